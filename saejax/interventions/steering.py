"""Steering: prompts turned to the answers of their counterparts by a change of one site.

A *text* is a train prompt, or its counterpart, to which the prompt's wrong answer is right; it is read at its last
position. Steering from answer c to answer w uses one of

- ``add``: the mean change of the top features' activations, from texts whose answer is c to texts whose answer is w, is
  added. The top features have the largest change times slope of the logit difference;
- ``clamp``: these features are set to a multiple of their mean activation on texts whose answer is w (Templeton et al.,
  2024);
- ``mean_difference``: the difference between the site's mean values on the two kinds of text is added (Rimsky et al.,
  2024, arXiv 2312.06681).

Train prompts also choose the strength of each method, among strengths that raise held-out cross-entropy little.
Test prompts judge it. For each pair of answers controls are added at the method's dose in its prompts:

- *random features*: lists to the dose (``saejax.interventions.controls``) of features that fire on at least 5 % of the
  test prompts, without the top ones; each is added by as large a multiple of its mean activation on the texts as the
  method adds of the top features' mean change, or clamps them to;
- *random directions*: differences of means after the answers were shuffled among the texts. They lie where values of
  these texts differ, and are harder to beat than directions that no value ever takes.

All changes are edits (``saejax.interventions.edits``) at the editable positions but attention sinks. Of a crosscoder
the value is that of all its sites, each relative to the size of its values (``saejax.interventions.several_sites``).
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.interventions import activity, bases
from saejax.interventions.ablation import root_mean_square, spread_over_templates
from saejax.interventions.answers import LEAST_PROMPTS, CausalAnswer, VerdictConfig, mean_interval
from saejax.interventions.controls import (
    MIN_FIRING,
    Changes,
    choose_pool,
    inner_products,
    lists_differ,
    random_lists,
)
from saejax.interventions.edits import FeatureEdits, add, mask
from saejax.interventions.engine import change_norms, run_edits
from saejax.interventions.settings import SteerConfig
from saejax.interventions.several_sites import DirectionsAtSites, SeveralSites
from saejax.interventions.slopes import leaders, slopes
from saejax.interventions.split_model import SplitModel
from saejax.interventions.text import HeldOutText
from saejax.models.language_model import LanguageModel
from saejax.models.split import LaterSite
from saejax.models.tokens import token_text
from saejax.parallel.collectives import to_host
from saejax.progress import OnProgress, silent
from saejax.results import Interval
from saejax.short_reprs import has_short_repr
from saejax.statistics import bootstrap
from saejax.statistics.intervals import wilson
from saejax.statistics.ranks import holm_by_key, min_controls, rank_p
from saejax.tasks.answer_tokens import first_answer_ids
from saejax.tasks.behaviours import Prompt

METHODS = ("add", "clamp", "mean_difference")
MIN_TEXTS = 3  # texts of an answer, of which a mean is taken
FACTORS = (1.0, 2.0, 4.0, 8.0)  # of the activation that features are clamped to
TEXT_SWAPS = 4  # answer pairs whose changes are tried on held-out text
# Nats per token: a larger rise means that text of any kind has become hard to predict, not that an answer was turned.
MAX_CE_RISE = 1.0
CONTROLS = dict(add="random lists of features", clamp="random lists of features", mean_difference="random directions")


class AnswerSwap(NamedTuple):
    """Two answers, as ids of their first tokens: a prompt's, and the one that it is steered to."""

    source: int
    target: int


