"""Transformers trained on algorithms with known variables: addition with carries, shortest paths."""
