"""Circuits of behaviours: features that return over prompts, in groups, and what each group does, measured."""
