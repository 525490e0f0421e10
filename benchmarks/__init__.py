"""Measurements that are not installed with hsrpc."""
