"""Features passed on from layer to layer by known weights, some with a layer skipped, and from the word before."""

import numpy as np

from saejax.ground_truth.circuits.cases.case import Case, drawn
from saejax.ground_truth.circuits.handset import START, Directions, HandSet, Head, Layer, Neuron, run
from saejax.tasks.behaviours import Prompt

_WORDS, _WIDTH, _DEPTH, _ANSWERS = 16, 12, 4, 4


def chain(count: int, rng: np.random.Generator) -> Case:
    """The case.

    Args:
      count: prompts of each behaviour and split.
      rng: draws the weights and the prompts.
    """
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

    return Case(model, tuple(drawn(count, draw)), None, {}, {}, (), texts)
