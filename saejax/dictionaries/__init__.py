"""Sparse dictionaries: modules, sparsity functions, losses, edits of features, file formats."""

from saejax.dictionaries.formats import load_dictionary, save_dictionary
from saejax.dictionaries.modules import Dictionary, DictionaryConfig

__all__ = ["Dictionary", "DictionaryConfig", "load_dictionary", "save_dictionary"]
