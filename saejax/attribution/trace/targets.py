"""Targets of a graph: logits, and differences of two.

A logit is read from the stream leaving the last layer, at the last position, through the final norm, whose factor is
constant where the model is frozen. Its direction is its column of the unembedding less the mean over the vocabulary, as
only differences of logits matter. Capping of logits is left out of it; probabilities are those of the capped logits.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saejax.attribution.local.prompt_run import PromptRun
from saejax.attribution.local.readouts import Readouts, padded
from saejax.errors import UserError
from saejax.models import decoder
from saejax.models.config import DecoderConfig, RunRules
from saejax.models.language_model import LanguageModel
from saejax.models.layers import einsum, norm
from saejax.models.tokens import continuation_ids, token_text
from saejax.parallel.collectives import to_host

_STEP = 16  # least size to which logits are filled up

Target = str | int | tuple[str | int, str | int]


def read_targets(run: PromptRun, targets: Sequence[Target], max_logits: int, logit_mass: float) -> Readouts:
    """Return the requested targets.

    Args:
      run: of the prompt.
      targets: tokens (ids, or texts of one token), pairs of them for the difference of their logits; none: the most
        probable tokens.
      max_logits: maximum number of tokens, where no targets are named.
      logit_mass: the smallest set of tokens with this total probability is taken, 0 to 1.

    Raises:
      UserError: a token does not exist, or a text is not one token.
    """
    logits_V = run.logits_V.astype(np.float64)
    probability_V = np.exp(logits_V - logits_V.max())
    probability_V /= probability_V.sum()
    if not targets:
        order = np.argsort(-probability_V, kind="stable")[: max(max_logits, 1)]
        # The token that reaches the share is one of them.
        count = int(np.searchsorted(np.cumsum(probability_V[order]), logit_mass)) + 1
        targets = [int(token) for token in order[:count]]
    model, text, count = run.model, token_text(run.model.tokenizer), len(targets)
    pairs: list[tuple[Any, ...]] = [target if isinstance(target, tuple) else (target,) for target in targets]
    # Filled up, so that prompts with other numbers of targets share the program.
    pair_Xx2 = np.full((padded(count, _STEP), 2), -1, np.int32)
    for k, pair in enumerate(pairs):
        pair_Xx2[k, : len(pair)] = [token_of(model, token) for token in pair]
    arrays = logit_directions(model.config, run.rules, model.params, run.last_D, *pair_Xx2.T)
    vector_KxD, value_K, constant_K = (to_host(array)[:count] for array in arrays)
    first_K, second_K = pair_Xx2[:count].T
    single_K = second_K < 0
    return Readouts(
        pair_Kx2=pair_Xx2[:count],
        vector_KxD=vector_KxD,
        value_K=value_K,
        constant_K=constant_K,
        weight_K=np.where(single_K, probability_V[first_K], 1).astype(np.float32),
        logit_K=run.logits_V[first_K] - np.where(single_K, 0, run.logits_V[second_K]).astype(np.float32),
        labels=tuple(text(a) if b < 0 else f"{text(a)!r} - {text(b)!r}" for a, b in pair_Xx2[:count].tolist()),
    )


def token_of(model: LanguageModel, target: str | int) -> int:
    """Return the id of a token; of a text, the one with which it continues another, taken as it is written.

    Raises:
      UserError: the text is not one token, or there is no such token.
    """
    if isinstance(target, str):
        ids = continuation_ids(model.tokenizer, target)
        if len(ids) != 1:
            raise UserError(f"the target {target!r} is {len(ids)} tokens: expected a text of one, such as ' Paris'")
        target = int(ids[0])
    if not 0 <= target < model.config.vocab:
        raise UserError(f"the target token {target} does not exist: expected 0 to {model.config.vocab - 1}")
    return target


@functools.partial(jax.jit, static_argnums=(0, 1))
def logit_directions(
    config: DecoderConfig,
    rules: RunRules,
    params: decoder.Params,
    last_D: jax.Array,
    first_K: jax.Array,
    second_K: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return differences of logits, before capping, as directions of the stream that leaves the last layer.

    Args:
      config: of the decoder (static).
      rules: say whether the final norm's factor is constant.
      params: of the model.
      last_D: that stream at the last position.
      first_K: token ids.
      second_K: token ids that are subtracted; -1 for the mean over the vocabulary.

    Returns:
      The directions [K, D], the differences [K], and the part of them [K] that biases are.
    """
    embed_VxD = params["embed_VxD"] if config.tied else params["unembed_DxV"].T
    rows_VxD = embed_VxD.astype(last_D.dtype)

    def less(rows: jax.Array) -> jax.Array:
        """Return the rows of the first tokens less those of the second ones or the mean."""
        single = jnp.reshape(second_K < 0, (-1,) + (1,) * (rows.ndim - 1))
        # Less the mean over the vocabulary, as only differences of logits matter.
        return rows[first_K] - jnp.where(single, jnp.mean(rows, axis=0, keepdims=True), rows[second_K])

    vector_KxD = less(rows_VxD)
    # By the rules the norm's factor is constant where the model is frozen; then this is its transpose.
    final_D, pull = jax.vjp(functools.partial(norm, config, rules, params, "final_norm"), last_D)
    constant_K = jnp.zeros(len(vector_KxD), last_D.dtype)
    if "final_norm_bias_D" in params:
        constant_K += einsum("kd,d->k", vector_KxD, params["final_norm_bias_D"].astype(last_D.dtype))
    bias = less(params["unembed_bias_V"].astype(last_D.dtype)) if config.unembed_bias else 0
    value_K = einsum("kd,d->k", vector_KxD, final_D) + bias
    return jax.vmap(pull)(vector_KxD)[0], value_K, constant_K + bias
