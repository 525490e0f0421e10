"""Models as tensors: what a checkpoint holds and how a layer computes. Uses torch, knows no event loop."""
