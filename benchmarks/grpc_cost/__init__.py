"""What streaming through gRPC costs."""
