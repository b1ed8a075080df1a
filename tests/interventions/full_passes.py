"""Effects of edits by one full forward pass per edit: edited values are computed from captured ones and patched in."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax

from saejax.errors import UserError
from saejax.interventions.edits import ZERO, ActivationReplacement, FeatureEdits, mask
from saejax.interventions.engine import LogitDiffs, run_edits
from saejax.interventions.split_model import SplitModel, editable_positions
from saejax.models.edits import SiteEdit
from saejax.tasks.answer_tokens import first_answer_ids
from saejax.tasks.behaviours import Prompt


def ablate_sets(
    split: SplitModel,
    runs: Sequence,
    sets: Sequence[Sequence[int]],
    *options: Any,
    source: ActivationReplacement = ZERO,
    **more: Any,
) -> LogitDiffs:
    """Ablate each set of features on the prompts of clean runs; options as those of ``run_edits``."""
    return run_edits(split, runs, mask(split.dictionary, sets, replacement=source), *options, **more)


def effects_by_full_passes(
    lm: Any,
    prompts: Sequence[Prompt],
    edits: FeatureEdits,
    readouts: Sequence[str],
    positions: str = "all",
    error: str = "keep",
) -> np.ndarray:
    """Return readouts of each edit on each prompt; arguments and result as those of ``engine.effects``.

    Args:
      lm: called as ``lm(tokens, capture=[...], edits=[...])``; has ``tokenize`` and ``tokenizer``.
      prompts: P prompts.
      edits: E edits.
      readouts: R names.
      positions: which are editable.
      error: "keep" or "drop".

    Returns:
      Float64 array ``[E, P, R]``.

    Raises:
      UserError: the edits swap activations with counterparts of another length.
    """
    basis, source = edits.dictionary.with_sink_norms(lm.sink_norm), edits.replacement
    reads, writes = basis.site, basis.config.target or basis.site
    tokens = lm.tokenize([prompt.text for prompt in prompts])
    clean = lm(tokens, capture=list(dict.fromkeys([reads, writes])))
    read_BxTxD, value_BxTxD = (jnp.asarray(clean.sites[site]) for site in (reads, writes))
    usable_BxT = jnp.asarray(tokens.mask_BxT) & basis.is_not_sink(read_BxTxD, value_BxTxD)
    if error == "drop":
        rebuilt_BxTxD = basis.decode(basis.encode(read_BxTxD), read_BxTxD)
        value_BxTxD = jnp.where(usable_BxT[..., None], rebuilt_BxTxD, value_BxTxD)
        clean = lm(tokens, edits=[SiteEdit.patch(writes, value_BxTxD)])
    editable_BxT = np.asarray(usable_BxT) & editable_positions(positions, tokens.last_B, tokens.mask_BxT.shape[1])
    f_BxTxF = jnp.where(editable_BxT[..., None], basis.encode(read_BxTxD), 0.0)
    other_BxTxF = f_BxTxF
    if source.kind == "counterpart":
        others = lm.tokenize([prompt.counterpart for prompt in prompts])
        if not np.array_equal(others.lengths_B, tokens.lengths_B):
            raise UserError("a counterpart has another number of tokens than its prompt: give pairs of one length")
        other_read_BxTxD = jnp.asarray(lm(others, capture=[reads]).sites[reads])
        other_usable_BxT = editable_BxT & basis.is_not_sink(other_read_BxTxD)
        other_BxTxF = jnp.where(other_usable_BxT[..., None], basis.encode(other_read_BxTxD), 0.0)
    value_BxTxD = np.asarray(value_BxTxD, np.float64)
    answers_Bx2, last_B, rows_B = first_answer_ids(lm.tokenizer, prompts), tokens.last_B, np.arange(len(prompts))
    clean_BxV = log_softmax(np.asarray(clean.logits_BxTxV, np.float64)[rows_B, last_B], axis=1)
    W_dec_FxD = np.asarray(basis.W_dec_FxD[...], np.float64)
    values_ExPxR = np.zeros((len(edits), len(prompts), len(readouts)))
    for e, members in enumerate(edits.sets):
        chosen = f_BxTxF[:, :, members], other_BxTxF[:, :, members], editable_BxT, jnp.asarray(members)
        fall_BxTxK = np.asarray(source.removed(*chosen, jnp.int32(len(prompts))), np.float64) * edits.fractions[e]
        if edits.addends is not None:
            fall_BxTxK -= editable_BxT[..., None] * edits.addends[e]
        change_BxTxD = fall_BxTxK @ W_dec_FxD[members]
        output = lm(tokens, edits=[SiteEdit.patch(writes, np.float32(value_BxTxD - change_BxTxD))])
        logp_BxV = log_softmax(np.asarray(output.logits_BxTxV, np.float64)[rows_B, last_B], axis=1)
        right_B, wrong_B = np.take_along_axis(logp_BxV, answers_Bx2, axis=1).T
        values = dict(
            logit_diff=right_B - wrong_B,
            log_prob=right_B,
            top1=(logp_BxV.argmax(axis=1) == answers_Bx2[:, 0]).astype(np.float64),
            kl=np.sum(np.exp(clean_BxV) * (clean_BxV - logp_BxV), axis=1),
            change_norm=np.sqrt(np.square(change_BxTxD).sum(axis=(1, 2))),
        )
        values_ExPxR[e] = np.stack([values[name] for name in readouts], axis=-1)
    return values_ExPxR
