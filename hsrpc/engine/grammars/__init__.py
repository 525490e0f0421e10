"""Constraints of outputs: compiled, followed token by token, and turned into masks, by llguidance."""
