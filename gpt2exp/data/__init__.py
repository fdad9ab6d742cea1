"""Text to batches: sources, tokens on disk, windows."""
