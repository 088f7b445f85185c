"""What the steps stand on: the store, the source checkpoint, the decoder's blocks, tracking."""
