"""The stage ``patch``: activations patched between prompts and their counterparts.

A unit for each kind of site patches it in every layer, at every position or, at sites of attention heads, in every
head. The unit of a dictionary patches features: the top ones of each behaviour, compared with random and placebo sets,
as ``ablate`` does with other replacements. Train prompts choose features, test prompts judge.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.interventions import published_heads
from saejax.interventions.ablation import begin_ablation, measure_behaviour
from saejax.interventions.answers import VerdictConfig, explain_no_top_features, mean_interval
from saejax.interventions.edits import swap
from saejax.interventions.engine import run_edits
from saejax.interventions.patching import (
    DIRECTIONS,
    EACH,
    FeaturePatchResults,
    Interchange,
    PatchedFeatures,
    PatchedSites,
    PatchGrid,
    PatchResults,
    SitePatchResults,
    describe_columns,
    fitting_pairs,
    is_measurable,
    patch_sites,
)
from saejax.interventions.published_heads import compare_published_heads, is_gpt2_small
from saejax.interventions.settings import AblateConfig, PatchConfig
from saejax.interventions.several_sites import DirectionsAtSites, SeveralSites, place_at_sites
from saejax.interventions.split_model import SplitModel
from saejax.interventions.table import TESTED, load_effects, merge_tables, save_effects
from saejax.interventions.verdict import summarise, verdict
from saejax.models.language_model import LanguageModel
from saejax.models.sites import HEAD_KINDS, Site
from saejax.progress import OnProgress
from saejax.runner import parts
from saejax.runner.workspace import Run
from saejax.stages import inputs as run_inputs
from saejax.statistics import bootstrap
from saejax.statistics.intervals import wilson
from saejax.tasks.behaviours import Prompt
from saejax.tasks.gate import read_tested
from saejax.wording import counted


class BehaviourPairs(NamedTuple):
    """The prompts of a behaviour that have counterparts of as many tokens, and the number of others by reason."""

    train: list[Prompt]
    tests: list[Prompt]
    left_out: Mapping[str, int]

    def missing(self, chooses_features: bool) -> str:
        """Return why the behaviour cannot be patched; "" if it can. Features are chosen on train prompts."""
        if not self.tests:
            return (
                f"of {sum(self.left_out.values())} test prompts {self.left_out['no counterpart']} have no counterpart "
                f"and {self.left_out['other length']} one of another number of tokens"
            )
        if chooses_features and not self.train:
            return "it has no train prompts with counterparts of as many tokens, which choose features"
        if chooses_features and len(self.tests) < 2:
            return "it has a single test prompt with a counterpart of as many tokens"
        return ""


def run_patch(run: Run) -> PatchResults:
    """Patch a kind of site, or features of a dictionary, on every behaviour.

    Args:
      run: of the unit. Its folder gets ``<behaviour>-patching.parquet`` with every location of a kind of site, or
        ``<behaviour>-effects/``, the effects table of features.

    Returns:
      The results of the unit.

    Raises:
      UserError: no behaviour can be patched, or prompts or dictionary do not fit the model.
    """
    config = run.configs[PatchConfig]
    prompts = run_inputs.read_behaviours(run)
    dictionary = None if run.name in config.kinds else run_inputs.load_run_dictionary(run)

    def begin() -> parts.Measure:
        lm = run_inputs.load_run_model(run, *([dictionary.config] if dictionary else []))
        pairs = {
            name: BehaviourPairs(fitting_pairs(lm, of_behaviour, "train")[0], *fitting_pairs(lm, of_behaviour))
            for name, of_behaviour in prompts.items()
        }
        placed = dictionary
        if dictionary is not None:
            placed = place_at_sites(lm, dictionary, [prompt for some in prompts.values() for prompt in some])

        def measure(name: str, on_progress: OnProgress) -> parts.Measured:
            if missing := pairs[name].missing(chooses_features=placed is not None):
                return parts.Measured(missing, f"not patched: {missing}")
            if placed is None:
                return _measure_sites(run, lm, name, pairs[name], on_progress)
            return _measure_features(run, lm, placed, name, pairs, on_progress)

        return measure

    kind: Any = PatchedSites if dictionary is None else PatchedFeatures
    tested = read_tested(run.inputs["baseline"])
    # A text: why it is not patched.
    results = parts.each_part(run, list(prompts), begin, str | kind, "rows", tested.mark)
    unpatched = {name: result for name, result in results.items() if isinstance(result, str)}
    behaviours = {name: result for name, result in results.items() if name not in unpatched}
    if not behaviours:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in unpatched.items())
        raise UserError(
            f"no behaviour can be patched ({reasons}): expected test prompts with counterparts of as many tokens, and "
            "for features train prompts, too; give them in --task.prompts"
        )
    if dictionary is None:
        return SitePatchResults(run.name, positions_of(run.name, config), behaviours, unpatched)
    tables = [load_effects(run.folder / f"{name}-effects") for name in behaviours]
    answers = verdict(merge_tables(tables), VerdictConfig(resamples=config.bootstrap, seed=config.seed))
    for name in behaviours:
        run.say(f"{name}{tested.mark(name)}: {summarise(answers, name)}")
    site = dictionary.config.target or dictionary.site
    return FeaturePatchResults(config.dictionary, site, config.top, behaviours, unpatched, answers)


def positions_of(kind: str, config: PatchConfig) -> str:
    """Return the positions at which a kind of site is patched: heads at all positions together unless some are named.

    Every head at every position would be thousands of runs of the model for each pair.
    """
    return "all" if config.positions == EACH and kind in HEAD_KINDS else config.positions


def _measure_sites(
    run: Run, lm: LanguageModel, name: str, pairs: BehaviourPairs, on_progress: OnProgress
) -> parts.Measured:
    config = run.configs[PatchConfig]
    positions = positions_of(run.name, config)
    patched = patch_sites(lm, run.name, pairs.tests, positions, None, config.batch_rows, on_progress)
    weight_RxP = _weights(pairs.tests, config)
    grid = PatchGrid.of(patched, weight_RxP)
    grid.save(grid.file(run.folder, name))
    published = None
    if (name, run.name, positions) == (published_heads.BEHAVIOUR, published_heads.KIND, "all") and is_gpt2_small(
        lm.config
    ):
        noised_LxH = patched.effect_DxLxHxPxC[DIRECTIONS.index("noising"), :, :, :, 0].mean(axis=-1)
        published = compare_published_heads(noised_LxH)
    results = PatchedSites(
        prompts=len(pairs.tests),
        left_out=pairs.left_out,
        clean=mean_interval(patched.clean_P, weight_RxP),
        corrupted=mean_interval(patched.corrupted_P, weight_RxP),
        is_normalised=is_measurable(patched.clean_P - patched.corrupted_P, weight_RxP),
        columns=describe_columns(lm, pairs.tests),
        published=published,
    )
    line = f"{counted(results.prompts, 'pair')}; logit difference {results.clean.mean:.2f} of the prompts, "
    line += f"{results.corrupted.mean:.2f} of their counterparts"
    return parts.Measured(results, line)


def _measure_features(
    run: Run,
    lm: LanguageModel,
    dictionary: Dictionary,
    name: str,
    pairs: Mapping[str, BehaviourPairs],
    on_progress: OnProgress,
) -> parts.Measured:
    config, tests = run.configs[PatchConfig], pairs[name].tests
    prompts = {behaviour: [*theirs.train, *theirs.tests] for behaviour, theirs in pairs.items() if theirs.tests}
    ablations = begin_ablation(lm, {TESTED: dictionary}, name, prompts, ablation_settings(config), on_progress)
    ablation = ablations[TESTED]
    if not ablation.top():
        reason = explain_no_top_features([name])
        return parts.Measured(reason, f"not patched: {reason}")
    table = measure_behaviour(ablations, prompts)
    save_effects(run.folder / f"{name}-effects", table)
    definitions = table.select_prompts(name)
    # The ablation measured noising. Denoising is the same with prompts and counterparts exchanged.
    (noised_P,) = table.values(table.select_whole_edits(name, "top"), definitions, "logit_diff")
    exchanged = [
        dataclasses.replace(clean.counterpart, counterpart=clean) for clean in ablation.test.runs if clean.counterpart
    ]
    edits = swap(ablation.split.dictionary, [ablation.top()])
    corrupted_P, denoised_P = run_edits(ablation.split, exchanged, edits, config.batch_rows)["logit_diff"]
    clean_P = table.clean_values(definitions, "logit_diff")
    # An answer can only be turned where the model gives the right one to both.
    both_P = (clean_P > 0) & (corrupted_P < 0)
    interchange, line = None, "on no pair is the model right about both the prompt and its counterpart"
    if both_P.any():
        if isinstance(dictionary, SeveralSites):
            width = ablation.split.dictionary.config.d_in
            values = SplitModel(lm, DirectionsAtSites(ablation.split.dictionary, np.eye(width)))
            edits = swap(values.dictionary, [range(width)])
            whole_P = run_edits(values, ablation.test.runs, edits, config.batch_rows)["logit_diff"][1]
        else:
            site = Site.parse(dictionary.config.target or dictionary.site)
            whole = patch_sites(lm, site.kind, tests, "all", [site.layer], config.batch_rows, by_head=False)
            whole_P = whole.diff_DxLxHxPxC[DIRECTIONS.index("noising"), 0, 0, :, 0]
        random_sets = table.select_whole_edits(name, "random")
        random_ExP = table.values(random_sets, definitions, "logit_diff")
        interchange = Interchange(
            prompts=int(both_P.sum()),
            top=wilson((noised_P < 0)[both_P]),
            random=float((random_ExP[:, both_P] < 0).mean()) if random_sets else None,
            site=wilson((whole_P < 0)[both_P]),
        )
        line = f"answers that become the counterpart's: top features {100 * interchange.top.mean:.0f} %, "
        line += f"whole site {100 * interchange.site.mean:.0f} %"
    results = PatchedFeatures(
        left_out=pairs[name].left_out,
        restored=mean_interval(denoised_P - corrupted_P, _weights(tests, config)),
        interchange=interchange,
    )
    return parts.Measured(results, line)


def ablation_settings(config: PatchConfig) -> AblateConfig:
    """Return the settings of the ablation that patches features: they take their activations in the counterpart."""
    return AblateConfig(
        top=config.top,
        replacement="counterpart",
        random_sets=config.random_sets,
        placebo_targets=config.placebo_targets,
        untrained_dictionaries=0,
        baselines=(),
        seed=config.seed,
        bootstrap=config.bootstrap,
        batch_rows=config.batch_rows,
    )


def _weights(prompts: Sequence[Prompt], config: PatchConfig) -> np.ndarray:
    return bootstrap.resampling_weights([prompt.template for prompt in prompts], config.bootstrap, config.seed)
