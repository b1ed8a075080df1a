"""Baseline of a behaviour: how well the model has it, before anything is explained.

The *logit difference* of a prompt is logit(correct) - logit(wrong) at its last position, each answer standing for its
first token. Of the prompts of a split are reported, with 95 % intervals, Wilson's of shares, bootstrap of the others:

- ``accuracy``: the share with a logit difference above 0;
- ``top1``: the share whose correct answer has the highest logit of the whole vocabulary;
- ``logit_diff``: the mean logit difference, in nats;
- ``separation``: its mean over its standard deviation (``separation``);
- ``counterpart_accuracy``: the share whose counterpart prompt prefers its own answer, which is the wrong one here, of
  the prompts that have one; None if none has. A model that gives the same answer whatever the prompt says has accuracy
  and counterpart accuracy of 1 in sum;
- ``log_likelihood`` and ``answer_accuracy``: of the whole answers, where a vocabulary cuts them into several tokens.

A behaviour that the model does not have (``gate``), or of which its tokenizer leaves too few prompts, is left out of
the causal tests.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saejax.errors import UserError
from saejax.models import decoder
from saejax.models.config import DecoderConfig
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import Tokens
from saejax.parallel.mesh import document_devices
from saejax.statistics.intervals import RESAMPLES, bootstrap, bootstrap_mean, wilson
from saejax.tasks.answer_tokens import answer_ids, check_ids
from saejax.tasks.behaviours import SPLITS, Prompt, PromptScore
from saejax.tasks.draw import Drawn
from saejax.tasks.gate import gate
from saejax.tasks.likelihood import loglikelihoods
from saejax.tasks.results import BaselineBehaviour, BaselineScores, PromptExample
from saejax.tasks.settings import TaskConfig

# A behaviour below one of these is flagged: with fewer right answers, or a mean within a standard deviation of 0,
# effects on it are hard to tell from noise.
MIN_ACCURACY, MIN_SEPARATION = 0.8, 1.0
SEPARATION_LIMIT = 1e6  # stands for infinity, which JSON does not have
BATCH = 32  # prompts per forward pass, or as many long ones as have so many tokens:
_BATCH_TOKENS = 4096
_EXAMPLES = 3  # prompts shown in the results


def score_prompts(model: LanguageModel, prompts: Sequence[Prompt]) -> list[PromptScore]:
    """Return the scores of each prompt.

    Raises:
      UserError: a prompt is longer than the model's context, or its logits are not finite.
    """
    answers = [[answer_ids(model.tokenizer, p.text, answer) for answer in (p.correct, p.wrong)] for p in prompts]
    ids_Nx2 = check_ids(model, prompts, np.array([[ids[0] for ids in pair] for pair in answers], np.int32))
    paired = [row for row, prompt in enumerate(prompts) if prompt.counterpart]
    texts = [p.text for p in prompts] + [prompts[row].counterpart for row in paired]
    tokens = model.tokenize(texts)
    logits_Tx2, logsum_T, top_T = _answer_logits(model, tokens, np.concatenate([ids_Nx2, ids_Nx2[paired]]))
    n = len(prompts)
    for row in np.flatnonzero(~np.isfinite(logits_Tx2).all(axis=1))[:1]:
        raise UserError(
            f"the model's logits are not finite on {texts[row]!r} ({prompts[0].behaviour}): its weights hold NaN or it "
            "overflows; try --model.dtype=float32 or another model"
        )
    diff_T = logits_Tx2[:, 0] - logits_Tx2[:, 1]
    # Negative, because after the counterpart the wrong answer is the right one.
    counterpart = dict(zip(paired, (-diff_T[n:]).tolist(), strict=True))
    # Of most answers the first token is all there is, so only longer ones take another pass.
    whole_Nx2 = logits_Tx2[:n] - logsum_T[:n, None]
    longer = [(i, side) for i, pair in enumerate(answers) for side, ids in enumerate(pair) if len(ids) > 1]
    contexts = [tokens.ids_BxT[i, : tokens.lengths_B[i]].tolist() for i, _ in longer]
    for place, likelihood in zip(longer, loglikelihoods(model, contexts, [answers[i][side] for i, side in longer])):
        whole_Nx2[place] = likelihood.total
    whole = whole_Nx2.tolist()
    return [
        PromptScore(float(diff_T[i]), bool(top_T[i] == ids_Nx2[i, 0]), counterpart.get(i), *whole[i]) for i in range(n)
    ]


def summarize(drawn: Drawn, scores: Sequence[PromptScore], task: TaskConfig) -> BaselineBehaviour:
    """Return a behaviour's entry in the results: figures of both splits, what is weak in words, and examples."""
    rows = list(zip(drawn.prompts, scores, strict=True))
    splits = {name: _split_scores([score for prompt, score in rows if prompt.split == name], task) for name in SPLITS}
    shown = [(prompt, score) for prompt, score in rows if prompt.split == "test"][:_EXAMPLES]
    examples = (PromptExample(prompt.text, prompt.correct, prompt.wrong, score.logit_diff) for prompt, score in shown)
    # Train prompts decide what is tested, or test prompts would be chosen by their own result.
    right = [score.logit_diff > 0 for prompt, score in rows if prompt.split == "train"]
    p_value, why = gate(sum(right), len(right), task.gate)
    return BaselineBehaviour(
        **splits,
        flags=(*_flags(splits), *_one_answer(drawn.prompts)),
        examples=tuple(examples),
        p_value=p_value,
        left_out=why or None,
        replaced=drawn.replaced or None,
    )


