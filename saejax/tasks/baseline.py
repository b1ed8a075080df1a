"""The stage ``baseline``: how well the model has each behaviour, before anything is explained.

The *logit difference* of a prompt is logit(correct) - logit(wrong) at its last position, each answer standing for its
first token. Of the prompts of a split are reported, with 95 % bootstrap intervals:

- ``accuracy``: the share with a logit difference above 0;
- ``top1``: the share whose correct answer has the highest logit of the whole vocabulary;
- ``logit_diff``: the mean logit difference, in nats;
- ``separation``: its mean over its standard deviation (``scoring.separation``);
- ``counterpart_accuracy``: the share whose counterpart prompt prefers its own answer, which is the wrong one here, of
  the prompts that have one; None if none has. A model that gives the same answer whatever the prompt says has accuracy
  and counterpart accuracy of 1 in sum.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saejax.errors import Interrupted, UserError
from saejax.models import decoder
from saejax.models.config import DecoderConfig
from saejax.models.language_model import LanguageModel, load_model
from saejax.models.tokens import Tokens
from saejax.parallel import make_mesh
from saejax.settings import TaskConfig
from saejax.tasks.behaviours import SPLITS, Prompt, make_prompts, write_prompts
from saejax.tasks.own_prompts import read_own_prompts
from saejax.tasks.scoring import bootstrap_mean, bootstrap_separation
from saejax.workspace import Run

BATCH = 32  # prompts per forward pass
_EXAMPLES = 3  # prompts shown in the results


def run_baseline(run: Run) -> dict:
    """Draws the prompts, scores them, and writes them with their scores to ``prompts.jsonl``.

    Returns:
      The results; WORKSPACE.md describes them.

    Raises:
      UserError: the model cannot be loaded, prompts cannot be made or are too long, or logits are not finite.
      Interrupted: asked to stop; there is nothing to keep.
    """
    model_config, task = run.configs["model"], run.configs["task"]
    model = load_model(model_config.path, model_config.revision, model_config.dtype, make_mesh(run.configs.get("mesh")))
    prompts: list[Prompt] = []
    scores: list[dict[str, Any]] = []
    behaviours = {}
    own = read_own_prompts(task, model.token_id)
    for name in (*task.behaviours, *own):
        if run.stopping():
            raise Interrupted("baseline: stopped; it starts anew")
        drawn = own.get(name) or make_prompts(name, task.train_prompts, task.test_prompts, task.seed, model.token_id)
        scored = score_prompts(model, drawn)
        prompts += drawn
        scores += scored
        behaviours[name] = summarize(drawn, scored, task)
        run.say(_line(name, behaviours[name]))
    write_prompts(run.folder / "prompts.jsonl", prompts, scores)
    return dict(behaviours=behaviours)


def score_prompts(model: LanguageModel, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """What the model makes of each prompt: the fields of ``behaviours.SCORES``.

    Raises:
      UserError: a prompt is longer than the model's context, or its logits are not finite.
    """
    ids_Nx2 = np.array([[model.token_id(p.correct), model.token_id(p.wrong)] for p in prompts], np.int32)
    paired = [row for row, prompt in enumerate(prompts) if prompt.counterpart]
    texts = [p.text for p in prompts] + [prompts[row].counterpart for row in paired]
    logits_Tx2, top_T = _answer_logits(model, model.tokenize(texts), np.concatenate([ids_Nx2, ids_Nx2[paired]]))
    n = len(prompts)
    for row in np.flatnonzero(~np.isfinite(logits_Tx2).all(axis=1))[:1]:
        raise UserError(
            f"the model's logits are not finite on {texts[row]!r} ({prompts[0].behaviour}): its weights hold NaN or it "
            "overflows; try --model.dtype=float32 or another model"
        )
    diff_T = logits_Tx2[:, 0] - logits_Tx2[:, 1]
    counterpart = dict(zip(paired, (-diff_T[n:]).tolist(), strict=True))
    return [
        dict(
            logit_diff=float(diff_T[i]),
            top1=bool(top_T[i] == ids_Nx2[i, 0]),
            counterpart_logit_diff=counterpart.get(i),
        )
        for i in range(n)
    ]


def summarize(prompts: Sequence[Prompt], scores: Sequence[Mapping[str, Any]], task: TaskConfig) -> dict[str, Any]:
    """A behaviour's entry in the results of the stage: figures of both splits, what is weak in words, and examples."""
    splits: dict[str, Any] = {}
    for split in SPLITS:
        rows = [score for prompt, score in zip(prompts, scores, strict=True) if prompt.split == split]
        diff_N, top1_N = (np.array([row[key] for row in rows], np.float64) for key in ("logit_diff", "top1"))
        paired = [row["counterpart_logit_diff"] for row in rows if row["counterpart_logit_diff"] is not None]
        intervals = dict(
            accuracy=bootstrap_mean(diff_N > 0, task.bootstrap, task.seed),
            top1=bootstrap_mean(top1_N, task.bootstrap, task.seed),
            logit_diff=bootstrap_mean(diff_N, task.bootstrap, task.seed),
            separation=bootstrap_separation(diff_N, task.bootstrap, task.seed),
        )
        if paired:
            counterpart_M = np.array(paired) > 0
            intervals["counterpart_accuracy"] = bootstrap_mean(counterpart_M, task.bootstrap, task.seed)
        described = {key: dataclasses.asdict(value) for key, value in intervals.items()}
        splits[split] = dict(n=len(rows), counterpart_accuracy=None) | described
    shown = [(p, s) for p, s in zip(prompts, scores, strict=True) if p.split == "test"][:_EXAMPLES]
    examples = [dict(text=p.text, correct=p.correct, wrong=p.wrong, logit_diff=s["logit_diff"]) for p, s in shown]
    return dict(**splits, flags=_flags(splits, task), examples=examples)


