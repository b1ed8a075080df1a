"""The stage ``ablate``: do a dictionary's features cause the behaviours?

A behaviour is a part in the sense of ``saejax.causal.parts``. What it measures goes to ``<behaviour>-effects/`` at
once, so that a run that was killed goes on with the next one; at the end all of it becomes the unit's effects table, of
which the verdict is a pure function.
"""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from jax.sharding import Mesh

from saejax.causal import parts
from saejax.causal.importance import Importance, measure_importance
from saejax.causal.programs import SplitShapes
from saejax.costs.plan import PlannedRun
from saejax.costs.programs import Program
from saejax.dictionaries import load_dictionary, stacks
from saejax.errors import UserError
from saejax.interventions import activity, positions
from saejax.interventions.ablation import (
    BehaviourAblation,
    expected_rows,
    measure_behaviour,
    measure_text,
)
from saejax.interventions.answers import AblateResults, CausalVerdict, FeatureEffect, ImportanceSummary, VerdictConfig
from saejax.interventions.engine import FEATURES
from saejax.interventions.rows import filled_features
from saejax.interventions.slopes import TARGETS
from saejax.interventions.split_model import PROMPTS
from saejax.interventions.table import TESTED, EffectsTable, load_effects, merge_tables, save_effects
from saejax.interventions.text import HeldOutText
from saejax.interventions.verdict import verdict
from saejax.parallel.collectives import is_first_process, wait_for_all
from saejax.results import Interval
from saejax.runner.workspace import Run
from saejax.settings import BASES, AblateConfig, CorpusConfig, TaskConfig
from saejax.statistics.bootstrap import percentile_interval, resampling_weights
from saejax.tasks.behaviours import Prompt
from saejax.tasks.planned import count_all_behaviours

TEXT_LENGTH = 32  # tokens of a held-out document
_FIRING = 0.85  # share of the rows that are run: a set that changes nothing on a prompt is not


@dataclasses.dataclass(frozen=True)
class BehaviourResults:
    """What the stage keeps of a behaviour beside its effects table."""

    top: tuple[FeatureEffect, ...]  #: the top features, one by one
    importance: ImportanceSummary | None = None  #: of all features


def rule(config: AblateConfig) -> str:
    """Return the rule of the verdict in words."""
    return verdict_config(config).rule


def verdict_config(config: AblateConfig) -> VerdictConfig:
    """Return the numbers of the rule."""
    return VerdictConfig(
        min_accuracy_drop=config.min_accuracy_drop,
        max_ce_rise=config.max_ce_rise,
        resamples=config.bootstrap,
        seed=config.seed,
    )


def run_ablate(run: Run) -> AblateResults:
    """Ablate the top features of every behaviour, beside controls, and draw the verdict.

    Args:
      run: of the unit; ``effects.parquet`` and its definitions, and with ``--ablate.effects=all``
        ``<behaviour>-importance.parquet``, are written into its folder.

    Returns:
      The results of the unit.

    Raises:
      UserError: a setting names what does not exist, or prompts or dictionaries do not fit the model.
    """
    config = run.configs[AblateConfig]
    positions.parse(config.positions)
    if len({config.dictionary, *config.repeats}) < 1 + len(config.repeats):
        raise UserError(f"--ablate.repeats={','.join(config.repeats)}: name each dictionary once, the tested one never")
    if config.repeats and config.error == "drop":
        raise UserError("--ablate.error=drop and --ablate.repeats do not go together: test the repeats by themselves")
    for name in config.baselines:
        if name not in BASES:
            load_dictionary(name)  # refused before any work is done
    prompts, dictionary = parts.read_behaviours(run), parts.load_run_dictionary(run)
    repeats = {name: stacks.load_trained(name, run.inputs, "--ablate.repeats") for name in config.repeats}
    text_folder = run.folder / "text-effects"

    def begin() -> parts.Measure:
        lm = parts.load_run_model(run)
        corpus, task = run.configs[CorpusConfig], run.configs[TaskConfig]
        text = HeldOutText.of(corpus, task, lm, config.text_documents, TEXT_LENGTH)
        if text and not text_folder.exists():
            table = measure_text(lm, text, dictionary, config.error)
            if is_first_process():
                save_effects(text_folder, table)

        def measure(name: str, on_progress: parts.OnProgress) -> parts.Measured:
            folder = parts.partial_folder(run, name)
            table, ablation = measure_behaviour(
                lm, dictionary, name, prompts, config, text, repeats, on_progress, folder
            )
            importance = measure_importance(table, ablation) if config.effects == "all" else None
            if is_first_process():
                save_effects(_effects_folder(run, name), table)
                if importance:
                    importance.save(Importance.file(run.folder, name))
            results = BehaviourResults(describe_top(table, ablation), importance.summary if importance else None)
            return parts.Measured(results, f"{len(table.edits):,} edits on {len(ablation.test)} test prompts")

        return measure

    measured = parts.each_part(run, list(prompts), begin, BehaviourResults, unit="rows")
    wait_for_all("ablate: effects written")  # by the first process
    folders = [*(_effects_folder(run, name) for name in prompts), *([text_folder] if text_folder.exists() else [])]
    table = merge_tables([load_effects(folder) for folder in folders])
    answers = verdict(table, verdict_config(config))
    for name in prompts:
        run.say(f"{name}: {summarise(answers, name)}")
    wait_for_all("ablate: effects read")
    if is_first_process():
        save_effects(run.folder, table)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    importance = {name: results.importance for name, results in measured.items() if results.importance}
    return AblateResults(
        dictionary=config.dictionary,
        site=dictionary.site,
        k=config.top,
        replacement=config.replacement,
        positions=config.positions,
        error=config.error,
        top={name: results.top for name, results in measured.items()},
        verdict=answers,
        importance=importance or None,
    )


