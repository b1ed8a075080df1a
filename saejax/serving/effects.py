"""What the next token becomes when features of a prompt are changed, beside what as many random ones do."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from saejax.attribution.checks.changes import matched, set_to
from saejax.attribution.checks.edits import Change
from saejax.attribution.checks.interventions import intervene
from saejax.attribution.checks.sae_changes import changed_logits
from saejax.attribution.graph.nodes import FEATURE, Nodes
from saejax.attribution.local.prompt_run import PromptRun
from saejax.attribution.local.replacement import Replacement
from saejax.attribution.requests import TargetText
from saejax.attribution.trace.sae_run import SaeRun
from saejax.attribution.trace.targets import read_targets
from saejax.causal.parts import OnProgress, silent
from saejax.errors import UserError
from saejax.models.tokens import token_text

HOLDS = ("nothing", "attention", "all")  # with SAEs the first alone
DRAWS = 7  # random sets: with the changes themselves as many rows as are run at once
_SHOWN = 8  # most probable tokens, before and after


def effects(
    run: Replacement | SaeRun,
    changes: Sequence[tuple[str, float, Sequence[str]]],
    hold: str,
    targets: Sequence[TargetText] = (),
    on_progress: OnProgress = silent,
) -> dict[str, Any]:
    """Runs a prompt with some features changed, and with random sets of as many other active ones changed alike.

    Args:
      run: of the prompt.
      changes: "scale" or "set", the factor or the activation, and ids of features, each in one change.
      hold: what stays as it was, with SAEs "nothing"; see ``interventions``.
      targets: what the graph explains, which is shown beside the most probable tokens.
      on_progress: called with the layers done and of all; may raise to stop.

    Returns:
      JSON data: of each of ``tokens``, the most probable after the changes first, its ``text``, ``logit`` and
      ``probability`` (before, after; 0 to 1), and ``random`` probabilities, the least and the largest; of each of
      ``differences`` of two logits its ``text``, ``value`` and ``random`` values; ``kl``, the
      divergence of the changed model from the model, in nats, and ``random_kl``; ``draws``, and why there are none.

    Raises:
      UserError: there is nothing to change, or a feature is not active in the prompt or named twice.
    """
    if isinstance(run, SaeRun) and hold != "nothing":
        raise UserError(f"hold is {hold!r}: expected nothing, as this graph is of SAEs")
    features, amount_N, is_factor_N = _changed(run, changes)
    try:
        sets, why = matched(run, features, DRAWS), ""
    except UserError as error:
        sets, why = [], str(error)
    rows = [_row(one, amount_N, is_factor_N) for one in (features, *sets)]
    readouts = read_targets(run, targets, 1, 0.0)
    if isinstance(run, SaeRun):
        on_progress(0, 1)
        changed_RxV: np.ndarray | None = changed_logits(run, rows)
    else:
        changed_RxV = intervene(run, rows, readouts, hold=hold, on_progress=on_progress, logits=True).logits_RxV
    assert changed_RxV is not None
    logits_RxV = np.concatenate([run.logits_V[None], changed_RxV]).astype(np.float64)
    text = token_text(run.model.tokenizer)
    return _told(logits_RxV, readouts.pair_Kx2.tolist(), text) | dict(draws=len(sets), no_draws=why)


def _told(logits_RxV: np.ndarray, pairs: Sequence[Sequence[int]], text: Callable[[int], str]) -> dict[str, Any]:
    """What ``effects`` says of logits: before, after, and with each random set changed.

    Args:
      logits_RxV: in this order, fp64.
      pairs: the targets' tokens; the second below 0 where a target is one token.
      text: of a token.
    """
    log_RxV = logits_RxV - logits_RxV.max(axis=1, keepdims=True)
    log_RxV -= np.log(np.exp(log_RxV).sum(axis=1, keepdims=True))
    p_RxV, kl_R = np.exp(log_RxV), (np.exp(log_RxV[0]) * (log_RxV[0] - log_RxV)).sum(axis=1)
    top = [token for row in p_RxV[:2] for token in np.argsort(-row, kind="stable")[:_SHOWN].tolist()]
    shown = sorted(dict.fromkeys([*top, *(a for a, b in pairs if b < 0)]), key=lambda token: -p_RxV[1, token])
    span = lambda value_R: [float(value_R[2:].min()), float(value_R[2:].max())] if len(value_R) > 2 else None  # noqa: E731
    difference = lambda a, b: logits_RxV[:, a] - logits_RxV[:, b]  # noqa: E731
    return dict(
        tokens=[
            dict(
                text=text(token),
                logit=logits_RxV[:2, token].tolist(),
                probability=p_RxV[:2, token].tolist(),
                random=span(p_RxV[:, token]),
            )
            for token in shown
        ],
        differences=[
            dict(text=[text(a), text(b)], value=difference(a, b)[:2].tolist(), random=span(difference(a, b)))
            for a, b in pairs
            if b >= 0
        ],
        kl=float(kl_R[1]),
        random_kl=kl_R[2:].tolist(),
    )


def _changed(
    run: PromptRun, changes: Sequence[tuple[str, float, Sequence[str]]]
) -> tuple[Nodes, np.ndarray, np.ndarray]:
    """The features that are changed, in the order (layer, position, feature), by how much, and if this is a factor."""
    active = run.active
    each = [(amount, how == "scale", name) for how, amount, ids in changes for name in ids]
    if not each:
        raise UserError("nothing is changed: name features")
    place_N = active.places(*np.array([name.split("_") for *_, name in each], np.int64).T[[0, 2, 1]])
    order_N = np.argsort(place_N)  # active features stand in that order, and random ones do
    chosen_N = place_N[order_N]
    if (np.diff(chosen_N) == 0).any():
        raise UserError("a feature is in two changes: give it one")
    amount_N, is_factor_N = np.array([(amount, scaled) for amount, scaled, _ in each], np.float64)[order_N].T
    columns = (column[chosen_N] for column in (active.layer_A, active.position_A, active.feature_A, active.value_A))
    return Nodes.of(FEATURE, *columns), amount_N, is_factor_N.astype(bool)


def _row(features: Nodes, amount_N: np.ndarray, is_factor_N: np.ndarray) -> list[Change]:
    return set_to(features, np.where(is_factor_N, amount_N * features.value_N, amount_N))
