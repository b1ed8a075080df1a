"""A function of two of sixteen bits, which the last word asks for; other pairs are worked out for nothing."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from saejax.ground_truth.circuits.cases.case import FULL, MARGIN, Case, drawn, places
from saejax.ground_truth.circuits.handset import START, Directions, HandSet, Head, Layer, Neuron
from saejax.tasks.behaviours import Prompt

_BITS, _ASKED = 16, dict(xor=(0, 1), both=(2, 3), either=(4, 5))
_TRUTH: Mapping[str, Callable[[int, int], int]] = {"xor": int.__xor__, "both": int.__and__, "either": int.__or__}
_GUESS = 0.5  # how much an answer that is not known counts, beside 8


def logic(count: int, rng: np.random.Generator) -> Case:
    """The case.

    Args:
      count: prompts of each behaviour and split.
      rng: draws the prompts.
    """
    model = _logic_model()
    prompts = [prompt for name in _ASKED for prompt in drawn(count, functools.partial(_logic_prompt, rng, name))]
    causes = {name: places(model.layers[1], f"bits {first} ") for name, (first, _) in _ASKED.items()}
    idle = {"xor of bits 8 and 9": places(model.layers[1], "bits 8 ")}
    labels = ("xor_0", "both_2", "either_4", "xor_8")

    def texts(number: int, seed: int) -> list[str]:
        own = np.random.default_rng(seed)
        return [_logic_text(own.integers(2, size=_BITS), str(own.choice(list(_ASKED)))) for _ in range(number)]

    return Case(model, tuple(prompts), 1, causes, idle, labels, texts)


def _logic_model() -> HandSet:
    """Heads fetch each bit; a layer knows the bits, the next pairs of them, the last the answers."""
    words: dict[str, Directions] = {START: {START: 1.0}, "0": {"bit 0": 1.0}, "1": {"bit 1": 1.0}}
    words |= {name: {"asked": 1.0, f"asks {name}": 1.0} for name in _ASKED}
    # Without the variable the last bit, which has nothing to do with the question, decides: no tie is left to rounding.
    logits: dict[str, Directions] = {
        word: {f"{name} is {answer}": 8.0 for name in _ASKED} | {f"known {_BITS - 1} is {answer}": _GUESS}
        for answer, word in enumerate(("no", "yes"))
    }
    fetch = tuple(
        Head((("", f"at {place + 1}"),), tuple((f"bit {value}", f"bit {place} is {value}") for value in (0, 1)))
        for place in range(_BITS)
    )
    known = tuple(
        _both(f"bit {place} is {value}", [f"bit {place} is {value}", "asked"], f"known {place} is {value}")
        for place in range(_BITS)
        for value in (0, 1)
    )
    pairs = tuple(
        _both(
            f"bits {first} {first + 1} are {u} {v}",
            [f"known {first} is {u}", f"known {first + 1} is {v}"],
            f"pair {first} is {u} {v}",
        )
        for first in range(0, _BITS, 2)
        for u, v in itertools.product((0, 1), repeat=2)
    )
    answers = tuple(
        _both(
            f"{name} is {answer}",
            [*(f"pair {first} is {u} {v}" for u, v in _values(name, answer)), f"asks {name}"],
            f"{name} is {answer}",
        )
        for name, (first, _) in _ASKED.items()
        for answer in (0, 1)
    )
    return HandSet(
        words | {word: {} for word in logits},
        tuple({f"at {place}": 1.0} for place in range(_BITS + 2)),
        (Layer(fetch, known), Layer((), pairs), Layer((), answers)),
        logits,
    )


def _both(name: str, reads: Sequence[str], writes: str) -> Neuron:
    """A neuron that fires where two of what it reads are there."""
    return Neuron(name, dict.fromkeys(reads, 1.0), {writes: FULL}, -1 - MARGIN)


def _values(name: str, answer: int) -> list[tuple[int, int]]:
    """The two bits for which a question has this answer."""
    return [(u, v) for u in (0, 1) for v in (0, 1) if _TRUTH[name](u, v) == answer]


def _logic_text(bits_N: np.ndarray, name: str) -> str:
    return " ".join([*map(str, bits_N.tolist()), name])


def _logic_prompt(rng: np.random.Generator, name: str, split: str) -> Prompt:
    """A question with either answer equally often, beside one that differs in the two bits that it asks for."""
    wanted, own = int(rng.integers(2)), list(_ASKED[name])
    bits_N = rng.integers(2, size=_BITS)
    bits_N[own] = rng.choice(_values(name, wanted))
    others_N = bits_N.copy()
    others_N[own] = rng.choice(_values(name, 1 - wanted))
    labels = {
        f"{other}_{place}": str(_TRUTH[other](*bits_N[[place, place + 1]].tolist()))
        for other, (place, _) in _ASKED.items()
    }
    labels["xor_8"] = str(int(bits_N[8] ^ bits_N[9]))
    right, wrong = ((" no", " yes"), (" yes", " no"))[wanted]
    text, other = (_logic_text(some_N, name) for some_N in (bits_N, others_N))
    return Prompt(name, split, text, right, wrong, other, wrong, labels=tuple(labels.items()))
