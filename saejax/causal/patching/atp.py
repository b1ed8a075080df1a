"""AtP and AtP* of every node of heads, over pairs of prompts; ``heads`` says what they are."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saejax.causal.patching.heads import NODES, effects, record_heads, slopes
from saejax.causal.patching.pairs import Pairs, few_pairs
from saejax.errors import UserError
from saejax.models.language_model import LanguageModel
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import by_row
from saejax.runner.parts import OnProgress, silent
from saejax.tasks.behaviours import Prompt


class NodeEstimates(NamedTuple):
    """Of each kind of ``NODES`` the estimated effects, mean over the pairs that have the position, fp64 [L, T, H].

    Positions are aligned at the end: the last column is that of every prompt's last token; keys and values have as many
    heads as the model has of them.

    Attributes:
      atp: by how much the logit difference falls.
      atp_star: the size of that, with the QK fix and GradDrop.
      change: the length of the change of the vector, which asks no gradient.
    """

    atp: Mapping[str, np.ndarray]
    atp_star: Mapping[str, np.ndarray]
    change: Mapping[str, np.ndarray]


def estimate_nodes(model: LanguageModel, prompts: Sequence[Prompt], on_progress: OnProgress = silent) -> NodeEstimates:
    """Estimates the effect of patching every node with that of the counterpart.

    Args:
      model: the language model; a pair takes a gradient for each of its layers.
      prompts: with counterparts of as many tokens, at least one.
      on_progress: called at the start and after each gradient with the rows done and of all, one row a gradient of a
        pair; may raise to stop.

    Raises:
      UserError: an estimate is not finite.
    """
    batches = list(few_pairs(model, prompts))
    gradients, columns = 1 + model.config.n_layers, max(int(pairs.ends_P.max()) for pairs in batches)
    counts_T, before = np.zeros(columns), 0
    sums: dict[str, np.ndarray] = {}
    for pairs in batches:

        def say(done: int, before: int = before, rows: int = len(pairs.index_P)) -> None:
            on_progress(before + done * rows, gradients * len(prompts))

        for name, found_LxBxTxH in _batch(model, pairs, say).items():
            sums.setdefault(name, np.zeros((found_LxBxTxH.shape[0], columns, found_LxBxTxH.shape[3])))
            for row, end in enumerate(pairs.ends_P):
                sums[name][:, columns - end :] += found_LxBxTxH[:, row, :end]
        for end in pairs.ends_P:
            counts_T[columns - end :] += 1
        before += gradients * len(pairs.index_P)
    if not all(np.isfinite(total).all() for total in sums.values()):
        raise UserError(
            "an estimated effect of a node is not finite: the model's weights hold NaN or it overflows; try "
            "--model.dtype=float32 or another model"
        )
    means = {name: total / counts_T[None, :, None] for name, total in sums.items()}
    return NodeEstimates(*({node: means[f"{kind} {node}"] for node in NODES} for kind in NodeEstimates._fields))


def _batch(model: LanguageModel, pairs: Pairs, say: Callable[[int], None]) -> dict[str, np.ndarray]:
    """The estimates of some pairs, [L, B, T, H]."""
    config, params, layers = model.config, model.params, model.config.n_layers
    rows = by_row(model.mesh, *pairs.ids_2xBxT, pairs.last_B, pairs.answers_Bx2)
    clean, other = (record_heads(config, params, ids_BxT) for ids_BxT in rows[:2])
    drops = range(layers) if layers > 1 else [-1]  # of one layer nothing is left when it is dropped
    plain: tuple[jax.Array, ...] = ()
    sizes: list[np.ndarray] = []
    changes = [np.linalg.norm(_host(b) - _host(a), axis=-1) for a, b in zip(clean, other, strict=True)]
    say(0)
    for done, dropped in enumerate([-1, *drops], 1):
        found = effects(config, clean, other, slopes(config, params, rows[0], *rows[2:], jnp.int32(dropped)))
        if not plain:
            plain = found.plain
        else:
            parts = [np.abs(_host(part)) / max(layers - 1, 1) for part in found.fixed]
            sizes = [size + part for size, part in zip(sizes, parts, strict=True)] if sizes else parts
        say(done)
    of_all = dict(atp=[_host(part) for part in plain], atp_star=sizes, change=changes)
    return {f"{kind} {node}": part for kind, parts in of_all.items() for node, part in zip(NODES, parts, strict=True)}


def _host(array: jax.Array) -> np.ndarray:
    return to_host(array).astype(np.float64)
