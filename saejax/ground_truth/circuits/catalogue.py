"""The transformers that are set by hand, their prompts, and which of their neurons stand for which variable.

chain       features passed on from layer to layer by known weights, some with a layer skipped, and from the word before
induction   the word that came after this one before: a head finds it, and a neuron of the layer above says which it is
pattern     whether the last three words are a, b and c, compiled by Tracr
logic       a function of two of sixteen bits, which the last word asks for; other pairs are worked out for nothing
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from saejax.ground_truth.circuits.handset import START, Directions, HandSet, Head, Layer, Neuron, run
from saejax.ground_truth.circuits.tracr import pattern
from saejax.tasks.behaviours import Prompt

_LETTERS, _BACK, _SEQUENCE = "abcdefgh", 6, 6
_WANTED = ("a", "b", "c")
_BITS, _ASKED = 16, dict(xor=(0, 1), both=(2, 3), either=(4, 5))
_TRUTH: Mapping[str, Callable[[int, int], int]] = {"xor": int.__xor__, "both": int.__and__, "either": int.__or__}
_GUESS = 0.5  # how much an answer that is not known counts, beside 8
_WORDS, _WIDTH, _DEPTH, _ANSWERS = 16, 12, 4, 4
_MARGIN = 0.125  # by which a neuron's input must exceed what one thing less would give: rounding makes none fire
_FULL = 1 / (1 - _MARGIN)  # what it writes, so that one is written where it fires


@dataclasses.dataclass(frozen=True)
class Case:
    """A transformer that is set by hand, and what is known of it.

    Attributes:
      model: its description.
      prompts: of all behaviours and both splits.
      layer: whose neurons the causal tests change; None: none is tested, only edges are known.
      causes: behaviour -> the neurons of that layer that its answer goes through.
      idle: variable -> the neurons of that layer that stand for it; no answer goes through them.
      labels: what probes should read off that layer's neurons.
      texts: so many random texts, by a seed, from which dictionaries learn.
    """

    model: HandSet
    prompts: tuple[Prompt, ...]
    layer: int | None
    causes: Mapping[str, tuple[int, ...]]
    idle: Mapping[str, tuple[int, ...]]
    labels: tuple[str, ...]
    texts: Callable[[int, int], list[str]]


def make_case(name: str, count: int, seed: int) -> Case:
    """A transformer of the catalogue.

    Args:
      name: one of ``CASES``.
      count: prompts of each behaviour and split.
      seed: of the prompts, and of the weights of the chain.
    """
    return CASES[name](count, np.random.default_rng([seed, *name.encode()]))


def _places(layer: Layer, start: str) -> tuple[int, ...]:
    """Of the neurons whose names begin so."""
    return tuple(place for place, neuron in enumerate(layer.neurons) if neuron.name.startswith(start))


def _drawn(count: int, draw: Callable[[str], Prompt]) -> list[Prompt]:
    """So many prompts of each split, no text twice."""
    found: dict[str, Prompt] = {}
    for split in ("train", "test"):
        wanted = len(found) + count
        while len(found) < wanted:
            prompt = draw(split)
            found.setdefault(prompt.text, prompt)
    return list(found.values())


# logic


def _logic(count: int, rng: np.random.Generator) -> Case:
    model = _logic_model()
    prompts = [prompt for name in _ASKED for prompt in _drawn(count, functools.partial(_logic_prompt, rng, name))]
    causes = {name: _places(model.layers[1], f"bits {first} ") for name, (first, _) in _ASKED.items()}
    idle = {"xor of bits 8 and 9": _places(model.layers[1], "bits 8 ")}
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
    return Neuron(name, dict.fromkeys(reads, 1.0), {writes: _FULL}, -1 - _MARGIN)


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


# induction


def _induction(count: int, rng: np.random.Generator) -> Case:
    length = _SEQUENCE + 2
    back = tuple(
        Head(
            tuple((f"at {place}", f"at {place - far}") for place in range(far + 1, length)),
            tuple((f"is {letter}", f"{far} back is {letter}") for letter in _LETTERS),
        )
        for far in range(1, _BACK + 1)
    )
    named = tuple(
        Neuron(f"is {letter}", {f"is {letter}": 1.0}, {f"named {letter}": _FULL}, -_MARGIN) for letter in _LETTERS
    )
    find = Head(
        tuple((f"is {letter}", f"1 back is {letter}") for letter in _LETTERS),
        tuple((f"named {letter}", f"found {letter}") for letter in _LETTERS),
    )
    found = tuple(
        Neuron(f"found {letter}", {f"found {letter}": 1.0}, {f"next {letter}": _FULL}, -_MARGIN) for letter in _LETTERS
    )
    seen = tuple(
        Neuron(f"{far} back is {letter}", {f"{far} back is {letter}": 1.0}, {f"seen {far} {letter}": _FULL}, -_MARGIN)
        for far in range(1, _BACK + 1)
        for letter in _LETTERS
    )
    words: dict[str, Directions] = {START: {START: 1.0}, **{letter: {f"is {letter}": 1.0} for letter in _LETTERS}}
    model = HandSet(
        words,
        tuple({f"at {place}": 1.0} for place in range(length)),
        (Layer(back, named), Layer((find,), found + seen)),
        {letter: {f"next {letter}": 8.0} for letter in _LETTERS},
    )

    def draw(split: str) -> Prompt:
        letters = rng.permutation(list(_LETTERS))[:_SEQUENCE].tolist()
        asked = int(rng.integers(_SEQUENCE - 1))
        other = int(rng.choice([place for place in range(_SEQUENCE) if place not in (asked, asked + 1)]))
        swapped = list(letters)
        swapped[asked + 1], swapped[other] = letters[other], letters[asked + 1]
        right, wrong = f" {letters[asked + 1]}", f" {letters[other]}"
        text, turned = (" ".join([*one, letters[asked]]) for one in (letters, swapped))
        return Prompt("induction", split, text, right, wrong, turned, wrong)

    def texts(number: int, seed: int) -> list[str]:
        own = np.random.default_rng(seed)
        drawn = [own.permutation(list(_LETTERS))[:_SEQUENCE].tolist() for _ in range(number)]
        return [" ".join([*letters, str(own.choice(letters[:-1]))]) for letters in drawn]

    layer = model.layers[1]
    causes = dict(induction=_places(layer, "found"))
    idle = {"the word two back": _places(layer, "2 back")}
    return Case(model, tuple(_drawn(count, draw)), 1, causes, idle, ("answer",), texts)


# chain


def _chain(count: int, rng: np.random.Generator) -> Case:
    signals = [f"signal {number}" for number in range(_WIDTH // 2)]
    before = Head((("at 2", "at 1"),), tuple((signal, f"{signal} before") for signal in signals))
    known, layers = [*signals, *(f"{signal} before" for signal in signals)], []
    for layer in range(_DEPTH):
        neurons = []
        for number in range(_WIDTH):
            recent = rng.choice(known[-_WIDTH:], 2, replace=False).tolist()
            older = rng.choice(known[:-_WIDTH] or known, 1).tolist()
            reads = {name: float(rng.uniform(0.5, 1.5) * rng.choice([1, 1, -1])) for name in (*recent, *older)}
            writes = {f"layer {layer} unit {number}": float(rng.uniform(0.5, 1.5))}
            neurons.append(Neuron(f"unit {number}", reads, writes, float(rng.uniform(0.2, 0.6))))
        layers.append(Layer((before,) if not layer else (), tuple(neurons)))
        known += [f"layer {layer} unit {number}" for number in range(_WIDTH)]
    answers = [f"answer{number}" for number in range(_ANSWERS)]
    logits = {
        word: {str(name): float(rng.uniform(-1.5, 1.5)) for name in rng.choice(known[-_WIDTH:], 3, replace=False)}
        for word in answers
    }
    contents = [f"word{number}" for number in range(_WORDS)]
    words: dict[str, Directions] = {START: {START: 1.0}}
    words |= {word: {signal: float(rng.uniform(0, 1)) for signal in signals} for word in contents}
    model = HandSet(
        words | {word: {} for word in answers}, tuple({f"at {place}": 1.0} for place in range(3)), tuple(layers), logits
    )

    def draw(split: str) -> Prompt:
        text = " ".join(rng.choice(contents, 2).tolist())
        logits_V = run(model, text).logits_V[-_ANSWERS:]
        best, worst = int(logits_V.argmax()), int(logits_V.argmin())
        return Prompt("chain", split, text, f" {answers[best]}", f" {answers[worst]}")

    def texts(number: int, seed: int) -> list[str]:
        return [" ".join(pair) for pair in np.random.default_rng(seed).choice(contents, (number, 2)).tolist()]

    return Case(model, tuple(_drawn(count, draw)), None, {}, {}, (), texts)


# pattern


def _pattern(count: int, rng: np.random.Generator) -> Case:
    def draw(split: str) -> Prompt:
        letters = rng.choice(list(_LETTERS[:4]), rng.integers(4, _SEQUENCE + 1)).tolist()
        letters[-3:] = _WANTED
        if right := rng.random() < 0.5:
            text = " ".join(letters)
        place = int(rng.integers(1, 4))
        letters[-place] = str(rng.choice([letter for letter in _LETTERS[:4] if letter != _WANTED[-place]]))
        other = " ".join(letters)
        if not right:
            text, other = other, " ".join([*letters[:-3], *_WANTED])
        correct, wrong = (" yes", " no") if right else (" no", " yes")
        return Prompt("pattern", split, text, correct, wrong, other, wrong)

    def texts(number: int, seed: int) -> list[str]:
        own = np.random.default_rng(seed)
        return [" ".join(own.choice(list(_LETTERS[:4]), own.integers(3, _SEQUENCE + 1))) for _ in range(number)]

    model = pattern(_LETTERS[:4], "".join(_WANTED), _SEQUENCE)
    return Case(model, tuple(_drawn(count, draw)), None, {}, {}, (), texts)


CASES: Mapping[str, Callable[[int, np.random.Generator], Case]] = dict(
    chain=_chain, induction=_induction, logic=_logic, pattern=_pattern
)
