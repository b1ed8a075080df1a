"""Tests of a step's features: ablate them within the step, beside random lists of the same dose.

The step's features are set to zero at its tokens, at one layer, and the log-likelihood of each of the step's tokens but
the first (which is predicted before the step begins) is compared with that of the unedited model. The answer is that of
question 2 of the verdict (``interventions.verdict``), with tokens in the place of prompts: random lists of features
that fire in the step and are not the step's, each built to the dose of the step's features and measured there
(``interventions.controls``). Where fewer than ten lists' worth of features fire, the step is not testable. Holm's
correction is over the other steps of a text. Features are chosen by where they fire, not by the effect of
ablating them, so all tokens judge.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.interventions.answers import VerdictConfig
from saejax.interventions.controls import Changes, choose_pool, inner_products, random_lists
from saejax.interventions.rows import edit_value
from saejax.interventions.split_model import SplitModel, active_features, record, run_head
from saejax.matching.track.results import StepTest, TrackedStep
from saejax.matching.track.settings import TrackConfig
from saejax.matching.track.stack import LayerDictionary
from saejax.matching.track.texts import EncodedText
from saejax.models import decoder
from saejax.models.language_model import LanguageModel
from saejax.models.lengths import round_length
from saejax.models.split import PrefixKV, SharedPrefixBatch, SplitPoint
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import document_devices
from saejax.statistics.ranks import holm_by_key, min_controls, rank_p
from saejax.tasks.likelihood import token_scores

_ROWS, _MANY = {"cpu": 32}, 256  # sets that are ablated at once; on accelerators
_WINDOW, _POOL = 8, 64  # windows and features are filled up to a multiple of these, so that few programs are compiled
LEVEL = 0.05  # of the test, after correction


@dataclasses.dataclass(frozen=True)
class StepEffects:
    """Effects of ablating a step's features, and random lists of their dose, on the step's P tokens but the first."""

    features: tuple[int, ...]  #: the step's features that fire in it
    drop_P: np.ndarray  #: drop of each token's log-likelihood, nats
    control_NxP: np.ndarray  #: the same under each list
    pool: int  #: features that lists are drawn from
    list_size: float  #: features of a list, median; 0 without any

    @property
    def is_testable(self) -> bool:
        """True where the pool holds enough lists' worth of features: lists from fewer are nearly the same."""
        return len(self.control_NxP) > 0 and self.pool >= VerdictConfig.least_lists * self.list_size


