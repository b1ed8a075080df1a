"""What a prompt is continued with when features take other values: token by token, the most probable one.

A change at a position is made there in every pass; one at a slice without an end goes on at the new tokens. Where
attention is held, it is that of the prompt's own tokens; new tokens attend as they do in the changed run.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from saejax.attribution.checks.changed_layers import LayerChanges, read_logits, run_layer
from saejax.attribution.checks.edits import Change, edits_by_layer
from saejax.attribution.local.replacement import Replacement, embed, padded
from saejax.attribution.local.written import Written
from saejax.errors import UserError
from saejax.parallel.collectives import to_host


@dataclasses.dataclass(frozen=True)
class Continued:
    """The new tokens, int32 [N], and the logits from which each was taken, fp32 [N, V]."""

    ids_N: np.ndarray
    logits_NxV: np.ndarray


def continue_prompt(
    replacement: Replacement, changes: Sequence[Change], max_new_tokens: int, hold: str = "nothing"
) -> Continued:
    """Continues the prompt with the changes.

    The prompt is run anew for each token, beside itself without changes, so this is for tens of tokens.

    Args:
      replacement: of the prompt.
      changes: made together; a slice without an end, such as ``slice(3, None)``, means the new tokens, too.
      max_new_tokens: how many, 1 or more; fewer where the model's context ends.
      hold: "nothing", or "attention", that of the prompt's tokens.

    Raises:
      UserError: a feature or position does not exist, or there is no such way to hold.
    """
    if hold not in ("nothing", "attention") or max_new_tokens < 1:
        raise UserError(
            f"hold is {hold!r} and max_new_tokens {max_new_tokens}: expected nothing or attention, and 1 or more"
        )
    length, ids, logits = len(replacement.ids_P), replacement.ids_P.tolist(), []
    within = [
        change._replace(position=slice(*change.position.indices(length)))
        if isinstance(change.position, slice) and change.position.stop is not None
        else change
        for change in changes
    ]
    while len(ids) < min(length + max_new_tokens, replacement.model.config.context):
        logits.append(_next_logits(replacement, ids, edits_by_layer(replacement, [[], within], len(ids)), hold))
        ids.append(int(logits[-1].argmax()))
    new_N = np.array(ids[length:], np.int32)
    return Continued(new_N, np.stack(logits) if logits else np.empty((0, replacement.model.config.vocab), np.float32))


def _next_logits(replacement: Replacement, ids: Sequence[int], edits: dict[int, LayerChanges], hold: str) -> np.ndarray:
    """The logits after some tokens in the changed run, [V]."""
    frozen, params = replacement.frozen, replacement.model.params
    x_TxD = embed(frozen, params, np.pad(np.array(ids, np.int32), (0, padded(len(ids)) - len(ids))))
    x_RxTxD = jnp.tile(x_TxD[None], (2, 1, 1))  # the first row is without changes
    bounds = np.int32(replacement.first), np.int32(len(replacement.ids_P))
    below = Written(replacement.dictionaries, *x_RxTxD.shape[:2])
    for layer in range(replacement.model.config.n_layers):
        edited = (replacement.transcoder(layer), edits[layer]) if layer in edits else None
        given = replacement.skip(layer), edited, bounds, below.at(layer)
        x_RxTxD, _, change_RxM = run_layer(frozen, hold, params, np.int32(layer), x_RxTxD[0], x_RxTxD, *given)
        if edited:
            below.add(layer, edits[layer].places(x_RxTxD.shape[1]), edits[layer].feature_RxM, change_RxM)
    last = np.int32(len(ids) - 1)
    return to_host(read_logits(frozen, "nothing", params, x_RxTxD[0, last], x_RxTxD, last))[1]
