"""Measurements: load through gRPC, and what is made of it."""