class StepTester:
    """The steps of one text, tested at one layer.

    Raises:
      UserError: the site's value is not finite.
    """

    def __init__(self, lm: LanguageModel, layer: LayerDictionary, text: EncodedText, config: TrackConfig):
        self._text, self._config, self._split = text, config, SplitModel(lm, layer.load())
        point, params, dictionary, length = self._split.point, lm.params, self._split.dictionary, len(text.ids_T)
        # Lengths are rounded, so that texts share programs.
        padded = round_length(length)
        ids_1xX = np.pad(text.ids_T, (0, padded - length))[None].astype(np.int32)
        last_1, wanted_1xX = np.array([length - 1]), np.ones(ids_1xX.shape, bool)
        stream, value, read_1xXxD, domain_1xX, finite_1 = run_head(
            point, "keep", params, dictionary, ids_1xX, last_1, wanted_1xX
        )
        if not np.asarray(finite_1).all():
            raise UserError(
                f"the value of {point.site} is not finite on {text.problem.slug}: try --model.dtype=float32"
            )
        self._clean = CleanText(stream, value, record(point, params, stream, value, last_1)[1])
        f_1xXxF = active_features(dictionary, read_1xXxD, domain_1xX)
        self._f_TxF = np.asarray(jnp.where(dictionary.fires(f_1xXxF), f_1xXxF, 0.0))[0, :length]

    def test(self, step: TrackedStep, features: Sequence[int]) -> StepEffects:
        """Return the effects on a step's tokens of ablating features in it, and of ablating random lists.

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
        # Random lists fire in the step, too: removing what is silent would do nothing and make any effect look large.
        layer = self._split.point.site.layer
        seed = int(np.random.SeedSequence([self._config.seed, step.start, layer]).generate_state(1)[0])
        pool = choose_pool(fires_F, 1, features, 1.0, seed)
        features_K = np.unique([*tested, *pool.tolist()])
        W_dec_KxD = to_host(self._split.dictionary.restrict(features_K).W_dec_FxD[...]).astype(np.float64)
        # The change over all positions of the step, in float64 as lists of a dose are compared.
        changes = Changes(features_K, inner_products([f_WxF[:, features_K].astype(np.float64)], [W_dec_KxD]))
        dose = changes.dose(tested)
        lists = random_lists(changes, pool, dose, self._config.random_sets, seed) if dose else []
        edits = [(np.array(tested), 1.0), *((np.array(members), fraction) for members, fraction in lists)]
        # The clean run is a row of the same program: rounding differs between programs, and would pass for an effect.
        clean_P, *logp_ExP = self._scores(step, [(np.zeros(0, np.int64), 1.0), *edits])
        if not np.isfinite(clean_P).all() or not np.isfinite(logp_ExP).all():
            raise UserError("log-likelihoods are not finite: try --model.dtype=float32")
        drop_ExP = clean_P - np.stack(logp_ExP)
        sizes = [len(members) for members, _ in lists]
        return StepEffects(
            features=tuple(tested),
            drop_P=drop_ExP[0],
            control_NxP=drop_ExP[1:],
            pool=len(pool),
            list_size=float(np.median(sizes)) if sizes else 0.0,
        )

    def _scores(self, step: TrackedStep, edits: Sequence[tuple[np.ndarray, float]]) -> np.ndarray:
        """Return the log-likelihood of the step's tokens but the first, under each partial ablation, [N, P]."""
        split, count = self._split, step.stop - step.start - 1
        pool_K = np.unique(np.concatenate([members for members, _ in edits]))
        # Copies of the last feature, of which nothing is removed, because their fraction stays 0.
        padded_X = np.pad(pool_K, (0, -len(pool_K) % _POOL), mode="edge")
        window = count + -count % _WINDOW
        removed_WxX = np.zeros((window, len(padded_X)), np.float32)
        removed_WxX[:count] = self._f_TxF[step.start : step.start + count][:, padded_X]
        targets_W: np.ndarray = np.zeros(window, np.int32)
        targets_W[:count] = self._text.ids_T[step.start + 1 : step.stop]
        mesh = split.point.mesh
        rows = _ROWS.get(mesh.devices.flat[0].platform, _MANY)
        rows += -rows % document_devices(mesh)
        parts = []
        for first in range(0, len(edits), rows):
            fraction_RxX = np.zeros((rows, len(padded_X)), np.float32)
            for row, (features, fraction) in zip(fraction_RxX, edits[first : first + rows], strict=False):
                row[np.searchsorted(pool_K, features)] = fraction
            removed = RemovedFeatures(padded_X, removed_WxX, fraction_RxX)
            # Only the step is run: what comes before it is not edited, and its keys and values are at hand.
            start = np.int32(step.start)
            logp_RxW, _ = run_rows(split.point, split.params, split.dictionary, self._clean, removed, targets_W, start)
            parts.append(np.asarray(logp_RxW, np.float64)[: len(edits) - first, :count])
        return np.concatenate(parts)


class CleanText(NamedTuple):
    """A text of T tokens as it is."""

    stream_1xTxD: jax.Array  #: the stream
    value_1xTxD: jax.Array  #: what the dictionary changes there
    past: PrefixKV  #: keys and values


class RemovedFeatures(NamedTuple):
    """Shares of K features' activations at W tokens, which each of R rows removes."""

    features_K: np.ndarray  #: the features that sets are drawn from
    act_WxK: np.ndarray  #: their activations
    fraction_RxK: np.ndarray  #: share of each that every row ablates


