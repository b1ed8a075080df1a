"""Causal interventions: edits of a model's features and sites, their effects, and the verdict drawn from them."""
