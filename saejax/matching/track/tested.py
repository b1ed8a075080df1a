"""Tests of a step's features: ablate them within the step, beside control sets.

The step's features are set to zero at its own tokens, at one layer, and the log-likelihood of each of the step's tokens
but the first (which is predicted before the step begins) is compared with that of the model as it is. The answer is
that of ``causal.claims``: tokens stand for prompts, log-likelihood for the logit difference, and the share of tokens
that are the likeliest for accuracy; Holm's correction is over all steps of a text and all layers that are tested.
Features are chosen by where they fire, not by what removing them costs, so all tokens judge; the matched ones fire as
often, as strongly and as late in the step. Drawn sets may hold features of the step, as in ``causal.claims``.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saejax.causal.claims import Rule, SetEffects, claims, run_draws
from saejax.causal.controls import TooFewControls
from saejax.causal.matched_sets import MatchedSets, draw_matched_sets
from saejax.causal.results import ControlMatch
from saejax.dictionaries import Dictionary
from saejax.dictionaries.matmul import matmul
from saejax.errors import UserError
from saejax.interventions.feature_statistics import FeatureStatistics
from saejax.interventions.split_model import active_features, record, run_head
from saejax.matching.track.results import StepTest
from saejax.matching.track.texts import EncodedText, Segment
from saejax.models import decoder
from saejax.models.language_model import LanguageModel
from saejax.models.lengths import round_length
from saejax.models.sites import Site
from saejax.models.split import PrefixKV, SharedPrefixBatch, SplitPoint
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import sharding
from saejax.stages.track import TrackConfig
from saejax.tasks.likelihood import token_scores

ROWS = {"cpu": 32}  # sets that are removed at once; the first block of draws and the clean run just fit
_MANY = 256  # the same on accelerators
_WINDOW, _POOL = 8, 64  # windows and features are filled up to a multiple of these, so that few programs are compiled
_OTHERS = 20  # sets of other features alone, which say how well they match
_ADVICE = "lower --track.matches"

Key = tuple[int, int]  # place of the dictionary in the stack, place of the segment


class StepTester:
    """The steps of one text, tested at one layer.

    Args:
      dictionary: whose features are removed.
      reads, writes: the sites that it reads and writes; the same for an SAE.
      text: what is followed.

    Raises:
      UserError: the site's value is not finite.
    """

    def __init__(
        self,
        lm: LanguageModel,
        dictionary: Dictionary,
        reads: Site,
        writes: Site,
        text: EncodedText,
        config: TrackConfig,
    ):
        self._lm, self._text, self._config = lm, text, config
        self._dictionary = jax.device_put(dictionary, sharding(lm.mesh))
        self._point = SplitPoint(lm.config, writes, reads, lm.mesh, lm.rules)
        length = len(text.ids_T)
        padded = round_length(length)
        ids_1xX = np.pad(text.ids_T, (0, padded - length))[None].astype(np.int32)
        last_1, wanted_1xX = np.array([length - 1]), np.ones(ids_1xX.shape, bool)
        *head, finite_1 = run_head(self._point, "keep", lm.params, self._dictionary, ids_1xX, last_1, wanted_1xX)
        if not np.asarray(finite_1).all():
            raise UserError(f"the value of {writes} is not finite on {text.problem.slug}: try --model.dtype=float32")
        self._stream, self._value, read_1xXxD, domain_1xX = head
        _, self._past = record(self._point, lm.params, self._stream, self._value, last_1)
        f_1xXxF = active_features(self._dictionary, read_1xXxD, domain_1xX)
        self._f_TxF = np.asarray(jnp.where(self._dictionary.fires(f_1xXxF), f_1xXxF, 0.0))[0, :length]

    def test(self, step: Segment, features: Sequence[int], draws: int, rule: Rule) -> tuple[SetEffects, ControlMatch]:
        """What removing features in a step costs its tokens, and what matched sets cost.

        Raises:
          TooFewControls: too few other features fire in the step.
          UserError: none of the features fires there, or it has one token.
        """
        config = self._config
        f_WxF = self._f_TxF[step.start : step.stop - 1]  # at the last token nothing of the step is predicted
        if not len(f_WxF):
            raise UserError("it has one token")
        statistics = self._statistics(f_WxF)
        firing = statistics.firing(features)
        if not firing:
            raise UserError("none of its features fires before its last token")
        W_dec_FxD = to_host(self._dictionary.W_dec_FxD[...])

        def changes(pool: Sequence[int]) -> np.ndarray:
            f_WxK, W_dec_KxD = f_WxF[:, pool], W_dec_FxD[pool].astype(np.float64)
            return (f_WxK.T.astype(np.float64) @ f_WxK) * (W_dec_KxD @ W_dec_KxD.T)

        seed = [config.seed, step.start, self._point.site.layer]
        sets = draw_matched_sets(statistics, firing, changes, (_OTHERS, draws), config.matches, seed, _ADVICE)
        return self._effects(step, firing, sets, rule), sets.match

    def _effects(self, step: Segment, firing: Sequence[int], matched: MatchedSets, rule: Rule) -> SetEffects:
        """Run the tested set and the matched ones, until all are run or none could change a no."""
        sets = [(), firing, *matched.draws_MxC.tolist()]
        score = functools.partial(self._scores, step, np.unique([*firing, *matched.draws_MxC.ravel().tolist()]))

        def effects(found_Sx2xP: np.ndarray) -> SetEffects:
            if not np.isfinite(found_Sx2xP).all():
                raise UserError("log-likelihoods are not finite: try --model.dtype=float32")
            (clean_P, right_P), (own_P, own_right_P) = found_Sx2xP[:2]
            logp_NxP, hits_NxP = np.moveaxis(found_Sx2xP[2:], 1, 0)
            drops = clean_P - own_P, right_P - own_right_P, clean_P - logp_NxP, right_P - hits_NxP
            return SetEffects(*drops, np.arange(len(clean_P)), matched.disjoint)

        def without(block: slice) -> np.ndarray:  # the first block comes with the clean run and the tested set
            return score(sets[block.start and block.start + 2 : block.stop + 2])

        return run_draws(without, effects, len(matched.draws_MxC), rule)[1]

    def _statistics(self, f_WxF: np.ndarray) -> FeatureStatistics:
        """Return how often, how strongly and how late features fire in a step."""
        fires_WxF = f_WxF != 0
        place_W = np.arange(len(f_WxF), 0, -1)
        norm_F = np.linalg.norm(to_host(self._dictionary.W_dec_FxD[...]).astype(np.float64), axis=1)
        part = len(f_WxF), fires_WxF.sum(axis=0), np.abs(f_WxF).sum(axis=0, dtype=np.float64), place_W @ fires_WxF
        return FeatureStatistics.total([part], norm_F)

    def _scores(self, step: Segment, pool_K: np.ndarray, sets: Sequence[Sequence[int]]) -> np.ndarray:
        """Return log-likelihood and top-1 hits of the step's tokens but the first, without each set, [N, 2, P]."""
        count = step.stop - step.start - 1
        window, pool = filled(count, len(pool_K))
        padded_X = np.pad(pool_K, (0, pool - len(pool_K)), mode="edge")
        removed_WxX = np.zeros((window, pool), np.float32)
        removed_WxX[:count] = self._f_TxF[step.start : step.start + count][:, padded_X]
        targets_W: np.ndarray = np.zeros(window, np.int32)
        targets_W[:count] = self._text.ids_T[step.start + 1 : step.stop]
        rows = rows_at_once(self._lm.mesh.devices.flat[0].platform, self._lm.mesh.shape["data"])
        found = []
        for first in range(0, len(sets), rows):
            members_RxX = np.zeros((rows, pool), bool)
            for row, features in zip(members_RxX, sets[first : first + rows], strict=False):
                row[np.searchsorted(pool_K, np.asarray(features, np.int64))] = True
            given = self._stream, self._value, self._past, removed_WxX, padded_X, members_RxX
            start = np.int32(step.start)
            scores = run_rows(self._point, self._lm.params, self._dictionary, *given, targets_W, start)
            found.append(np.stack([np.asarray(part, np.float64)[: len(sets) - first, :count] for part in scores], 1))
        return np.concatenate(found)


