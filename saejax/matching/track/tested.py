"""Tests of a step's features: ablate them within the step, beside random sets at equal dose.

The step's features are set to zero at its tokens, at one layer, and the log-likelihood of each of the step's tokens but
the first (which is predicted before the step begins) is compared with that of the unedited model. The answer is that of
question 2 of the verdict (``interventions.verdict``), with tokens in the place of prompts: random sets are disjoint, of
as many features that fire in the step and are not the step's, and each pair is compared at the smaller of its two
doses. Holm's correction is over all steps of a text. Features are chosen by where they
fire, not by the effect of ablating them, so all tokens judge.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import Dictionary
from saejax.dictionaries.matmul import matmul
from saejax.errors import UserError
from saejax.interventions.ablation import FRACTIONS
from saejax.interventions.curves import EffectCurve, compare_at_equal_dose
from saejax.interventions.split_model import active_features, record, run_head
from saejax.matching.track.results import StepTest
from saejax.matching.track.stack import LayerDictionary
from saejax.matching.track.texts import EncodedText, Segment
from saejax.models import decoder
from saejax.models.language_model import LanguageModel
from saejax.models.lengths import round_length
from saejax.models.sites import Site
from saejax.models.split import PrefixKV, SharedPrefixBatch, SplitPoint
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import sharding
from saejax.stages.track import TrackConfig
from saejax.statistics.partition import disjoint_sets
from saejax.statistics.ranks import holm, min_controls, rank_p
from saejax.tasks.likelihood import token_scores

ROWS = {"cpu": 32}  # sets that are removed at once; the first block of draws and the clean run just fit
_MANY = 256  # the same on accelerators
_WINDOW, _POOL = 8, 64  # windows and features are filled up to a multiple of these, so that few programs are compiled
LEVEL = 0.05  # of the test, after correction

Effects = tuple[Sequence[int], EffectCurve, Sequence[EffectCurve]]  # features, their curve, those of random sets


class StepTester:
    """The steps of one text, tested at one layer.

    Raises:
      UserError: the site's value is not finite.
    """

    def __init__(self, lm: LanguageModel, layer: LayerDictionary, text: EncodedText, config: TrackConfig):
        self._lm, self._text, self._config = lm, text, config
        writes = Site.parse(layer.config.target or layer.config.site)
        self._dictionary = jax.device_put(layer.load().with_sink_norms(lm.sink_norm), sharding(lm.mesh))
        self._point = SplitPoint(lm.config, writes, layer.reads, lm.mesh, lm.rules)
        length = len(text.ids_T)
        # Lengths are rounded, so that texts share programs.
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

    def test(self, step: Segment, features: Sequence[int]) -> tuple[EffectCurve, list[EffectCurve]]:
        """Return the effects on a step's tokens of ablating features in it, and of ablating random sets.

        Returns:
          The curve of the features that fire there, by growing fractions, and those of the random sets.

        Raises:
          UserError: none of the features fires there, the step has one token, or a log-likelihood is not finite.
        """
        f_WxF = self._f_TxF[step.start : step.stop - 1]  # at the last token nothing of the step is predicted
        if not len(f_WxF):
            raise UserError("the step has a single token")
        fires_F = (f_WxF != 0).any(axis=0)
        tested = [feature for feature in features if fires_F[feature]]
        if not tested:
            raise UserError("none of its features fires before its last token")
        # Random sets fire in the step, too: removing what is silent would do nothing and make any effect look large.
        pool = np.setdiff1d(np.flatnonzero(fires_F), np.asarray(features))
        seed = int(np.random.SeedSequence([self._config.seed, step.start, self._point.site.layer]).generate_state(1)[0])
        random_sets = disjoint_sets(pool, len(tested), self._config.random_sets, seed)
        sets = [np.array(tested), *random_sets]
        W_dec_FxD = to_host(self._dictionary.W_dec_FxD[...])
        dose_S = np.array([_dose(f_WxF, W_dec_FxD, members) for members in sets])
        share_S = dose_S[0] / np.maximum(dose_S, 1e-30)
        edits = [(sets[0], fraction) for fraction in FRACTIONS] + [(members, 1.0) for members in random_sets]
        # Sets of a larger dose are ablated in part as well, and compared with the features at their dose.
        edits += [(members, share) for members, share in zip(random_sets, share_S[1:], strict=True) if share < 1]
        pool_K = np.unique(np.concatenate(sets))
        # The clean run is a row of the same program: rounding differs between programs, and would pass for an effect.
        clean_P, *logp_ExP = self._scores(step, pool_K, [(np.zeros(0, np.int64), 1.0), *edits])
        if not np.isfinite(clean_P).all() or not np.isfinite(logp_ExP).all():
            raise UserError("log-likelihoods are not finite: try --model.dtype=float32")
        drop_ExP = clean_P - np.stack(logp_ExP)
        count, nothing_1xP = len(FRACTIONS), np.zeros((1, len(clean_P)))
        top = EffectCurve((), dose_S[0] * np.array([0.0, *FRACTIONS]), np.concatenate([nothing_1xP, drop_ExP[:count]]))
        whole, reduced = drop_ExP[count : count + len(random_sets)], iter(drop_ExP[count + len(random_sets) :])
        curves = []
        for drop_P, dose, share in zip(whole, dose_S[1:], share_S[1:], strict=True):
            rows = [nothing_1xP[0], *([next(reduced)] if share < 1 else []), drop_P]
            doses = [0.0, *([share * dose] if share < 1 else []), dose]
            curves.append(EffectCurve((), np.array(doses), np.stack(rows)))
        return top, curves

    def _scores(self, step: Segment, pool_K: np.ndarray, edits: Sequence[tuple[np.ndarray, float]]) -> np.ndarray:
        """Return the log-likelihood of the step's tokens but the first, under each partial ablation, [N, P]."""
        count = step.stop - step.start - 1
        window, pool = filled(count, len(pool_K))
        # Copies of the last feature, of which nothing is removed, because their fraction stays 0.
        padded_X = np.pad(pool_K, (0, pool - len(pool_K)), mode="edge")
        removed_WxX = np.zeros((window, pool), np.float32)
        removed_WxX[:count] = self._f_TxF[step.start : step.start + count][:, padded_X]
        targets_W: np.ndarray = np.zeros(window, np.int32)
        targets_W[:count] = self._text.ids_T[step.start + 1 : step.stop]
        rows = rows_at_once(self._lm.mesh.devices.flat[0].platform, self._lm.mesh.shape["data"])
        parts = []
        for first in range(0, len(edits), rows):
            fraction_RxX = np.zeros((rows, pool), np.float32)
            for row, (features, fraction) in zip(fraction_RxX, edits[first : first + rows], strict=False):
                row[np.searchsorted(pool_K, features)] = fraction
            arrays = self._stream, self._value, self._past, removed_WxX, padded_X, fraction_RxX
            start = np.int32(step.start)
            # Only the step is run: what comes before it is not edited, and its keys and values are at hand.
            logp_RxW, _ = run_rows(self._point, self._lm.params, self._dictionary, *arrays, targets_W, start)
            parts.append(np.asarray(logp_RxW, np.float64)[: len(edits) - first, :count])
        return np.concatenate(parts)


