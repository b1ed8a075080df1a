"""Transformers trained here on algorithms whose variables are known: addition with carries, shortest paths."""
