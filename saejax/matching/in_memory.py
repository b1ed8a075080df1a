"""Features of dictionaries in memory: matched one to one, and grouped by the tokens on which they fire."""

import dataclasses

import numpy as np

from saejax.activations.in_memory import Activations
from saejax.dictionaries import Dictionary
from saejax.errors import UserError, one_of
from saejax.matching.clusters.groups import Coactivation, StableGroups, find_groups
from saejax.matching.match import Matched, match
from saejax.matching.rows import independent_rows, weight_rows
from saejax.matching.transfer.activity import encode
from saejax.parallel.mesh import make_mesh

_BATCH_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class MatchedFeatures:
    """The features of two dictionaries, matched by cosine."""

    pairs: Matched  #: the assignment with the largest sum of cosines, and each feature's largest cosine
    null: Matched  #: the same with random rows of the second one's mean and covariance: what chance gives


def match_features(first: Dictionary, second: Dictionary, by: str = "decoder", seed: int = 789) -> MatchedFeatures:
    """Match the features of two dictionaries of one width one to one.

    Args:
      first: a dictionary.
      second: another one.
      by: the rows that are compared, "decoder" or "encoder".
      seed: of the random rows.

    Raises:
      UserError: the widths differ.
    """
    one_of(by, ("decoder", "encoder"), "kind of rows")
    first_FxD, second_GxD = weight_rows(by, first), weight_rows(by, second)
    if first_FxD.shape[1] != second_GxD.shape[1]:
        raise UserError(
            f"rows have the widths {first_FxD.shape[1]} and {second_GxD.shape[1]}: expected dictionaries of one width"
        )
    problems = [("pairs", first_FxD, second_GxD), ("null", first_FxD, independent_rows(second_GxD, [seed]))]
    return MatchedFeatures(**dict(match(problems, make_mesh())))


def group_features(
    acts: Activations, dictionary: Dictionary, smallest: int = 5, resamples: int = 10, seed: int = 789
) -> tuple[np.ndarray, StableGroups]:
    """Group the features of a dictionary that fire on the same tokens.

    Args:
      acts: result of ``capture``, with the dictionary's site.
      dictionary: the dictionary.
      smallest: number of features of the smallest group.
      resamples: number of bootstrap samples of the texts, and of shuffled data.
      seed: of both.

    Returns:
      The indices of the grouped features: those that fire on several tokens and texts. Their groups; a group is stable
      if its ``overlap_U`` exceeds ``bar``.

    Raises:
      UserError: the dictionary's site was not captured, or it reads several.
    """
    one_of(dictionary.site, acts.values, "site of these activations")
    activity = encode(dictionary.with_sink_norms(acts.max_norm), acts.values[dictionary.site], _BATCH_TOKENS)
    firings = Coactivation.of(activity, acts.index_Nx3[:, 0])
    groups, _ = find_groups(firings, smallest, resamples, [seed])
    return firings.feature_F, groups