@functools.partial(jax.jit, static_argnums=0)
def run_rows(
    point: SplitPoint,
    params: decoder.Params,
    dictionary: Dictionary,
    clean: CleanText,
    removed: RemovedFeatures,
    targets_W: jax.Array,
    start: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Run W tokens from ``start`` on, in each row without a set of features, and return their scores, both [R, W].

    Args:
      point: where the model is split.
      params: of the model.
      dictionary: whose features are removed.
      clean: the text as it is.
      removed: what each row removes.
      targets_W: the next tokens.
      start: position of the first token.
    """
    rows, window = len(removed.fraction_RxK), len(removed.act_WxK)
    shards = document_devices(point.mesh)
    tree = SharedPrefixBatch.unshared(jnp.zeros(rows, jnp.int32), jnp.full(rows, start), window, shards)
    # A window filled up beyond the text reads its last token; those scores are dropped.
    at_W = jnp.minimum(start + jnp.arange(window), clean.stream_1xTxD.shape[1] - 1)
    stream_RxWxD, value_RxWxD, act_RxWxK = (
        jnp.broadcast_to(row, (rows, *row.shape[-2:]))
        for row in (clean.stream_1xTxD[:, at_W], clean.value_1xTxD[:, at_W], removed.act_WxK)
    )
    W_dec_KxD = dictionary.W_dec_FxD[...][removed.features_K]
    edited_RxWxD = edit_value(value_RxWxD, act_RxWxK, W_dec_KxD, removed.fraction_RxK[:, None, :])
    flat = (array.reshape(shards, -1, array.shape[-1]) for array in (stream_RxWxD, edited_RxWxD))
    x = point.run_shared_suffix(params, clean.past, tree, *flat).reshape(edited_RxWxD.shape)
    positions_RxW, targets_RxW = (jnp.tile(row_W[None], (rows, 1)) for row_W in (jnp.arange(window), targets_W))
    return token_scores(point.config, params, x, positions_RxW, targets_RxW)


def judge_steps(effects: Mapping[int, StepEffects]) -> dict[int, StepTest]:
    """Return the answers for all tested steps of a text, by the index of the step's segment."""
    # Which steps are testable depends on where features fire, not on effects.
    testable = {key: effect for key, effect in effects.items() if effect.is_testable}
    p_values = {
        key: rank_p(float(effect.drop_P.mean()), effect.control_NxP.mean(axis=1)) for key, effect in testable.items()
    }
    adjusted, needed = holm_by_key(p_values), min_controls(max(len(testable), 1), LEVEL)

    def answer(key: int, sets: int) -> str:
        if key not in testable or sets < needed:
            return "not testable"
        # Lists may raise the likelihood by more than the step's features do: then these hurt nothing.
        return "yes" if adjusted[key] <= LEVEL and testable[key].drop_P.mean() > 0 else "no"

    return {
        key: StepTest(
            features=effect.features,
            drop=float(effect.drop_P.mean()),
            sets=len(effect.control_NxP),
            needed=needed,
            random_drop=float(effect.control_NxP.mean()) if len(effect.control_NxP) else None,
            p_holm=adjusted.get(key),
            hurt=answer(key, len(effect.control_NxP)),
        )
        for key, effect in effects.items()
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
    effects: dict[int, StepEffects] = {}
    untested: dict[int, str] = {}
    on_step(0, len(text.steps))
    for done, segment in enumerate(range(text.first, len(text.segments)), 1):
        try:
            if not chosen[segment]:
                raise UserError("no feature belongs to it")
            effects[segment] = tester.test(text.segments[segment], chosen[segment])
        except UserError as error:
            # A step that cannot be tested should not end the text: the page says why.
            untested[segment] = str(error)
        on_step(done, len(text.steps))
    return judge_steps(effects), untested
