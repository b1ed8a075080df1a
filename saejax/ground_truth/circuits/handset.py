"""A transformer described by what its parts read and write, in named directions of the residual stream.

    embedding of a word or position      an amount of each of some directions
    head                                 attends to keys that match its query, and moves directions from there to here
    neuron                               relu(what it reads + bias), times what it writes
    logit of a word                      what it reads

There is nothing else, so every path from a word to a logit is known; ``edges`` computes what each path carries.

Its checkpoint has GPT-2's architecture with ReLU, and layer norms without effect. Named directions become random
orthonormal vectors whose entries sum to 0, so that no single dimension of the stream has a meaning, and subtracting the
mean, as a layer norm does, has no effect. Dividing by the standard deviation is undone: with an epsilon of 2^32 and a
gain of 2^16 the factor is 1 to the last bit of fp32.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

START = "<s>"  # the first word of every text
_EPSILON, _GAIN = 2.0**32, 2.0**16
SILENT = -1.0  # bias of neurons that pad a layer
_MATCH = 240.0  # score of a matching key: the softmax weights of all others are 0 in fp32

Directions = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Head:
    """An attention head; without a key that matches its query it attends to the first word, and must move nothing."""

    #: pairs of directions, of a query and of the keys that match it; "" is every query.
    looks: tuple[tuple[str, str], ...]
    moves: tuple[tuple[str, str], ...]  #: pairs of directions: read at the key's position and written at the query's

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
    """A transformer with weights set by hand."""

    words: Mapping[str, Directions]  #: word -> its embedding; the first is ``START``
    positions: tuple[Directions, ...]  #: embedding of each position
    layers: tuple[Layer, ...]  #: the layers in order
    logits: Mapping[str, Directions]  #: word -> what its logit reads; the logits of other words are 0

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
    """A run on one text, in float64."""

    start_TxJ: np.ndarray  #: the residual stream entering layer 0
    #: for each head of each layer its attention weights [T, S] and the map of moved directions [J, J].
    moves: tuple[tuple[tuple[np.ndarray, np.ndarray], ...], ...]
    acts: tuple[np.ndarray, ...]  #: activations of each layer's neurons, [T, F]
    logits_V: np.ndarray  #: logits at the last position


def run(model: HandSet, text: str) -> HandSetRun:
    """Run a text through the description, in float64 and in named directions."""
    ids_T = model.ids(text)
    start_TxJ = stream_TxJ = (
        model.vectors(list(model.words.values()))[ids_T] + model.vectors(model.positions)[: len(ids_T)]
    )
    moves, acts = [], []
    for layer in model.layers:
        moves.append(tuple(_attend(model, head, stream_TxJ) for head in layer.heads))
        stream_TxJ = stream_TxJ + sum(at_TxS @ stream_TxJ @ moved_JxJ for at_TxS, moved_JxJ in moves[-1])
        reads_FxJ, writes_FxJ = (
            model.vectors([getattr(neuron, part) for neuron in layer.neurons]) for part in ("reads", "writes")
        )
        bias_F = np.array([neuron.bias for neuron in layer.neurons])
        acts.append(np.maximum(stream_TxJ @ reads_FxJ.T + bias_F[None], 0))
        stream_TxJ = stream_TxJ + acts[-1] @ writes_FxJ
    logits_VxJ = model.vectors([model.logits.get(word, {}) for word in model.words])
    return HandSetRun(start_TxJ, tuple(moves), tuple(acts), logits_VxJ @ stream_TxJ[-1])


def _attend(model: HandSet, head: Head, stream_TxJ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a head's attention weights [T, S], and the map from directions read to directions written, [J, J]."""
    scores = head.scores
    query_TxN = stream_TxJ @ model.vectors([{query: 1.0} if query else {} for query, _, _ in scores]).T
    query_TxN += np.array([not query for query, _, _ in scores])[None]
    key_SxN = stream_TxJ @ model.vectors([{key: score} for _, key, score in scores]).T
    score_TxS = np.where(np.tri(len(stream_TxJ), dtype=bool), query_TxN @ key_SxN.T, -np.inf)
    weight_TxS = np.exp(score_TxS - score_TxS.max(1, keepdims=True))
    read_MxJ, written_MxJ = (model.vectors([{pair[side]: 1.0} for pair in head.moves]) for side in (0, 1))
    return weight_TxS / weight_TxS.sum(1, keepdims=True), read_MxJ.T @ written_MxJ


def frame(model: HandSet, seed: int) -> np.ndarray:
    """Return the vector of each named direction, float64 [J, D]."""
    width = _shape(model)[2]
    rng = np.random.default_rng(seed)
    # The constant vector comes first: all others are orthogonal to it, so that their entries sum to 0.
    drawn_DxD = np.concatenate([np.ones((width, 1)), rng.normal(size=(width, width - 1))], axis=1)
    return np.linalg.qr(drawn_DxD)[0].T[1 : 1 + len(model.directions)]


