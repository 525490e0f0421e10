"""What runs next, and in which order: requests, blocks, steps as plain data."""
