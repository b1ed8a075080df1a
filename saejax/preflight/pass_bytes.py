"""Bytes per device of what a pass through the model makes: estimated from the largest arrays alive at once."""

from collections.abc import Mapping

from saejax.parallel import part_size
from saejax.preflight.work import Work

Axes = Mapping[str, int]  # sizes of the mesh's axes
WIDTH = {"bfloat16": 2, "float32": 4, "float64": 8}


def layer_bytes(work: Work, axes: Axes, rows: int, length: int, dtype: str, kept: int = 0) -> int:
    """A pass through the layers: the stream and what the largest of them makes, and ``kept`` copies of a site."""
    model, width = work.model, WIDTH[dtype]
    data_rows = part_size(axes, (rows,), "data")
    heads, kv_heads, mlp = (
        part_size(axes, (size,), "model") for size in (model.n_heads, model.n_kv_heads, model.d_mlp)
    )
    stream = data_rows * length * model.d_model * width
    heads_wide = data_rows * length * (heads + 2 * kv_heads) * model.d_head * width
    scores = data_rows * heads * length * length * (2 * 4 + width)  # scores and their softmax in fp32, and the weights
    hidden = data_rows * length * mlp * width * (3 if model.gated else 2)
    return (4 + kept) * stream + max(2 * heads_wide + scores, hidden)


def logit_bytes(work: Work, axes: Axes, rows: int, length: int) -> int:
    """fp32 logits at every position, and as much again for their softmax."""
    return 2 * 4 * part_size(axes, (rows, length, work.model.vocab), "data", None, "model")


def feature_bytes(n_features: int, rows: int, length: int) -> int:
    """fp32 activations of all features, before and after the sparsity function."""
    return 2 * 4 * rows * length * n_features


def generated_bytes(work: Work, axes: Axes, rows: int, length: int, new: int) -> int:
    """The pass over the prompts, and keys and values of all tokens, which are copied when room is made for new ones."""
    model = work.model
    heads = part_size(axes, (rows, model.n_kv_heads), "data", "model")
    cache = 2 * WIDTH[work.dtype] * model.n_layers * heads * (length + new) * model.d_head
    return layer_bytes(work, axes, rows, length, work.dtype) + 2 * cache
