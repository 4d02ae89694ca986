"""Tokenised rows to batches: their order, their share of ranks, padding, packing and streams."""
