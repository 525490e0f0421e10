"""Text as it comes: token ids to characters, and stop strings."""