def describe_top(table: EffectsTable, ablation: BehaviourAblation) -> tuple[FeatureEffect, ...]:
    """Return what each top feature does alone, from a table's group ``single``."""
    prompts = table.select_prompts(ablation.behaviour)
    edits = table.select_edits(ablation.behaviour, "single", TESTED)
    drop_KxP = table.clean_values(prompts, "logit_diff") - table.values(edits, prompts, "logit_diff")
    templates = [prompt.template for prompt in prompts]
    intervals = [Interval(float(drop_P.mean()), float(drop_P.mean()), float(drop_P.mean())) for drop_P in drop_KxP]
    if len(prompts) > 1:
        weights_SxP = resampling_weights(templates, ablation.config.bootstrap, ablation.config.seed)
        ends = [percentile_interval(weights_SxP @ drop_P) for drop_P in drop_KxP]
        intervals = [Interval(old.mean, low, high) for old, (low, high) in zip(intervals, ends, strict=True)]
    statistics = activity.statistics(ablation.split, ablation.runs)
    return tuple(
        FeatureEffect(
            feature=(feature := edit.features[0]),
            attribution=float(ablation.attribution_F[feature]),
            drop=interval,
            firing_rate=float(statistics.firing_rate_F[feature]),
            mean_activation=float(statistics.mean_activation_F[feature]),
        )
        for edit, interval in zip(edits, intervals, strict=True)
    )


def summarise(answers: CausalVerdict, behaviour: str) -> str:
    """Return the answers on a behaviour in one line."""
    result = answers.dictionaries[TESTED][behaviour]
    said = dict(
        effect=result.ablation["logit_diff"].answer,
        more_than_random=result.random.answer,
        specific=result.placebo.answer,
        selective=result.selective.answer,
        **{f"more_than_{name}": answer.answer for name, answer in result.bases.items()},
    )
    return "; ".join(f"{question.replace('_', ' ')}: {answer}" for question, answer in said.items())


def _effects_folder(run: Run, behaviour: str) -> Path:
    return parts.part_file(run, behaviour, "-effects")


def _gathered(plan: PlannedRun) -> int:
    """Return the number of features whose activations are kept at once, with padding."""
    return filled_features(min(plan.dictionary("ablate").n_features, max(FEATURES, plan.configs[AblateConfig].top)))


def ablate_programs(plan: PlannedRun, mesh: Mesh) -> list[Program]:
    """Return the programs of the stage: clean runs, attribution, changes of features, and the layers above the site."""
    if not plan.configs[TaskConfig].has_behaviours:
        return []
    shapes, ablate, gathered = SplitShapes(plan, mesh, "ablate"), plan.configs[AblateConfig], _gathered(plan)
    task, behaviours = plan.configs[TaskConfig], count_all_behaviours(plan.configs[TaskConfig])
    trainings = 1 + ablate.untrained + len(ablate.repeats)
    prompts = [Prompt("", "test", "", "", "")] * task.test_prompts
    named: Mapping[str, Sequence[Prompt]] = {str(number): prompts for number in range(behaviours)}
    rows = _FIRING * behaviours * expected_rows(ablate, named, "0", plan.dictionary("ablate").n_features)
    ranked = behaviours * min(ablate.attribution_prompts or task.train_prompts, task.train_prompts) / PROMPTS
    targets = trainings * ranked * ablate.placebo_targets / TARGETS
    calls = dict(head=2 * ranked, slopes=ranked * (trainings + len(ablate.baselines)), tail=rows / ablate.batch_rows)
    placebos = [(shapes.placebos(ablate.replacement), targets)] if ablate.placebo_targets else []
    programs = [
        (shapes.head(error=ablate.error), calls["head"]),
        (shapes.slopes("gradient", ablate.replacement), calls["slopes"]),
        *placebos,
        (shapes.features(ablate.replacement, gathered), calls["slopes"]),
        (shapes.tail(gathered, ablate.batch_rows), calls["tail"]),
    ]
    return [dataclasses.replace(program, runs=runs) for program, runs in programs]