def _shape(model: HandSet) -> tuple[int, int, int]:
    """Return the number of heads of a layer, the width of each, and the width of the stream."""
    heads = [head for layer in model.layers for head in layer.heads]
    count = max(max(len(layer.heads) for layer in model.layers), 1)
    least = max((max(len(head.scores), len(head.moves)) for head in heads), default=1)
    # One dimension more than directions, for the constant vector, which none of them is.
    d_head = max(least, math.ceil((len(model.directions) + 1) / count))
    return count, d_head, count * d_head


def neuron_arrays(model: HandSet, layer: int, frame_JxD: np.ndarray) -> dict[str, np.ndarray]:
    """Return a layer's neurons in a frame, under the names of a dictionary's arrays; F is ``model.width``."""
    neurons = model.layers[layer].neurons
    silent = model.width - len(neurons)
    reads_FxJ = model.vectors([*(neuron.reads for neuron in neurons), *[{}] * silent])
    writes_FxJ = model.vectors([*(neuron.writes for neuron in neurons), *[{}] * silent])
    return dict(
        W_enc_DxF=(reads_FxJ @ frame_JxD).T,
        b_enc_F=np.array([*(neuron.bias for neuron in neurons), *[SILENT] * silent]),
        W_dec_FxD=writes_FxJ @ frame_JxD,
        b_dec_D=np.zeros(frame_JxD.shape[1]),
    )


def checkpoint(model: HandSet, seed: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the fields of ``config.json`` and the tensors of GPT-2's checkpoint, float64."""
    frame_JxD = frame(model, seed)
    count, _, width = _shape(model)
    # The gain is the root of the epsilon that the norm divides by, so that a norm changes nothing.
    norm = dict(weight=np.full(width, _GAIN), bias=np.zeros(width))
    tensors = {f"transformer.ln_f.{name}": value for name, value in norm.items()}
    tensors["transformer.wte.weight"] = model.vectors(list(model.words.values())) @ frame_JxD
    tensors["transformer.wpe.weight"] = model.vectors(model.positions) @ frame_JxD
    tensors["lm_head.weight"] = model.vectors([model.logits.get(word, {}) for word in model.words]) @ frame_JxD
    for layer in range(len(model.layers)):
        arrays = neuron_arrays(model, layer, frame_JxD)
        parts = {f"{name}.{part}": value for name in ("ln_1", "ln_2") for part, value in norm.items()}
        parts |= _attention_tensors(model, layer, frame_JxD)
        parts |= {"mlp.c_fc.weight": arrays["W_enc_DxF"], "mlp.c_fc.bias": arrays["b_enc_F"]}
        parts |= {"mlp.c_proj.weight": arrays["W_dec_FxD"], "mlp.c_proj.bias": arrays["b_dec_D"]}
        tensors |= {f"transformer.h.{layer}.{name}": value for name, value in parts.items()}
    fields = dict(
        model_type="gpt2",
        architectures=["GPT2LMHeadModel"],
        n_layer=len(model.layers),
        n_head=count,
        n_embd=width,
        n_inner=model.width,
        n_positions=len(model.positions),
        activation_function="relu",
        layer_norm_epsilon=_EPSILON,
        tie_word_embeddings=False,
    )
    return fields, tensors


def _attention_tensors(model: HandSet, layer: int, frame_JxD: np.ndarray) -> dict[str, np.ndarray]:
    """Return GPT-2's tensors of a layer's attention; unused heads move nothing."""
    count, d_head, width = _shape(model)
    weight_DxSxHxK, bias_SxHxK = np.zeros((width, 3, count, d_head)), np.zeros((3, count, d_head))
    out_HxKxD = np.zeros((count, d_head, width))

    def vector(name: str) -> np.ndarray:
        return frame_JxD[model.directions.index(name)]

    def set_head(number: int, head: Head) -> None:
        for place, (query, key, score) in enumerate(head.scores):
            if query:
                weight_DxSxHxK[:, 0, number, place] = vector(query)
            else:
                bias_SxHxK[0, number, place] = 1.0
            # Times the root that the model divides scores by.
            weight_DxSxHxK[:, 1, number, place] = score * d_head**0.5 * vector(key)
        for place, (source, target) in enumerate(head.moves):
            weight_DxSxHxK[:, 2, number, place] = vector(source)
            out_HxKxD[number, place] = vector(target)

    for number, head in enumerate(model.layers[layer].heads):
        set_head(number, head)
    return {
        "attn.c_attn.weight": weight_DxSxHxK.reshape(width, -1),
        "attn.c_attn.bias": bias_SxHxK.reshape(-1),
        "attn.c_proj.weight": out_HxKxD.reshape(-1, width),
        "attn.c_proj.bias": np.zeros(width),
    }
