"""What the OpenAI port costs beside gRPC."""