@dataclasses.dataclass(frozen=True)
class AnswerTexts:
    """N texts at their last positions."""

    answer_N: np.ndarray  #: token ids of their right answers
    value_NxD: np.ndarray  #: values of the site that is changed
    slope_NxD: np.ndarray  #: gradient of logit(right) - logit(wrong) at that site
    f_NxF: np.ndarray  #: activations of the features
    W_dec_FxD: np.ndarray  #: directions of the features
    norm: float  #: mean norm of the site's values at editable positions

    @classmethod
    def read(cls, lm: LanguageModel, split: SplitModel, prompts: Sequence[Prompt]) -> "AnswerTexts":
        """Read the texts of train prompts; those without a counterpart give one text."""
        turned = [
            dataclasses.replace(p, text=p.counterpart, correct=p.wrong, wrong=p.correct, counterpart=p.text)
            for p in prompts
            if p.counterpart
        ]
        texts = [*prompts, *turned]
        index_N, last_N = np.arange(len(texts)), lm.tokenize([text.text for text in texts]).last_B
        later = split.point.later
        slope_by_site, scale_by_site = [], []
        for site, scale in (LaterSite(split.point.site, 1.0), *later):
            slope_by_site.append(scale * slopes(lm, texts, "logit_diff", str(site), silent)[index_N, last_N])
            scale_by_site.append(np.full(site.width(lm.config), scale, np.float32))
        slope_NxD, scale_D = np.concatenate(slope_by_site, axis=1), np.concatenate(scale_by_site)
        answer_N, value_NxD = np.zeros(len(texts), np.int64), np.zeros(slope_NxD.shape, np.float32)
        f_NxF, norms = np.zeros((len(texts), split.dictionary.config.n_features), np.float32), []
        for run in split.run(texts):
            count, rows_B = len(run.index_P), np.arange(len(run.last_B))
            # Of several sites ``value`` has changes in the place of later values, and ``read`` all values.
            value_BxTxD = to_host(run.read_BxTxD if later else run.value_BxTxD) / scale_D
            answer_N[run.index_P] = run.answers_Bx2[:count, 0]
            value_NxD[run.index_P] = value_BxTxD[rows_B, run.last_B][:count]
            f_NxF[run.index_P] = to_host(split.dictionary.encode(run.read_BxTxD[rows_B, run.last_B]))[:count]
            norm_PxT = np.linalg.norm(value_BxTxD[:count].astype(np.float64), axis=-1)
            norms += norm_PxT[to_host(run.domain_BxT)[:count]].tolist()
        W_dec_FxD = to_host(split.dictionary.W_dec_FxD[...]).astype(np.float32, copy=False)
        return cls(answer_N, value_NxD, slope_NxD, f_NxF, W_dec_FxD, float(np.mean(norms)) if norms else 0.0)

    def covers(self, swap: AnswerSwap) -> bool:
        """Return whether there are enough texts of both answers."""
        return all((self.answer_N == answer).sum() >= MIN_TEXTS for answer in swap)

    def mean_difference(self, values_Nx: np.ndarray, swap: AnswerSwap) -> np.ndarray:
        """Return the mean of values over texts of the target answer, less that over texts of the source answer."""
        source, target = (values_Nx[self.answer_N == answer].mean(axis=0, dtype=np.float64) for answer in swap)
        return target - source

    def top(self, swap: AnswerSwap, count: int) -> list[int]:
        """Return the features of largest change times slope, at most ``count``, those above zero alone."""
        slope_D = self.mean_difference(self.slope_NxD, swap) / 2  # texts of either answer have opposite slopes
        return leaders(self.mean_difference(self.f_NxF, swap) * (self.W_dec_FxD @ slope_D), count)


def steering_edits(
    texts: AnswerTexts,
    dictionary: Dictionary,
    method: str,
    swap: AnswerSwap,
    features: Sequence[int],
    strengths: Sequence[float],
) -> FeatureEdits:
    """Return the edits of a method, one for each strength.

    Args:
      texts: the texts that it is learned on.
      dictionary: the dictionary of the features, at whose site the change is made.
      method: one of ``METHODS``.
      swap: the answers.
      features: the top features of the swap.
      strengths: norms of what is added, in mean norms of the site's values; for ``clamp`` factors of the features' mean
        activations on texts of the target answer.
    """
    chosen = np.asarray(features, np.int64)
    if method == "clamp":
        level_K = texts.f_NxF[texts.answer_N == swap.target][:, chosen].mean(axis=0, dtype=np.float64)
        count, whole_K = len(strengths), np.ones(len(chosen))
        levels = tuple(strength * level_K for strength in strengths)
        return FeatureEdits(dictionary, (chosen,) * count, (whole_K,) * count, levels)
    if method == "add":
        vector_D = texts.mean_difference(texts.f_NxF[:, chosen], swap) @ texts.W_dec_FxD[chosen]
    else:
        vector_D = texts.mean_difference(texts.value_NxD, swap)
    return vector_edits(dictionary, [strength * texts.norm * _unit(vector_D) for strength in strengths])


