"""The stage ``study``."""

from saejax.config import Configs
from saejax.dictionaries.hashes import hash_dictionaries
from saejax.dictionaries.names import is_folder
from saejax.errors import UserError, one_of
from saejax.files import fingerprint
from saejax.interventions.settings import BASES, StudyConfig
from saejax.models.settings import ModelConfig
from saejax.runner.stage import Input, Stage, inputs_of, list_folders, settings_of, train_units
from saejax.stages import identities
from saejax.stages.study.measure import split_items
from saejax.stages.study.report import sections
from saejax.stages.study.results import StudyResults
from saejax.stages.study.run import run_study
from saejax.tasks import corpora
from saejax.tasks.benchmarks import check_items
from saejax.tasks.settings import OF_BEHAVIOURS, CorpusConfig, TaskConfig
from saejax.tasks.text_sources import text_sources


def _dictionaries(configs: Configs) -> tuple[str, ...]:
    """Return the dictionaries that are tested, the main one first."""
    study = configs[StudyConfig]
    return tuple(dict.fromkeys((study.dictionary, *study.repeats)))


def _bases(configs: Configs) -> str:
    """Return the identity of dictionaries that are named by their folders."""
    names = (*_dictionaries(configs), *configs[StudyConfig].baselines)
    return fingerprint([hash_dictionaries(name) for name in names if is_folder(name)])


def _ordinary_text(configs: Configs) -> str:
    """Return the identity of the user's ordinary text; "" if there is none, or it is not read."""
    study = configs[StudyConfig]
    return corpora.identity(CorpusConfig(path=study.falsify_text)) if study.falsify and study.falsify_text else ""


def _check(configs: Configs) -> None:
    for name in configs[StudyConfig].baselines:
        if not is_folder(name):
            one_of(name, BASES, "basis (--study.baselines), and no folder of a dictionary:")
    study, task = configs[StudyConfig], configs[TaskConfig]
    check_items(study.benchmarks, task, lambda name, items: split_items(items, study, name))
    if study.falsify and study.falsify_text:
        try:
            text_sources(CorpusConfig(path=study.falsify_text), task)
        except UserError as error:
            raise UserError(str(error).replace("--corpus.path", "--study.falsify_text")) from None


def _inputs(configs: Configs, name: str) -> dict[str, Input]:
    return inputs_of(
        configs,
        *train_units(*_dictionaries(configs)),
        model=identities.model,
        bases=_bases,
        benchmark=identities.benchmark(name),
        # Features chosen on each are ablated on the others.
        benchmarks=lambda c: fingerprint([identities.benchmark(name)(c) for name in c[StudyConfig].benchmarks]),
        ordinary_text=_ordinary_text,
    )


STUDY = Stage(
    name="study",
    summary="ablates top features and control sets on benchmarks, if --study.benchmarks names any",
    run=run_study,
    results=StudyResults,
    groups=(ModelConfig, TaskConfig, StudyConfig),
    reads=("train",),
    follows=("ablate",),
    settings=settings_of(ModelConfig, TaskConfig, StudyConfig, but=OF_BEHAVIOURS),
    inputs=_inputs,
    names=lambda configs: configs[StudyConfig].benchmarks,
    check=_check,
    places=list_folders("study", "dictionary", "repeats", "baselines"),
    revision=18,  # judges of answers know signs of Unicode, and thousands separators of LaTeX and percentages
    processes="items",
    section=sections,
)
