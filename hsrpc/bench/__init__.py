"""Measurements of the engine against the limit of the machine, on random weights of a named shape."""
