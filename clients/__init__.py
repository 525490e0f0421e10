"""Clients of the service in several languages, and the suite that all of them pass."""
