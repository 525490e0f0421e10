"""Quantised checkpoints: what config.json says of their weights, and how the tensors of their files become codes."""
