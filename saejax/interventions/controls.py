"""Control lists at a dose: what a tested change T is compared with, each built to T's full dose and measured there.

A *list to a dose* is the shortest beginning of an ordered list of features, or of directions, whose dose is at least
T's, the whole then scaled down to T's dose (``shortest_beginning``). Nothing is interpolated. Ablation,
benchmarks, steering, the tracker and circuits build their controls here; they differ in what a feature changes. Doses
of all beginnings come from the mean inner products of the changes that single features make (``Changes``): the change
of a set is the sum of its features'.

- *Random lists*: features that fire, without T, in random order.
- *Placebo sets*: the top features of two likely tokens that are no answers, scaled either way to T's dose.
- *Untrained dictionaries*, and simpler bases: directions in the order of their attribution.
"""

import dataclasses
import functools
import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from saejax.errors import UserError
from saejax.interventions.answers import VerdictConfig
from saejax.interventions.edits import GATHERED, FeatureEdits, filled_features
from saejax.interventions.table import TESTED, EditDefinition, EffectsTable

LARGEST_POOL = 4096  # features of which random lists are made: their inner products take 128 MB
LONGEST = 512  # directions of a list by attribution, at most
MIN_FIRING = 0.05  # share of the test prompts on which a feature of a random list fires, at least
_FACTORS = (0.5, 2.0)  # least and largest scale of a placebo set: beyond them it would be another set
_TOKEN_PAIRS = 4  # placebo pairs that a token is in, at most
_BLOCK = 32  # features of a list whose doses are computed at first
_FIRST = 64  # features of a list whose changes are measured at first: most lists of directions are shorter
_TOLERANCE = 0.1  # relative, within which a control has the dose of T
_ROUNDING = 1e-6  # relative: doses are sums of many numbers


def shortest_beginning(squares: Iterable[float], dose: float) -> tuple[int, float, float]:
    """Return how many elements of an ordered list reach a dose, and the fraction that brings these to it.

    Args:
      squares: square of the dose of each beginning, the shortest first; read as far as it is needed.
      dose: above 0.

    Returns:
      The number, the fraction, in (0, 1], and the dose that this gives; the whole list and 1 if it does not reach the
      dose.
    """
    size, square = 0, 0.0
    for size, square in enumerate(squares, 1):
        if square >= (dose * (1 - _ROUNDING)) ** 2:
            fraction = min(dose / math.sqrt(square), 1.0)
            return size, fraction, fraction * math.sqrt(square)
    return size, 1.0, math.sqrt(max(square, 0.0))


def list_to_dose(
    changes_of: Callable[[Sequence[int]], "Changes"], order: Sequence[int], dose: float
) -> tuple[tuple[int, ...], float]:
    """Return ``Changes.beginning`` of an ordered list, given a function of features that returns their changes."""
    some = order[:_FIRST]  # inner products of all would take longer than all else
    members, fraction = changes_of(some).beginning(some, dose)
    if len(some) < len(order) and len(members) == len(some) and fraction == 1.0:  # these do not reach it
        return changes_of(order).beginning(order, dose)
    return members, fraction


