"""Measured effects of groups of features on one prompt: the model is run with edits, and with those of control sets.

Three edits of each group, each in a run of its own in which everything else is recomputed:

total    its active features are set to 0
direct   the same while the features of all other groups keep the activations that they have in the prompt: what then
         changes is not carried by another group. Pre-activations of the held features are read, so this one run gives
         the group's edges to all other groups and to the answer
swap     its features take the activations that they have in the counterpart prompt, which asks for the wrong answer

Each edit is repeated with control sets of the same *dose*, the norm of all changes of what features write to the
stream, over layers and positions. Control sets are drawn from features of no group at the group's roles, in its span
of layers: *random* ones, and *placebo* ones, the most influential ones on the difference of two tokens that are no
answers. Features are added until the dose is reached; then all are edited partially, so that doses are equal.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from saejax.attribution.local.edits import Change
from saejax.attribution.local.model import LocalModel
from saejax.attribution.local.readouts import Readouts
from saejax.circuits.groups import THIRDS, Group, Key
from saejax.parallel.collectives import to_host

EDITS = ("total", "direct", "swap")
CONTROLS = ("random", "placebo")
_BLOCK = 64  # features whose decoder rows are read at once


@dataclasses.dataclass(frozen=True)
class PromptEffects:
    """Effects of G groups on one prompt; each has its own sets first, then random and placebo sets, S in all."""

    #: fp64 fall of the logit difference by each of ``EDITS``; NaN: there is no counterpart to swap with.
    answer_ExGxS: np.ndarray
    #: fp64 share of each group's activation that vanishes by the edit ``direct`` of another; NaN for the group itself,
    #: and for groups that are silent in this prompt.
    group_GxSxG: np.ndarray
    dose_ExGxS: np.ndarray  #: fp64 doses


@dataclasses.dataclass(frozen=True)
class EditTable:
    """Features of a prompt that an edit may change."""

    #: layer_N, position_N, feature_N: layer, position and index of each.
    layer_N: np.ndarray
    position_N: np.ndarray
    feature_N: np.ndarray
    #: old_N and new_N: its activations before and after.
    old_N: np.ndarray
    new_N: np.ndarray
    keys: Sequence[Key]  #: of each
    owner_N: np.ndarray  #: index of the group that it is in; -1: none

    def changes(self, rows: np.ndarray, fraction: float = 1.0) -> list[Change]:
        """Return the changes of some rows, made to a fraction."""
        value_N = self.old_N[rows] + fraction * (self.new_N[rows] - self.old_N[rows])
        columns = (column[rows].tolist() for column in (self.layer_N, self.position_N, self.feature_N))
        return [Change(*change) for change in zip(*columns, value_N.tolist(), strict=True)]


def edit_table(
    local: LocalModel, roles: np.ndarray, groups: Sequence[Group], counterpart: LocalModel | None = None
) -> EditTable:
    """Return the table of setting active features to 0, or to the activations that they have in the counterpart.

    Args:
      local: of the prompt.
      roles: of its positions.
      groups: that own features.
      counterpart: of a prompt of the same length, whose active features are changed, too; None: activations become 0.
    """
    index_of, new_index_of = local.active.index_of, counterpart.active.index_of if counterpart else {}
    places = sorted(index_of.keys() | new_index_of.keys())
    old_N = np.array(
        [local.active.value_A[index_of[place]] if place in index_of else 0 for place in places], np.float32
    )
    new_N = np.zeros_like(old_N)
    if counterpart:
        value_A = counterpart.active.value_A
        new_N[:] = [value_A[new_index_of[place]] if place in new_index_of else 0 for place in places]
    layer_N, position_N, feature_N = np.array(places, np.int32).reshape(-1, 3).T
    keys = [Key(layer, feature, str(roles[position])) for layer, position, feature in places]
    group_of = {key: number for number, group in enumerate(groups) for key in group.members}
    owner_N = np.array([group_of.get(key, -1) for key in keys], np.int64)
    return EditTable(layer_N, position_N, feature_N, old_N, new_N, keys, owner_N)


def measure_prompt(
    local: LocalModel,
    roles: np.ndarray,
    groups: Sequence[Group],
    answer: Readouts,
    *,
    counterpart: LocalModel | None = None,
    placebo: Mapping[Key, float] = {},
    controls: int = 2,
    seed: int = 0,
) -> PromptEffects:
    """Measure all groups on a prompt.

    Args:
      local: of the prompt.
      roles: of its positions.
      groups: disjoint.
      answer: the logit difference of the answers, one readout.
      counterpart: of its counterpart, of the same length; None: nothing is swapped.
      placebo: influence of features on a placebo target.
      controls: random and placebo sets of each group and edit.
      seed: of the control sets.
    """
    rng, sets = np.random.default_rng(seed), 1 + len(CONTROLS) * controls
    ablation = edit_table(local, roles, groups)
    swap = edit_table(local, roles, groups, counterpart) if counterpart else None
    # An edit to its own value: the feature is not computed again, and so passes nothing on.
    same = dataclasses.replace(ablation, new_N=ablation.old_N)
    held = [same.changes(np.flatnonzero(ablation.owner_N == g)) for g in range(len(groups))]
    rows: list[list[Change]] = []
    dose_ExGxS = np.full((len(EDITS), len(groups), sets), np.nan)
    for e, edit in enumerate(EDITS):
        table = swap if edit == "swap" else ablation
        for g, group in enumerate(groups):
            if table is None:
                rows += [[]] * sets
                continue
            # Below the group nothing changes, so there is nothing to hold.
            lowest = min(key.layer for key in group.members)
            above = [change for h, some in enumerate(held) if h != g for change in some if change.layer >= lowest]
            kept = above if edit == "direct" else []
            for s, (chosen, fraction, dose) in enumerate(_draw_sets(local, table, group, g, controls, placebo, rng)):
                rows.append(table.changes(chosen, fraction) + kept)
                dose_ExGxS[e, g, s] = dose
    # The rows of ``ablation`` are the active features, in their order.
    member_J = np.flatnonzero(ablation.owner_N >= 0)
    readout_R, feature_RxJ = _run_rows(local, rows, answer, member_J)
    answer_ExGxS = (answer.value_K[0] - readout_R).astype(np.float64).reshape(dose_ExGxS.shape)
    if swap is None:
        answer_ExGxS[EDITS.index("swap")] = np.nan
    act_ExGxSxJ = activations(local, member_J, feature_RxJ).astype(np.float64).reshape(*dose_ExGxS.shape, -1)
    act_GxSxJ = act_ExGxSxJ[EDITS.index("direct")]
    return PromptEffects(answer_ExGxS, _lost_shares(local, ablation.owner_N[member_J], member_J, act_GxSxJ), dose_ExGxS)


def activations(local: LocalModel, member_J: np.ndarray, pre_RxJ: np.ndarray) -> np.ndarray:
    """Return the activations [R, J] of some active features, by their indices, from pre-activations in edited runs.

    Of TopK transcoders, whose cut depends on all other features, those below 0 alone count as silent.
    """
    layer_J, feature_J = local.active.layer_A[member_J], local.active.feature_A[member_J]
    threshold_J = np.zeros(len(member_J), np.float32)
    for layer in np.unique(layer_J):
        arrays = local.dictionaries.encoder(int(layer), local.model.mesh).arrays
        if "threshold_F" in arrays:
            here = layer_J == layer
            threshold_J[here] = to_host(arrays["threshold_F"])[feature_J[here]]
    return np.where(pre_RxJ > threshold_J, pre_RxJ, 0)


def _run_rows(
    local: LocalModel, rows: Sequence[list[Change]], answer: Readouts, member_J: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the readout of each row of changes [R], and the pre-activations of some features [R, J].

    Rows whose changes begin in one third of the layers run together: what lies below a change is not run again.
    """
    n_layers = local.model.config.n_layers
    start_R = np.array([min((change.layer for change in row), default=n_layers - 1) for row in rows])
    readout_R, feature_RxJ = np.empty(len(rows), np.float32), np.empty((len(rows), len(member_J)), np.float32)
    # By thirds: rows run from the lowest layer of any of them.
    third_R = start_R * len(THIRDS) // n_layers
    for third in np.unique(third_R):
        here = np.flatnonzero(third_R == third)
        run = local.run([rows[r] for r in here.tolist()], readouts=answer, features=member_J, logits=False)
        readout_R[here], feature_RxJ[here] = run.readout_RxK[:, 0], run.feature_RxJ
    return readout_R, feature_RxJ


