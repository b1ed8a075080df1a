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
from typing import NamedTuple

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


class KeyEdit(NamedTuple):
    """A feature at a position, and the activation that an edit gives it."""

    key: Key  #: layer, index, and role of the position
    position: int
    old: float  #: activation in the prompt
    new: float  #: activation after the edit
    group: int  #: index of the group that it is in; -1: none

    def change(self, fraction: float = 1.0) -> Change:
        """Return the change of a run, made to a fraction."""
        value = self.old + fraction * (self.new - self.old)
        return Change(self.key.layer, self.position, self.key.feature, float(value))


def list_edits(
    local: LocalModel, roles: np.ndarray, groups: Sequence[Group], counterpart: LocalModel | None = None
) -> list[KeyEdit]:
    """Return the edits that set features to 0, or to the activations that they have in the counterpart.

    Args:
      local: of the prompt, each of whose active features has an edit, in their order.
      roles: of its positions.
      groups: that own features.
      counterpart: of a prompt of the same length, whose active features are changed, too; None: activations become 0.
    """
    group_of = {key: number for number, group in enumerate(groups) for key in group.members}
    old_of, new_of = (
        dict(zip(model.active.index_of, model.active.value_A, strict=True)) if model else {}
        for model in (local, counterpart)
    )
    edits = []
    for place in sorted(old_of.keys() | new_of.keys()):
        layer, position, feature = place
        key, zero = Key(layer, feature, str(roles[position])), np.float32(0)
        edits.append(KeyEdit(key, position, old_of.get(place, zero), new_of.get(place, zero), group_of.get(key, -1)))
    return edits


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
    ablation = list_edits(local, roles, groups)
    edits_of = dict(total=ablation, direct=ablation)
    if counterpart:
        edits_of["swap"] = list_edits(local, roles, groups, counterpart)
    rows: list[list[list[Change]]] = [[] for _ in groups]
    dose_ExGxS = np.full((len(EDITS), len(groups), SETS), np.nan)
    for e, (name, edits) in enumerate(edits_of.items()):
        for g, group in enumerate(groups):
            lowest = min(key.layer for key in group.members)
            # Holding a feature is setting it to the activation that it has. Below the group nothing changes.
            held = [
                edit._replace(new=edit.old).change()
                for edit in ablation
                if name == "direct" and edit.group not in (-1, g) and edit.key.layer >= lowest
            ]
            for s, (chosen, fraction, dose) in enumerate(_draw_sets(local, edits, group, g, placebo, rng)):
                rows[g].append([edit.change(fraction) for edit in chosen] + held)
                dose_ExGxS[e, g, s] = dose

    # Edits of ``ablation`` are of the active features, in their order.
    member_J = np.array([index for index, edit in enumerate(ablation) if edit.group >= 0], np.int64)
    answer_ExGxS, act_GxSxJ = np.full_like(dose_ExGxS, np.nan), np.empty((len(groups), SETS, len(member_J)))
    for g in range(len(groups)):
        # The rows of a group run together: what lies below its features is not run again.
        run = local.run(rows[g], readouts=answer, features=member_J, logits=False)
        answer_ExGxS[: len(edits_of), g] = (answer.value_K[0] - run.readout_RxK[:, 0]).reshape(len(edits_of), SETS)
        act_ExSxJ = activations(local, member_J, run.feature_RxJ).reshape(len(edits_of), SETS, -1)
        act_GxSxJ[g] = act_ExSxJ[EDITS.index("direct")]
    members = [ablation[index] for index in member_J.tolist()]
    return PromptEffects(answer_ExGxS, _lost_shares(local, members, act_GxSxJ), dose_ExGxS)


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