def vector_edits(dictionary: Dictionary, vectors: Sequence[np.ndarray]) -> FeatureEdits:
    """Return edits that add a vector each at the site that a dictionary writes to."""
    # With the dictionary's rule for attention sinks, which are left alone.
    make = DirectionsAtSites if isinstance(dictionary, SeveralSites) else bases.linear
    return add(make(dictionary, np.stack(vectors)), [[number] for number in range(len(vectors))], 1.0)


def random_feature_vectors(
    texts: AnswerTexts, pool: np.ndarray, multiple: float, norm: float, count: int, seed: int
) -> list[np.ndarray]:
    """Return vectors of one norm that add random lists of features.

    None if the whole pool does not reach the norm, or holds fewer than ten lists' worth of features (``lists_differ``).

    Args:
      texts: their mean activations say by how much each feature is added.
      pool: the features that lists are made of, rising.
      multiple: of the mean activation.
      norm: norm of each vector, above 0.
      count: number of lists.
      seed: seed of the draws.
    """
    amount_F = multiple * texts.f_NxF.mean(axis=0, dtype=np.float64)
    pool = pool[amount_F[pool] > 0]  # others would add nothing
    if not len(pool):
        return []
    amount_K = amount_F[pool]
    W_dec_KxD = texts.W_dec_FxD[pool].astype(np.float64)
    changes = Changes(pool, inner_products([amount_K[None]], [W_dec_KxD]))
    lists = [(np.searchsorted(pool, some), share) for some, share in random_lists(changes, pool, norm, count, seed)]
    if not lists_differ(len(pool), [len(at_N) for at_N, _ in lists]):
        return []
    return [share * amount_K[at_N] @ W_dec_KxD[at_N] for at_N, share in lists]


def random_directions(texts: AnswerTexts, swap: AnswerSwap, count: int, seed: int) -> list[np.ndarray]:
    """Return ``count`` differences of means of texts whose answers were shuffled by ``seed``, of norm 1."""
    shuffled = (np.random.default_rng([seed, number]).permutation(texts.answer_N) for number in range(count))
    drawn = (dataclasses.replace(texts, answer_N=answer_N) for answer_N in shuffled)
    return [_unit(sample.mean_difference(sample.value_NxD, swap)) for sample in drawn]


def choose_strength(diff_SxP: np.ndarray, is_allowed_S: np.ndarray) -> int:
    """Return the strength that turns most prompts, of those allowed; of equal ones the lowest mean difference wins.

    Args:
      diff_SxP: logit differences of train prompts at S rising strengths.
      is_allowed_S: which may be chosen; the first one if none may.
    """
    order = sorted(np.flatnonzero(is_allowed_S), key=lambda s: (-(diff_SxP[s] < 0).mean(), diff_SxP[s].mean()))
    return int(order[0]) if order else 0


def group_by_swap(lm: LanguageModel, prompts: Sequence[Prompt]) -> dict[AnswerSwap, list[int]]:
    """Return the indices of the prompts of each pair of answers, the most frequent pair first."""
    groups: dict[AnswerSwap, list[int]] = {}
    for place, answers in enumerate(first_answer_ids(lm, prompts).tolist() if prompts else ()):
        groups.setdefault(AnswerSwap(*answers), []).append(place)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def name_swap(tokenizer: Any, swap: AnswerSwap) -> str:
    """Return a pair of answers as text; tokens that are a part of a character are shown by their bytes."""
    return " → ".join(token_text(tokenizer)(token).strip() for token in swap)


def _unit(vector_D: np.ndarray) -> np.ndarray:
    """Return a vector of norm 1, or 0 if it has none."""
    norm = float(np.linalg.norm(vector_D))
    return vector_D / norm if norm > 0 else vector_D


@dataclasses.dataclass(frozen=True)
class SteeringPoint:
    """One strength of a method, on the test prompts."""

    strength: float  #: norm of what is added in mean norms of the site's values; of `clamp` the factor
    dose: float  #: root mean square over prompts of the norm of the change at the site
    drop: Interval  #: fall of logit(answer) - logit(target), 95 % bootstrap interval over prompts within templates
    turned: Interval  #: share of the prompts whose target has the higher logit, 95 % Wilson interval
    ce_rise: Interval | None  #: rise of cross-entropy on held-out text, nats per token; None without text


