"""The walk: once through the decoder blocks, every artifact from the same pass."""
