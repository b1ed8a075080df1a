"""Transformers compiled by Tracr (Lindner et al., 2023, arXiv 2301.05062) from RASP programs, as descriptions.

A compiled transformer has named one-dimensional directions, no norms and no biases, so its matrices are a list of what
heads and neurons read and write. Tracr is no part of saejax and is needed while a program is compiled alone.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from saejax.errors import UserError
from saejax.ground_truth.circuits.handset import START, Directions, HandSet, Head, Layer, Neuron

_BOS, _PAD = "compiler_bos", "compiler_pad"


def pattern(letters: str, wanted: str, length: int) -> HandSet:
    """Whether the last words are those wanted, one letter each: "yes" or "no".

    Args:
      letters: all words.
      wanted: of the last words.
      length: words of a text at most.

    Raises:
      UserError: Tracr is not installed, or cannot compile this.
    """
    try:
        from tracr.compiler import compiling, lib
        from tracr.rasp import rasp
    except ImportError as error:
        raise UserError(
            f"--known.circuits=pattern is compiled by Tracr, which cannot be imported ({error}): install it, under the "
            "name of tracr-pypi or from its repository, or choose other circuits"
        ) from error
    try:
        program = lib.detect_pattern(rasp.tokens, wanted)
        made = compiling.compile_rasp_to_model(program, set(letters), length, causal=True)
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"Tracr does not compile whether the last words are {wanted!r}: {error}") from error
    logits = {word: {f"detect_pattern({wanted})_1:{value}": 8.0} for word, value in (("yes", "True"), ("no", "False"))}
    return described(made, logits)


def described(made: Any, logits: Mapping[str, Directions]) -> HandSet:
    """What a compiled transformer's parts read and write.

    Args:
      made: Tracr's ``AssembledTransformerModel``, compiled with ``causal=True``.
      logits: words of the answers, which are not words of the program, and what each one's logit reads.

    Raises:
      UserError: it has biases or norms, or an answer reads what is not there.
    """
    labels, config = list(made.residual_labels), made.model_config
    arrays = {
        f"{part}/{name}": np.asarray(a, np.float64) for part, own in made.params.items() for name, a in own.items()
    }
    unknown = sorted({name for reads in logits.values() for name in reads} - set(labels))
    biased = config.layer_norm or not config.causal or any(a.any() for name, a in arrays.items() if name.endswith("/b"))
    if unknown or biased:
        raise UserError(f"this compiled transformer is no sum of products of its directions, or lacks {unknown}")

    def directions(values_D: np.ndarray) -> Directions:
        return {labels[place]: float(values_D[place]) for place in np.flatnonzero(values_D)}

    row = made.input_encoder.encoding_map
    words = {START: directions(arrays["token_embed/embeddings"][row[_BOS]])}
    words |= {
        str(word): directions(arrays["token_embed/embeddings"][place])
        for word, place in row.items()
        if word not in (_BOS, _PAD)
    }
    layers = []
    for layer in range(config.num_layers):
        own = {name.split("/", 2)[2]: array for name, array in arrays.items() if f"layer_{layer}/" in name}
        neurons = tuple(
            Neuron(f"neuron {number}", directions(reads_D), directions(writes_D))
            for number, (reads_D, writes_D) in enumerate(
                zip(own["mlp/linear_1/w"].T, own["mlp/linear_2/w"], strict=True)
            )
            if reads_D.any() and writes_D.any()
        )
        heads = tuple(_head(own, number, config.key_size, labels) for number in range(config.num_heads))
        layers.append(Layer(tuple(head for head in heads if head.moves), neurons))
    positions = tuple(map(directions, arrays["pos_embed/embeddings"]))
    return HandSet(words | {word: {} for word in logits}, positions, tuple(layers), logits)


def _head(own: dict[str, np.ndarray], number: int, width: int, labels: list[str]) -> Head:
    """A head by the products of its matrices, which are all that it does."""
    some = slice(number * width, (number + 1) * width)
    score_DxD = own["attn/query/w"][:, some] @ own["attn/key/w"][:, some].T / width**0.5
    moved_DxD = own["attn/value/w"][:, some] @ own["attn/linear/w"][some]
    given = tuple((labels[i], labels[j], float(score_DxD[i, j])) for i, j in np.argwhere(score_DxD))
    pairs = [(int(i), int(j)) for i, j in np.argwhere(moved_DxD)]
    amounts = tuple(float(moved_DxD[pair]) for pair in pairs)
    return Head((), tuple((labels[i], labels[j]) for i, j in pairs), given, amounts)