def _flags(splits: Mapping[str, Any], task: TaskConfig) -> list[str]:
    least = [
        ("accuracy", task.min_accuracy),
        ("separation", task.min_separation),
        ("counterpart_accuracy", task.min_accuracy),
    ]
    return [
        f"{key.replace('_', ' ')} {splits[split][key]['mean']:.3f} on {split} prompts is below {limit:.3f}"
        for split in SPLITS
        for key, limit in least
        if splits[split][key] and splits[split][key]["mean"] < limit
    ]


def _line(name: str, result: Mapping[str, Any]) -> str:
    test = result["test"]
    percent = {
        key: "{mean:.0f} % [{low:.0f}, {high:.0f}]".format(**_times(test[key], 100)) for key in ("accuracy", "top1")
    }
    plain = {key: "{mean:.2f} [{low:.2f}, {high:.2f}]".format(**test[key]) for key in ("logit_diff", "separation")}
    flags = f"; weak: {'; '.join(result['flags'])}" if result["flags"] else ""
    return (
        f"{name}: on {test['n']} test prompts accuracy {percent['accuracy']}, top-1 {percent['top1']}, "
        f"logit difference {plain['logit_diff']}, separation {plain['separation']}{flags}"
    )


def _times(interval: Mapping[str, float], factor: float) -> dict[str, float]:
    return {key: factor * value for key, value in interval.items()}


def _answer_logits(model: LanguageModel, tokens: Tokens, ids_Nx2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, 2] of two answers at each text's last position, and the token with the highest logit, [N]."""
    last_site = f"resid_post.{model.config.n_layers - 1}"
    n = len(tokens.lengths_B)
    chosen, top = [], []
    for first in range(0, n, BATCH):
        rows_B = np.resize(np.arange(first, min(first + BATCH, n)), BATCH)  # the last batch is filled up with copies
        batch = Tokens(tokens.ids_BxT[rows_B], tokens.lengths_B[rows_B])
        # Logits at every position would be most of the memory and a fifth of the work.
        x_BxTxD = model(batch, capture=[last_site], logits=False).sites[last_site]
        chosen_Bx2, top_B = _last_logits(model.config, model.params, x_BxTxD, batch.last_B, ids_Nx2[rows_B])
        real = min(BATCH, n - first)
        chosen.append(np.asarray(chosen_Bx2)[:real])
        top.append(np.asarray(top_B)[:real])
    return np.concatenate(chosen), np.concatenate(top)


@functools.partial(jax.jit, static_argnums=0)
def _last_logits(
    config: DecoderConfig, params: decoder.Params, x_BxTxD: jax.Array, last_B: jax.Array, ids_Bx2: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_Bx1xD = jnp.take_along_axis(x_BxTxD, last_B[:, None, None], axis=1)
    logits_BxV = decoder.unembed(config, params, x_Bx1xD)[:, 0]
    return jnp.take_along_axis(logits_BxV, ids_Bx2, axis=1), logits_BxV.argmax(axis=-1)