@dataclasses.dataclass(frozen=True)
class Changes:
    """The changes that ablating each of K features makes at the site."""

    features_K: np.ndarray  #: their numbers, rising
    product_KxK: np.ndarray  #: inner products of their changes, summed over positions, mean over prompts; float64

    def dose(self, members: Sequence[int]) -> float:
        """Return the dose of a set: the root mean square over prompts of the norm of its change."""
        at_N = np.searchsorted(self.features_K, np.asarray(members, np.int64))
        return float(np.sqrt(max(self.product_KxK[np.ix_(at_N, at_N)].sum(), 0.0)))

    def beginning(self, order: Sequence[int] | np.ndarray, dose: float) -> tuple[tuple[int, ...], float]:
        """Return the shortest beginning of an ordered list that reaches a dose, and the fraction that brings it there.

        Args:
          order: features, each of them once; at least one.
          dose: above 0.

        Returns:
          The features and the fraction; see ``shortest_beginning``.
        """
        size, fraction, _ = shortest_beginning(self._squares(order), dose)
        return tuple(int(feature) for feature in order[:size]), fraction

    def _squares(self, order: Sequence[int] | np.ndarray) -> Iterator[float]:
        """Yield the square of the dose of each beginning of a list."""
        at_N, done, count = np.searchsorted(self.features_K, np.asarray(order, np.int64)), 0, _BLOCK
        square = 0.0
        while done < len(at_N):  # most lists are short, so the first ones are computed first
            some_S = at_N[done:count]
            product_SxL = self.product_KxK[np.ix_(some_S, at_N[:count])]
            # Each feature adds its own square, and twice its products with those before it.
            square_S = square + np.cumsum(np.einsum("sl,sl->s", product_SxL, _weights(len(some_S), done)))
            yield from square_S.tolist()
            square, done, count = square_S[-1], count, 2 * count


@functools.lru_cache(maxsize=4)
def _weights(features: int, before: int) -> np.ndarray:
    """Return what products count for features in a list with others before them: twice before each, once at it."""
    return np.tri(features, before + features, before) + np.tri(features, before + features, before - 1)


class GatheredPrompts(NamedTuple):
    """P prompts, or texts, whose features can be gathered."""

    index_P: np.ndarray  #: their indices among all prompts
    editable_PxT: np.ndarray  #: True where features may change
    #: K features -> by how much ablation lowers their activations, [P or more, T, K], and their directions [K, D]
    gather: Callable[[np.ndarray], tuple[Any, Any]]


def change_norms(parts: Iterable[GatheredPrompts], edits: FeatureEdits, prompts: int) -> np.ndarray:
    """Return the norm of each edit's change at the site, over all positions of each prompt, float64 [E, N]."""
    norm_ExN = np.zeros((len(edits), prompts))
    for index_P, editable_PxT, gather in parts:
        # In chunks, as activations of all named features at all positions may not fit.
        for chosen, features_K in edits.chunks():
            fall_BxTxK, W_dec_KxD = map(np.asarray, gather(features_K))
            arrays = fall_BxTxK[: len(index_P)], W_dec_KxD, editable_PxT
            norm_ExN[np.array(chosen)[:, None], index_P] = edits.norms(chosen, features_K, *arrays)
    return norm_ExN


def measure_changes(parts: Iterable[GatheredPrompts], features: Sequence[int] | np.ndarray, prompts: int) -> Changes:
    """Return the changes that ablating each of some features makes at the site, alone and with each other."""
    features_K, total = np.unique(np.asarray(features, np.int64)), np.zeros(())
    for index_P, editable_PxT, gather in parts:
        falls, rows = [], []
        for first in range(0, len(features_K), GATHERED):
            some = features_K[first : first + GATHERED]
            filled = np.pad(some, (0, filled_features(len(some)) - len(some)), mode="edge")
            fall_BxTxX, W_dec_XxD = map(np.asarray, gather(filled))
            falls.append(fall_BxTxX[: len(index_P)][editable_PxT][:, : len(some)].astype(np.float64))
            rows.append(W_dec_XxD[: len(some)].astype(np.float64))
        total = total + inner_products(falls, rows)
    return Changes(features_K, total / prompts)


