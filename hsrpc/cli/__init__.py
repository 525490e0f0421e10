"""The command line: `hsrpc serve | generate | chat | batch | plan | convert | info | bench | top`."""
