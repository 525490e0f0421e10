"""The engine's tasks: weights, cache, executor, text."""
