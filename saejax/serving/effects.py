"""Effects of edited features of a prompt on the next token and on the text, beside random features at equal dose.

The dose of changes is the length of what they add to the stream, over layers and the prompt's positions
(``circuits.measure.squared_doses``). Changes of as many random features are made longer or shorter until they have that
of the named ones.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import log_softmax

from saejax.attribution.checks import matched, set_to
from saejax.attribution.graph.data import Nodes
from saejax.attribution.local.edits import Change
from saejax.attribution.local.model import LocalModel
from saejax.attribution.local.rows import Target, read_targets
from saejax.attribution.local.state import FREEZE_MODES, PromptRun
from saejax.attribution.trace.gradient import SaeRun
from saejax.circuits.measure import squared_doses
from saejax.errors import UserError
from saejax.models.tokens import continuation_text, token_text
from saejax.progress import OnProgress, silent

MODES = FREEZE_MODES[:3]  # not the one that takes a layer; with SAEs the first alone
DRAWS = 7  # random sets: with the changes themselves 8 rows, to which fewer would be filled up
TEXTS = 3  # random sets with which a text is continued
_SHOWN = 8  # most probable tokens, before and after


def effects(
    run: LocalModel | SaeRun,
    changes: Sequence[tuple[str, float, Sequence[str]]],
    freeze: str,
    targets: Sequence[Target] = (),
    on_progress: OnProgress = silent,
) -> dict[str, Any]:
    """Run a prompt with some features changed, and with as many random active features changed at equal dose.

    Args:
      run: the run of the prompt.
      changes: "scale" or "set", the factor or the activation, and ids of features, each in one change.
      freeze: what is frozen at its values in the prompt, "none" with SAEs; see ``LocalModel.run``.
      targets: the graph's targets, which are shown with the most probable tokens.
      on_progress: called with the numbers of layers done and of all layers; may raise to stop.

    Returns:
      ``tokens``, the most probable next tokens, after the changes first: of each its ``text``, ``logit`` and
      ``probability`` before and after, and ``random``, the least and the largest probability with random sets changed
      (None: there are none). ``differences``, of logits that the graph explains: ``text`` of both tokens,
      ``value`` before and after, ``random``. ``kl``, the divergence of the changed model from the model in nats, and
      ``random_kl`` with each random set changed; ``draws``, their number; ``no_draws``, why there are none.

    Raises:
      UserError: there is nothing to change, or a feature is not active in the prompt or named twice.
    """
    rows, why = _rows(run, changes, DRAWS)
    readouts = read_targets(run, targets, 1, 0.0)
    changed_RxV = run.run(rows, freeze, readouts=readouts, on_progress=on_progress).logits_RxV
    assert changed_RxV is not None
    # Before the changes, after them, and with each random set changed.
    logits_RxV = np.concatenate([run.logits_V[None], changed_RxV]).astype(np.float64)
    text, pairs = token_text(run.model.tokenizer), readouts.pair_Kx2.tolist()
    log_RxV = log_softmax(logits_RxV, axis=1)
    p_RxV, kl_R = np.exp(log_RxV), (np.exp(log_RxV[0]) * (log_RxV[0] - log_RxV)).sum(axis=1)
    top = [token for row in p_RxV[:2] for token in np.argsort(-row, kind="stable")[:_SHOWN].tolist()]
    shown = sorted(dict.fromkeys([*top, *(a for a, b in pairs if b < 0)]), key=lambda token: -p_RxV[1, token])
    differences = [(a, b, logits_RxV[:, a] - logits_RxV[:, b]) for a, b in pairs if b >= 0]

    def ends(value_R: np.ndarray) -> list[float]:
        """Before the changes, and after."""
        return value_R[:2].tolist()

    def span(value_R: np.ndarray) -> list[float] | None:
        """Return the least and the largest with random sets changed."""
        return [float(value_R[2:].min()), float(value_R[2:].max())] if len(value_R) > 2 else None

    return dict(
        tokens=[
            dict(text=text(t), logit=ends(logits_RxV[:, t]), probability=ends(p_RxV[:, t]), random=span(p_RxV[:, t]))
            for t in shown
        ],
        differences=[
            dict(text=[text(a), text(b)], value=ends(value_R), random=span(value_R)) for a, b, value_R in differences
        ],
        kl=float(kl_R[1]),
        random_kl=kl_R[2:].tolist(),
        draws=len(kl_R) - 2,
        no_draws=why,
    )


def continuations(
    run: LocalModel | SaeRun,
    changes: Sequence[tuple[str, float, Sequence[str]]],
    freeze: str,
    tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    onward: bool = True,
    on_progress: OnProgress = silent,
) -> dict[str, Any]:
    """Continue a prompt as it is, with features changed, and with random active features changed at equal dose.

    Args:
      run: the run of the prompt.
      changes: as for ``effects``.
      freeze: "none" or "attention".
      tokens: maximum number of new tokens.
      temperature: see ``LocalModel.generate_rows``.
      seed: of the sample.
      onward: whether a feature stays changed from its last position on, in the new tokens, too.
      on_progress: called with the tokens done and of all; may raise to stop.

    Returns:
      ``texts``: what each text is ("clean", "changed", "random") and the text; ``no_draws``, why there are no random
      ones.

    Raises:
      UserError: the graph is of SAEs, or as for ``effects`` and ``LocalModel.generate_rows``.
    """
    if isinstance(run, SaeRun):
        raise UserError("text is generated for graphs of transcoders: this graph is of SAEs")
    changed, why = _rows(run, changes, TEXTS)
    rows = [[], *changed]
    if onward:
        rows = [_onward(row) for row in rows]
    texts = run.generate_rows(rows, tokens, freeze, temperature=temperature, seed=seed, on_progress=on_progress)
    kinds = ["clean", "changed", *["random"] * (len(changed) - 1)]
    written = [continuation_text(run.model.tokenizer, text.ids_N) for text in texts]
    return dict(texts=list(map(list, zip(kinds, written, strict=True))), no_draws=why)


def _onward(row: Sequence[Change]) -> list[Change]:
    """Return the changes, each at one position, of which the last one of a feature also means all later positions."""
    last = dict[tuple[int, int], Any]()
    for change in row:
        key = change.layer, change.feature
        last[key] = max(last.get(key, 0), change.position)
    is_last = [last[change.layer, change.feature] == change.position for change in row]
    return [
        change._replace(position=slice(change.position, None)) if ends else change
        for change, ends in zip(row, is_last, strict=True)
    ]


def _changed(
    run: PromptRun, changes: Sequence[tuple[str, float, Sequence[str]]]
) -> tuple[Nodes, np.ndarray, np.ndarray]:
    """Return the changed features in the order of ``Active``, the amounts, and whether each is a factor."""
    active = run.active
    changed = [(amount, how == "scale", name) for how, amount, ids in changes for name in ids]
    if not changed:
        raise UserError("nothing is changed: name features")
    place_N = active.find(*np.array([name.split("_") for *_, name in changed], np.int64).T[[0, 2, 1]])
    order_N = np.argsort(place_N)  # active features stand in that order, and random ones do
    chosen_N = place_N[order_N]
    if (np.diff(chosen_N) == 0).any():
        raise UserError("a feature is in two changes: give it one")
    amount_N, is_factor_N = np.array([(amount, scaled) for amount, scaled, _ in changed], np.float64)[order_N].T
    return active[chosen_N].nodes, amount_N, is_factor_N.astype(bool)


def _rows(
    run: PromptRun, changes: Sequence[tuple[str, float, Sequence[str]]], draws: int
) -> tuple[list[list[Change]], str]:
    """Return the changes of the named features, then of random ones at equal dose; and why there are no random ones."""
    features, amount_N, is_factor_N = _changed(run, changes)
    try:
        sets, why = matched(run, features, draws), ""
    except UserError as error:
        sets, why = [], str(error)
    rows, doses = list[list[Change]](), list[float]()
    for members in (features, *sets):
        old_N = members.value_N.astype(np.float64)
        rise_N = np.where(is_factor_N, amount_N * old_N, amount_N) - old_N
        columns = members.layer_N.tolist(), members.position_N.tolist(), members.index_N.tolist(), rise_N.tolist()
        *_, square = squared_doses(run.dictionaries, list(zip(*columns, strict=True)))
        doses.append(math.sqrt(max(square, 0.0)))
        rows.append(set_to(members, old_N + rise_N * (doses[0] / doses[-1] if doses[-1] else 0.0)))
    return rows, why
