"""The stage ``ablate``: do a dictionary's features cause the behaviours?

A behaviour is a part in the sense of ``saejax.runner.parts``. Its measurements go to ``<behaviour>-effects/`` at
once, so that a killed run continues with the next one. Together these tables are the unit's effects table, of which
the verdict is a pure function.
"""

import dataclasses

from saejax.dictionaries import load_dictionary
from saejax.errors import UserError
from saejax.interventions.ablation import (
    TEXT_LENGTH,
    begin_ablation,
    check_prompts,
    describe_top,
    measure_behaviour,
    verdict_config,
)
from saejax.interventions.answers import AblateResults, FeatureEffect, ImportanceSummary, explain_no_top_features
from saejax.interventions.importance import Importance, measure_importance
from saejax.interventions.settings import BASES, AblateConfig
from saejax.interventions.several_sites import JointSAEs, join_saes, place_at_sites
from saejax.interventions.split_model import parse_positions
from saejax.interventions.table import TESTED, load_effects, merge_tables, save_effects
from saejax.interventions.text import HeldOutText
from saejax.interventions.verdict import summarise, verdict
from saejax.parallel.collectives import is_first_process, wait_for_all
from saejax.progress import OnProgress
from saejax.runner import parts, stacks
from saejax.runner.workspace import Run
from saejax.stages import inputs as run_inputs
from saejax.tasks.gate import read_tested
from saejax.tasks.settings import CorpusConfig, TaskConfig


@dataclasses.dataclass(frozen=True)
class BehaviourResults:
    """Results of a behaviour, in addition to its effects table."""

    top: tuple[FeatureEffect, ...]  #: the top features, one by one
    importance: ImportanceSummary | None = None  #: of all features


def check_settings(config: AblateConfig) -> None:
    """Raise a ``UserError`` for settings that contradict each other, before anything is trained for them."""
    parse_positions(config.positions)
    if len({config.dictionary, *config.repeats}) < 1 + len(config.repeats):
        raise UserError(
            f"--ablate.repeats={','.join(config.repeats)}: name each dictionary once, and not the tested one"
        )
    if config.joined and (config.repeats or config.error == "drop" or config.effects == "all"):
        raise UserError("--ablate.joined goes with none of --ablate.repeats, --ablate.error=drop, --ablate.effects=all")
    if config.repeats and config.error == "drop":
        raise UserError("--ablate.error=drop and --ablate.repeats do not go together: test the repeats by themselves")


def run_ablate(run: Run) -> AblateResults:
    """Ablate the top features of every behaviour, with controls, and draw the verdict.

    Args:
      run: of the unit; ``effects.parquet`` and its definitions, and with ``--ablate.effects=all``
        ``<behaviour>-importance.parquet``, are written into its folder.

    Returns:
      The results of the unit.

    Raises:
      UserError: a setting names what does not exist, or prompts or dictionaries do not fit the model.
    """
    config = run.configs[AblateConfig]
    for name in config.baselines:
        if name not in BASES:
            load_dictionary(name, mesh=run_inputs.run_mesh(run))  # refused before any work is done
    prompts = run_inputs.read_behaviours(run)
    check_prompts(prompts)  # of all behaviours, before the first one takes hours
    dictionary = run_inputs.load_run_dictionary(run)
    mesh = run_inputs.run_mesh(run)
    if dictionary.config.widths and (config.repeats or config.joined or config.error == "drop"):
        raise UserError(
            f"--ablate.dictionary={config.dictionary} is a crosscoder, whose features are of several sites: leave out "
            "--ablate.repeats, --ablate.joined and --ablate.error=drop"
        )
    repeats = {name: stacks.load_trained(name, run.inputs, "--ablate.repeats", mesh) for name in config.repeats}
    joined = [stacks.load_trained(name, run.inputs, "--ablate.joined", mesh) for name in config.joined]

    def begin() -> parts.Measure:
        lm = run_inputs.load_run_model(
            run, dictionary.config, *(dictionary.config for dictionary in (*repeats.values(), *joined))
        )
        every = [prompt for of_behaviour in prompts.values() for prompt in of_behaviour]
        texts = [prompt.text for prompt in every if prompt.split == "train"]
        tested = join_saes(lm, [dictionary, *joined], texts) if joined else place_at_sites(lm, dictionary, every)
        corpus, task = run.configs[CorpusConfig], run.configs[TaskConfig]
        text = HeldOutText.of(corpus, task, lm, config.text_documents, TEXT_LENGTH)

        dictionaries = {TESTED: tested, **repeats}

        def measure(name: str, on_progress: OnProgress) -> parts.Measured:
            documents = len(text.documents) if text else 0
            ablations = begin_ablation(lm, dictionaries, name, prompts, config, on_progress, documents)
            table, ablation = measure_behaviour(ablations, prompts, text), ablations[TESTED]
            importance = measure_importance(table, ablation) if config.effects == "all" and table.behaviours else None
            if is_first_process():
                # Before the part's results, whose file says that the part is done.
                save_effects(parts.part_file(run, name, "-effects"), table)
                if importance:
                    importance.save(Importance.file(run.folder, name))
            top = describe_top(table, ablation)
            if isinstance(tested, JointSAEs):
                places = [tested.locate(effect.feature) for effect in top]
                top = tuple(
                    dataclasses.replace(effect, feature=feature, site="" if site == dictionary.site else site)
                    for effect, (site, feature) in zip(top, places, strict=True)
                )
            results = BehaviourResults(top, importance.summary if importance else None)
            line = f"{len(table.edits):,} edits on {len(ablation.test)} test prompts"
            return parts.Measured(results, line if top else f"not testable: {explain_no_top_features([name])}")

        return measure

    measured = parts.each_part(run, list(prompts), begin, BehaviourResults, unit="rows")
    wait_for_all("ablate: effects written")  # by the first process
    table = merge_tables([load_effects(parts.part_file(run, name, "-effects")) for name in prompts])
    answers = verdict(table, verdict_config(config))
    tested = read_tested(run.inputs["baseline"])
    for name in prompts:
        run.say(f"{name}{tested.mark(name)}: {summarise(answers, name)}")
        for repeat in (label for label in repeats if name in answers.dictionaries.get(label, ())):
            run.say(f"{name}{tested.mark(name)}, {repeat}: {summarise(answers, name, repeat)}")
    if is_first_process():
        save_effects(run.folder, table)
    importance = {name: results.importance for name, results in measured.items() if results.importance}
    return AblateResults(
        dictionary=config.dictionary,
        site=", ".join([dictionary.config.target or dictionary.site, *(dictionary.site for dictionary in joined)]),
        k=config.top,
        replacement=config.replacement,
        positions=config.positions,
        error=config.error,
        top={name: results.top for name, results in measured.items() if results.top},
        verdict=answers,
        importance=importance or None,
    )
