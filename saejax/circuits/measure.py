"""Measured effects of groups of features on one prompt: the model is run with edits, and with edits of control sets.

Three edits of each group, each in a run of its own in which everything else is recomputed:

total    its active features are set to 0
direct   the same while the features of all other groups keep the activations that they have in the prompt: what then
         changes is not carried by another group. Pre-activations of the held features are read, so this one run gives
         the group's edges to all other groups and to the answer
swap     its features take the activations that they have in the counterpart prompt, which asks for the wrong answer

Each edit is repeated with control sets of the same *dose*, the norm of all changes of what features write to the
stream, over layers and positions. Control sets are drawn from features of no group at the group's roles, in its span
of layers: *random* ones, and *placebo* ones, the most influential ones on the difference of two tokens that are no
answers. They are lists to the dose (``saejax.interventions.controls``), so that doses are equal.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from saejax.attribution.local.dictionaries import LayerDictionaries
from saejax.attribution.local.edits import Change
from saejax.attribution.local.model import LocalModel
from saejax.circuits.groups import Group, Key
from saejax.interventions.controls import influential_orders, random_orders, shortest_beginning
from saejax.parallel.collectives import to_host

EDITS = ("total", "direct", "swap")
CONTROLS = ("random", "placebo")
CONTROL_SETS = 2  # of each kind, that each edit of a group is compared with, in every prompt
SETS = 1 + len(CONTROLS) * CONTROL_SETS  # a group's own features first
_BLOCK = 64  # features whose decoder rows are read at once


class PromptEffects(NamedTuple):
    """Effects of G groups on one prompt; each has its own sets first, then random and placebo sets, S in all."""

    #: fp64 share of each group's activation that vanishes by each of ``EDITS`` of another, and last the fall of the
    #: logit difference. NaN: there is no counterpart to swap with; a group by itself, or one that is silent here.
    effect_ExGxSxH: np.ndarray
    dose_ExGxS: np.ndarray  #: fp64 doses


class KeyEdit(NamedTuple):
    """A feature at a position, and the activation that an edit gives it."""

    key: Key  #: layer, index, and role of the position
    position: int
    old: float  #: activation in the prompt
    new: float  #: activation after the edit
    group: int  #: index of the group that it is in; -1: none

    def change(self, fraction: float) -> Change:
        """Return the change of a run, made to a fraction; to 0 it holds the feature at its activation."""
        value = self.old + fraction * (self.new - self.old)
        return Change(self.key.layer, self.position, self.key.feature, float(value))


def measure_prompt(
    local: LocalModel,
    roles: np.ndarray,
    groups: Sequence[Group],
    answers: tuple[int, int],
    *,
    counterpart: LocalModel | None = None,
    placebo: Mapping[Key, float] = {},
    seed: int = 0,
) -> PromptEffects:
    """Measure all groups on a prompt.

    Args:
      local: the local model of the prompt.
      roles: role of each position of the prompt.
      groups: groups of features, of which none is in two groups.
      answers: token ids of the correct and the wrong answer.
      counterpart: the local model of the prompt's counterpart, of the same length; None: nothing is swapped.
      placebo: influence of features on a placebo target.
      seed: seed of the control sets.
    """
    rng, count = np.random.default_rng(seed), len(groups)
    ablation = _list_edits(local, roles, groups)
    edits_of = dict(total=ablation, direct=ablation)
    if counterpart:
        edits_of["swap"] = _list_edits(local, roles, groups, counterpart)
    # All sets before all runs: the random draws then have one order.
    sets_ExG = [
        [_draw_sets(local, edits, groups, g, placebo, rng) for g in range(count)] for edits in edits_of.values()
    ]
    # Edits of ``ablation`` are of the active features, in their order.
    member_J = np.array([index for index, edit in enumerate(ablation) if edit.group >= 0], np.int64)
    members = [ablation[index] for index in member_J.tolist()]
    # Weighted by what they write: a large activation with a short decoder row matters little.
    size_J = np.array(
        [
            np.linalg.norm(vector_XxD)
            for vector_XxD in _written(local.dictionaries, [edit.key.address for edit in members])
        ],
        np.float64,
    )
    old_J, group_J = np.array([(edit.old, edit.group) for edit in members], np.float64).reshape(-1, 2).T
    weight_JxG = np.where(group_J[:, None] == np.arange(count), size_J[:, None], 0)
    clean_G = old_J @ weight_JxG
    clean_G[clean_G == 0] = np.nan

    effect_ExGxSxH = np.full((len(EDITS), count, SETS, count + 1), np.nan)
    dose_ExGxS = np.full(effect_ExGxSxH.shape[:3], np.nan)
    for g, group in enumerate(groups):
        lowest = min(key.layer for key in group.members)
        # Below the group nothing changes.
        held = [edit.change(0) for edit in members if edit.group != g and edit.key.layer >= lowest]
        # The rows of a group run together: what lies below its features is not run again.
        rows = [
            changes + (held if name == "direct" else [])
            for name, sets_G in zip(edits_of, sets_ExG, strict=True)
            for changes, _ in sets_G[g]
        ]
        # Last the prompt itself, in the same program: another one would round its logits otherwise.
        run = local.run([*rows, []], features=member_J)
        assert run.logits_RxV is not None
        # Logits as the model gives them: a final soft cap bends differences.
        difference_R = -np.diff(run.logits_RxV[:, answers].astype(np.float64))[:, 0]
        lost_RxG = 1 - activations(local, member_J, run.feature_RxJ[:-1]) @ weight_JxG / clean_G
        lost_RxG[:, g] = np.nan
        lost_RxH = np.column_stack([lost_RxG, difference_R[-1] - difference_R[:-1]])
        effect_ExGxSxH[: len(edits_of), g] = lost_RxH.reshape(-1, SETS, count + 1)
        dose_ExGxS[: len(edits_of), g] = [[dose for _, dose in sets_G[g]] for sets_G in sets_ExG]
    return PromptEffects(effect_ExGxSxH, dose_ExGxS)


def activations(local: LocalModel, member_J: np.ndarray, pre_RxJ: np.ndarray) -> np.ndarray:
    """Return the activations [R, J] of some active features, by their indices, from pre-activations in edited runs.

    Of TopK transcoders, whose cut depends on all other features, those below 0 alone count as silent.
    """
    layer_J, feature_J = local.active.layer_A[member_J], local.active.feature_A[member_J]
    threshold_J = np.zeros(len(member_J), np.float32)
    for layer in np.unique(layer_J):
        arrays = local.encoder(int(layer)).arrays
        if "threshold_F" in arrays:
            here = layer_J == layer
            threshold_J[here] = to_host(arrays["threshold_F"])[feature_J[here]]
    return np.where(pre_RxJ > threshold_J, pre_RxJ, 0)


def _list_edits(
    local: LocalModel, roles: np.ndarray, groups: Sequence[Group], counterpart: LocalModel | None = None
) -> list[KeyEdit]:
    """List an edit of every feature that is active in either prompt: to its activation in the counterpart.

    Without a counterpart it is an edit to 0.
    """
    group_of = {key: number for number, group in enumerate(groups) for key in group.members}
    old_of, new_of = (
        dict(zip(model.active.index_of, model.active.value_A, strict=True)) if model else {}
        for model in (local, counterpart)
    )
    edits, zero = [], np.float32(0)
    for place in sorted(old_of.keys() | new_of.keys()):
        layer, position, feature = place
        key = Key(layer, feature, str(roles[position]))
        edits.append(KeyEdit(key, position, old_of.get(place, zero), new_of.get(place, zero), group_of.get(key, -1)))
    return edits


def _draw_sets(
    local: LocalModel,
    edits: Sequence[KeyEdit],
    groups: Sequence[Group],
    number: int,
    placebo: Mapping[Key, float],
    rng: np.random.Generator,
) -> list[tuple[list[Change], float]]:
    """Return the changes and the dose of a group, by its number, then of random and of placebo sets."""
    members = groups[number].members
    layers, roles = [key.layer for key in members], {key.role for key in members}
    # Features that the edit leaves as they are, such as equal ones in a swap, cannot make up a dose.
    changed = [edit for edit in edits if edit.old != edit.new]
    # No dose is too large: all of the group's features are taken.
    sets = [_reach(local, [edit for edit in changed if edit.group == number], np.inf)]
    # Of no group at all, so that a control set cannot hold what another group does.
    pool = [
        edit
        for edit in changed
        if edit.group < 0 and min(layers) <= edit.key.layer <= max(layers) and edit.key.role in roles
    ]
    influence_M, seed = np.array([placebo.get(edit.key, 0.0) for edit in pool]), int(rng.integers(2**31))
    orders = (
        random_orders(np.arange(len(pool)), CONTROL_SETS, seed),
        influential_orders(influence_M, CONTROL_SETS, seed),
    )
    for order_M in itertools.chain(*orders):  # in the order of ``CONTROLS``
        sets.append(_reach(local, [pool[m] for m in order_M.tolist()], sets[0][1]))
    return sets


def _reach(local: LocalModel, edits: Sequence[KeyEdit], dose: float) -> tuple[list[Change], float]:
    """Return as many of the first edits as reach a dose, made partially where they exceed it, and their dose."""
    changes = [(edit.key.layer, edit.position, edit.key.feature, edit.new - edit.old) for edit in edits]
    # A group that is silent in the prompt has no dose to reach.
    squares = squared_doses(local.dictionaries, changes)
    size, fraction, reached = shortest_beginning(squares, dose) if dose > 0 else (0, 1.0, 0.0)
    return [edit.change(fraction) for edit in edits[:size]], reached


def squared_doses(dictionaries: LayerDictionaries, changes: Sequence[tuple[int, int, int, float]]) -> Iterator[float]:
    """Yield the square of the dose of each beginning of a list of changes.

    Args:
      dictionaries: the dictionaries of the features.
      changes: layer, position and index of each feature, and by how much its activation changes.
    """
    sums: dict[tuple[int, int], np.ndarray] = {}
    square = 0.0
    features = [(layer, feature) for layer, _, feature, _ in changes]
    for (layer, position, _, rise), vector_XxD in zip(changes, _written(dictionaries, features), strict=True):
        before_XxD = sums.get((layer, position), np.zeros_like(vector_XxD, np.float64))
        # Changes at one place are summed as vectors: the dose is the norm of what reaches the stream.
        sums[layer, position] = before_XxD + rise * vector_XxD
        square += float((sums[layer, position] ** 2).sum() - (before_XxD**2).sum())
        yield square


def _written(dictionaries: LayerDictionaries, features: Sequence[tuple[int, int]]) -> Iterator[np.ndarray]:
    """Yield what each feature, a layer and an index, writes at activation 1 to the layers that it writes to, [X, D]."""
    for start in range(0, len(features), _BLOCK):
        block = features[start : start + _BLOCK]
        vectors = dict[tuple[int, int], np.ndarray]()
        # Layer by layer, since a layer's rows are read from its files together.
        for layer in {layer for layer, _ in block}:
            here = sorted({feature for member_layer, feature in block if member_layer == layer})
            written_UxXxD = dictionaries.writes(layer, np.array(here))
            vectors |= {(layer, feature): written_UxXxD[u] for u, feature in enumerate(here)}
        yield from map(vectors.__getitem__, block)
