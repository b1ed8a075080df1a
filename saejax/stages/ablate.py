"""The stage ``ablate``."""

from saejax.errors import one_of
from saejax.runner.config import Configs
from saejax.runner.stage import Stage, folder_name, is_folder, train_units
from saejax.runner.workspace import fingerprint
from saejax.settings import BASES, AblateConfig, CorpusConfig, MeshConfig, ModelConfig, TaskConfig, TrainConfig
from saejax.tasks import identities


def _bases(configs: Configs) -> str:
    """Return the identity of dictionaries that are named by their folders: other bases, and tested ones."""
    from saejax.dictionaries import stacks

    others = [name for name in _dictionaries(configs) if is_folder(name)]
    bases = [name for name in configs[AblateConfig].baselines if name not in BASES]
    return fingerprint([stacks.identity(name) for name in (*bases, *others)])


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
    own, sites = configs[AblateConfig].dictionary, configs[TrainConfig].sites
    crosscoders = not is_folder(own) and all("+" in site for site in sites)
    return (folder_name(own),) if configs[TaskConfig].has_behaviours and not crosscoders else ()


ABLATE = Stage(
    name="ablate",
    summary="ablates top features beside random and placebo sets and says whether they cause the behaviours",
    run="saejax.causal.ablate.run:run_ablate",
    results="saejax.interventions.answers:AblateResults",
    groups=(ModelConfig, CorpusConfig, AblateConfig),
    placement=(MeshConfig,),
    after=("baseline", "train", "evaluate"),
    needs=lambda configs, name: ("baseline", *train_units(*_dictionaries(configs))),
    names=_names,
    identity=dict(model=identities.model, corpus=identities.corpus, bases=_bases),
    check=_check,
    rule="saejax.causal.ablate.run:rule",
    cost="saejax.causal.ablate.run:ablate_cost",
    programs="saejax.causal.ablate.run:ablate_programs",
    processes="all",
)
