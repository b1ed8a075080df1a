"""Other bases of a site beside the features at equal dose: does changing the site as much, otherwise, cost as much?

Removing 20 principal components changes a site far more than removing 20 features does, so that counting directions
compares nothing. Of each basis growing sets of its top directions, chosen on train prompts by the same estimate, are
removed from the test prompts. A set's *dose* is how much that changes: the norm of the change at the site (root mean
square over test prompts, of all positions together), and the divergence from the model's clean predictions on held-out
text. Between sets, effects are interpolated linearly, from no effect at dose 0. Of two bases the areas under the curves
up to the smaller of their largest doses are compared, prompt by prompt.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from saejax.causal.ablate import bases
from saejax.causal.ablate.results import DoseCurve, UncomparedBasis
from saejax.causal.ablate.text import FOR_DOSE, HeldOutText
from saejax.causal.ablate.verdict import Over, over_prompts
from saejax.causal.experiment import Experiment
from saejax.causal.results import EqualDose
from saejax.dictionaries import Dictionary, load_dictionary
from saejax.interventions import slopes as screening
from saejax.interventions.replacement import ActivationSource
from saejax.interventions.split_model import SplitModel
from saejax.models.language_model import LanguageModel
from saejax.models.sites import Site
from saejax.settings import BASES, AblateConfig

SIZES = 6  # sets of a curve, at most
WIDEST = 8  # times as many directions as there are top features are in the largest set, at most
FEATURES = "features"  # the name of the tested dictionary's curve

Divergence = Callable[[Sequence[Sequence[int]]], np.ndarray]  # on held-out text, of sets; nats per token


def check(config: AblateConfig) -> None:
    """A ``UserError``, before any work is done, if a basis is no word that is known and no folder of a dictionary."""
    for wanted in config.baselines:
        if wanted not in BASES:
            load_dictionary(wanted)


@dataclasses.dataclass(frozen=True)
class MeasuredCurve:
    """Growing sets of a basis on P test prompts.

    Attributes:
      size: directions in the basis.
      top: the directions of the largest set, by attribution.
      sizes: of the S sets, rising.
      norm_S, kl_S: their doses; ``kl_S`` is None without held-out text.
      drop_SxP: by how much the logit difference falls without each.
    """

    size: int
    top: list[int]
    sizes: list[int]
    norm_S: np.ndarray
    kl_S: np.ndarray | None
    drop_SxP: np.ndarray

    def beside(self, features: "MeasuredCurve | None", over: Over) -> DoseCurve:
        """For the results, with the comparison to the features unless it is their own curve."""
        of_kl = None if self.kl_S is None else tuple(self.kl_S.tolist())
        curve = DoseCurve(
            size=self.size,
            top=tuple(self.top),
            sizes=tuple(self.sizes),
            dose=tuple(self.norm_S.tolist()),
            logit_diff_drop=tuple(self.drop_SxP.mean(axis=1).tolist()),
            kl=of_kl,
        )
        if features is None:
            return curve
        by_norm = equal_dose((features.norm_S, features.drop_SxP), (self.norm_S, self.drop_SxP), over)
        by_kl = None
        if features.kl_S is not None and self.kl_S is not None:
            by_kl = equal_dose((features.kl_S, features.drop_SxP), (self.kl_S, self.drop_SxP), over)
        return dataclasses.replace(curve, by_norm=by_norm, by_kl=by_kl)


def equal_dose(
    features: tuple[np.ndarray, np.ndarray], basis: tuple[np.ndarray, np.ndarray], over: Over
) -> EqualDose | None:
    """The areas under two curves over the doses that both reach; None where one reaches none.

    Args:
      features, basis: doses [S] and effects [S, P] of each.
    """
    reach = min(float(dose_S.max(initial=0.0)) for dose_S, _ in (features, basis))
    if not reach > 0:
        return None
    own_P, other_P = (mean_effect(dose_S, effect_SxP, reach) for dose_S, effect_SxP in (features, basis))
    return EqualDose(reach, float(own_P.mean()), float(other_P.mean()), over(own_P - other_P))


def mean_effect(dose_S: np.ndarray, effect_SxP: np.ndarray, reach: float) -> np.ndarray:
    """The area under each prompt's curve of effect against dose from 0 to ``reach``, by ``reach``, [P].

    The curve is piecewise linear through no effect at dose 0 and the points in order of their doses.
    """
    order_S = np.argsort(dose_S, kind="stable")
    dose_K = np.concatenate([[0.0], dose_S[order_S]])
    effect_KxP = np.concatenate([np.zeros((1, effect_SxP.shape[1])), effect_SxP[order_S]])
    inside_K = dose_K < reach
    at_reach_P = np.array([np.interp(reach, dose_K, effect_K) for effect_K in effect_KxP.T])
    knots_N = np.concatenate([dose_K[inside_K], [reach]])
    effects_NxP = np.concatenate([effect_KxP[inside_K], at_reach_P[None]])
    return np.trapezoid(effects_NxP, knots_N, axis=0) / reach


def measure_curves(
    experiment: Experiment,
    orders: Mapping[str, tuple[int, Sequence[int]]],
    reach: float,
    divergence: Divergence | None,
) -> dict[str, MeasuredCurve]:
    """Removes growing sets of the top directions of some bases, all on one experiment.

    Args:
      experiment: whose features are the directions.
      orders: of each basis its size, and its top directions by attribution.
      reach: the norm of the change beyond which no larger set is removed.
      divergence: of sets on held-out text; None: there is none.
    """
    orders = {name: order for name, order in orders.items() if len(order[1])}
    together = [direction for _, order in orders.values() for direction in order]
    if not together:
        return {}
    change_KxK, first, sets, norms = experiment.changes(together), 0, {}, {}
    for name, (_, order) in orders.items():
        own = slice(first, first + len(order))
        first = own.stop
        # The sum of the leading n x n block, of every n.
        norm_N = np.sqrt(np.maximum(np.diagonal(change_KxK[own, own].cumsum(axis=0).cumsum(axis=1)), 0.0))
        enough = int(np.argmax(norm_N >= reach)) + 1 if (norm_N >= reach).any() else len(order)
        sizes = np.unique(np.geomspace(1, enough, SIZES).round().astype(int)).tolist()
        sets[name], norms[name] = [list(order[:size]) for size in sizes], norm_N[np.array(sizes) - 1]
    flat = [one for own_sets in sets.values() for one in own_sets]
    drop_SxP = experiment.ablate(flat).drop_SxP
    kl_S = divergence(flat) if divergence else None
    found, first = {}, 0
    for name, (size, _) in orders.items():
        own = slice(first, first + len(sets[name]))
        first = own.stop
        sizes = [len(one) for one in sets[name]]
        own_kl = None if kl_S is None else kl_S[own]
        found[name] = MeasuredCurve(size, sets[name][-1], sizes, norms[name], own_kl, drop_SxP[own])
    return found


def compare(
    experiment: Experiment,
    top: Sequence[int],
    split: SplitModel,
    model: LanguageModel,
    dictionary: Dictionary,
    text: HeldOutText | None,
    config: AblateConfig,
) -> dict[str, DoseCurve | UncomparedBasis]:
    """The curves of the top features and of each basis in ``config.baselines``.

    Args:
      experiment: a behaviour on the tested dictionary.
      top: its top features.
      dictionary: the tested one.
      text: held-out text, if there is any.

    Raises:
      UserError: a folder holds no dictionary, or one of another model.
    """
    over = over_prompts(np.asarray(experiment.templates), config)
    own_order = {FEATURES: (dictionary.config.n_features, top)}
    own = measure_curves(experiment, own_order, np.inf, _divergence(text, split, experiment.replacement)).get(FEATURES)
    if own is None:
        return {}
    found: dict[str, DoseCurve | UncomparedBasis] = {FEATURES: own.beside(None, over)}
    made, missing = _bases(experiment, model, dictionary, config)
    for names, basis in made:
        joined = {name: member.config.n_features for name, member in names.items()}
        other = SplitModel(model, basis, config.positions)
        on_basis = experiment.on(other, "-".join(joined))
        attribution_F, first, orders = on_basis.attribution(), 0, {}
        for name, size in joined.items():
            leaders = screening.leaders(attribution_F[first : first + size], WIDEST * config.top)
            orders[name] = size, [first + direction for direction in leaders]
            first += size
        # What is removed must be the same edit where it is measured on prompts and on text.
        divergence = _divergence(text, other, on_basis.replacement)
        curves = measure_curves(on_basis, orders, float(own.norm_S.max()), divergence)
        first = 0
        for name, size in joined.items():
            if name in curves:
                curve = dataclasses.replace(curves[name], top=[number - first for number in curves[name].top])
                found[name] = curve.beside(own, over)
            else:
                missing[name] = UncomparedBasis("none of its directions has an attribution above zero", size)
            first += size
    return {name: found.get(name) or missing[name] for name in (FEATURES, *config.baselines)}


def _divergence(text: HeldOutText | None, split: SplitModel, source: ActivationSource) -> Divergence | None:
    if text is None:
        return None

    def of(sets: Sequence[Sequence[int]]) -> np.ndarray:
        diffs = text.effects(split, source, sets, FOR_DOSE)
        return diffs.kl_SxN.sum(axis=1) / diffs.tokens_N.sum()

    return of


def _bases(
    experiment: Experiment, model: LanguageModel, dictionary: Dictionary, config: AblateConfig
) -> tuple[list[tuple[dict[str, Dictionary], Dictionary]], dict[str, UncomparedBasis]]:
    """What is run: of each basis, or of several as one, its members by name; and why others are not."""
    if config.error == "drop":
        reason = "with --ablate.error=drop the features' error term goes, which other bases do not have"
        return [], dict.fromkeys(config.baselines, UncomparedBasis(reason))
    at_site: dict[str, Dictionary] = {}
    made: list[tuple[dict[str, Dictionary], Dictionary]] = []
    missing: dict[str, UncomparedBasis] = {}
    for wanted in config.baselines:
        basis = _basis(wanted, experiment, model, dictionary, config)
        if isinstance(basis, str):
            missing[wanted] = UncomparedBasis(basis)
        elif wanted in BASES and wanted != "neurons":
            at_site[wanted] = basis
        else:
            made.append(({wanted: basis}, basis))
    if at_site:
        made.append((at_site, bases.Joined(list(at_site.values()))))
    return made, missing


def _basis(
    wanted: str, experiment: Experiment, model: LanguageModel, dictionary: Dictionary, config: AblateConfig
) -> Dictionary | str:
    """A basis, or why there is none."""
    if wanted == "neurons":
        site = Site.parse(dictionary.config.target or dictionary.site)
        if model.config.post_norms:
            return "this model norms what its neurons add, so they have no directions of their own"
        if site.kind == "mlp_in":
            return "what the MLP reads is normed, so that a change there has another scale than what neurons add"
        return bases.Neurons(model, site.layer)
    if wanted == "random":
        statistics = experiment.statistics()
        active = round(statistics.fires_F.sum() / max(statistics.positions, 1))
        return bases.untrained(dictionary, active, config.seed)
    if wanted not in BASES:
        return load_dictionary(wanted)
    values_NxD = experiment.train_values()
    if not len(values_NxD):
        return "no train prompt has a position at which features may change, so there is nothing to decompose"
    if wanted == "components":
        return bases.components(dictionary, values_NxD) or "all values of the train prompts are the same"
    means_GxD = experiment.answer_means()
    if len(means_GxD) < 2:
        return "its train prompts have one answer, so there is no difference of means"
    found = bases.directions(dictionary, means_GxD - means_GxD.mean(axis=0), values_NxD.mean(axis=0, dtype=np.float64))
    return found or "the means of all answers are the same"
