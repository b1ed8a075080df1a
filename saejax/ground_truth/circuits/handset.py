"""A transformer described by what its parts read and write, in named directions of the residual stream.

    embedding of a word or position      an amount of each of some directions
    head                                 attends to keys that match its query, and moves directions from there to here
    neuron                               relu(what it reads + bias), times what it writes
    logit of a word                      what it reads

There is nothing else, so every path from a word to a logit is known; ``edges`` computes what each path carries.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

START = "<s>"  # the first word of every text
_MATCH = 240.0  # score of a matching key: the softmax weights of all others are 0 in fp32

Directions = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Head:
    """An attention head. Where no key matches its query it attends to the first word and must move nothing from there.

    Attributes:
      looks: pairs of directions, of a query and of the keys that match it; "" is every query.
      moves: pairs of directions: read at the key's position and written at the query's.
    """

    looks: tuple[tuple[str, str], ...]
    moves: tuple[tuple[str, str], ...]

    @property
    def scores(self) -> tuple[tuple[str, str, float], ...]:
        """Scores added where the query has the first and the key the second direction."""
        # Half of a match: the first word wins where nothing matches, and only there.
        return (*((query, key, _MATCH) for query, key in self.looks), ("", START, _MATCH / 2))


@dataclasses.dataclass(frozen=True)
class Neuron:
    """A neuron: writes relu(bias + reads) of its directions."""

    name: str
    reads: Directions
    writes: Directions
    bias: float = 0.0


@dataclasses.dataclass(frozen=True)
class Layer:
    """Heads, which act in parallel, followed by neurons."""

    heads: tuple[Head, ...] = ()
    neurons: tuple[Neuron, ...] = ()


@dataclasses.dataclass(frozen=True)
class HandSet:
    """A transformer with weights set by hand.

    Attributes:
      words: word -> its embedding; the first is ``START``.
      positions: embedding of each position.
      layers: the layers in order.
      logits: word -> what its logit reads; the logits of other words are 0.
    """

    words: Mapping[str, Directions]
    positions: tuple[Directions, ...]
    layers: tuple[Layer, ...]
    logits: Mapping[str, Directions]

    @functools.cached_property
    def directions(self) -> tuple[str, ...]:
        """Names of all directions, in the order of their first use."""
        every: list[Iterable[str]] = [*self.words.values(), *self.positions, *self.logits.values()]
        for layer in self.layers:
            every += [dict.fromkeys(pair) for head in layer.heads for pair in (*head.looks, *head.moves)]
            every += [part for neuron in layer.neurons for part in (neuron.reads, neuron.writes)]
        return tuple(name for name in dict.fromkeys(name for part in every for name in part) if name)

    def vectors(self, parts: Sequence[Directions]) -> np.ndarray:
        """Return the coordinates of N parts in the named directions, float64 [N, J]."""
        place = {name: index for index, name in enumerate(self.directions)}
        found_NxJ = np.zeros((len(parts), len(place)))
        for row, part in enumerate(parts):
            for name, value in part.items():
                found_NxJ[row, place[name]] = value
        return found_NxJ

    @property
    def width(self) -> int:
        """Number of neurons of the widest layer."""
        return max(len(layer.neurons) for layer in self.layers)

    def ids(self, text: str) -> np.ndarray:
        """Return the ids of a text's words with ``START`` before them, [T]."""
        number = {word: index for index, word in enumerate(self.words)}
        return np.array([number[word] for word in (START, *text.split())])


@dataclasses.dataclass(frozen=True)
class HandSetRun:
    """A run on one text, in float64.

    Attributes:
      start_TxJ: the residual stream entering layer 0.
      moves: for each head of each layer its attention weights [T, S] and the map of moved directions [J, J].
      acts: activations of each layer's neurons, [T, F].
      logits_V: logits at the last position.
    """

    start_TxJ: np.ndarray
    moves: tuple[tuple[tuple[np.ndarray, np.ndarray], ...], ...]
    acts: tuple[np.ndarray, ...]
    logits_V: np.ndarray


def run(model: HandSet, text: str) -> HandSetRun:
    """Run a text through the description, in float64 and in named directions."""
    ids_T = model.ids(text)
    start_TxJ = stream_TxJ = (
        model.vectors(list(model.words.values()))[ids_T] + model.vectors(model.positions)[: len(ids_T)]
    )
    moves, acts = [], []
    for layer in model.layers:
        moves.append(tuple((_attention(model, head, stream_TxJ), _moved(model, head)) for head in layer.heads))
        stream_TxJ = stream_TxJ + sum(at_TxS @ stream_TxJ @ moved_JxJ for at_TxS, moved_JxJ in moves[-1])
        reads_FxJ, writes_FxJ = (
            model.vectors([getattr(neuron, part) for neuron in layer.neurons]) for part in ("reads", "writes")
        )
        bias_F = np.array([neuron.bias for neuron in layer.neurons])
        acts.append(np.maximum(stream_TxJ @ reads_FxJ.T + bias_F[None], 0))
        stream_TxJ = stream_TxJ + acts[-1] @ writes_FxJ
    logits_VxJ = model.vectors([model.logits.get(word, {}) for word in model.words])
    return HandSetRun(start_TxJ, tuple(moves), tuple(acts), logits_VxJ @ stream_TxJ[-1])


def _attention(model: HandSet, head: Head, stream_TxJ: np.ndarray) -> np.ndarray:
    """Return a head's attention weights, [T, S]."""
    scores = head.scores
    query_TxN = stream_TxJ @ model.vectors([{query: 1.0} if query else {} for query, _, _ in scores]).T
    query_TxN += np.array([not query for query, _, _ in scores])[None]
    key_SxN = stream_TxJ @ model.vectors([{key: score} for _, key, score in scores]).T
    score_TxS = np.where(np.tri(len(stream_TxJ), dtype=bool), query_TxN @ key_SxN.T, -np.inf)
    weight_TxS = np.exp(score_TxS - score_TxS.max(1, keepdims=True))
    return weight_TxS / weight_TxS.sum(1, keepdims=True)


def _moved(model: HandSet, head: Head) -> np.ndarray:
    """Return the map from directions read to directions written, [J, J]."""
    read_NxJ, written_NxJ = (model.vectors([{pair[side]: 1.0} for pair in head.moves]) for side in (0, 1))
    return read_NxJ.T @ written_NxJ
