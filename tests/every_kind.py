"""The kinds that tests go through: all of the package, and one of a user's file."""

from pathlib import Path

from saejax.dictionaries import kinds
from saejax.runner import plugins

MADE_UP, PLUGIN = "shrunk", Path(__file__).parent / "shrunk_kind.py"
OWN_KINDS = tuple(kinds.KINDS)
plugins.load([PLUGIN])
KINDS = (*OWN_KINDS, MADE_UP)
