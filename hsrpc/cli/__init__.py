"""The command line: `hsrpc serve | generate | plan | convert | info`."""
