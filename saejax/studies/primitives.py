"""Primitives of a benchmark: groups of features that matter for the same items, such as additions.

1. Attributions of features for the answers to each train item are their profiles, once every item has the same size.
   The features with the largest mean over all items are grouped by the correlation of their profiles (average linkage,
   cut where 95 % of shuffled profiles have no group); a group is stable if it is found again on resampled items. No
   category is looked at until here, so that permuting them below is a test.
2. A stable group is named after the category for whose items it matters most, if that is more than with categories
   permuted over items. The largest contrast of all groups and categories is permuted, which corrects for their number.
3. Groups are ablated on the test items. The effect on the items of the group's category is compared with random lists
   and placebo sets of its dose there, each measured on these items, and with its effect on other items. As many groups
   are tested, the most outstanding first, as can pass Holm's correction with the control sets that there are.
4. A group recurs in a dictionary of another seed, or in another model, if a stable group there has the same name. Names
   are few: recurrences in other seeds count where all of a dictionary's groups together have more of them than with
   the names of each other dictionary permuted over the categories.

Transfer to unseen domains is measured alike: features chosen on one benchmark are ablated on the items of another, and
compared with random lists of their dose there, without them.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from saejax.interventions.answers import mean_interval
from saejax.interventions.benchmark import control_group
from saejax.interventions.controls import lists_differ
from saejax.interventions.table import EffectsTable, PromptDefinition
from saejax.matching.clusters.groups import DISSOLVED, overlaps
from saejax.results import Interval
from saejax.statistics.bootstrap import resampling_weights
from saejax.statistics.permutation import label_correlations
from saejax.statistics.ranks import holm_by_key, min_controls, rank_p

GROUP = "primitive "  # and its number: the group of its edits
CHOSEN_ON = "chosen on "  # and the benchmark: the group of edits of features that another benchmark chose
LEVEL = 0.05  # of a name, and of the comparison with control sets
IMPORTANT, SMALLEST, MOST = 64, 3, 4  # features that are grouped; of the smallest group; groups that are ablated
_RESAMPLES, _PERMUTATIONS = 50, 999
RULE = (
    f"The {IMPORTANT} features with the largest mean attribution over all train items, whatever their category, are "
    f"grouped by the correlation of their attributions (average linkage, at least {SMALLEST} features, cut where "
    f"{100 * LEVEL:g} % of shuffled profiles have a group). A group is a primitive if its mean overlap with a group of "
    f"resampled items is at least {DISSOLVED:g}. It is named after a category if its attributions there exceed those "
    f"elsewhere by more than with categories permuted over items (p at most {LEVEL:g} for the largest contrast of "
    f"all groups and categories). Up to {MOST} groups are ablated. As many of them are compared with control sets, "
    f"those that stand out most first, as can reach p at most {LEVEL:g} after Holm's correction "
    "with the sets that there are."
)


@dataclasses.dataclass(frozen=True)
class FeaturePrimitive:
    """A stable group of features with the category that it is named after."""

    name: str  #: the category; "" where no category stands out
    features: tuple[int, ...]  #: the most important first
    overlap: float  #: mean Jaccard overlap with the most similar group of resampled items, at least 0.5
    contrast: float  #: attribution in its category against that elsewhere, standard errors
    p_value: float  #: of the largest contrast of all groups with categories permuted
    examples: tuple[str, ...]  #: ids of the train items for which it matters most


@dataclasses.dataclass(frozen=True)
class PrimitiveEffect:
    """The effect of ablating a primitive on test items."""

    group: int  #: its place among the primitives
    items: int  #: test items of its category; without a name all
    effect: Interval  #: drop of the reference's log-likelihood on these, nats
    elsewhere: Interval | None  #: on other test items; None without any
    random: float | None  #: mean drop under random lists of its dose on the items of ``effect``, measured there
    placebo: float | None  #: the same under placebo sets
    sets: int  #: control sets: random lists without its features, or placebo sets if these are fewer
    needed: int  #: sets of each kind that it takes to test as many groups as were tested, or one more for this one
    p_random: float | None  #: rank among random sets, corrected by Holm over the tested groups; None: not testable
    p_placebo: float | None  #: the same among placebo sets
    answer: str  #: whether it is more than both: yes, no or not testable


@dataclasses.dataclass(frozen=True)
class DomainEffect:
    """The effect of features that were chosen on another benchmark."""

    effect: Interval  #: drop of the reference's log-likelihood, nats
    random: float | None  #: mean drop under random lists of the same dose; None without any
    p_value: float | None  #: rank among these, not corrected
    random_sets: int  #: number of these lists, without the features
    common: int  #: features that were also chosen here


@dataclasses.dataclass(frozen=True)
class BenchmarkPrimitives:
    """The primitives of a benchmark."""

    rule: str  #: in words
    features: int  #: that were grouped
    groups: int  #: found, stable or not
    shuffled: float  #: groups of shuffled profiles at the same cut, mean
    primitives: tuple[FeaturePrimitive, ...]  #: stable groups, the named ones first
    effects: tuple[PrimitiveEffect, ...]  #: of those that were ablated
    #: dictionary of another seed -> for each primitive whether one there has the same name
    seeds: Mapping[str, tuple[bool, ...]] = dataclasses.field(default_factory=dict)
    #: share of permutations of names with as many recurrences of all groups together; None: too few names to be rare
    p_recurs: float | None = None
    #: whether any group could be named: False where even the best fit is not rare on so few items
    can_name: bool = True


def find_primitives(
    attribution_PxF: np.ndarray, ids: Sequence[str], categories: Sequence[Sequence[str]], seed: int
) -> BenchmarkPrimitives:
    """Return the primitives of a benchmark, before they are ablated.

    Args:
      attribution_PxF: attribution of each feature for the answer to each train item, nats.
      ids: names of the P items.
      categories: of each item.
      seed: of the resamples and permutations.
    """
    names = sorted({name for some in categories for name in some})
    inside_CxP = np.array([[name in some for some in categories] for name in names], bool).reshape(len(names), len(ids))
    # Items whose answer is unlikely have large attributions of all features, which would make all profiles alike.
    size_Px1 = np.sqrt(np.square(attribution_PxF).mean(axis=1, keepdims=True))
    rows_PxF = attribution_PxF / np.maximum(size_Px1, 1e-30)
    # Not by category: a choice that saw the categories would make every group stand out in one of them.
    mean_F = rows_PxF.mean(axis=0)
    order_A = np.argsort(-mean_F, kind="stable")[:IMPORTANT]
    feature_K = np.sort(order_A[mean_F[order_A] > 0])
    group_K, overlap_U, shuffled = group_profiles(rows_PxF[:, feature_K].T, seed)
    stable = np.flatnonzero(overlap_U >= DISSOLVED)
    members = [feature_K[group_K == group] for group in stable]
    profile_GxP = np.array([rows_PxF[:, some].mean(axis=1) for some in members]).reshape(-1, len(ids))
    contrast_GxC, p_GxC = category_contrasts(profile_GxP, inside_CxP, seed)
    primitives = []
    for g, some in enumerate(members):
        best = int(np.argmax(contrast_GxC[g])) if names else None
        mean_M = rows_PxF[:, some].mean(axis=0)
        primitives.append(
            FeaturePrimitive(
                name=names[best] if best is not None and p_GxC[g, best] <= LEVEL else "",
                features=tuple(some[np.argsort(-mean_M, kind="stable")].tolist()),
                overlap=float(overlap_U[stable[g]]),
                contrast=float(contrast_GxC[g, best]) if best is not None else 0.0,
                p_value=float(p_GxC[g, best]) if best is not None else 1.0,
                examples=tuple(ids[p] for p in np.argsort(-profile_GxP[g], kind="stable")[:3]),
            )
        )
    primitives.sort(key=lambda primitive: (not primitive.name, -primitive.contrast))
    return BenchmarkPrimitives(
        rule=RULE,
        features=len(feature_K),
        groups=len(overlap_U),
        shuffled=shuffled,
        primitives=tuple(primitives),
        effects=(),
        can_name=_least_p(inside_CxP) <= LEVEL,
    )


def _least_p(inside_CxP: np.ndarray) -> float:
    """Return the smallest p-value that a group's largest contrast can have, of so many ways to permute categories."""
    sizes = collections.Counter(inside_CxP.sum(axis=1).tolist())
    # A group that stands out in one category does so in any other of that size where the items change places.
    return min((count / math.comb(inside_CxP.shape[1], size) for size, count in sizes.items()), default=1.0)


