"""The transformers with weights set by hand: their descriptions, prompts, and which neurons represent which variable.

induction   the word that followed this one before: a head finds it, and a neuron of the layer above names it
logic       a function of two of sixteen bits, which the last word asks for; other pairs are computed for nothing
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from saejax.ground_truth.circuits.handset import START, Directions, HandSet, Head, Layer, Neuron
from saejax.tasks.behaviours import Prompt

LETTERS, SEQUENCE = "abcdefgh", 6  # of induction
MARGIN = 0.125  # of a neuron's input above the next smaller one, so that rounding makes no neuron fire
FULL = 1 / (1 - MARGIN)  # what a neuron writes: 1 where it fires


@dataclasses.dataclass(frozen=True)
class Case:
    """A transformer with weights set by hand, and its ground truth."""

    model: HandSet  #: its description
    prompts: tuple[Prompt, ...]  #: prompts of all behaviours and both splits
    layer: int  #: the layer whose neurons the causal tests edit
    causes: Mapping[str, tuple[int, ...]]  #: behaviour -> the neurons of the layer that its answer depends on
    #: variable -> the neurons of the layer that represent it; no answer depends on them.
    idle: Mapping[str, tuple[int, ...]]
    texts: Callable[[int, int], list[str]]  #: (count, seed) -> random texts to train dictionaries on


def select_neurons(layer: Layer, prefix: str) -> tuple[int, ...]:
    """Return the indices of the neurons whose names start with a prefix."""
    return tuple(index for index, neuron in enumerate(layer.neurons) if neuron.name.startswith(prefix))


def draw_prompts(count: int, draw: Callable[[str], Prompt]) -> list[Prompt]:
    """Return ``count`` prompts of each split, no text twice."""
    by_text: dict[str, Prompt] = {}
    for split in ("train", "test"):
        wanted = len(by_text) + count
        while len(by_text) < wanted:
            prompt = draw(split)
            by_text.setdefault(prompt.text, prompt)
    return list(by_text.values())


_BACK = 6  # words


def induction(count: int, rng: np.random.Generator) -> Case:
    """Return the case of the word that followed the last word before."""
    model = _induction_model()

    def draw(split: str) -> Prompt:
        letters = rng.permutation(list(LETTERS))[:SEQUENCE].tolist()
        query = int(rng.integers(SEQUENCE - 1))
        # Not the query's own successor, and not the query: the swap would change what is asked.
        wrong_place = int(rng.choice([place for place in range(SEQUENCE) if place not in (query, query + 1)]))
        swapped = list(letters)
        swapped[query + 1], swapped[wrong_place] = letters[wrong_place], letters[query + 1]
        right, wrong = f" {letters[query + 1]}", f" {letters[wrong_place]}"
        text, turned = (" ".join([*sequence, letters[query]]) for sequence in (letters, swapped))
        return Prompt("induction", split, text, right, wrong, turned, wrong)

    def texts(number: int, seed: int) -> list[str]:
        text_rng = np.random.default_rng(seed)
        orders = [text_rng.permutation(list(LETTERS))[:SEQUENCE].tolist() for _ in range(number)]
        return [" ".join([*letters, str(text_rng.choice(letters[:-1]))]) for letters in orders]

    layer = model.layers[1]
    causes = dict(induction=select_neurons(layer, "found"))
    idle = {"the word two back": select_neurons(layer, "2 back")}
    return Case(model, tuple(draw_prompts(count, draw)), 1, causes, idle, texts)


def _induction_model() -> HandSet:
    """Return the model: heads fetch the words before, and a head of the next layer finds the queried one among them."""
    length = SEQUENCE + 2
    back = tuple(
        Head(
            tuple((f"at {place}", f"at {place - far}") for place in range(far + 1, length)),
            tuple((f"is {letter}", f"{far} back is {letter}") for letter in LETTERS),
        )
        for far in range(1, _BACK + 1)
    )
    named = tuple(
        Neuron(f"is {letter}", {f"is {letter}": 1.0}, {f"named {letter}": FULL}, -MARGIN) for letter in LETTERS
    )
    find = Head(
        tuple((f"is {letter}", f"1 back is {letter}") for letter in LETTERS),
        tuple((f"named {letter}", f"found {letter}") for letter in LETTERS),
    )
    matches = tuple(
        Neuron(f"found {letter}", {f"found {letter}": 1.0}, {f"next {letter}": FULL}, -MARGIN) for letter in LETTERS
    )
    seen = tuple(
        Neuron(f"{far} back is {letter}", {f"{far} back is {letter}": 1.0}, {f"seen {far} {letter}": FULL}, -MARGIN)
        for far in range(1, _BACK + 1)
        for letter in LETTERS
    )
    words: dict[str, Directions] = {START: {START: 1.0}, **{letter: {f"is {letter}": 1.0} for letter in LETTERS}}
    return HandSet(
        words,
        tuple({f"at {place}": 1.0} for place in range(length)),
        (Layer(back, named), Layer((find,), matches + seen)),
        {letter: {f"next {letter}": 8.0} for letter in LETTERS},
    )


_BITS, _ASKED = 16, dict(xor=(0, 1), both=(2, 3), either=(4, 5))
_TRUTH: Mapping[str, Callable[[int, int], int]] = {"xor": int.__xor__, "both": int.__and__, "either": int.__or__}
_GUESS = 0.5  # weight of the unrelated bit; a known answer has 8


def logic(count: int, rng: np.random.Generator) -> Case:
    """Return the case of logical functions of two of sixteen bits."""
    model = _logic_model()
    prompts = [prompt for name in _ASKED for prompt in draw_prompts(count, functools.partial(_logic_prompt, rng, name))]
    causes = {name: select_neurons(model.layers[1], f"bits {first} ") for name, (first, _) in _ASKED.items()}
    idle = {"xor of bits 8 and 9": select_neurons(model.layers[1], "bits 8 ")}

    def texts(number: int, seed: int) -> list[str]:
        text_rng = np.random.default_rng(seed)
        return [
            _logic_text(text_rng.integers(2, size=_BITS), str(text_rng.choice(list(_ASKED)))) for _ in range(number)
        ]

    return Case(model, tuple(prompts), 1, causes, idle, texts)


def _logic_model() -> HandSet:
    """Return the model: heads fetch each bit; the layers' neurons are bits, then pairs of bits, then answers."""
    words: dict[str, Directions] = {START: {START: 1.0}, "0": {"bit 0": 1.0}, "1": {"bit 1": 1.0}}
    words |= {name: {"asked": 1.0, f"asks {name}": 1.0} for name in _ASKED}
    # Without the variable the last bit, unrelated to the question, decides: no tie is left to rounding.
    logits: dict[str, Directions] = {
        word: {f"{name} is {answer}": 8.0 for name in _ASKED} | {f"known {_BITS - 1} is {answer}": _GUESS}
        for answer, word in enumerate(("no", "yes"))
    }
    fetch = tuple(
        Head((("", f"at {place + 1}"),), tuple((f"bit {value}", f"bit {place} is {value}") for value in (0, 1)))
        for place in range(_BITS)
    )
    bits = tuple(
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
        (Layer(fetch, bits), Layer((), pairs), Layer((), answers)),
        logits,
    )


