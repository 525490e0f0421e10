"""What computes an engine's steps: one GPU in this process, or several in processes of their own."""
