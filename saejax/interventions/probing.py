"""Linear probes: how well a class can be read from activations, and how much of it is chance.

Labels (``saejax.tasks.labels``) are predicted for prompts of behaviours and, with ``--probe.benchmarks``, for the
questions of benchmarks, from a dictionary's features and from the raw activations at its site.

A probe is a logistic regression (multinomial for more than two classes) with an L2 penalty on inputs standardised over
the train prompts. Cross-validation on the train prompts chooses the penalty; test prompts judge. A *sparse* probe sees
k inputs: those whose class means differ most on the train prompts (k-sparse probes: Gurnee et al., 2023, arXiv
2305.01610; the protocol of Kantamneni et al., 2025, arXiv 2502.16681, except that the likelihood of held-out folds
chooses the penalty). The *dense* probe sees all raw activations, and is the baseline of all others.

Controls of each probe:

- shuffled train labels, with inputs selected and fitted again;
- of a sparse probe of features, features matched in firing rate: drawn from those nearest to each selected one in the
  number of train prompts on which they are active;
- of a sparse probe of raw activations, as many random directions of the dense space;
- a permutation test on the test labels.

A probe reads what is there, and the model need not use it. So the features that a sparse probe selects are ablated one
by one on test prompts, each compared with random lists of features to its dose (``saejax.interventions.controls``).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.interventions.answers import LEAST_PROMPTS, mean_interval
from saejax.interventions.behaviour_prompts import BehaviourPrompts
from saejax.interventions.controls import MIN_FIRING, choose_pool, lists_differ, random_lists
from saejax.interventions.edits import mask
from saejax.interventions.references import References
from saejax.interventions.settings import ProbeConfig
from saejax.interventions.split_model import SplitModel, in_order, of_features
from saejax.models.split import SplitPoint
from saejax.parallel.mesh import sharding
from saejax.results import Interval
from saejax.short_reprs import has_short_repr
from saejax.statistics.bootstrap import resampling_weights
from saejax.statistics.intervals import wilson
from saejax.statistics.permutation import max_t_p
from saejax.statistics.ranks import holm_by_key
from saejax.tasks.behaviours import SPLITS, Prompt
from saejax.tasks.labels import LABELS, Labelled, label_prompts

MATCHES = 10  # nearest features by firing rate, from which a matched one is drawn
LOGIT_DIFFERENCE, LOG_LIKELIHOOD = "logit difference", "log-likelihood of the reference answer"
_PAIRED_RESAMPLES = 2_000  # of test prompts, for differences between probes
_PERMUTATIONS = 10_000  # of the test labels: the smallest p-value is a ten-thousandth
_FOLDS = 5  # a class with as many train prompts has one of them in each
_ITERATIONS, _TOLERANCE = 2_000, 1e-6  # of the solver
ABLATED = 10  # features of a probe that are ablated, at most
_RESAMPLES = 10_000  # of test prompts, and of signs of their drops, for effects of ablated features
_CONTROLS = 5  # random lists to the dose of each ablated feature


@dataclasses.dataclass(frozen=True)
class ProbeFit:
    """A linear probe."""

    input: str  #: what it reads: "features" or "raw"
    k: int | None  #: number of features or dimensions that it reads; None: all
    strength: float  #: inverse strength of the penalty (C of scikit-learn)
    inputs: tuple[int, ...] | None  #: inputs that a sparse probe sees, best first; None: all
    accuracy: Interval  #: share of test prompts whose class is named, 95 % Wilson interval
    f1: float  #: F1 score, mean over classes
    majority: float  #: accuracy of always naming the largest train class
    shuffled: Interval  #: accuracy of probes of shuffled train labels: mean, 5th and 95th percentile
    #: accuracy of probes of matched features, or of random directions: mean, 5th and 95th percentile; None: all inputs
    control: Interval | None
    #: accuracy minus the dense probe's, paired by prompt; None for the dense probe, and where p is not testable
    against_dense: Interval | None
    #: permutations of the test labels, one-sided; None: not testable, as test prompts are of one class, or fewer than 6
    #: of a class
    p_value: float | None
    p_holm: float | None  #: corrected by Holm's method over the labels of the run, for probes of the same inputs


@dataclasses.dataclass(frozen=True)
class ProbeTask:
    """Inputs and classes of a probe."""

    train_NxC: np.ndarray  #: C inputs of N train prompts, finite
    train_class_N: np.ndarray  #: their classes, counted from 0; each at least as often as there are folds
    test_MxC: np.ndarray  #: the same inputs of M test prompts, at least one
    test_class_M: np.ndarray  #: their classes

    def with_inputs(self, inputs: np.ndarray) -> "ProbeTask":
        """Return the task with some of the inputs."""
        return dataclasses.replace(self, train_NxC=self.train_NxC[:, inputs], test_MxC=self.test_MxC[:, inputs])


class ProbeAnswers(NamedTuple):
    """A probe's answers on M test prompts: classes and, with two classes, scores, larger for the second."""

    class_M: np.ndarray
    score_M: np.ndarray | None