def _both(name: str, reads: Sequence[str], writes: str) -> Neuron:
    """Return a neuron that fires where two of the directions it reads are present."""
    return Neuron(name, dict.fromkeys(reads, 1.0), {writes: FULL}, -1 - MARGIN)


def _values(name: str, answer: int) -> list[tuple[int, int]]:
    """Return the values of the two bits for which a question has this answer."""
    return [(u, v) for u in (0, 1) for v in (0, 1) if _TRUTH[name](u, v) == answer]


def _logic_text(bits_N: np.ndarray, name: str) -> str:
    return " ".join([*map(str, bits_N.tolist()), name])


def _logic_prompt(rng: np.random.Generator, name: str, split: str) -> Prompt:
    """Return a question, either answer equally likely, with a counterpart that differs in the two bits it asks for."""
    answer, places = int(rng.integers(2)), list(_ASKED[name])
    bits_N = rng.integers(2, size=_BITS)
    bits_N[places] = rng.choice(_values(name, answer))
    counterpart_N = bits_N.copy()
    counterpart_N[places] = rng.choice(_values(name, 1 - answer))
    labels = {
        f"{question}_{place}": str(_TRUTH[question](*bits_N[[place, place + 1]].tolist()))
        for question, (place, _) in _ASKED.items()
    }
    labels["xor_8"] = str(int(bits_N[8] ^ bits_N[9]))
    right, wrong = ((" no", " yes"), (" yes", " no"))[answer]
    text, counterpart = (_logic_text(some_N, name) for some_N in (bits_N, counterpart_N))
    return Prompt(name, split, text, right, wrong, counterpart, wrong, labels=tuple(labels.items()))


CASES: Mapping[str, Callable[[int, np.random.Generator], Case]] = dict(induction=induction, logic=logic)


def make_case(name: str, count: int, seed: int) -> Case:
    """Return a transformer of ``CASES``.

    Args:
      name: name of the case.
      count: prompts of each behaviour and split.
      seed: seed of the prompts.
    """
    return CASES[name](count, np.random.default_rng([seed, *name.encode()]))
