"""The stage ``probe``."""

from collections.abc import Sequence

from saejax.runner.config import Configs
from saejax.runner.stage import Stage, folder_name, train_units
from saejax.settings import MeshConfig, ModelConfig, ProbeConfig, TaskConfig
from saejax.tasks import identities


def _names(configs: Configs) -> Sequence[str]:
    asked = configs[ProbeConfig].labels and configs[TaskConfig].has_behaviours
    return (folder_name(configs[ProbeConfig].dictionary),) if asked else ()


PROBE = Stage(
    name="probe",
    summary="probes features and raw activations for labels of the prompts, if --probe.labels names any",
    run="saejax.causal.probes.run:run_probe",
    results="saejax.causal.probes.results:ProbeResults",
    groups=(ModelConfig, ProbeConfig),
    placement=(MeshConfig,),
    reads=("baseline", "train"),
    follows=("ablate",),
    needs=lambda configs, name: ("baseline", *train_units(configs[ProbeConfig].dictionary)),
    names=_names,
    identity=dict(model=identities.model, dictionary=lambda configs: identities.dictionary(configs, "probe")),
    processes="items",
    section="saejax.causal.probes.report:sections",
)
