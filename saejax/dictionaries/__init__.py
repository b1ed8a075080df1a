"""Sparse dictionaries: modules, sparsity functions, losses, edits of features, file formats."""

from saejax.dictionaries.check import check_dictionary
from saejax.dictionaries.formats import SAE, load_dictionary, load_transcoders, save_dictionary, save_transcoders
from saejax.dictionaries.modules import Dictionary, DictionaryConfig

__all__ = [
    "SAE",
    "Dictionary",
    "DictionaryConfig",
    "check_dictionary",
    "load_dictionary",
    "load_transcoders",
    "save_dictionary",
    "save_transcoders",
]
