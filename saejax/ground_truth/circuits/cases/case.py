"""What is known of a transformer that is set by hand."""

import dataclasses
from collections.abc import Callable, Mapping

from saejax.ground_truth.circuits.handset import HandSet, Layer
from saejax.tasks.behaviours import Prompt

LETTERS, SEQUENCE = "abcdefgh", 6  # of induction and of patterns
MARGIN = 0.125  # by which a neuron's input must exceed what one thing less would give: rounding makes none fire
FULL = 1 / (1 - MARGIN)  # what it writes, so that one is written where it fires


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


def places(layer: Layer, start: str) -> tuple[int, ...]:
    """Of the neurons whose names begin so."""
    return tuple(place for place, neuron in enumerate(layer.neurons) if neuron.name.startswith(start))


def drawn(count: int, draw: Callable[[str], Prompt]) -> list[Prompt]:
    """So many prompts of each split, no text twice."""
    found: dict[str, Prompt] = {}
    for split in ("train", "test"):
        wanted = len(found) + count
        while len(found) < wanted:
            prompt = draw(split)
            found.setdefault(prompt.text, prompt)
    return list(found.values())
