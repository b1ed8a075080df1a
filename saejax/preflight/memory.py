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
from saejax.preflight.causal_memory import causal_bytes
from saejax.preflight.pass_bytes import WIDTH, Axes, feature_bytes, generated_bytes, layer_bytes, logit_bytes
from saejax.preflight.work import Work

GIB = 2**30
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
      read: the dictionary that each of the other stages reads, whole on every device: patch, probe, study.
      activations: what comes and goes, by stage: capture, train, evaluate, ablate; benchmark where answers are
        generated; patch, probe and study where they are asked for.
    """

    model: int
    captured: int
    dictionary: int
    whole_dictionary: int
    optimizer: int
    read: Mapping[str, int]
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
            **{stage: self.model + size for stage, size in self.read.items()},
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
    state = WIDTH[work.train.state_dtype]
    split = state * sum(part_size(axes, shape, *spec) for shape, spec in arrays)
    members = -(-max(len(stack.members) for stack in work.stacks) // axes["member"])
    activations = dict(
        capture=_capture(work, axes),
        train=members * _train(work, axes),
        evaluate=_evaluate(work, axes),
        **causal_bytes(work, axes),
    )
    if work.generated:
        activations["benchmark"] = generated_bytes(work, axes, *work.generated)
    return Memory(
        model=WIDTH[work.dtype] * _weights(work, axes, work.model.n_layers),
        captured=WIDTH[work.capture]
        * (_weights(work, axes, layers) if work.backend == "jax" else parameters(work.model)),
        dictionary=members * split,
        whole_dictionary=state * sum(prod(shape) for shape, _ in arrays),
        optimizer=3 * members * split,
        read={
            stage: state * sum(prod(shape) for shape, _ in dictionary_table(used).values()) if used else 0
            for stage, used in (("patch", work.patched), ("probe", work.probed), ("study", work.studied))
        },
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


def _capture(work: Work, axes: Axes) -> int:
    rows, length = work.batch
    return layer_bytes(work, axes, rows, length, work.capture, kept=2 * len(work.sites))


def _train(work: Work, axes: Axes) -> int:
    d, f, batch = work.tested.d_in, work.tested.n_features, work.train.batch
    width = WIDTH[work.train.state_dtype]
    return width * 4 * (part_size(axes, (batch, d), "data", None) + part_size(axes, (batch, f), "data", "model"))


def _evaluate(work: Work, axes: Axes) -> int:
    rows, length = work.scored
    local = part_size(axes, (rows,), "data")
    return max(
        layer_bytes(work, axes, rows, length, work.dtype) + feature_bytes(work.tested.n_features, local, length),
        layer_bytes(work, axes, rows, length, work.dtype, kept=4) + logit_bytes(work, axes, rows, length),
    )
