"""Features of dictionaries in memory: matched one to one, and grouped by the tokens on which they fire."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from saejax.activations.in_memory import Activations
from saejax.arguments import check_classes
from saejax.dictionaries import Dictionary
from saejax.dictionaries.joined import join
from saejax.errors import UserError, one_of
from saejax.matching.clusters.groups import Coactivation, StableGroups, find_groups
from saejax.matching.match import Matched, match, measure_pairs
from saejax.matching.rows import CentredRows, independent_rows, weight_rows
from saejax.matching.transfer.activity import MIN_FIRINGS, Activity, encode
from saejax.parallel.mesh import make_mesh
from saejax.progress import show_progress
from saejax.short_reprs import has_short_repr

_BATCH_TOKENS = 2048


@has_short_repr
@dataclasses.dataclass(frozen=True)
class MatchedFeatures:
    """The features of two dictionaries, matched one to one."""

    pairs: Matched  #: the assignment with the largest sum of cosines or correlations, and each feature's largest one
    #: the same where nothing is shared: with random rows of the second one's mean and covariance; of activations, with
    #: the second one's shifted by half of the text
    null: Matched


@check_classes
def match_features(
    first: Dictionary, second: Dictionary, by: str = "decoder", seed: int = 789, acts: Activations | None = None
) -> MatchedFeatures:
    """Match the features of two dictionaries one to one, as the stage ``transfer`` does.

    Args:
      first: a dictionary.
      second: another one; for "decoder" and "encoder" of the same width.
      by: the rows that are compared, "decoder", "encoder", or "activity": activations on the same tokens. Texts of even
        number choose the pairs, and the values of pairs are those on the others.
      seed: of the random rows.
      acts: result of ``capture`` with the sites of both. "activity" needs it; for the others features that fire
        nowhere in it are left out, as in the stage features that fire on no held-out text. None: all features are
        compared, dead ones too, whose rows say nothing.

    Raises:
      UserError: the widths differ, or there are no activations of a dictionary's site, or of one text alone.
    """
    one_of(by, ("decoder", "encoder", "activity"), "kind of rows")
    if by == "activity":
        return _match_activities(first, second, acts)
    first_FxD, second_GxD = (_live_rows(by, dictionary, acts) for dictionary in (first, second))
    if first_FxD.shape[1] != second_GxD.shape[1]:
        raise UserError(
            f"rows have the widths {first_FxD.shape[1]} and {second_GxD.shape[1]}: expected dictionaries of one width"
        )
    problems = [("pairs", first_FxD, second_GxD), ("null", first_FxD, independent_rows(second_GxD, [seed]))]
    return MatchedFeatures(**dict(_match(problems)))


def _live_rows(by: str, dictionary: Dictionary, acts: Activations | None) -> np.ndarray:
    """Return the rows of a dictionary; those of features that fire nowhere in given activations are 0."""
    rows_FxD = weight_rows(by, dictionary)
    if acts is None:
        return rows_FxD
    activity = _encode(acts, dictionary)
    fires_F = activity.firings(np.flatnonzero(activity.real_N)) > 0
    return np.where(fires_F[:, None], rows_FxD, np.float32(0))


def _match_activities(first: Dictionary, second: Dictionary, acts: Activations | None) -> MatchedFeatures:
    if acts is None:
        raise UserError('by="activity" compares activations: give acts=, the result of saejax.capture')
    pair = [_encode(acts, dictionary) for dictionary in (first, second)]
    real = np.flatnonzero(pair[0].real_N & pair[1].real_N)
    is_odd_N = _texts_of_rows(acts)[real] % 2 == 1
    halves = real[~is_odd_N], real[is_odd_N]
    if not all(map(len, halves)):
        raise UserError("pairs are chosen on some texts and measured on others: give activations of two texts at least")
    live_F, live_G = (np.all([some.firings(half) >= MIN_FIRINGS for half in halves], axis=0) for some in pair)

    def rows(side: str, half: np.ndarray) -> tuple[CentredRows, CentredRows]:
        # Shifted by half, every feature keeps its runs of firings, and no token meets itself.
        other = np.roll(half, len(half) // 2) if side == "null" else half
        return pair[0].rows(half, live_F), pair[1].rows(other, live_G)

    matched = _match([(side, *rows(side, halves[0])) for side in ("pairs", "null")])
    return MatchedFeatures(**{side: measure_pairs(assignment, *rows(side, halves[1])) for side, assignment in matched})


def _match(problems: Sequence[tuple[str, Any, Any]]) -> Iterator[tuple[str, Matched]]:
    """Yield the matching of each side, and show how many are done."""
    with show_progress("match_features") as on_progress:
        on_progress(0, len(problems))
        for done, matched in enumerate(match(problems, make_mesh()), 1):
            on_progress(done, len(problems))
            yield matched


@check_classes
def group_features(
    acts: Activations, dictionary: Dictionary, smallest: int = 5, resamples: int = 10, seed: int = 789
) -> tuple[np.ndarray, StableGroups]:
    """Group the features of a dictionary that fire on the same tokens.

    Args:
      acts: result of ``capture``, with the dictionary's site (of a crosscoder, all of its sites).
      dictionary: the dictionary.
      smallest: number of features of the smallest group.
      resamples: number of bootstrap samples of the texts, and of shuffled data.
      seed: of both.

    Returns:
      The indices of the grouped features, which fire on several tokens and texts. Their groups; a group is stable
      if its ``overlap_U`` exceeds ``bar``.

    Raises:
      UserError: the dictionary's site was not captured, or it reads several, or there are fewer than five texts.
    """
    for name, number, least in (("smallest", smallest, 2), ("resamples", resamples, 1)):
        if not isinstance(number, Integral) or number < least:
            raise UserError(f"{name} is {number!r}: expected a whole number, {least} or more")
    firings = Coactivation.of(_encode(acts, dictionary), _texts_of_rows(acts))
    done, total = itertools.count(1), 1 + 3 * resamples
    with show_progress("group_features") as on_progress:
        groups, _ = find_groups(firings, smallest, resamples, [seed], lambda: on_progress(next(done), total))
    return firings.feature_F, groups


def _texts_of_rows(acts: Activations) -> np.ndarray:
    """Return the text that each row is of, all pieces of a long one together."""
    return acts.sources_of_pieces()[acts.index_Nx3[:, 0]]


def _encode(acts: Activations, dictionary: Dictionary) -> Activity:
    config = dictionary.config
    if config.widths:
        values_NxD = np.asarray(join(config, acts.values))
    else:
        values_NxD = acts.values[one_of(config.site, acts.values, "site of these activations")]
    target_NxO = acts.values.get(config.target)  # without it only sinks at the site are known
    return encode(dictionary.with_sink_norms(acts.max_norm), values_NxD, _BATCH_TOKENS, target_NxO)
