"""The checker of shapes itself, on a module made up for it."""

import numpy as np
import pytest
import shapes

SOURCE = '''
"""A module."""

from __future__ import annotations

def product(acts_BxF, rows_FxD, names_B=None):
    """With a docstring."""
    made_BxD = acts_BxF @ rows_FxD
    return made_BxD

def fixed(pair_Bx2):
    return pair_Bx2

def last(pre_xF, bias_F):
    return pre_xF + bias_F

def first(cache_SxRx):
    return cache_SxRx

def assigned(acts_BxF):
    low_BxF, high_B = acts_BxF, acts_BxF.max(axis=-1, keepdims=True)
    return high_B

def loop(acts_BxF, sizes):
    for size in sizes:
        part_CxF = acts_BxF[:size]
    return part_CxF

def bad_loop(acts_BxF, sizes):
    for size in sizes:
        part_CxF = acts_BxF[:, :size]
    return part_CxF

def pieces(acts_BxF):
    for size in (1, 2):
        part_BxF = acts_BxF[:size, :size]
        yield part_BxF

def outer(acts_BxF):
    def inner(row_F):
        acts_BxF = row_F[None]
        return acts_BxF
    return inner(acts_BxF[0, :2])

class Holder:
    total_F = None

    def add(self, acts_BxF):
        self.total_F = acts_BxF.sum(axis=0) if self.total_F is None else acts_BxF
'''


@pytest.fixture
def module():
    names = {"__name__": "made_up"}
    exec(shapes.rewritten(SOURCE, "made_up.py"), names)
    return names


def wrong(*words: str) -> object:
    return pytest.raises(AssertionError, match=".*".join(words))


def test_suffixes():
    for shape in ("BxTxD", "Bx2", "xF", "SxRx", "D", "2xBxT"):
        assert shapes.suffix(f"acts_{shape}") == shapes.suffix(f"_acts_{shape}") == shape
    assert not any(map(shapes.suffix, ("top_1", "_Z", "D", "MOST_TOKENS", "_Item", "x", "Q_STAR", "max_x")))
    assert shapes.letters("acts_BxTx3") == {"B", "T"}


def test_dimensions_and_letters(module):
    module["product"](np.ones((3, 4)), np.ones((4, 5)))
    with wrong("made_up.py:6 acts_BxF", "3 dimensions"):
        module["product"](np.ones((1, 3, 4)), np.ones((4, 5)))
    with wrong("rows_FxD", "F is 6, expected 4"):
        module["product"](np.ones((3, 4)), np.ones((6, 5)))
    with wrong("names_B list is no array"):
        module["product"](np.ones((3, 4)), np.ones((4, 5)), names_B=["a"])
    with wrong("made_up.py:21 high_B", "2 dimensions"):
        module["assigned"](np.ones((3, 4)))


def test_numbers_and_further_dimensions(module):
    module["fixed"](np.ones((3, 2)))
    with wrong("pair_Bx2"):
        module["fixed"](np.ones((3, 4)))
    for before in ((), (2,), (2, 3)):
        module["last"](np.ones((*before, 4)), np.ones(4))
        module["first"](np.ones((5, 6, *before)))
    with wrong("bias_F"):
        module["last"](np.ones((3, 4)), np.ones(5))
    with wrong("cache_SxRx"):
        module["first"](np.ones(5))


def test_scopes_and_fields(module):
    acts_BxF = np.ones((4, 3))
    module["loop"](acts_BxF, [3, 1])
    with wrong("made_up.py:31 part_CxF", "F is 2"):
        module["bad_loop"](acts_BxF, [2])
    assert len(list(module["pieces"](acts_BxF))) == 2
    module["outer"](acts_BxF)
    holder = module["Holder"]()
    holder.add(acts_BxF)
    with wrong("total_F"):
        holder.add(acts_BxF)
