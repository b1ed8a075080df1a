"""A configuration on a model that is known by its shape: its programs, and the bytes and hours that it takes."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from saejax.activations.settings import CaptureConfig
from saejax.config import Configs
from saejax.costs.plan import PlannedRun
from saejax.costs.programs import Program
from saejax.errors import UserError
from saejax.models.config import DecoderConfig
from saejax.models.sites import ModuleSite, decoder_site
from saejax.preflight.results import CompiledProgram
from saejax.runner.registry import all_stages
from saejax.stages.ablate.plan import ablate_programs
from saejax.stages.baseline.plan import benchmark_programs
from saejax.stages.capture.plan import capture_programs, store_bytes
from saejax.stages.evaluate.plan import evaluate_programs
from saejax.stages.train.plan import checkpoint_bytes, planned_stacks, train_programs
from saejax.training.settings import TrainConfig

# The large jitted functions of each stage that has any, with shapes in place of arrays.
_PROGRAMS: Mapping[str, Callable[[PlannedRun, Mesh], Sequence[Program]]] = {
    "benchmark": benchmark_programs,
    "capture": capture_programs,
    "train": train_programs,
    "evaluate": evaluate_programs,
    "ablate": ablate_programs,
}


def plan_run(name: str, model: DecoderConfig, configs: Configs, mesh: Mesh, **more: Any) -> PlannedRun:
    """Return the plan of a configuration on a model.

    Args:
      name: name of the model.
      model: its decoder.
      configs: all settings.
      mesh: the devices.
      more: other fields of ``PlannedRun``.

    Raises:
      UserError: a site does not exist in this model, or is trained on and not captured; k is above the features.
    """
    capture = configs[CaptureConfig]
    try:
        # Modules of the PyTorch model, which may be captured as well, have sizes that only it knows.
        sites = tuple(decoder_site(site).check(model) for site in capture.sites if not ModuleSite.names(site))
        stacks = planned_stacks(configs[TrainConfig], capture.sites, model)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return PlannedRun(configs, name, model, sites, stacks, mesh, **more)


def check_dictionaries(plan: PlannedRun) -> None:
    """Raise a ``UserError`` if a stage that is asked for names a dictionary that is not trained."""
    for stage in ("ablate", "patch", "probe", "steer", "study"):
        if all_stages()[stage].units(plan.configs) and plan.configs.named(stage).dictionary:
            plan.dictionary(stage)


def compiled_stages(stages: Collection[str]) -> list[str]:
    """Return the stages whose large programs some stages run, of a study a benchmark's."""
    names = {*stages, *(["benchmark"] if "study" in stages else [])}
    return [name for name in _PROGRAMS if name in names]


def stage_programs(plan: PlannedRun, stages: Collection[str] | None = None) -> list[Program]:
    """Return the large programs of those of some stages that have any; a benchmark's are a study's, too.

    Args:
      plan: the run.
      stages: names of stages; None: all that have units.

    Raises:
      UserError: the mesh does not divide the training batch or the features.
    """
    if stages is None:
        stages = {stage.name for stage in all_stages().values() if stage.units(plan.configs)}
    placed = [(_PROGRAMS[name], plan.placed(all_stages()[name])) for name in compiled_stages(stages)]
    return [program for list_programs, where in placed for program in list_programs(where, where.mesh)]


def disk_bytes(plan: PlannedRun, stages: Collection[str]) -> int:
    """Return the bytes that stages write: the store, dictionaries and the checkpoints that are kept."""
    return ("capture" in stages) * store_bytes(plan) + ("train" in stages) * checkpoint_bytes(plan)


def stage_seconds(programs: Sequence[CompiledProgram], rates: Mapping[str, float], dtypes: Mapping[str, str]) -> dict:
    """Return the expected seconds of each stage: the operations of its programs, divided by a measured rate.

    Args:
      programs: the programs, with how often each is called.
      rates: FLOP/s of large matrix products of all devices, by dtype.
      dtypes: dtype of the products of each stage; float32 for stages that are not named.
    """
    seconds: dict[str, float] = {}
    for program in programs:
        stage = program.name.partition(":")[0]
        rate = rates[dtypes.get(stage, "float32")]
        seconds[stage] = seconds.get(stage, 0.0) + program.runs * program.flops / rate
    return seconds