def _lost_shares(local: LocalModel, owner_J: np.ndarray, member_J: np.ndarray, act_GxSxJ: np.ndarray) -> np.ndarray:
    """Return the share of each group's activation, weighted by what it writes, that vanishes: [G, S, G]."""
    # Weighted by what they write: a large activation with a short decoder row matters little.
    vectors = _written(local, local.active.layer_A[member_J], local.active.feature_A[member_J])
    size_J = np.array([np.linalg.norm(vector) for vector in vectors])
    clean_J = local.active.value_A[member_J].astype(np.float64)
    lost_GxSxG = np.full((*act_GxSxJ.shape[:2], len(act_GxSxJ)), np.nan)
    for h in range(len(act_GxSxJ)):
        here = owner_J == h
        if (clean := float(clean_J[here] @ size_J[here])) > 0:
            lost_GxSxG[:, :, h] = 1 - act_GxSxJ[:, :, here] @ size_J[here] / clean
            lost_GxSxG[h, :, h] = np.nan
    return lost_GxSxG


def _written(local: LocalModel, layer_J: np.ndarray, feature_J: np.ndarray) -> list[np.ndarray]:
    """Return what each feature writes at activation 1 to the layers that it writes to, each [X, D]."""
    vectors: list[np.ndarray] = [np.empty(0)] * len(layer_J)
    # Layer by layer, since a layer's rows are read from its files together.
    for layer in np.unique(layer_J):
        here = np.flatnonzero(layer_J == layer)
        feature_U, index = np.unique(feature_J[here], return_inverse=True)
        vector_UxXxD = local.dictionaries.writes(int(layer), feature_U)
        for j, u in zip(here, index, strict=True):
            vectors[j] = vector_UxXxD[u]
    return vectors