def inner_products(falls: Sequence[np.ndarray], rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return the inner products of the changes of K features, summed over N positions, [K, K].

    Args:
      falls: by how much activations fall, some of the K features at a time, float64 ``[N, X]`` each.
      rows: directions of these features, ``[X, D]`` each.
    """
    fall_NxK, W_dec_KxD = np.concatenate(falls, axis=1), np.concatenate(rows)
    return (fall_NxK.T @ fall_NxK) * (W_dec_KxD @ W_dec_KxD.T)


def choose_pool(prompts_F: np.ndarray, prompts: int, top: Sequence[int], share: float, seed: int) -> np.ndarray:
    """Return the features of which random lists are made: features that fire on a share of the prompts, without T.

    Args:
      prompts_F: number of prompts on which each feature fires.
      prompts: number of prompts.
      top: T.
      share: least share of the prompts on which a feature fires.
      seed: seed of the draw where there are more than ``LARGEST_POOL``.
    """
    # Features that hardly fire change nothing, and lists of them would hold thousands.
    pool = np.setdiff1d(np.flatnonzero(prompts_F / prompts >= share), np.asarray(top))
    if len(pool) > LARGEST_POOL:
        pool = np.sort(np.random.default_rng(seed).choice(pool, LARGEST_POOL, replace=False))
    return pool


def random_lists(
    changes: Changes, pool: np.ndarray, dose: float, count: int, seed: int
) -> list[tuple[tuple[int, ...], float]]:
    """Return independent random lists to a dose, features and fraction each; none of a pool that does not reach it.

    Args:
      changes: of the pool's features.
      pool: features to draw from.
      dose: the dose, above 0.
      count: number of lists.
      seed: seed of the draws.
    """
    if not len(pool) or changes.dose(pool.tolist()) < dose:
        return []
    return [changes.beginning(order, dose) for order in random_orders(pool, count, seed)]


def lists_differ(pool: int, sizes: Sequence[int], least: int = VerdictConfig.least_lists) -> bool:
    """Return whether a pool holds enough random lists: from a small one they are nearly the same.

    Args:
      pool: number of features in the pool.
      sizes: number of features of each list.
      least: typical lists that the pool must hold.
    """
    return len(sizes) > 0 and pool >= least * float(np.median(sizes))


def random_orders(pool: np.ndarray, count: int, seed: int) -> Iterator[np.ndarray]:
    """Yield a pool in ``count`` random orders, drawn by ``seed``, of which the beginnings are random lists."""
    # A generator for each list, so that more lists leave the first ones as they are.
    return (np.random.default_rng([seed, number]).permutation(pool) for number in range(count))


def influential_orders(influence_N: np.ndarray, count: int, seed: int) -> Iterator[np.ndarray]:
    """Yield orders of N items, of which the beginnings are placebo sets where placebo targets are ranked together.

    The half of largest influence, of those with any, comes first in random order, so that the sets differ; the others
    follow by falling influence, where the half does not reach the dose.

    Args:
      influence_N: influence of each on the placebo targets.
      count: number of orders.
      seed: seed of the draws.
    """
    half = max(int((influence_N > 0).sum()) // 2, 1)
    for number, order_N in enumerate(random_orders(np.arange(len(influence_N)), count, seed)):
        ranked_N = order_N[np.argsort(-influence_N[order_N], kind="stable")]
        # Another draw than the one that ordered equal ones.
        first_N = np.random.default_rng([seed, number, 1]).permutation(ranked_N[:half])
        yield np.concatenate([first_N, ranked_N[half:]])


def scaled_sets(changes: Changes, sets: Sequence[Sequence[int]], dose: float, count: int) -> list[tuple[int, float]]:
    """Return the first ``count`` sets that a factor of 0.5 to 2 brings to a dose, as index and factor.

    A set that is silent on the test prompts, or that would have to be scaled further, is replaced by the next.
    """
    chosen = []
    for index, members in enumerate(sets):
        size = changes.dose(members) if len(members) else 0.0
        if size > 0 and _FACTORS[0] <= dose / size <= _FACTORS[1]:
            chosen.append((index, dose / size))
    return chosen[:count]


def control_edits(
    define: Callable[..., EditDefinition],
    changes_of: Callable[[Sequence[int] | np.ndarray], Changes],
    pool: np.ndarray,
    placebos: Sequence[tuple[tuple[str, str] | None, Sequence[int]]],
    dose: float,
    counts: tuple[int, int],
    seed: int,
) -> list[EditDefinition]:
    """Return the random lists and placebo sets to a dose as edits, after the pool of the lists, which is not run.

    Args:
      define: group, features, index in the group, fraction and placebo target -> the edit.
      changes_of: features -> the changes that ablating them makes.
      pool: features to draw from; see ``choose_pool``.
      placebos: the target, if it is two tokens, and the features of each placebo set.
      dose: the dose, above 0.
      counts: random lists and placebo sets, at most.
      seed: seed of the draws.
    """
    edits = [define("pool", pool, 0, 1.0, None)]
    if len(pool) and counts[0]:
        lists = random_lists(changes_of(pool), pool, dose, counts[0], seed)
        edits += [define("random", members, index, share, None) for index, (members, share) in enumerate(lists)]
    sets = [members for _, members in placebos]
    if features := sorted({feature for members in sets for feature in members}):
        scaled = scaled_sets(changes_of(features), sets, dose, counts[1])
        edits += [
            define("placebo", sets[index], place, factor, placebos[index][0])
            for place, (index, factor) in enumerate(scaled)
        ]
    return edits


def token_pairs(tokens: np.ndarray, seed: int) -> np.ndarray:
    """Return different pairs of different tokens, drawn by ``seed``, none of which is in more than four, [R, 2]."""
    rng, pairs = np.random.default_rng(seed), dict[tuple[int, int], None]()
    for _ in range(_TOKEN_PAIRS):
        order = rng.permutation(tokens)[: len(tokens) // 2 * 2].reshape(-1, 2)
        for first, second in order.tolist():
            if (second, first) not in pairs:  # the same set with another sign
                pairs[first, second] = None
    return np.array(list(pairs), np.int64).reshape(-1, 2)


def begins_answer(token: str, answers: Iterable[str]) -> bool:
    """Return whether a token is the beginning of an answer, whatever its case, code points and the spaces around it.

    Tokenizers of SentencePiece decode a word's first token without the space that the answer begins with, and some
    write "é" as one code point where the answer has two.
    """
    word, *words = (unicodedata.normalize("NFKC", text).strip().casefold() for text in (token, *answers))
    return any(answer.startswith(word) for answer in words)


def check_controls(table: EffectsTable, behaviour: str, dictionary: str = TESTED) -> None:
    """Check that the controls of a behaviour and a dictionary are what the rule says they are.

    Raises:
      UserError: a random list holds a tested feature, a control has another dose than T, or a token of a placebo target
        is (the beginning of) an answer.
    """
    advice = "its figures are no controls; run the stage again"
    prompts = table.select_prompts(behaviour)
    top = table.select_edits(behaviour, "top", dictionary)[-1:]
    (dose,) = table.doses(top, prompts)
    for group in ("random", "placebo"):
        edits = table.select_edits(behaviour, group, dictionary)
        for edit, size in zip(edits, table.doses(edits, prompts), strict=True):
            shared = sorted({*edit.features} & {*top[0].features})
            if group == "random" and shared:
                raise UserError(f"random list {edit.index} of {behaviour} holds the top feature {shared[0]}: {advice}")
            # Of a table without some prompts doses differ a little.
            if abs(size - dose) > _TOLERANCE * dose:
                raise UserError(
                    f"{group} control {edit.index} of {behaviour} has the dose {size:.4g}, not that of the top "
                    f"features, {dose:.4g}: {advice}"
                )
    answers = {
        answer
        for prompt in table.prompts
        if prompt.behaviour == behaviour
        for answer in (prompt.correct, prompt.wrong)
        if answer.strip()
    }
    for edit in table.select_edits(behaviour, "placebo", dictionary):
        for token in edit.target or ():
            if begins_answer(token, answers):
                raise UserError(f"placebo target {edit.index} of {behaviour} is an answer ({token!r}): {advice}")