def _split_scores(rows: Sequence[PromptScore], task: TaskConfig) -> BaselineScores:
    diff_N, top1_N = (np.array([getattr(row, key) for row in rows], np.float64) for key in ("logit_diff", "top1"))
    paired = [row.counterpart_logit_diff for row in rows if row.counterpart_logit_diff is not None]
    whole_Nx2 = np.array([[row.correct_log_likelihood, row.wrong_log_likelihood] for row in rows], np.float64)
    mean = functools.partial(bootstrap_mean, seed=task.seed)
    return BaselineScores(
        n=len(rows),
        accuracy=wilson(diff_N > 0),
        top1=wilson(top1_N),
        logit_diff=mean(diff_N),
        separation=bootstrap(diff_N, separation, RESAMPLES, task.seed),
        counterpart_accuracy=wilson(np.array(paired) > 0) if paired else None,
        answer_accuracy=wilson(whole_Nx2[:, 0] > whole_Nx2[:, 1]),
        log_likelihood=mean(whole_Nx2[:, 0]),
    )


def separation(values_RxN: np.ndarray) -> np.ndarray:
    """Return each row's mean over its population standard deviation, [R], cut at +- ``SEPARATION_LIMIT``.

    Where all values of a row are equal, one value included, the deviation is 0: the separation is then the limit
    with the sign of the mean, and 0 if they are all 0.
    """
    mean_R, spread_R = values_RxN.mean(axis=1), values_RxN.std(axis=1)
    limit_R = np.sign(mean_R) * SEPARATION_LIMIT
    ratio_R = np.divide(mean_R, spread_R, out=limit_R, where=spread_R > 0)
    # Of equal numbers the rounded deviation may be a last bit above 0; that is cut to the limit, too.
    return np.clip(ratio_R, -SEPARATION_LIMIT, SEPARATION_LIMIT)


def _one_answer(prompts: Sequence[Prompt]) -> tuple[str, ...]:
    """Return a sentence if a model that gives one answer whatever it reads would be right on every prompt."""
    answers = {prompt.correct for prompt in prompts}
    if len(answers) > 1 or any(prompt.counterpart for prompt in prompts):
        return ()
    return (f"the right answer is {answers.pop()!r} in every prompt, and no prompt has a counterpart",)


def _flags(splits: Mapping[str, BaselineScores]) -> tuple[str, ...]:
    """Return a sentence for each score that is below its limit."""
    limits = [("accuracy", MIN_ACCURACY), ("separation", MIN_SEPARATION), ("counterpart_accuracy", MIN_ACCURACY)]
    scores = [(key, split, getattr(splits[split], key), limit) for split in SPLITS for key, limit in limits]
    return tuple(
        f"{key.replace('_', ' ')} {value.mean:.3f} on {split} prompts is below {limit:.3f}"
        for key, split, value, limit in scores
        # Only a note: what is left out is decided by the gate alone.
        if value and value.mean < limit
    )


def _answer_logits(
    model: LanguageModel, tokens: Tokens, ids_Nx2: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return logits at each text's last position.

    Returns:
      The logits of two answers, [N, 2]; the logsumexp of all logits, [N]; and the token with the highest logit, [N].
    """
    last_site = f"resid_post.{model.config.n_layers - 1}"
    n = len(tokens.lengths_B)
    parts = []
    devices = document_devices(model.mesh)
    # Of long prompts a few at a time, and no 32 copies of one; each device has as many.
    size = -(-max(min(BATCH, _BATCH_TOKENS // tokens.ids_BxT.shape[1]), 1) // devices) * devices
    for first in range(0, n, size):
        rows_B = np.resize(np.arange(first, min(first + size, n)), size)  # the last batch is filled up with copies
        batch = Tokens(tokens.ids_BxT[rows_B], tokens.lengths_B[rows_B])
        # Logits at every position would be most of the memory and a fifth of the work.
        x_BxTxD = model(batch, capture=[last_site], logits=False).sites[last_site]
        outputs = _last_logits(model.config, model.params, x_BxTxD, batch.last_B, ids_Nx2[rows_B])
        parts.append([np.asarray(output)[: n - first] for output in outputs])
    chosen_Nx2, logsum_N, top_N = map(np.concatenate, zip(*parts, strict=True))
    return chosen_Nx2, logsum_N, top_N


@functools.partial(jax.jit, static_argnums=0)
def _last_logits(
    config: DecoderConfig, params: decoder.Params, x_BxTxD: jax.Array, last_B: jax.Array, ids_Bx2: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x_Bx1xD = jnp.take_along_axis(x_BxTxD, last_B[:, None, None], axis=1)
    logits_BxV = decoder.unembed(config, params, x_Bx1xD)[:, 0]
    logsum_B = jax.nn.logsumexp(logits_BxV, axis=-1)
    return jnp.take_along_axis(logits_BxV, ids_Bx2, axis=1), logsum_B, logits_BxV.argmax(axis=-1)
