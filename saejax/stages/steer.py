"""The stage ``steer``."""

from collections.abc import Sequence

from saejax.runner.config import Configs
from saejax.runner.stage import Stage, folder_name, train_units
from saejax.settings import CorpusConfig, MeshConfig, ModelConfig, SteerConfig, TaskConfig
from saejax.tasks import identities


def _names(configs: Configs) -> Sequence[str]:
    dictionary = configs[SteerConfig].dictionary
    return (folder_name(dictionary),) if dictionary and configs[TaskConfig].has_behaviours else ()


STEER = Stage(
    name="steer",
    summary="steers prompts to another answer by features, means and examples, if --steer.dictionary is set",
    run="saejax.causal.steer.run:run_steer",
    results="saejax.causal.steer.results:SteerResults",
    groups=(ModelConfig, CorpusConfig, SteerConfig),
    placement=(MeshConfig,),
    reads=("baseline", "train"),
    follows=("ablate",),
    needs=lambda configs, name: ("baseline", *train_units(configs[SteerConfig].dictionary)),
    names=_names,
    identity=dict(
        model=identities.model,
        corpus=identities.corpus,
        dictionary=lambda configs: identities.dictionary(configs, "steer"),
    ),
    processes="items",
    section="saejax.causal.steer.report:sections",
)