def _dose(f_WxF: np.ndarray, W_dec_FxD: np.ndarray, members: np.ndarray) -> float:
    """Return the norm of the change at the site when features are ablated, over all positions of the step."""
    return float(np.linalg.norm(f_WxF[:, members].astype(np.float64) @ W_dec_FxD[members].astype(np.float64)))


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
    fraction_RxX: jax.Array,
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
      fraction_RxX: share of each feature that every row ablates.
      targets_W: the next tokens.
      start: position of the first token.
    """
    rows, window = len(fraction_RxX), len(removed_WxX)
    shards = point.mesh.shape["data"]
    tree = SharedPrefixBatch.unshared(jnp.zeros(rows, jnp.int32), jnp.full(rows, start), window, shards)
    # A window filled up beyond the text reads its last token; those scores are dropped.
    at_W = jnp.minimum(start + jnp.arange(window), stream_1xTxD.shape[1] - 1)
    W_dec_KxD = dictionary.W_dec_FxD[...][features_K]
    removed_RxWxK = removed_WxX[None] * fraction_RxX[:, None, :]
    # Features are subtracted from the value instead of rebuilding it, so that the dictionary's error stays in place.
    changed_RxWxD = matmul(removed_RxWxK.astype(W_dec_KxD.dtype), W_dec_KxD)
    value_1xWxD = value_1xTxD[:, at_W]
    edited_RxWxD = (value_1xWxD.astype(changed_RxWxD.dtype) - changed_RxWxD).astype(value_1xWxD.dtype)
    stream_RxWxD = jnp.broadcast_to(stream_1xTxD[:, at_W], edited_RxWxD.shape)
    flat = (array.reshape(shards, -1, array.shape[-1]) for array in (stream_RxWxD, edited_RxWxD))
    x = point.run_shared_suffix(params, past, tree, *flat).reshape(edited_RxWxD.shape)
    positions_RxW, targets_RxW = (jnp.tile(each[None], (rows, 1)) for each in (jnp.arange(window), targets_W))
    return token_scores(point.config, params, x, positions_RxW, targets_RxW)


def judge_steps(effects: Mapping[int, Effects]) -> dict[int, StepTest]:
    """Return the answers for all tested steps of a text, by the index of the step's segment."""
    pairs = {key: compare_at_equal_dose(top, random)[:2] for key, (_, top, random) in effects.items() if random}
    p_values = {key: rank_p(top.mean(axis=1), random.mean(axis=1)) for key, (top, random) in pairs.items()}
    adjusted = dict(zip(p_values, holm(np.array(list(p_values.values()))).tolist(), strict=True))
    needed = min_controls(len(effects), LEVEL)

    def answer(key: int, sets: int) -> str:
        if sets < needed:
            return "not testable"
        return "yes" if adjusted[key] <= LEVEL else "no"

    return {
        key: StepTest(
            features=tuple(features),
            tokens=top.drop_AxP.shape[1],
            drop=float(top.drop_AxP[-1].mean()),
            sets=len(random),
            needed=needed,
            equal_drop=float(pairs[key][0].mean()) if random else None,
            random_drop=float(pairs[key][1].mean()) if random else None,
            p_value=p_values.get(key),
            p_holm=adjusted.get(key),
            hurt=answer(key, len(random)),
        )
        for key, (features, top, random) in effects.items()
    }


def ablate_steps(
    tester: StepTester, text: EncodedText, chosen: Sequence[Sequence[int]], on_step: Callable[[int, int], None]
) -> tuple[dict[int, StepTest], dict[int, str]]:
    """Test every step of a text.

    Args:
      tester: tests at a layer.
      text: what is followed.
      chosen: the features of each segment.
      on_step: called with the tests done and of all; may raise to stop.

    Returns:
      The tests by segment, and why other steps could not be tested.
    """
    effects: dict[int, Effects] = {}
    untested: dict[int, str] = {}
    on_step(0, len(text.steps))
    for done, segment in enumerate(range(text.first, len(text.segments)), 1):
        try:
            if not chosen[segment]:
                raise UserError("no feature belongs to it")
            effects[segment] = chosen[segment], *tester.test(text.segments[segment], chosen[segment])
        except UserError as error:
            # A step that cannot be tested should not end the text: the page says why.
            untested[segment] = str(error)
        on_step(done, len(text.steps))
    return judge_steps(effects), untested
