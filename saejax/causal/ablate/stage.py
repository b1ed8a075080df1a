"""The stage ``ablate``."""

from collections.abc import Sequence

from saejax.settings import BASES, AblateConfig, CorpusConfig, MeshConfig, ModelConfig
from saejax.stage import Configs, Stage, folder_name, is_folder, train_units
from saejax.tasks import identities
from saejax.workspace import fingerprint


def _needs(configs: Configs, name: str) -> Sequence[str]:
    """The units of the tested dictionary and of those that it is compared with."""
    names = (configs["ablate"].dictionary, *configs["ablate"].compare)
    return ("baseline", *train_units(*names))


def _bases(configs: Configs) -> str:
    """Dictionaries that are named by their folders: other bases, and tested ones."""
    from saejax.dictionaries import stacks

    ablate = configs["ablate"]
    others = [name for name in (ablate.dictionary, *ablate.compare) if is_folder(name)]
    return fingerprint([stacks.identity(name) for name in (*ablate.baselines, *others) if name not in BASES])


ABLATE = Stage(
    name="ablate",
    summary="ablates top features against matched random ones and says which features cause the behaviours",
    run="saejax.causal.ablate.run:run_ablate",
    results="saejax.causal.ablate.results:AblateResults",
    groups=(ModelConfig, CorpusConfig, AblateConfig),
    placement=(MeshConfig,),
    after=("baseline", "train", "evaluate"),
    needs=_needs,
    names=lambda configs: [folder_name(configs["ablate"].dictionary)] if configs["task"].has_behaviours else (),
    identity=dict(model=identities.model, corpus=identities.corpus, bases=_bases),
    rule="saejax.causal.ablate.grades:rule",
    cost="saejax.causal.ablate.cost:ablate_cost",
    programs="saejax.causal.ablate.cost:ablate_programs",
    version=3,  # 2: draws may hold the tested features; 3: those of circuits, too
    processes="all",
)