@dataclasses.dataclass(frozen=True)
class SteeringMethod:
    """A way to steer."""

    points: tuple[SteeringPoint, ...]  #: measurements by rising strength
    chosen: int  #: the strength that was chosen on train prompts, counted from 0
    control: str  #: the comparison at equal dose: random lists of features, or random directions
    controls: tuple[float, ...]  #: drop of each control change, logits, mean over prompts
    control_turned: float | None  #: mean share of prompts that the controls turn; None without any
    #: test prompts that are compared with controls; for other answers no list of features reaches the dose, or a list
    #: holds more than a tenth of the features that fire
    compared: int
    answer: CausalAnswer  #: does it steer more than the controls at equal dose?


@has_short_repr
@dataclasses.dataclass(frozen=True)
class BehaviourSteering:
    """A behaviour steered; also in `<behaviour>.json`."""

    reason: str | None  #: why the behaviour was not steered; None where it was
    prompts: int  #: test prompts on which it is judged
    left_out: Mapping[str, int]  #: other test prompts, by reason
    clean: Interval | None  #: logit difference without a change
    methods: Mapping[str, SteeringMethod]  #: by name
    features: Mapping[str, tuple[int, ...]]  #: answer → target: the top features


@dataclasses.dataclass(frozen=True)
class SteerResults:
    """Steering of prompts to the answers of their counterparts."""

    dictionary: str  #: name of the dictionary
    site: str  #: site that is changed
    behaviours: Mapping[str, BehaviourSteering]  #: results by behaviour


