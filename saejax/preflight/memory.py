"""Bytes per device on a mesh, and what is replicated there.

Arrays that stay (weights, dictionary, optimizer) are counted exactly, by the rule by which they are placed. What comes
and goes is estimated from the largest arrays that are alive at once; a compiler may need less or up to
twice as much.
"""

import dataclasses
from collections.abc import Mapping
from math import prod

from saejax.causal.split import PROMPTS
from saejax.dictionaries.modules import parameter_table as dictionary_table
from saejax.models.config import DecoderConfig
from saejax.models.parameters import LAYERS, parameter_table
from saejax.parallel import fitting_spec, part_size
from saejax.preflight.work import Work

Axes = Mapping[str, int]

GIB = 2**30
_WIDTH = {"bfloat16": 2, "float32": 4, "float64": 8}
_DIMENSIONS = {
    "H": "query heads",
    "N": "key-value heads",
    "F": "dimensions of the MLP",
    "V": "entries of the vocabulary",
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device.

    Attributes:
      model: the weights in the dtype of ``--model.dtype``.
      captured: the weights in the dtype of ``--capture.dtype``: up to the last captured layer if JAX captures; torch
        reads all of them, onto one device.
      dictionary: the largest stack while it is trained, its features split over ``model``, its members over ``member``.
      whole_dictionary: the same where it is used: every device has all of it.
      optimizer: Adam's two moments, and the gradient.
      activations: what comes and goes, by stage: capture, train, evaluate, ablate, and benchmark where answers are
        generated.
    """

    model: int
    captured: int
    dictionary: int
    whole_dictionary: int
    optimizer: int
    activations: Mapping[str, int]

    @property
    def stages(self) -> dict[str, int]:
        """What each stage needs in all."""
        kept = dict(
            benchmark=self.model,
            capture=self.captured,
            train=self.dictionary + self.optimizer,
            evaluate=self.model + self.whole_dictionary,
            ablate=self.model + self.whole_dictionary,
        )
        return {stage: kept[stage] + size for stage, size in self.activations.items()}

    @property
    def peak(self) -> int:
        """What the largest stage needs."""
        return self.stages[self.largest]

    @property
    def largest(self) -> str:
        """The stage that needs most."""
        return max(self.stages, key=self.stages.__getitem__)


def parameters(model: DecoderConfig) -> int:
    """Number of parameters of the decoder."""
    return sum(prod(shape) for shape, _ in parameter_table(model).values())


def device_memory(work: Work, axes: Axes) -> Memory:
    """Bytes per device.

    Args:
      work: what is run.
      axes: sizes of the mesh's axes.
    """
    layers = 1 + max(site.layer for site in work.sites)
    arrays = _dictionary_arrays(work)
    state = _WIDTH[work.train.state_dtype]
    split = state * sum(part_size(axes, shape, *spec) for shape, spec in arrays)
    members = -(-max(len(stack.members) for stack in work.stacks) // axes["member"])
    activations = dict(
        capture=_capture(work, axes),
        train=members * _train(work, axes),
        evaluate=_evaluate(work, axes),
        ablate=_ablate(work, axes),
    )
    if work.generated:
        activations["benchmark"] = _generate(work, axes, *work.generated)
    return Memory(
        model=_WIDTH[work.dtype] * _weights(work, axes, work.model.n_layers),
        captured=_WIDTH[work.capture]
        * (_weights(work, axes, layers) if work.backend == "jax" else parameters(work.model)),
        dictionary=members * split,
        whole_dictionary=state * sum(prod(shape) for shape, _ in arrays),
        optimizer=3 * members * split,
        activations=activations,
    )


def replicated(work: Work, axes: Axes) -> list[str]:
    """What the mesh does not divide, so that every device holds or runs all of it; one line each."""
    lines = _replicated_weights(work.model, axes)
    for count, what in (
        (work.scored[0], "documents of evaluate"),
        (PROMPTS, "prompts of ablate"),
        (work.rows, "rows of ablate"),
    ):
        if count % axes["data"]:
            lines.append(f"{count} {what} over {axes['data']} devices: every device runs all of them")
    return lines


def _replicated_weights(model: DecoderConfig, axes: Axes) -> list[str]:
    over = axes["model"]
    names: dict[tuple[int, str], list[str]] = {}
    for name, (shape, spec) in parameter_table(model).items():
        label, _, letters = name.rpartition("_")
        split = fitting_spec(axes, shape, *spec)
        for size, letter, axis, kept in zip(shape, _letters(letters, len(spec)), spec, split, strict=True):
            if axis and over > 1 and not kept:
                names.setdefault((size, letter), []).append(label.removeprefix(LAYERS))
    return [
        f"{size:,} {_DIMENSIONS.get(letter, letter)} over {over} devices: {', '.join(sorted(found))} are replicated"
        for (size, letter), found in names.items()
    ]


def _letters(letters: str, count: int) -> list[str]:
    """The letters of "DxHxK", with "" for the layers in front of them."""
    named = letters.split("x")
    return [""] * (count - len(named)) + named


def _weights(work: Work, axes: Axes, layers: int) -> int:
    """Numbers per device of the weights outside the layers and of the first ``layers``."""
    sizes = {
        name: part_size(axes, (layers if name.startswith(LAYERS) else shape[0], *shape[1:]), *spec)
        for name, (shape, spec) in parameter_table(work.model).items()
    }
    return sum(sizes.values())


def _dictionary_arrays(work: Work) -> list[tuple[tuple[int, ...], tuple[str | None, ...]]]:
    return list(dictionary_table(work.tested).values())


def _layer(work: Work, axes: Axes, rows: int, length: int, dtype: str, kept: int = 0) -> int:
    """A pass through the layers: the stream and what the largest of them makes, and ``kept`` copies of a site."""
    model, width = work.model, _WIDTH[dtype]
    data_rows = part_size(axes, (rows,), "data")
    heads, kv_heads, mlp = (
        part_size(axes, (size,), "model") for size in (model.n_heads, model.n_kv_heads, model.d_mlp)
    )
    stream = data_rows * length * model.d_model * width
    heads_wide = data_rows * length * (heads + 2 * kv_heads) * model.d_head * width
    scores = data_rows * heads * length * length * (2 * 4 + width)  # scores and their softmax in fp32, and the weights
    hidden = data_rows * length * mlp * width * (3 if model.gated else 2)
    return (4 + kept) * stream + max(2 * heads_wide + scores, hidden)


def _logits(work: Work, axes: Axes, rows: int, length: int) -> int:
    """fp32 logits at every position, and as much again for their softmax."""
    return 2 * 4 * part_size(axes, (rows, length, work.model.vocab), "data", None, "model")


def _features(work: Work, rows: int, length: int) -> int:
    """fp32 activations of all features, before and after the sparsity function."""
    return 2 * 4 * rows * length * work.tested.n_features


def _capture(work: Work, axes: Axes) -> int:
    rows, length = work.batch
    return _layer(work, axes, rows, length, work.capture, kept=2 * len(work.sites))


def _train(work: Work, axes: Axes) -> int:
    d, f, batch = work.tested.d_in, work.tested.n_features, work.train.batch
    width = _WIDTH[work.train.state_dtype]
    return width * 4 * (part_size(axes, (batch, d), "data", None) + part_size(axes, (batch, f), "data", "model"))


def _evaluate(work: Work, axes: Axes) -> int:
    rows, length = work.scored
    local = part_size(axes, (rows,), "data")
    return max(
        _layer(work, axes, rows, length, work.dtype) + _features(work, local, length),
        _layer(work, axes, rows, length, work.dtype, kept=4) + _logits(work, axes, rows, length),
    )


def _ablate(work: Work, axes: Axes) -> int:
    above = work.model.n_layers - work.site.layer - 1
    past = 2 * _WIDTH[work.dtype] * above * work.model.n_kv_heads * work.model.d_head
    bank = work.prompts * work.prompt * (4 * (work.features + 2 * work.tested.d_in) + past)
    head = _layer(work, axes, PROMPTS, work.prompt, work.dtype) + _features(work, PROMPTS, work.prompt)
    return bank + max(head, _layer(work, axes, work.rows, work.prompt, work.dtype, kept=4))


def _generate(work: Work, axes: Axes, rows: int, length: int, new: int) -> int:
    """The pass over the prompts, and keys and values of all tokens, which are copied when room is made for new ones."""
    model = work.model
    heads = part_size(axes, (rows, model.n_kv_heads), "data", "model")
    cache = 2 * _WIDTH[work.dtype] * model.n_layers * heads * (length + new) * model.d_head
    return _layer(work, axes, rows, length, work.dtype) + 2 * cache