def group_profiles(profile_KxP: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the group of each feature (-1: none), the stability of each group, and how many shuffled profiles have.

    Args:
      profile_KxP: profile of each feature over items.
      seed: of the shuffles and resamples.
    """
    features, items = profile_KxP.shape
    if features < SMALLEST or items < 3:
        return np.full(features, -1), np.zeros(0), 0.0
    rng = np.random.default_rng(seed)
    trees = [_tree(rng.permuted(profile_KxP, axis=1)) for _ in range(_RESAMPLES)]
    # The distance at which the first group forms: below the cut it does in 5 % of shuffles.
    cut = float(np.quantile([tree[tree[:, 3] >= SMALLEST, 2].min() for tree in trees], LEVEL, method="lower"))
    shuffled = float(np.mean([_cut(tree, cut).max() + 1 for tree in trees]))
    group_K = _cut(_tree(profile_KxP), cut)
    resampled = [
        overlaps(group_K, _cut(_tree(profile_KxP[:, rng.integers(items, size=items)]), cut)) for _ in range(_RESAMPLES)
    ]
    return group_K, np.mean(resampled, axis=0), shuffled


def _tree(profile_KxP: np.ndarray) -> np.ndarray:
    """Return the average-linkage tree of profiles; the distance is 1 - correlation, of constant profiles 1."""
    centred_KxP = profile_KxP - profile_KxP.mean(axis=1, keepdims=True)
    unit_KxP = centred_KxP / np.maximum(np.linalg.norm(centred_KxP, axis=1, keepdims=True), 1e-12)
    distance_KxK = np.clip(1 - unit_KxP @ unit_KxP.T, 0, 2)
    np.fill_diagonal(distance_KxK, 0)
    return linkage(squareform(distance_KxK, checks=False), "average")


def _cut(tree: np.ndarray, distance: float) -> np.ndarray:
    """Return the groups of at least ``SMALLEST`` features that form below a distance, from 0; -1: none."""
    _, label_K, count_U = np.unique(
        fcluster(tree, np.nextafter(distance, 0), "distance"), return_inverse=True, return_counts=True
    )
    kept_U = count_U >= SMALLEST
    return np.where(kept_U, np.cumsum(kept_U) - 1, -1)[label_K]


def category_contrasts(profile_GxP: np.ndarray, inside_CxP: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how much each profile stands out in each category, with p-values corrected for all of them.

    The contrast is the difference of the mean inside a category and outside in standard errors of the pooled variance;
    p is the share of permutations of the items whose largest contrast is at least as large (Westfall and Young, 1993).

    Args:
      profile_GxP: a number for each group and item.
      inside_CxP: whether each item is of each category; an item may be of several.
      seed: of the permutations.

    Returns:
      Contrasts and p-values, ``[G, C]``; for a category of all items, or of none, they are 0 and 1.
    """
    rng, items = np.random.default_rng(seed), inside_CxP.shape[1]
    order_SxP = [rng.permutation(items) for _ in range(_PERMUTATIONS)]
    seen_GxC, largest_S = label_correlations(profile_GxP.T, inside_CxP.T, order_SxP)
    as_large_GxC = (largest_S[None, None, :] >= seen_GxC[:, :, None] - 1e-12).sum(axis=2)
    # This difference in these standard errors is the correlation with the category, times the root of N - 1.
    return seen_GxC * np.sqrt(items - 1), (1 + as_large_GxC) / (1 + _PERMUTATIONS)


def recurring(primitives: Sequence[FeaturePrimitive], elsewhere: Sequence[FeaturePrimitive]) -> tuple[bool, ...]:
    """Return for each primitive whether another dictionary has one of the same name; False without a name."""
    names = {primitive.name for primitive in elsewhere}
    return tuple(bool(primitive.name) and primitive.name in names for primitive in primitives)


def recurrence_p(
    primitives: Sequence[FeaturePrimitive],
    elsewhere: Sequence[Sequence[FeaturePrimitive]],
    categories: Sequence[str],
    seed: int,
) -> float | None:
    """Return how often as many groups recur in other dictionaries with their names permuted over the categories.

    Args:
      primitives: of the tested dictionary.
      elsewhere: of each other dictionary.
      categories: distinct categories of the train items.
      seed: of the permutations.

    Returns:
      A p-value above 0; None if no outcome has one of at most ``LEVEL``.
    """
    place = {name: index for index, name in enumerate(categories)}
    count_C = np.bincount([place[group.name] for group in primitives if group.name], minlength=len(categories))
    names = [sorted({place[group.name] for group in some if group.name}) for some in elsewhere]
    rng = np.random.default_rng(seed)
    # Names of one dictionary that differ stay different: as many categories, drawn without replacement.
    shuffled_R = np.array(
        [
            sum(count_C[rng.permutation(len(categories))[: len(some)]].sum() for some in names)
            for _ in range(_PERMUTATIONS)
        ]
    )
    most = sum(np.sort(count_C)[::-1][: len(some)].sum() for some in names)
    seen = sum(count_C[some].sum() for some in names)
    p, least = ((1 + int((shuffled_R >= value).sum())) / (1 + _PERMUTATIONS) for value in (seen, most))
    return p if least <= LEVEL else None


def judge_primitives(
    table: EffectsTable,
    benchmark: str,
    primitives: Sequence[FeaturePrimitive],
    categories: Mapping[str, Sequence[str]],
    resamples: int,
    seed: int,
) -> tuple[PrimitiveEffect, ...]:
    """Return the effects of the primitives that were ablated, a function of the table alone.

    Args:
      table: effects table of the benchmark.
      benchmark: its name.
      primitives: all of them; primitives that the table has are judged.
      categories: of each item, by the id of its prompt.
      resamples: bootstrap samples of the intervals.
      seed: seed of the bootstrap.
    """
    prompts = table.select_prompts(benchmark)
    effects: list[PrimitiveEffect] = []
    for number, primitive in enumerate(primitives[:MOST]):
        group = f"{GROUP}{number}"
        edits = table.select_edits(benchmark, group)
        if not edits:
            continue
        drop_P = table.drops(edits, prompts, "answer_log_prob")[0]
        inside_P = np.array([not primitive.name or primitive.name in categories[prompt.id] for prompt in prompts])
        if (effect := _interval(drop_P[inside_P], resamples, seed)) is None:
            continue
        some = [prompt for prompt, is_inside in zip(prompts, inside_P, strict=True) if is_inside]
        # Random lists hold no feature of the primitive; placebo sets are chosen as it was, and may hold some.
        random_N, placebo_N = (_control_drops(table, benchmark, group, kind, some) for kind in ("random", "placebo"))
        effects.append(
            PrimitiveEffect(
                group=number,
                items=len(some),
                effect=effect,
                elsewhere=_interval(drop_P[~inside_P], resamples, seed),
                random=float(random_N.mean()) if len(random_N) else None,
                placebo=float(placebo_N.mean()) if len(placebo_N) else None,
                sets=min(len(random_N), len(placebo_N)),
                needed=0,
                p_random=rank_p(effect.mean, random_N) if len(random_N) else None,
                p_placebo=rank_p(effect.mean, placebo_N) if len(placebo_N) else None,
                answer="not testable",
            )
        )
    return _corrected(effects)


def count_testable(random_sets: int, placebo_sets: int) -> int:
    """Return how many groups, at most ``MOST``, can be told from so many controls of each kind after correction."""
    sets = min(random_sets, placebo_sets)
    return max(count for count in range(MOST + 1) if not count or min_controls(count, LEVEL) <= sets)


def _control_drops(
    table: EffectsTable, benchmark: str, group: str, kind: str, prompts: Sequence[PromptDefinition]
) -> np.ndarray:
    """Return the mean drop under each control of a group on some items, [N]; none where lists are nearly the same."""
    edits = table.select_edits(benchmark, control_group(kind, group))
    pool = table.select_edits(benchmark, control_group("pool", group))
    if kind == "random" and pool and not lists_differ(len(pool[0].features), [len(edit.features) for edit in edits]):
        return np.zeros(0)
    return table.drops(edits, prompts, "answer_log_prob").mean(axis=1) if edits else np.zeros(0)


def _interval(drop_P: np.ndarray, resamples: int, seed: int) -> Interval | None:
    if len(drop_P) < 2:
        return None
    return mean_interval(drop_P, resampling_weights(np.zeros(len(drop_P)), resamples, seed))


def _corrected(effects: Sequence[PrimitiveEffect]) -> tuple[PrimitiveEffect, ...]:
    """Return the effects with the answers where they can be tested.

    The first N effects with enough sets for a correction over N tests are tested, N as large as possible; which these
    are depends on the number of sets alone. The others have no p-value.
    """
    for count in range(len(effects), -1, -1):
        able = [place for place, effect in enumerate(effects) if effect.sets >= min_controls(count, LEVEL)][:count]
        if len(able) == count:
            break
    p_random, p_placebo = (
        holm_by_key({place: getattr(effects[place], name) for place in able}) for name in ("p_random", "p_placebo")
    )
    corrected = []
    for place, effect in enumerate(effects):
        is_tested = place in able
        # A group whose answers become likelier causes none of them, whatever its controls do.
        as_rare = is_tested and effect.effect.mean > 0 and max(p_random[place], p_placebo[place]) <= LEVEL
        needed = min_controls(len(able) + (not is_tested), LEVEL)
        answer = ("yes" if as_rare else "no") if is_tested else effect.answer
        effect = dataclasses.replace(effect, p_random=p_random.get(place), p_placebo=p_placebo.get(place))
        corrected.append(dataclasses.replace(effect, needed=needed, answer=answer))
    return tuple(corrected)


def judge_domains(table: EffectsTable, name: str, resamples: int, seed: int) -> dict[str, DomainEffect]:
    """Return the effects of features that other benchmarks chose, a function of the table alone.

    Args:
      table: effects table of a benchmark.
      name: the benchmark.
      resamples: bootstrap samples of the intervals.
      seed: seed of the bootstrap.
    """
    groups = dict.fromkeys(edit.group for edit in table.edits if edit.group.startswith(CHOSEN_ON))
    effects, prompts = {}, table.select_prompts(name)
    (*_, top) = table.select_edits(name, "top")
    weight_RxP = resampling_weights([prompt.template for prompt in prompts], resamples, seed)
    for group in groups:
        edits = table.select_edits(name, group)
        drop_P = table.drops(edits, prompts, "answer_log_prob")[0]
        random_N = _control_drops(table, name, group, "random", prompts)
        effects[group.removeprefix(CHOSEN_ON)] = DomainEffect(
            effect=mean_interval(drop_P, weight_RxP),
            random=float(random_N.mean()) if len(random_N) else None,
            p_value=rank_p(float(drop_P.mean()), random_N) if len(random_N) else None,
            random_sets=len(random_N),
            common=len({*edits[0].features} & {*top.features}),
        )
    return effects
