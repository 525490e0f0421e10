"""The command line: `hsrpc serve | generate | chat | plan | convert | info | bench | top`."""