class SteeringTest:
    """A behaviour on a model and a dictionary.

    Args:
      lm: the model.
      dictionary: the dictionary whose features, and at whose site, prompts are steered; a crosscoder at its sites
        (``place_at_sites``).
      prompts: prompts of both splits.
      text: held-out text, if there is any.
      config: settings of the stage.
      max_prompts: test prompts that are steered, at most, spread evenly over templates; 0: all.
      on_progress: called with the tokens done and in total of each measurement; may raise to stop.

    Raises:
      UserError: there are no doses.
    """

    def __init__(
        self,
        lm: LanguageModel,
        dictionary: Dictionary,
        prompts: Sequence[Prompt],
        text: HeldOutText | None,
        config: SteerConfig,
        max_prompts: int = 0,
        on_progress: OnProgress = silent,
    ):
        if not config.doses:
            raise UserError("doses is empty: name at least one, such as 0.4")
        config = dataclasses.replace(config, doses=tuple(sorted(set(config.doses))))
        self._lm, self._text, self._config, self._on_progress = lm, text, config, on_progress
        self._split = SplitModel(lm, dictionary)
        self._nothing = mask(self._split.dictionary, [[]])
        train, test = ([prompt for prompt in prompts if prompt.split == name] for name in ("train", "test"))
        on_progress(0, 0)
        self._texts = AnswerTexts.read(lm, self._split, train) if train else None
        self._train, _ = self._fitting(train)
        # What the model gets wrong cannot be turned from right.
        tests, self._left_out = self._fitting(test)
        self._test = spread_over_templates(tests, max_prompts)
        self._left_out[f"beyond {max_prompts} prompts"] = len(tests) - len(self._test)
        self._train_groups, self._groups = group_by_swap(lm, self._train), group_by_swap(lm, self._test)
        swaps = {**self._groups, **self._train_groups} if self._texts else {}
        self._tops = {swap: self._texts.top(swap, config.top) for swap in swaps if self._texts}

    def results(self) -> BehaviourSteering:
        """Measure every method at every strength, and the controls of the chosen ones."""
        if reason := self._reason():
            return BehaviourSteering(reason, len(self._test), self._left_out, None, {}, {})
        templates = [prompt.template for prompt in self._test]
        weight_RxP = bootstrap.resampling_weights(templates, self._config.bootstrap, self._config.seed)
        (clean_P,), _ = self._steer(self._test, self._groups, dict.fromkeys(self._groups, self._nothing))
        methods = {
            method: self._measure(method, clean_P, weight_RxP)
            for method in METHODS
            if method == "mean_difference" or any(self._tops.values())
        }
        return BehaviourSteering(
            reason=None,
            prompts=len(self._test),
            left_out=self._left_out,
            clean=mean_interval(clean_P, weight_RxP),
            methods=methods,
            features={name_swap(self._lm.tokenizer, swap): tuple(self._tops[swap]) for swap in self._groups},
        )

    def _reason(self) -> str:
        """Return why the behaviour is not steered; "" if it is."""
        if self._texts is None:
            return "it has no train prompts"
        if not self._texts.norm > 0:
            return "no position of its train prompts may be changed"
        for split, prompts in (("train", self._train), ("test", self._test)):
            if len(prompts) < LEAST_PROMPTS:
                return (
                    f"{len(prompts)} of its {split} prompts are answered correctly and have two answers that "
                    f"at least {MIN_TEXTS} train texts have, too; expected at least {LEAST_PROMPTS}"
                )
        return ""

    def _fitting(self, prompts: Sequence[Prompt]) -> tuple[list[Prompt], dict[str, int]]:
        """Return prompts answered correctly whose answers the texts have, and the number of others by reason."""
        swaps, texts = group_by_swap(self._lm, prompts), self._texts
        covered = sorted(p for swap, places in swaps.items() if texts and texts.covers(swap) for p in places)
        chosen = [prompts[place] for place in covered]
        split = self._split
        measured = run_edits(split, split.run(chosen), self._nothing, self._config.batch_rows) if chosen else {}
        diff_P = measured["logit_diff"][0] if chosen else np.zeros(0)
        right = [prompt for prompt, diff in zip(chosen, diff_P, strict=True) if diff > 0]
        return right, {"unknown answers": len(prompts) - len(chosen), "answered wrongly": len(chosen) - len(right)}

    def _steer(
        self,
        prompts: Sequence[Prompt],
        groups: Mapping[AnswerSwap, Sequence[int]],
        edits: Mapping[AnswerSwap, FeatureEdits],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run the edits of each swap, S for each, on the swap's prompts.

        Returns:
          The logit differences, and the norms of the changes at the site, float64 [S, P] each.
        """
        diffs, norms = [], []
        for swap, places in groups.items():
            split = self._split_for(edits[swap])
            runs = split.run([prompts[place] for place in places])
            measured = run_edits(split, runs, edits[swap], self._config.batch_rows, self._on_progress)
            diffs.append(measured["logit_diff"][1:])
            norms.append(change_norms(split, runs, edits[swap]))
        order_P = np.argsort(np.concatenate(list(groups.values())))
        return np.concatenate(diffs, axis=1)[:, order_P], np.concatenate(norms, axis=1)[:, order_P]

    def _split_for(self, edits: FeatureEdits) -> SplitModel:
        """Return the model split for the edits' dictionary, which may be another basis at the site."""
        # The dictionary itself may be large: it is placed on the devices once.
        is_same = edits.dictionary is self._split.dictionary
        return self._split if is_same else SplitModel(self._lm, edits.dictionary)

    def _edits(self, method: str, swaps: Iterable[AnswerSwap]) -> dict[AnswerSwap, FeatureEdits]:
        """Return the edits of a method for some swaps, one for each strength."""
        assert self._texts
        fixed = self._texts, self._split.dictionary, method
        return {swap: steering_edits(*fixed, swap, self._tops[swap], self._strengths(method)) for swap in swaps}

    def _strengths(self, method: str) -> tuple[float, ...]:
        """Return the strengths of a method: factors of activations for ``clamp``, otherwise doses."""
        return FACTORS if method == "clamp" else self._config.doses

    def _measure(self, method: str, clean_P: np.ndarray, weight_RxP: np.ndarray) -> SteeringMethod:
        edits = self._edits(method, [*self._groups, *self._train_groups])
        diff_SxP, norm_SxP = self._steer(self._test, self._groups, edits)
        rises = self._text_rises(method, edits)
        points = tuple(
            SteeringPoint(
                strength=strength,
                dose=root_mean_square(norm_SxP[s]),
                drop=mean_interval(clean_P - diff_SxP[s], weight_RxP),
                turned=wilson(diff_SxP[s] < 0),
                ce_rise=rises[s] if rises else None,
            )
            for s, strength in enumerate(self._strengths(method))
        )
        # A strength that breaks the model turns many prompts, too: text has to stay as likely as it was.
        allowed_S = np.array([not p.ce_rise or p.ce_rise.mean <= MAX_CE_RISE for p in points])
        # On train prompts, or the best of several strengths would look better than it is.
        chosen = choose_strength(self._steer(self._train, self._train_groups, edits)[0], allowed_S)
        control_NxP, _, compared_P = self._steer_controls(method, points[chosen].strength, norm_SxP[chosen])
        # On the same prompts as the controls.
        drop_N = (clean_P - control_NxP)[:, compared_P].mean(axis=1) if len(control_NxP) else np.zeros(0)
        compared_drop = float((clean_P - diff_SxP[chosen])[compared_P].mean()) if len(drop_N) else 0.0
        p_value = rank_p(compared_drop, drop_N) if len(drop_N) else None
        return SteeringMethod(
            points=points,
            chosen=chosen,
            control=CONTROLS[method],
            controls=tuple(drop_N.tolist()),
            control_turned=float((control_NxP[:, compared_P] < 0).mean()) if len(drop_N) else None,
            compared=int(compared_P.sum()),
            answer=CausalAnswer(
                "not tested",
                "Not tested: the run has not ended.",
                points[chosen].drop,
                p_value,
                numbers=dict(compared_drop=compared_drop) if len(drop_N) else None,
            ),
        )

    def _steer_controls(
        self, method: str, strength: float, norm_P: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Run the controls of a method, at the dose that the method has in the prompts of each swap.

        Args:
          method: one of ``METHODS``.
          strength: the method's.
          norm_P: the norm of its change in each test prompt.

        Returns:
          The logit differences and the norms of the changes, as of ``_steer``, and the prompts that have controls, or
          that the method does not change: where no list of features reaches the dose, or all are nearly the same, there
          is nothing to compare with.
        """
        assert self._texts
        dictionary, norm_P = self._split.dictionary, np.asarray(norm_P, np.float64)
        # A vector of norm 1 has the norm sqrt(n) in a prompt with n positions that may change.
        unit = vector_edits(dictionary, [np.eye(1, self._texts.value_NxD.shape[1])[0]])
        _, (unit_P,) = self._steer(self._test, self._groups, dict.fromkeys(self._groups, unit))
        nothing = mask(dictionary, [[]] * self._config.random_sets)
        edits, compared_P = dict.fromkeys(self._groups, nothing), np.ones(len(self._test), bool)
        for swap, places in self._groups.items():
            dose = root_mean_square(norm_P[places])
            if not dose:  # the method changes nothing here, and neither do its controls
                continue
            vectors = self._draw_controls(method, strength, swap, dose / root_mean_square(unit_P[places]))
            if vectors:
                edits[swap] = vector_edits(dictionary, vectors)
            else:
                compared_P[places] = False
        is_compared = any(edit is not nothing for edit in edits.values()) and compared_P.sum() >= LEAST_PROMPTS
        if not is_compared or not len(nothing):
            return np.zeros((0, len(norm_P))), np.zeros((0, len(norm_P))), np.zeros(len(norm_P), bool)
        return *self._steer(self._test, self._groups, edits), compared_P

    def _draw_controls(self, method: str, strength: float, swap: AnswerSwap, norm: float) -> list[np.ndarray]:
        """Return the vectors that the controls of a method add in prompts of a swap, all of one norm."""
        assert self._texts
        texts, count, seed = self._texts, self._config.random_sets, self._config.seed
        if CONTROLS[method] == "random directions":
            return [norm * vector_D for vector_D in random_directions(texts, swap, count, seed)]
        top, multiple = self._tops[swap], strength
        if method == "add":
            change_D = texts.mean_difference(texts.f_NxF[:, top], swap) @ texts.W_dec_FxD[top]
            multiple = strength * texts.norm / max(float(np.linalg.norm(change_D)), 1e-12)
        pool = choose_pool(self._firing_F, len(self._test), top, MIN_FIRING, seed)
        return random_feature_vectors(texts, pool, multiple, norm, count, seed)

    @functools.cached_property
    def _firing_F(self) -> np.ndarray:
        """Return the number of test prompts on which each feature fires."""
        return activity.statistics(self._split, self._split.run(self._test)).prompts_F

    def _text_rises(self, method: str, edits: Mapping[AnswerSwap, FeatureEdits]) -> list[Interval] | None:
        """Return the rise of cross-entropy at each strength, mean over the most frequent swaps; None without text."""
        if self._text is None:
            return None
        # Without top features there is nothing to add: such a swap would leave text as it is.
        swaps = [swap for swap in self._groups if method == "mean_difference" or self._tops[swap]] or list(self._groups)
        rises = []
        for swap in swaps[:TEXT_SWAPS]:
            ce_ExN = self._text.effects(self._split_for(edits[swap]), edits[swap])
            rises.append(ce_ExN[1:] - ce_ExN[0])
        rise_SxN = np.mean(rises, axis=0)
        documents = [""] * rise_SxN.shape[1]
        weight_RxN = bootstrap.resampling_weights(documents, self._config.bootstrap, self._config.seed)
        return [mean_interval(rise_N, weight_RxN) for rise_N in rise_SxN]


def judge(behaviours: Mapping[str, BehaviourSteering]) -> dict[str, BehaviourSteering]:
    """Answer, for each method and behaviour, whether it steers more than its controls at equal dose.

    p-values are corrected by Holm's method over the behaviours, for each method by itself.
    """
    judged = dict(behaviours)
    # Methods are not corrected for each other: each is a question by itself.
    for method in METHODS:
        measured = {name: result.methods[method] for name, result in behaviours.items() if method in result.methods}
        p_values = {name: result.answer.p_value for name, result in measured.items()}
        p_holm = holm_by_key({name: p_value for name, p_value in p_values.items() if p_value is not None})
        for name, result in measured.items():
            answer = _conclude(result, p_holm.get(name), len(p_holm), behaviours[name].prompts)
            methods = {**judged[name].methods, method: dataclasses.replace(result, answer=answer)}
            judged[name] = dataclasses.replace(judged[name], methods=methods)
    return judged


def _conclude(result: SteeringMethod, p_holm: float | None, tests: int, prompts: int) -> CausalAnswer:
    """Return the answer of a method on a behaviour, given the corrected p-value over some tests."""
    effect, point, p_value = result.answer.effect, result.points[result.chosen], result.answer.p_value
    # Longer lists are nearly the same: see ``lists_differ``.
    rule = "" if result.control == "random directions" else " with at most a tenth of the features that fire"
    if p_holm is None or effect is None:
        reason = (
            f"Not testable: fewer than {LEAST_PROMPTS} of {prompts} prompts have answers for which {result.control} "
            f"reach the dose of {point.dose:.3g}{rule}."
            if point.dose
            else "Not testable: the method changes nothing in the test prompts."
        )
        return CausalAnswer("not testable", reason, effect)
    level = VerdictConfig().level
    # On the prompts that are compared there may be no drop, though their controls' is even less.
    drop = min(effect.low, (result.answer.numbers or {}).get("compared_drop", effect.low))
    answer, needed = "yes" if p_holm <= level and drop > 0 else "no", min_controls(tests, level)
    sentence = (
        f"At strength {point.strength:g} (dose {point.dose:.3g}) the logit difference changes by {-effect.mean:+.2f} "
        f"logits [{-effect.high:+.2f}, {-effect.low:+.2f}], and {100 * point.turned.mean:.0f} % of the prompts "
        f"[{100 * point.turned.low:.0f}, {100 * point.turned.high:.0f}] are turned. "
    )
    if point.ce_rise:
        sentence += f"The cross-entropy of held-out text rises by {point.ce_rise.mean:.2f} nats per token. "
    count = len(result.controls)
    if count < needed:
        answer = "not testable"
        sentence += f"Not testable: {count} controls ({result.control}) of {needed} needed."
    else:
        corrected = f", {p_holm:.2g} after correction for {tests} behaviours" if tests > 1 else ""
        verb = "more than" if answer == "yes" else "not shown to be more than"
        sentence += (
            f"The drop is {verb} that of {count} {result.control} of equal dose (mean {np.mean(result.controls):.2f}, "
            f"maximum {max(result.controls):.2f}; p = {p_value:.2g}{corrected}), which turn "
            f"{100 * (result.control_turned or 0):.0f} % of the prompts."
        )
    numbers = dict(result.answer.numbers or {}, controls=float(count), needed=float(needed))
    if result.compared < prompts:
        where = f", where the drop is {numbers['compared_drop']:z.2f}" if "compared_drop" in numbers else ""
        sentence += (
            f" Both are compared on {result.compared} of {prompts} prompts{where}: for the answers of the others, no "
            f"{result.control} reach the dose{rule}."
        )
    return CausalAnswer(answer, sentence, effect, p_value, p_holm, numbers)