def filled(tokens: int, features: int) -> tuple[int, int]:
    """Return the numbers of ``tokens`` of a step and of ``features``, rounded up."""
    return -(-tokens // _WINDOW) * _WINDOW, -(-features // _POOL) * _POOL


def rows_at_once(platform: str, data: int) -> int:
    """Return how many sets are removed together on a ``platform``, as many on each of ``data`` parts."""
    return -(-ROWS.get(platform, _MANY) // data) * data


@functools.partial(jax.jit, static_argnums=0)
def run_rows(
    point: SplitPoint,
    params: decoder.Params,
    dictionary: Dictionary,
    stream_1xTxD: jax.Array,
    value_1xTxD: jax.Array,
    past: PrefixKV,
    removed_WxX: jax.Array,
    features_K: jax.Array,
    members_RxX: jax.Array,
    targets_W: jax.Array,
    start: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Run W tokens from ``start`` on, in each row without a set of features, and return their scores, both [R, W].

    Args:
      point: where the model is split.
      params: of the model.
      dictionary: whose features are removed.
      stream_1xTxD: the stream of the text as it is.
      value_1xTxD: what the dictionary changes there.
      past: keys and values of the text as it is.
      removed_WxX: activations of the features that sets are drawn from.
      features_K: their numbers.
      members_RxX: which of them each row is without.
      targets_W: the next tokens.
      start: position of the first token.
    """
    rows, window = len(members_RxX), len(removed_WxX)
    shards = point.mesh.shape["data"]
    tree = SharedPrefixBatch.unshared(jnp.zeros(rows, jnp.int32), jnp.full(rows, start), window, shards)
    at_W = jnp.minimum(start + jnp.arange(window), stream_1xTxD.shape[1] - 1)
    W_dec_KxD = dictionary.W_dec_FxD[...][features_K]
    removed_RxWxK = removed_WxX[None] * members_RxX[:, None, :]
    changed_RxWxD = matmul(removed_RxWxK.astype(W_dec_KxD.dtype), W_dec_KxD)
    value_1xWxD = value_1xTxD[:, at_W]
    edited_RxWxD = (value_1xWxD.astype(changed_RxWxD.dtype) - changed_RxWxD).astype(value_1xWxD.dtype)
    stream_RxWxD = jnp.broadcast_to(stream_1xTxD[:, at_W], edited_RxWxD.shape)
    flat = (array.reshape(shards, -1, array.shape[-1]) for array in (stream_RxWxD, edited_RxWxD))
    x = point.run_shared_suffix(params, past, tree, *flat).reshape(edited_RxWxD.shape)
    positions_RxW, targets_RxW = (jnp.tile(each[None], (rows, 1)) for each in (jnp.arange(window), targets_W))
    return token_scores(point.config, params, x, positions_RxW, targets_RxW)


def judged(effects: Mapping[Key, tuple[Sequence[int], SetEffects, ControlMatch]], rule: Rule) -> dict[Key, StepTest]:
    """Apply the rule to all steps of a text that were tested.

    Args:
      effects: of each the features that were removed, what that changed, and how well the control sets matched.
      rule: of the verdict.
    """
    said = claims({f"{place}/{segment}": part for (place, segment), (_, part, _) in effects.items()}, rule)
    return {
        (place, segment): StepTest(
            features=tuple(features),
            tokens=len(part.drop_P),
            drop=float(part.drop_P.mean()),
            matched_drop=float(part.draw_drop_NxP.mean()),
            lost=float(part.lost_P.mean()),
            matched_lost=float(part.draw_lost_NxP.mean()),
            claim=said[f"{place}/{segment}"],
            match=match,
        )
        for (place, segment), (features, part, match) in effects.items()
    }


def draws_for(config: TrackConfig, tests: int) -> int:
    """Return the number of control sets, enough that a step could pass at all."""
    return max(config.draws, Rule().least_draws(tests))


def tested_steps(
    testers: Mapping[int, Callable[[], StepTester]],
    text: EncodedText,
    chosen: Mapping[int, Sequence[Sequence[int]]],
    config: TrackConfig,
    on_step: Callable[[int, int], None],
) -> tuple[dict[Key, StepTest], dict[Key, str]]:
    """Test every step at every layer that is to be tested.

    Args:
      testers: place of the dictionary in the stack -> makes its tester.
      text: what is followed.
      chosen: place -> the features of each segment.
      config: of the stage.
      on_step: called with the tests done and of all; may raise to stop.

    Returns:
      What was found, and why others could not be tested.
    """
    total, done, rule = len(testers) * len(text.steps), 0, Rule()
    draws = draws_for(config, total)
    effects: dict[Key, tuple[Sequence[int], SetEffects, ControlMatch]] = {}
    untested: dict[Key, str] = {}
    on_step(0, total)
    for place, make in testers.items():
        tester = make()
        for segment in range(text.first, len(text.segments)):
            features = chosen[place][segment]
            try:
                if not features:
                    raise UserError("no feature belongs to it")
                effects[place, segment] = features, *tester.test(text.segments[segment], features, draws, rule)
            except TooFewControls as few:
                untested[place, segment] = few.fact
            except UserError as error:
                untested[place, segment] = str(error)
            done += 1
            on_step(done, total)
    return judged(effects, rule), untested
