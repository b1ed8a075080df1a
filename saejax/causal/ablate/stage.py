"""The stage ``ablate``."""

from saejax.config import Configs
from saejax.errors import one_of
from saejax.settings import BASES, AblateConfig, CorpusConfig, MeshConfig, ModelConfig, TaskConfig, TrainConfig
from saejax.stage import Stage, folder_name, is_folder, train_units
from saejax.tasks import identities
from saejax.workspace import fingerprint


def _bases(configs: Configs) -> str:
    """Dictionaries that are named by their folders: other bases, and tested ones."""
    from saejax.dictionaries import stacks

    others = [name for name in _dictionaries(configs) if is_folder(name)]
    bases = [name for name in configs[AblateConfig].baselines if name not in BASES]
    return fingerprint([stacks.identity(name) for name in (*bases, *others)])


def _check(configs: Configs) -> None:
    for name in configs[AblateConfig].baselines:
        if not is_folder(name):
            one_of(name, BASES, "basis (--ablate.baselines), and no folder of a dictionary:")


def _dictionaries(configs: Configs) -> tuple[str, ...]:
    """The tested one first."""
    ablate = configs[AblateConfig]
    return tuple(dict.fromkeys((ablate.dictionary, *ablate.compare, *ablate.repeats)))


def _names(configs: Configs) -> tuple[str, ...]:
    """The tested dictionary; none where all that is trained here are crosscoders, which ``crosscode`` tests."""
    own, sites = configs[AblateConfig].dictionary, configs[TrainConfig].sites
    crosscoders = not is_folder(own) and all("+" in site for site in sites)
    return (folder_name(own),) if configs[TaskConfig].has_behaviours and not crosscoders else ()


def _version(configs: Configs) -> int:
    """2: draws may hold the tested features; 3: those of circuits, too.

    4: where other activations stand in, doses of other bases are of one edit, and fillers of text lend none.
    """
    return 3 if configs[AblateConfig].replacement == "zero" else 4


ABLATE = Stage(
    name="ablate",
    summary="ablates top features against matched random ones and says which features cause the behaviours",
    run="saejax.causal.ablate.run:run_ablate",
    results="saejax.causal.ablate.results:AblateResults",
    groups=(ModelConfig, CorpusConfig, AblateConfig),
    placement=(MeshConfig,),
    after=("baseline", "train", "evaluate"),
    needs=lambda configs, name: ("baseline", *train_units(*_dictionaries(configs))),
    names=_names,
    identity=dict(model=identities.model, corpus=identities.corpus, bases=_bases),
    check=_check,
    rule="saejax.causal.ablate.grades:rule",
    cost="saejax.causal.ablate.cost:ablate_cost",
    programs="saejax.causal.ablate.cost:ablate_programs",
    version=_version,
    processes="all",
)
