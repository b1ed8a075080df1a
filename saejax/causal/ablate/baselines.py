"""The same experiment on other bases (``bases``): does the dictionary beat neurons, components, random directions?

The top directions of each basis are chosen on train prompts and judged on test prompts as those of the dictionary are,
each beside random directions of its own basis matched as features are (``controls``).
"""

import dataclasses

import numpy as np

from saejax.causal.ablate import bases, verdict
from saejax.causal.ablate.results import ComparedBasis, UncomparedBasis
from saejax.causal.controls import TooFewControls
from saejax.causal.experiment import Experiment
from saejax.causal.split import SplitModel
from saejax.dictionaries import Basis, Dictionary, load_dictionary
from saejax.errors import UserError
from saejax.models.language_model import LanguageModel
from saejax.settings import BASES, AblateConfig

DRAWS = 20  # of matched random directions in each basis


def check(config: AblateConfig) -> None:
    """A ``UserError``, before any work is done, if a basis is no word that is known and no folder of a dictionary."""
    if config.baselines and config.error == "drop":
        raise UserError("--ablate.error=drop has no meaning for other bases: leave out --ablate.baselines")
    for wanted in config.baselines:
        if wanted not in BASES:
            load_dictionary(wanted)


def compare(
    experiment: Experiment, model: LanguageModel, dictionary: Dictionary, config: AblateConfig
) -> dict[str, ComparedBasis | UncomparedBasis]:
    """Removes the top directions of each basis in ``config.baselines`` from a behaviour's test prompts.

    Raises:
      UserError: a folder holds no dictionary, or one of another model.
    """
    return {wanted: _compare_with(wanted, experiment, model, dictionary, config) for wanted in config.baselines}


def _compare_with(
    wanted: str, experiment: Experiment, model: LanguageModel, dictionary: Dictionary, config: AblateConfig
) -> ComparedBasis | UncomparedBasis:
    basis = _basis(wanted, experiment, model, dictionary, config)
    if isinstance(basis, str):
        return UncomparedBasis(basis)
    size = basis.config.n_features
    if size < 2 * config.top + config.matches:
        reason = f"it has {size} directions: too few for {config.top}, and as many matched ones to choose from"
        return UncomparedBasis(reason, size)
    on_basis = experiment.on(SplitModel(model, basis, config.positions), wanted)
    few = dataclasses.replace(config, draws=min(config.draws, DRAWS))
    try:
        results, measured = verdict.judge(experiment.name, on_basis, few)
    except TooFewControls as error:  # the dictionary's features have their controls: what is said of them stands
        return UncomparedBasis(error.fact, size)
    return ComparedBasis(
        joint=results.joint,
        difference=results.difference,
        percentile=results.percentile,
        verdict=results.verdict,
        control_drop=float(np.mean(results.controls.logit_diff_drop)),
        size=size,
        top=tuple(measured.top),
    )


def _basis(
    wanted: str, experiment: Experiment, model: LanguageModel, dictionary: Dictionary, config: AblateConfig
) -> Basis | str:
    """A basis, or why there is none."""
    if wanted == "neurons":
        if model.config.post_norms:
            return "this model norms what its neurons add, so they have no directions of their own"
        return bases.neurons(model, dictionary.site)
    if wanted == "components":
        values_NxD = experiment.train_values()
        if not len(values_NxD):
            return "no train prompt has a position at which features may change, so there is nothing to decompose"
        return bases.components(dictionary, values_NxD)
    if wanted == "random":
        statistics = experiment.statistics()
        active = round(statistics.fires_F.sum() / max(statistics.positions, 1))
        return bases.untrained(dictionary, active, config.seed)
    return load_dictionary(wanted)
