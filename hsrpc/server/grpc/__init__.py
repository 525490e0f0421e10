"""The gRPC front end of the server."""
