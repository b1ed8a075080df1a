"""Transformers whose weights are set by hand, so that their circuits are known, and how well the method finds these."""
