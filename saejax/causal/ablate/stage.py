"""The stage ``ablate``."""

from collections.abc import Sequence

from saejax.settings import BASES, AblateConfig, MeshConfig, ModelConfig
from saejax.stage import Configs, Stage, folder_name, train_unit
from saejax.tasks import identities
from saejax.workspace import fingerprint


def _needs(configs: Configs, name: str) -> Sequence[str]:
    """The units of the tested dictionary and of those that it is compared with."""
    names = (configs["ablate"].dictionary, *configs["ablate"].compare)
    return tuple(dict.fromkeys(("baseline", *map(train_unit, names))))


def _bases(configs: Configs) -> str:
    """Dictionaries beside the one that is tested."""
    from saejax.training import initial

    return fingerprint([initial.identity(folder) for folder in configs["ablate"].baselines if folder not in BASES])


ABLATE = Stage(
    name="ablate",
    summary="ablates top features against matched random ones and says which features cause the behaviours",
    run="saejax.causal.ablate.run:run_ablate",
    results="saejax.causal.ablate.results:AblateResults",
    groups=(ModelConfig, AblateConfig),
    placement=(MeshConfig,),
    after=("baseline", "train", "evaluate"),
    needs=_needs,
    names=lambda configs: [folder_name(configs["ablate"].dictionary)] if configs["task"].has_behaviours else (),
    identity=dict(model=identities.model, bases=_bases),
    rule="saejax.causal.ablate.verdict:rule",
    cost="saejax.causal.ablate.cost:ablate_cost",
    programs="saejax.causal.ablate.cost:ablate_programs",
    many_processes=True,
)