def _lost_shares(local: LocalModel, members: Sequence[KeyEdit], act_GxSxJ: np.ndarray) -> np.ndarray:
    """Return the share of each group's activation, weighted by what it writes, that vanishes: [G, S, G]."""
    # Weighted by what they write: a large activation with a short decoder row matters little.
    size_J = np.array([np.linalg.norm(vector_XxD) for vector_XxD in _written(local, members)])
    clean_J, group_J = np.array([(edit.old, edit.group) for edit in members], np.float64).reshape(-1, 2).T
    lost_GxSxG = np.full((*act_GxSxJ.shape[:2], len(act_GxSxJ)), np.nan)
    for h in range(len(act_GxSxJ)):
        here = group_J == h
        if (clean := float(clean_J[here] @ size_J[here])) > 0:
            lost_GxSxG[:, :, h] = 1 - act_GxSxJ[:, :, here] @ size_J[here] / clean
            lost_GxSxG[h, :, h] = np.nan
    return lost_GxSxG


def _written(local: LocalModel, edits: Sequence[KeyEdit]) -> Iterator[np.ndarray]:
    """Yield what each feature writes at activation 1 to the layers that it writes to, each [X, D]."""
    for start in range(0, len(edits), _BLOCK):
        block = [edit.key for edit in edits[start : start + _BLOCK]]
        vector_of: dict[tuple[int, int], np.ndarray] = {}
        # Layer by layer, since a layer's rows are read from its files together.
        for layer in {key.layer for key in block}:
            feature_U = np.unique([key.feature for key in block if key.layer == layer])
            vector_UxXxD = local.dictionaries.writes(layer, feature_U)
            vector_of |= {
                (layer, u): vector_XxD for u, vector_XxD in zip(feature_U.tolist(), vector_UxXxD, strict=True)
            }
        yield from (vector_of[key.address] for key in block)


def _draw_sets(
    local: LocalModel,
    edits: Sequence[KeyEdit],
    group: Group,
    number: int,
    placebo: Mapping[Key, float],
    rng: np.random.Generator,
) -> list[tuple[Sequence[KeyEdit], float, float]]:
    """Return edits, the fraction to which they are made, and the dose: of the group, random and placebo sets."""
    layers, roles = [key.layer for key in group.members], {key.role for key in group.members}
    # Features that the edit leaves as they are, such as equal ones in a swap, cannot make up a dose.
    changed = [edit for edit in edits if edit.old != edit.new]
    # Of no group at all, so that a control set cannot hold what another group does.
    near = [edit for edit in changed if edit.group < 0 and min(layers) <= edit.key.layer <= max(layers)]
    pool = [edit for edit in near if edit.key.role in roles]
    # No dose is too large: all of the group's features are taken.
    drawn = [_reach(local, [edit for edit in changed if edit.group == number], np.inf)]
    influence_M = np.array([placebo.get(edit.key, 0.0) for edit in pool])
    for control in np.repeat(CONTROLS, CONTROL_SETS):
        order = rng.permutation(len(pool))
        if control == "placebo":  # the most influential half in random order, so that placebo sets differ
            ranked = order[np.argsort(-influence_M[order], kind="stable")]
            # Half of those with any influence; the others follow where these do not reach the dose.
            first = max((influence_M > 0).sum() // 2, 1)
            order = np.concatenate([rng.permutation(ranked[:first]), ranked[first:]])
        drawn.append(_reach(local, [pool[m] for m in order.tolist()], drawn[0][2]))
    return drawn


def _reach(local: LocalModel, edits: Sequence[KeyEdit], dose: float) -> tuple[Sequence[KeyEdit], float, float]:
    """Return as many of the first edits as reach a dose, the fraction of them that does, and the dose."""
    sums: dict[tuple[int, int], np.ndarray] = {}
    taken, square = 0, 0.0
    for edit, vector_XxD in zip(edits, _written(local, edits), strict=True):
        if square >= dose**2:
            break
        place = edit.key.layer, edit.position
        before_XxD = sums.get(place, np.zeros_like(vector_XxD))
        # Changes at one place are summed as vectors: the dose is the norm of what reaches the stream.
        sums[place] = before_XxD + (edit.new - edit.old) * vector_XxD
        square += float((sums[place] ** 2).sum() - (before_XxD**2).sum())
        taken += 1
    reached = max(square, 0.0) ** 0.5
    # Partially, where the last feature went beyond the dose; never beyond what the features are.
    fraction = min(dose / reached, 1.0) if reached > 0 else 1.0
    return edits[:taken], fraction, reached * fraction
