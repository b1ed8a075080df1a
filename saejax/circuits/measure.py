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
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from saejax.attribution.local.edits import Change
from saejax.attribution.local.model import LocalModel
from saejax.attribution.local.readouts import Readouts
from saejax.circuits.groups import Group, Key
from saejax.parallel.collectives import to_host

EDITS = ("total", "direct", "swap")
CONTROLS = ("random", "placebo")
CONTROL_SETS = 2  # of each kind, that each edit of a group is compared with, in every prompt
SETS = 1 + len(CONTROLS) * CONTROL_SETS  # a group's own features first
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
    value_of, new_value_of = (
        dict(zip(model.active.index_of, model.active.value_A, strict=True)) if model else {}
        for model in (local, counterpart)
    )
    places = sorted(value_of.keys() | new_value_of.keys())
    old_N, new_N = (
        np.array([values.get(place, 0) for place in places], np.float32) for values in (value_of, new_value_of)
    )
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
      seed: of the control sets.
    """
    rng = np.random.default_rng(seed)
    ablation = edit_table(local, roles, groups)
    tables = dict(total=ablation, direct=ablation)
    if counterpart:
        tables["swap"] = edit_table(local, roles, groups, counterpart)
    # Holding a feature is setting it to the activation that it has.
    same = dataclasses.replace(ablation, new_N=ablation.old_N)
    held = [same.changes(np.flatnonzero(ablation.owner_N == g)) for g in range(len(groups))]
    rows: list[list[list[Change]]] = [[] for _ in groups]
    dose_ExGxS = np.full((len(EDITS), len(groups), SETS), np.nan)
    for e, (edit, table) in enumerate(tables.items()):
        for g, group in enumerate(groups):
            # Below the group nothing changes, so there is nothing to hold.
            lowest = min(key.layer for key in group.members)
            above = [change for h, some in enumerate(held) if h != g for change in some if change.layer >= lowest]
            kept = above if edit == "direct" else []
            for s, (chosen, fraction, dose) in enumerate(_draw_sets(local, table, group, g, placebo, rng)):
                rows[g].append(table.changes(chosen, fraction) + kept)
                dose_ExGxS[e, g, s] = dose

    # The rows of ``ablation`` are the active features, in their order.
    member_J = np.flatnonzero(ablation.owner_N >= 0)
    answer_ExGxS, act_GxSxJ = np.full_like(dose_ExGxS, np.nan), np.empty((len(groups), SETS, len(member_J)))
    for g in range(len(groups)):
        # The rows of a group run together: what lies below its features is not run again.
        run = local.run(rows[g], readouts=answer, features=member_J, logits=False)
        answer_ExGxS[: len(tables), g] = (answer.value_K[0] - run.readout_RxK[:, 0]).reshape(len(tables), SETS)
        act_ExSxJ = activations(local, member_J, run.feature_RxJ).reshape(len(tables), SETS, -1)
        act_GxSxJ[g] = act_ExSxJ[EDITS.index("direct")]
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


def _lost_shares(local: LocalModel, owner_J: np.ndarray, member_J: np.ndarray, act_GxSxJ: np.ndarray) -> np.ndarray:
    """Return the share of each group's activation, weighted by what it writes, that vanishes: [G, S, G]."""
    # Weighted by what they write: a large activation with a short decoder row matters little.
    written = _written(local, local.active.layer_A[member_J], local.active.feature_A[member_J])
    size_J = np.array([np.linalg.norm(vector_XxD) for vector_XxD in written])
    clean_J = local.active.value_A[member_J].astype(np.float64)
    lost_GxSxG = np.full((*act_GxSxJ.shape[:2], len(act_GxSxJ)), np.nan)
    for h in range(len(act_GxSxJ)):
        here = owner_J == h
        if (clean := float(clean_J[here] @ size_J[here])) > 0:
            lost_GxSxG[:, :, h] = 1 - act_GxSxJ[:, :, here] @ size_J[here] / clean
            lost_GxSxG[h, :, h] = np.nan
    return lost_GxSxG


def _written(local: LocalModel, layer_J: np.ndarray, feature_J: np.ndarray) -> Iterator[np.ndarray]:
    """Yield what each feature writes at activation 1 to the layers that it writes to, each [X, D]."""
    for start in range(0, len(layer_J), _BLOCK):
        layer_B, feature_B = layer_J[start : start + _BLOCK], feature_J[start : start + _BLOCK]
        vector_of: dict[tuple[int, int], np.ndarray] = {}
        # Layer by layer, since a layer's rows are read from its files together.
        for layer in np.unique(layer_B).tolist():
            feature_U = np.unique(feature_B[layer_B == layer])
            vector_UxXxD = local.dictionaries.writes(layer, feature_U)
            vector_of |= {
                (layer, u): vector_XxD for u, vector_XxD in zip(feature_U.tolist(), vector_UxXxD, strict=True)
            }
        yield from (vector_of[place] for place in zip(layer_B.tolist(), feature_B.tolist(), strict=True))


def _draw_sets(
    local: LocalModel,
    table: EditTable,
    group: Group,
    number: int,
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
    for control in np.repeat(CONTROLS, CONTROL_SETS):
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
    written = _written(local, table.layer_N[rows], table.feature_N[rows])
    for row, vector_XxD in zip(rows.tolist(), written, strict=True):
        if square >= dose**2:
            break
        place = int(table.layer_N[row]), int(table.position_N[row])
        before_XxD = sums.get(place, np.zeros_like(vector_XxD))
        # Changes at one place are summed as vectors: the dose is the norm of what reaches the stream.
        sums[place] = before_XxD + (table.new_N[row] - table.old_N[row]) * vector_XxD
        square += float((sums[place] ** 2).sum() - (before_XxD**2).sum())
        taken += 1
    reached = max(square, 0.0) ** 0.5
    # Partially, where the last feature went beyond the dose; never beyond what the features are.
    fraction = min(dose / reached, 1.0) if reached > 0 else 1.0
    return rows[:taken], fraction, reached * fraction