def _draw_sets(
    local: LocalModel,
    table: EditTable,
    group: Group,
    number: int,
    controls: int,
    placebo: Mapping[Key, float],
    rng: np.random.Generator,
) -> list[tuple[np.ndarray, float, float]]:
    """Return rows, the fraction to which they are changed, and the dose: of the group, random and placebo sets."""
    # Features that the edit leaves as they are, such as equal ones in a swap, cannot make up a dose.
    changed_N = table.old_N != table.new_N
    layers, roles = [key.layer for key in group.members], {key.role for key in group.members}
    near_N = (table.layer_N >= min(layers)) & (table.layer_N <= max(layers))
    near_N &= np.array([key.role in roles for key in table.keys], bool)
    # Of no group at all, so that a control set cannot hold what another group does.
    pool_M = np.flatnonzero(near_N & (table.owner_N < 0) & changed_N)
    # No dose is too large: all of the group's features are taken.
    drawn = [_reach(local, table, np.flatnonzero((table.owner_N == number) & changed_N), np.inf)]
    influence_M = np.array([placebo.get(table.keys[row], 0.0) for row in pool_M.tolist()])
    for control in CONTROLS:
        for _ in range(controls):
            order = rng.permutation(len(pool_M))
            if control == "placebo":  # the most influential half in random order, so that placebo sets differ
                ranked = order[np.argsort(-influence_M[order], kind="stable")]
                # Half of those with any influence; the others follow where these do not reach the dose.
                first = max((influence_M > 0).sum() // 2, 1)
                order = np.concatenate([rng.permutation(ranked[:first]), ranked[first:]])
            drawn.append(_reach(local, table, pool_M[order], drawn[0][2]))
    return drawn


def _reach(local: LocalModel, table: EditTable, rows: np.ndarray, dose: float) -> tuple[np.ndarray, float, float]:
    """Return as many of the first rows as reach a dose, the fraction of their change that does, and the dose."""
    sums: dict[tuple[int, int], np.ndarray] = {}
    taken, square = 0, 0.0
    while taken < len(rows) and square < dose**2:
        block = rows[taken : taken + _BLOCK]
        vectors = _written(local, table.layer_N[block], table.feature_N[block])
        for row, vector_XxD in zip(block.tolist(), vectors, strict=True):
            place = int(table.layer_N[row]), int(table.position_N[row])
            before_XxD = sums.get(place, np.zeros_like(vector_XxD))
            # Changes at one place are summed as vectors: the dose is the norm of what reaches the stream.
            sums[place] = before_XxD + (table.new_N[row] - table.old_N[row]) * vector_XxD
            square += float((sums[place] ** 2).sum() - (before_XxD**2).sum())
            taken += 1
            if square >= dose**2:
                break
    reached = max(square, 0.0) ** 0.5
    # Partially, where the last feature went beyond the dose; never beyond what the features are.
    fraction = min(dose / reached, 1.0) if reached > 0 else 1.0
    return rows[:taken], fraction, reached * fraction
