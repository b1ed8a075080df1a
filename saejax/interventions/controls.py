"""Control lists at a dose: what a tested change T is compared with, each built to T's full dose and measured there.

A *list to a dose* is the shortest beginning of an ordered list of features, or of directions, whose dose is at least
that of T, the whole then scaled down to T's dose (``shortest_beginning``). Nothing is interpolated. Ablation,
benchmarks, steering, the tracker and circuits build their controls here; they differ in what a feature changes. Doses
of all beginnings come from the mean inner products of the changes that single features make (``Changes``): the change
of a set is the sum of its features'.

- *Random lists*: features that fire, without T, in random order.
- *Placebo sets*: the top features of two likely tokens that are no answers, scaled either way to T's dose.
- *Untrained dictionaries*, and simpler bases: directions in the order of their attribution.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from saejax.errors import UserError
from saejax.interventions.table import TESTED, EditDefinition, EffectsTable

LARGEST_POOL = 4096  # features of which random lists are made: their inner products take 128 MB
LONGEST = 512  # directions of a list by attribution, at most
MIN_FIRING = 0.05  # share of the test prompts on which a feature of a random list fires, at least
_FACTORS = (0.5, 2.0)  # by which a placebo set may be scaled: further from what is measured it would be another set
_TOKEN_PAIRS = 4  # placebo pairs that a token is in, at most
_BLOCK = 256  # features of a list whose doses are computed at first
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
        while done < len(at_N):  # most lists are short, so the first ones are computed first
            some_L = at_N[:count]
            product_LxL = self.product_KxK[np.ix_(some_L, some_L)]
            # Each feature adds its own square, and twice its products with those before it.
            square_L = np.cumsum(2 * np.tril(product_LxL, -1).sum(axis=1) + np.diagonal(product_LxL))
            yield from square_L[done:].tolist()
            done, count = count, 2 * count


def inner_products(falls: Sequence[np.ndarray], rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return the inner products of the changes of K features, summed over N positions, [K, K].

    Args:
      falls: by how much activations fall, some of the K features at a time, float64 ``[N, X]`` each.
      rows: directions of these features, ``[X, D]`` each.
    """
    fall_NxK, W_dec_KxD = np.concatenate(falls, axis=1), np.concatenate(rows)
    return (fall_NxK.T @ fall_NxK) * (W_dec_KxD @ W_dec_KxD.T)


def choose_pool(prompts_F: np.ndarray, prompts: int, top: Sequence[int], share: float, seed: int) -> np.ndarray:
    """Return the features of which random lists are made: those that fire on a share of the prompts, without T.

    Args:
      prompts_F: number of prompts on which each feature fires.
      prompts: number of prompts.
      top: T.
      share: of the prompts, at least.
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
    # A generator for each list, so that more lists leave the first ones as they are.
    orders = (np.random.default_rng([seed, number]).permutation(pool) for number in range(count))
    return [changes.beginning(order, dose) for order in orders]


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
    """Return whether a token is the beginning of an answer, whatever the case and the spaces around it.

    Tokenizers of SentencePiece decode a word's first token without the space that the answer begins with.
    """
    word = token.strip().casefold()
    return any(answer.strip().casefold().startswith(word) for answer in answers)


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