def probe_inputs(split: SplitModel, prompts: Sequence[Prompt]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the inputs of probes for each prompt, at its last position.

    Args:
      split: the model, split at the dictionary's site.
      prompts: N prompts; their answers are not used.

    Returns:
      ``features`` [N, F] and ``raw`` activations [N, D] of the site that the dictionary reads, float32, 0 for prompts
      whose last position is an attention sink; and which prompts have another, bool [N].

    Raises:
      UserError: an activation is not finite.
    """
    # Items of benchmarks have answers of any form; a clean run asks for the first tokens of two.
    runs = split.run([dataclasses.replace(prompt, correct=" yes", wrong=" no") for prompt in prompts])
    arrays = ((run.read_BxTxD, run.domain_BxT, run.last_B) for run in runs)
    parts = [_at_last_position(split.point, split.dictionary, *inputs) for inputs in arrays]
    features_NxF, raw_NxD, is_read_N = (in_order(part, runs) for part in zip(*parts, strict=True))
    for feature in np.flatnonzero(~np.isfinite(features_NxF).all(axis=0))[:1]:
        raise UserError(
            f"feature {feature} has an activation that is not finite: the dictionary holds NaN or overflows; train it "
            "again"
        )
    return dict(features=features_NxF.astype(np.float32), raw=raw_NxD.astype(np.float32)), is_read_N


@functools.partial(jax.jit, static_argnums=0)
def _at_last_position(
    point: SplitPoint, dictionary: Dictionary, read_BxTxD: jax.Array, domain_BxT: jax.Array, last_B: jax.Array
) -> tuple[jax.Array, ...]:
    """Return features [B, F], raw activations [B, D], and whether the prompt's last position is read [B]."""
    is_last_BxT = jnp.arange(domain_BxT.shape[1])[None, :] == last_B[:, None]
    is_used_BxT = domain_BxT & is_last_BxT
    features_BxF = of_features(point.mesh, dictionary, (read_BxTxD, domain_BxT, is_used_BxT), _value_there)
    inputs = features_BxF, _value_there(read_BxTxD, is_used_BxT), is_used_BxT.any(axis=1)
    return jax.lax.with_sharding_constraint(inputs, sharding(point.mesh))


def _value_there(x_BxTxC: jax.Array, is_used_BxT: jax.Array) -> jax.Array:
    """Return the values at the one used position, [B, C]; 0 where there is none."""
    return jnp.where(is_used_BxT[:, :, None], x_BxTxC.astype(jnp.float32), 0.0).sum(axis=1)


def run_probes(
    task: ProbeTask, config: ProbeConfig, seed: Sequence[int], name: str = "features"
) -> Iterator[tuple[ProbeFit, np.ndarray]]:
    """Yield the sparse probes, smallest first, and the probe of all inputs, each with its right answers, bool [M].

    Args:
      task: inputs and classes.
      config: settings of the stage.
      seed: seed of folds, shuffles, controls and permutations, in addition to ``config.seed``.
      name: the inputs, "features" or "raw".
    """
    from sklearn.metrics import f1_score

    # An input that never varies cannot be scaled, and says nothing.
    varying_C = np.flatnonzero(np.ptp(task.train_NxC, axis=0) > 0)
    task = task.with_inputs(varying_C)
    task = dataclasses.replace(task, train_NxC=task.train_NxC.astype(float), test_MxC=task.test_MxC.astype(float))
    class_M = task.test_class_M
    # Classes that no test prompt has are left out: scikit-learn would count them as missed.
    labels = np.unique(class_M)
    for k in (*sorted(set(config.sparse)), None):
        rng = np.random.default_rng([config.seed, *seed, k or 0])
        strength = choose_strength(task, k, config, int(rng.integers(2**31)))
        answers = fit_probe(task, k, strength)
        right_M = answers.class_M == class_M
        draws, train_class_N = range(config.shuffles), task.train_class_N
        controls = [_control_task(task, k, name, rng) for _ in draws] if k else []
        shuffled = [dataclasses.replace(task, train_class_N=rng.permutation(train_class_N)) for _ in draws]
        is_testable = len(labels) > 1 and np.bincount(class_M)[labels].min() >= LEAST_PROMPTS
        p_value = permutation_p(answers.class_M, class_M, _PERMUTATIONS, rng) if is_testable else None
        fit = ProbeFit(
            input=name,
            k=k,
            strength=strength,
            inputs=tuple(varying_C[select_inputs(task, k)].tolist()) if k else None,
            accuracy=wilson(right_M),
            f1=float(f1_score(class_M, answers.class_M, labels=labels, average="macro", zero_division=0)),
            majority=float((class_M == np.bincount(train_class_N).argmax()).mean()),
            shuffled=_control_accuracy(shuffled, k, strength),
            control=_control_accuracy(controls, None, strength) if k else None,
            against_dense=None,
            p_value=p_value,
            p_holm=p_value,
        )
        yield fit, right_M


def fit_probe(task: ProbeTask, k: int | None, strength: float) -> ProbeAnswers:
    """Fit a probe of ``k`` inputs (None: all) at an inverse strength of the penalty, and answer the test prompts."""
    train_NxR, test_MxR = _prepare(task, k)
    model = _fit(train_NxR, task.train_class_N, strength)
    score_M = model.decision_function(test_MxR) if len(model.classes_) == 2 else None
    return ProbeAnswers(model.predict(test_MxR), score_M)


def _control_accuracy(tasks: Sequence[ProbeTask], k: int | None, strength: float) -> Interval:
    """Return the accuracy of the probes of some tasks: mean, 5th and 95th percentile."""
    accuracy_R = np.array([(fit_probe(task, k, strength).class_M == task.test_class_M).mean() for task in tasks])
    low, high = np.quantile(accuracy_R, (0.05, 0.95))
    return Interval(float(accuracy_R.mean()), float(low), float(high))


def choose_strength(task: ProbeTask, k: int | None, config: ProbeConfig, seed: int) -> float:
    """Return the inverse strength of the penalty with the largest likelihood of held-out folds of the train prompts.

    Each fold, drawn by ``seed``, scales and selects its k inputs (None: all) anew. Of equals, the strongest penalty.
    """
    from sklearn.model_selection import StratifiedKFold

    strengths, class_N = sorted(set(config.strengths)), task.train_class_N
    if len(strengths) == 1:
        return strengths[0]
    score_S = np.zeros(len(strengths))
    # Stratified, so that every fold has all classes to learn.
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    for kept, held in folds.split(class_N, class_N):
        fold = ProbeTask(task.train_NxC[kept], class_N[kept], task.train_NxC[held], class_N[held])
        kept_PxR, held_MxR = _prepare(fold, k)
        for s, strength in enumerate(strengths):
            log_p_MxK = _fit(kept_PxR, fold.train_class_N, strength).predict_log_proba(held_MxR)
            # Likelihood and not accuracy, which has many ties on few prompts.
            score_S[s] += log_p_MxK[np.arange(len(held)), fold.test_class_M].sum()
    return strengths[int(score_S.argmax())]


def select_inputs(task: ProbeTask, k: int) -> np.ndarray:
    """Return the k inputs whose class means differ most on the train prompts, best first; all if there are fewer.

    The best one of every class comes first, then every class's second, and so on: the best inputs over all classes
    often separate the same class.
    """
    score_KxC = mean_differences(task.train_NxC, task.train_class_N)
    rank_KxC = np.argsort(np.argsort(-score_KxC, axis=1, kind="stable"), axis=1)
    return np.lexsort((-score_KxC.max(axis=0), rank_KxC.min(axis=0)))[:k]


def mean_differences(x_NxC: np.ndarray, class_N: np.ndarray) -> np.ndarray:
    """Return by how much each input's mean (x_NxC) is larger in each of K classes (class_N) than in the others, [K, C].

    Of two classes the absolute value, so that both have the same order. Of more classes it is signed: an input that one
    class raises would otherwise seem to separate each of the others, too.
    """
    member_KxN = class_N[None, :] == np.unique(class_N)[:, None]
    weight_KxN = member_KxN / member_KxN.sum(axis=1, keepdims=True)
    outside_KxN = ~member_KxN / np.maximum((~member_KxN).sum(axis=1, keepdims=True), 1)
    difference_KxC = (weight_KxN - outside_KxN) @ x_NxC
    return np.abs(difference_KxC) if len(difference_KxC) == 2 else difference_KxC


def match_firing_rates(active_F: np.ndarray, features: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Return for each of some features another one, none twice, drawn from the ``MATCHES`` nearest in firing rate.

    Args:
      active_F: number of prompts on which each feature is active.
      features: the features to match; none of them is drawn. Those for which no candidate is left get none.
      rng: source of the draws.
    """
    is_free_F = np.ones(len(active_F), bool)
    is_free_F[np.asarray(features, np.int64)] = False
    matched: list[int] = []
    for feature in features:
        free = np.flatnonzero(is_free_F)
        if not len(free):
            break
        distance = np.abs(active_F[free] - active_F[feature])
        matched.append(int(rng.choice(free[np.argsort(distance, kind="stable")[:MATCHES]])))
        is_free_F[matched[-1]] = False
    return np.array(matched, np.int64)


def permutation_p(answer_M: np.ndarray, class_M: np.ndarray, draws: int, rng: np.random.Generator) -> float:
    """Return the p-value of the hypothesis that answers have nothing to do with the prompts' classes, one-sided.

    It is the share of ``draws`` permutations of ``class_M`` by ``rng``, the true order among them, of which at least as
    many answers of ``answer_M`` are right (Phipson and Smyth, 2010).
    """
    right_R = (rng.permuted(np.tile(class_M, (draws, 1)), axis=1) == answer_M[None, :]).sum(axis=1)
    return float((1 + (right_R >= (answer_M == class_M).sum()).sum()) / (1 + draws))


def paired_difference(right_M: np.ndarray, baseline_M: np.ndarray, seed: int) -> Interval:
    """Return how much more often a probe is right (right_M) than another (baseline_M); the seed is the bootstrap's."""
    difference_M = right_M.astype(float) - baseline_M
    return mean_interval(difference_M, resampling_weights(np.zeros(len(difference_M)), _PAIRED_RESAMPLES, seed))


class FeatureAblation(NamedTuple):
    """Test prompts on which sets of features are ablated."""

    readout: str  #: what the readout whose fall is measured is called
    texts: BehaviourPrompts | References  #: P prompts, or reference answers
    templates: Sequence[str]  #: template of each

    def measure_drop(self, sets: Sequence[Sequence[int]], fractions: Sequence[float]) -> np.ndarray:
        """Return the fall of the readout without each of S sets, given the fraction of each, float64 [S, P]."""
        (value_ExP,) = self.texts.measure(mask(self.texts.split.dictionary, sets, fractions)).values()
        return value_ExP[0] - value_ExP[1:]


def _control_task(task: ProbeTask, k: int, name: str, rng: np.random.Generator) -> ProbeTask:
    """Return the task with matched features, or with random directions of the dense space, in the inputs' place."""
    inputs = task.train_NxC.shape[1]
    if name == "raw":
        directions_CxK = rng.normal(size=(inputs, min(k, inputs)))
        projected = dict(train_NxC=task.train_NxC @ directions_CxK, test_MxC=task.test_MxC @ directions_CxK)
        return dataclasses.replace(task, **projected)
    active_C = (task.train_NxC != 0).sum(axis=0)
    return task.with_inputs(match_firing_rates(active_C, select_inputs(task, k).tolist(), rng))


def _prepare(task: ProbeTask, k: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the solver's inputs of train and test prompts; a column of zeros where nothing varies."""
    from sklearn.preprocessing import StandardScaler

    task = task.with_inputs(select_inputs(task, k)) if k else task
    if not task.train_NxC.size or not np.ptp(task.train_NxC, axis=0).any():
        return np.zeros((len(task.train_NxC), 1)), np.zeros((len(task.test_MxC), 1))
    # Fitted on train prompts alone. Scaled, because the penalty would otherwise favour inputs of large numbers.
    scaler = StandardScaler().fit(task.train_NxC)
    scaled = scaler.transform(task.train_NxC), scaler.transform(task.test_MxC)
    return scaled if k else _rotate(*scaled)


def _rotate(train_NxC: np.ndarray, test_MxC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs in the at most N directions that the train prompts span.

    The optimal weights lie there, and rotation does not change the penalty: the same probe from far fewer inputs.
    """
    squares_N, vectors_NxN = np.linalg.eigh(train_NxC @ train_NxC.T)
    # Directions of no extent but rounding would be blown up by the division below.
    kept_N = squares_N > 1e-10 * squares_N.max(initial=0.0)
    length_R, rows_NxR = np.sqrt(squares_N[kept_N]), vectors_NxN[:, kept_N]
    return rows_NxR * length_R, test_MxC @ (train_NxC.T @ rows_NxR) / length_R


def _fit(train_NxR: np.ndarray, class_N: np.ndarray, strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, max_iter=_ITERATIONS, tol=_TOLERANCE)
    return model.fit(train_NxR, class_N)


@dataclasses.dataclass(frozen=True)
class SelectedFeature:
    """A feature that a probe selects, ablated alone on the behaviour's test prompts."""

    feature: int  #: its index
    drop: Interval  #: fall of the readout, logits or nats, 95 % bootstrap interval over prompts within templates
    p_value: float  #: two-sided, of no effect, from flipped signs of the drops (``statistics.permutation``)
    p_holm: float  #: corrected by Holm's method over all ablated features of the run
    controls: tuple[float, ...]  #: mean fall of the readout for each random list of features to its dose


@dataclasses.dataclass(frozen=True)
class SelectedFeatures:
    """Effects of ablating the features that a probe selects."""

    readout: str  #: the readout whose fall is measured: logit difference, or log-likelihood of the reference answer
    features: tuple[SelectedFeature, ...]  #: in the order of the probe


@has_short_repr
@dataclasses.dataclass(frozen=True)
class ProbedLabel:
    """The probes of a label; also in `<label>.json` or `<label>-<behaviour>.json`."""

    label: str  #: name of the label
    behaviour: str  #: behaviour or benchmark whose prompts are read; "" for all behaviours
    reason: str | None  #: why there is no probe; None where there is
    classes: Mapping[str, Mapping[str, int]]  #: class -> its prompts by split
    left_out: Mapping[str, int]  #: prompts of classes with fewer than 5 train prompts, by class
    unlabelled: int  #: prompts without such a label
    #: of `number`: prompts whose noun beside the verb was given the subject's number, half of agreement's prompts; 0:
    #: that noun, if there is one, may give the number away
    congruent: int
    unread: int  #: prompts without a position that the dictionary reads: their inputs are 0
    probes: tuple[ProbeFit, ...]  #: none if there is a reason
    selected: SelectedFeatures | None  #: None where none were ablated


@dataclasses.dataclass(frozen=True)
class ProbeResults:
    """Linear probes of a dictionary's features and of raw activations."""

    dictionary: str  #: name of the dictionary
    site: str  #: site that it reads; of a transcoder, its input
    labels: tuple[ProbedLabel, ...]  #: each of all behaviours, of a behaviour or of a benchmark


def label_all(
    config: ProbeConfig,
    behaviours: tuple[Sequence[Prompt], Sequence[float]],
    benchmarks: Sequence[tuple[Sequence[Prompt], Sequence[float]]] = (),
) -> dict[str, Labelled]:
    """Return the labelled prompts of each label and behaviour or benchmark, by name.

    Args:
      config: settings of the stage.
      behaviours: prompts of behaviours and their logit differences.
      benchmarks: questions of each benchmark, with 1 where the model is right and -1 elsewhere.

    Raises:
      UserError: there is no strength, no such label, or no prompt that has one.
    """
    if not config.strengths:
        raise UserError("strengths is empty: name at least one inverse strength, such as 0.01")
    of_benchmarks = {name for prompts, _ in benchmarks for prompt in prompts for name, _ in prompt.labels}
    wanted: dict[str, Labelled] = {}
    for label in config.labels:
        of_prompts = label in LABELS or any(label in dict(prompt.labels) for prompt in behaviours[0])
        # A label that benchmarks alone have is no mistake for behaviours.
        if behaviours[0] and (of_prompts or label not in of_benchmarks):
            wanted |= {labelled.name: labelled for labelled in label_prompts(label, *behaviours)}
        for prompts, diffs in benchmarks:
            if any(label in dict(prompt.labels) for prompt in prompts):
                wanted |= {labelled.name: labelled for labelled in label_prompts(label, prompts, diffs)}
    if not wanted:
        raise UserError(f"no prompt has a label of --probe.labels={','.join(config.labels)}: name one that some have")
    return wanted


def probe_label(
    config: ProbeConfig,
    labelled: Labelled,
    inputs: Mapping[str, np.ndarray],
    is_read_P: np.ndarray,
    ablation: Callable[[], FeatureAblation | None],
    check_stop: Callable[[], None] = lambda: None,
) -> ProbedLabel:
    """Fit the probes of a label, and ablate the features that one of them selects.

    Args:
      config: settings of the stage.
      labelled: the labelled prompts.
      inputs: from ``probe_inputs``.
      is_read_P: from ``probe_inputs``.
      ablation: returns the test prompts on which features are ablated; None where there are none.
      check_stop: called now and then; may raise to stop.
    """
    fits, rights = [], []
    with threadpool_limits(1):  # threads of products this small only wait for each other
        for name, x_PxC in inputs.items() if not labelled.reason else ():
            train_NxC, test_MxC = x_PxC[labelled.train_N], x_PxC[labelled.test_M]
            task = ProbeTask(train_NxC, labelled.train_class_N, test_MxC, labelled.test_class_M)
            for fit, right_M in run_probes(task, config, [*f"{labelled.name} {name}".encode()], name):
                fits.append(fit)
                rights.append(right_M)
                check_stop()
    # The last one is the dense probe, of all raw activations.
    for place, right_M in enumerate(rights[:-1]):
        if fits[place].p_value is not None:
            gap = paired_difference(right_M, rights[-1], config.seed)
            fits[place] = dataclasses.replace(fits[place], against_dense=gap)
    return ProbedLabel(
        label=labelled.label,
        behaviour=labelled.behaviour,
        reason=labelled.reason or None,
        classes={name: dict(zip(SPLITS, counts, strict=True)) for name, counts in labelled.classes.items()},
        left_out=dict(labelled.left_out),
        unlabelled=labelled.unlabelled,
        congruent=labelled.congruent,
        unread=sum(int((~is_read_P[places]).sum()) for places in (labelled.train_N, labelled.test_M)),
        probes=tuple(fits),
        selected=ablate_selected(config, fits, ablation),
    )


def ablation_of(split: SplitModel, labelled: Labelled) -> FeatureAblation | None:
    """Return the ablation of features on a behaviour's test prompts; None if there are none."""
    tests = [p for p in labelled.prompts if p.split == "test" and p.wrong and labelled.behaviour == p.behaviour]
    templates = [prompt.template for prompt in tests]
    return FeatureAblation(LOGIT_DIFFERENCE, BehaviourPrompts(split, tests), templates) if tests else None


def ablate_selected(
    config: ProbeConfig, fits: Sequence[ProbeFit], ablation: Callable[[], FeatureAblation | None]
) -> SelectedFeatures | None:
    """Ablate the features of the largest sparse probe that sees at most ``ABLATED``, and random lists to their doses.

    Nothing is ablated on fewer than ``LEAST_PROMPTS`` prompts: on two, noise seems to have an effect.
    """
    sparse = [fit for fit in fits if fit.input == "features" and fit.k and fit.k <= ABLATED and fit.inputs]
    tests = ablation() if sparse else None
    if tests is None or len(tests.templates) < LEAST_PROMPTS:
        return None
    features = list(sparse[-1].inputs or ())
    pool = choose_pool(tests.texts.statistics().prompts_F, len(tests.templates), features, MIN_FIRING, config.seed)
    changes = tests.texts.changes([*features, *pool.tolist()])
    doses = [changes.dose([feature]) for feature in features]
    lists_of = [random_lists(changes, pool, dose, _CONTROLS, config.seed) if dose else [] for dose in doses]
    lists_of = [lists if lists_differ(len(pool), [len(some) for some, _ in lists]) else [] for lists in lists_of]
    every = [*(((feature,), 1.0) for feature in features), *itertools.chain(*lists_of)]
    drop_SxP = tests.measure_drop(*zip(*every, strict=True))
    weight_RxP = resampling_weights(tests.templates, _RESAMPLES, config.seed)
    controls = iter(drop_SxP[len(features) :].mean(axis=1).tolist())
    selected = []
    for feature, drop_P, lists in zip(features, drop_SxP, lists_of, strict=False):
        # Signs are flipped: of few prompts a bootstrap's tails are too light for a correction over many features.
        p_value = float(max_t_p(drop_P[None], _RESAMPLES, config.seed)[0])
        list_drops = tuple(itertools.islice(controls, len(lists)))
        selected.append(SelectedFeature(feature, mean_interval(drop_P, weight_RxP), p_value, p_value, list_drops))
    return SelectedFeatures(tests.readout, tuple(selected))


def correct(labels: Sequence[ProbedLabel]) -> tuple[ProbedLabel, ...]:
    """Correct p-values by Holm's method: of probes over the labels, of ablated features over all of them."""
    fits = [(n, fit) for n, label in enumerate(labels) for fit in label.probes]
    p_fits = {(n, fit.input, fit.k): fit.p_value for n, fit in fits if fit.p_value is not None}
    for inputs in {key[1:] for key in p_fits}:
        p_fits |= holm_by_key({key: p for key, p in p_fits.items() if key[1:] == inputs})
    chosen = {n: label.selected for n, label in enumerate(labels) if label.selected}
    p_features = holm_by_key(
        {(n, feature.feature): feature.p_value for n, some in chosen.items() for feature in some.features}
    )

    def corrected(n: int, label: ProbedLabel) -> ProbedLabel:
        probes = tuple(dataclasses.replace(fit, p_holm=p_fits.get((n, fit.input, fit.k))) for fit in label.probes)
        if selected := label.selected:
            features = [
                dataclasses.replace(feature, p_holm=p_features[n, feature.feature]) for feature in selected.features
            ]
            selected = dataclasses.replace(selected, features=tuple(features))
        return dataclasses.replace(label, probes=probes, selected=selected)

    return tuple(corrected(n, label) for n, label in enumerate(labels))
