"""Formats in which weights lie and travel."""
