"""The stage ``ablate``."""

from typing import Any

from saejax.errors import one_of
from saejax.runner.config import Configs
from saejax.runner.stage import Stage, folder_name, is_folder, train_units
from saejax.runner.workspace import Run, fingerprint
from saejax.settings import BASES, AblateConfig, CorpusConfig, MeshConfig, ModelConfig, TaskConfig, TrainConfig
from saejax.tasks import identities


def _bases(configs: Configs) -> str:
    """Return the identity of dictionaries that are named by their folders: other bases, and tested ones."""
    from saejax.dictionaries import stacks

    by_folder = [name for name in _dictionaries(configs) if is_folder(name)]
    bases = [name for name in configs[AblateConfig].baselines if name not in BASES]
    return fingerprint([stacks.identity(name) for name in (*bases, *by_folder)])


def _check(configs: Configs) -> None:
    for name in configs[AblateConfig].baselines:
        if not is_folder(name):
            one_of(name, BASES, "basis (--ablate.baselines), and no folder of a dictionary:")


def _dictionaries(configs: Configs) -> tuple[str, ...]:
    """Return the dictionaries that are tested, the main one first."""
    ablate = configs[AblateConfig]
    return tuple(dict.fromkeys((ablate.dictionary, *ablate.repeats)))


def _names(configs: Configs) -> tuple[str, ...]:
    """Return the tested dictionary; none where only crosscoders are trained."""
    tested, sites = configs[AblateConfig].dictionary, configs[TrainConfig].sites
    crosscoders = not is_folder(tested) and all("+" in site for site in sites)
    return (folder_name(tested),) if configs[TaskConfig].has_behaviours and not crosscoders else ()


def _run(run: Run) -> Any:
    from saejax.interventions.ablate_run import run_ablate

    return run_ablate(run)


def _results() -> Any:
    from saejax.interventions.answers import AblateResults

    return AblateResults


def _rule(config: Any) -> str:
    from saejax.interventions.ablation import verdict_config

    return verdict_config(config).rule


ABLATE = Stage(
    name="ablate",
    summary="ablates top features and control sets, and says whether the features cause the behaviours",
    run=_run,
    results=_results,
    groups=(ModelConfig, CorpusConfig, AblateConfig),
    placement=(MeshConfig,),
    reads=("baseline", "train"),
    follows=("evaluate",),
    needs=lambda configs, name: ("baseline", *train_units(*_dictionaries(configs))),
    names=_names,
    identity=dict(model=identities.model, corpus=identities.corpus, bases=_bases),
    check=_check,
    revision=3,  # few prompts are not testable; bases of dictionaries that normalise tokens
    rule=_rule,
    processes="all",
)
