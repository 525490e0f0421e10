"""Generated from proto/hsrpc/v1 by tools/proto.sh: the messages and stubs of the service."""
