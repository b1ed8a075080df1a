"""The stages as functions for notebooks: arrays and objects in, arrays and small dataclasses out, no workdir.

They run what the stages run, with the same settings by the same names (``saejax.settings``), on what is in memory.
"""
