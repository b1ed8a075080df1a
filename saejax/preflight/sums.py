"""A configuration on one model: what each unit takes, and what that is in all."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from saejax.costs.cost import Axes, Cost, DeviceBytes, PlannedRun
from saejax.costs.programs import Program
from saejax.errors import UserError
from saejax.models.config import DecoderConfig
from saejax.models.parameters import LAYERS, parameter_table
from saejax.models.sites import ModuleSite, decoder_site
from saejax.parallel.mesh import fitting_spec
from saejax.runner.config import Configs
from saejax.runner.registry import STAGES
from saejax.runner.stage import load
from saejax.settings import CaptureConfig, TrainConfig
from saejax.training.cost import planned_stacks

_DIMENSIONS = {
    "H": "query heads",
    "N": "key-value heads",
    "F": "dimensions of the MLP",
    "V": "entries of the vocabulary",
}


def plan_run(name: str, model: DecoderConfig, configs: Configs, axes: Axes, **more: Any) -> PlannedRun:
    """What stages' costs follow from.

    Args:
      name: of the model.
      axes: sizes of the mesh's axes.
      more: other fields of ``PlannedRun``.

    Raises:
      UserError: a site does not exist in this model, or is trained on and not captured; k is above the features.
    """
    capture = configs[CaptureConfig]
    try:
        # Modules of the PyTorch model, which may be captured beside the sites, have sizes that only it knows.
        sites = tuple(decoder_site(site).check(model) for site in capture.sites if not ModuleSite.names(site))
        stacks = planned_stacks(configs[TrainConfig], capture.sites, model)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return PlannedRun(configs, name, model, sites, stacks, axes, **more)


@dataclasses.dataclass(frozen=True)
class Needs:
    """What the units of a configuration take on a model.

    Attributes:
      units: the cost of each, in the order in which they run.
    """

    units: Mapping[str, Cost]

    @classmethod
    def of(cls, plan: PlannedRun) -> "Needs":
        """Asks every stage for what its units cost.

        Raises:
          UserError: a unit cannot run: its dictionary is not trained, or something does not fit or divide.
        """
        return cls(
            {
                unit: load(stage.cost)(plan.placed(stage), unit.partition("/")[2])
                for stage in STAGES.values()
                if stage.cost
                for unit in stage.units(plan.configs)
            }
        )

    @property
    def largest(self) -> str:
        """The unit that needs most memory of a device."""
        return max(self.units, key=lambda unit: self.units[unit].bytes.total)

    @property
    def peak(self) -> int:
        """What that unit needs."""
        return self.units[self.largest].bytes.total

    @property
    def bytes(self) -> DeviceBytes:
        """The most of any unit, by use."""
        parts = (field.name for field in dataclasses.fields(DeviceBytes))
        return DeviceBytes(**{part: max(getattr(cost.bytes, part) for cost in self.units.values()) for part in parts})

    @property
    def disk(self) -> int:
        """Bytes that the run writes."""
        return sum(cost.disk for cost in self.units.values())

    def seconds(self, rates: Mapping[str, float]) -> dict[str, float]:
        """Seconds of the stages that take long, their units together.

        Args:
          rates: FLOP/s of large matrix products, by dtype.
        """
        found: dict[str, float] = {}
        for unit, cost in self.units.items():
            stage, took = unit.partition("/")[0], cost.seconds(rates)
            found[stage] = found.get(stage, 0.0) + took
        return {stage: value for stage, value in found.items() if value}


def stage_programs(plan: PlannedRun) -> list[Program]:
    """The large programs of all stages that have any.

    Raises:
      UserError: the mesh does not divide the training batch or the features.
    """
    stages = [(stage, plan.placed(stage)) for stage in STAGES.values() if stage.programs]
    return [program for stage, placed in stages for program in load(stage.programs)(placed, placed.mesh)]


def replicated(plan: PlannedRun, needs: Needs) -> list[str]:
    """What the mesh does not divide, so that every device holds or runs all of it; one line each."""
    lines = _replicated_weights(plan.model, plan.axes)
    batches = {
        (count, f"{what} of {stage.name}", plan.placed(stage).axes["data"]): None
        for stage, cost in ((STAGES[unit.partition("/")[0]], cost) for unit, cost in needs.units.items())
        for what, count in cost.batches.items()
    }
    return lines + [
        f"{count} {what} over {over} devices: every device runs all of them"
        for count, what, over in batches
        if count % over
    ]


def _replicated_weights(model: DecoderConfig, axes: Axes) -> list[str]:
    over = axes["model"]
    names: dict[tuple[int, str], list[str]] = {}
    for name, (shape, spec) in parameter_table(model).items():
        label, _, letters = name.rpartition("_")
        split = fitting_spec(axes, shape, *spec)
        for size, letter, axis, kept in zip(shape, _letters(letters, len(spec)), spec, split, strict=True):
            if axis and over > 1 and not kept:
                names.setdefault((size, letter), []).append(label.removeprefix(LAYERS))
    return [
        f"{size:,} {_DIMENSIONS.get(letter, letter)} over {over} devices: {', '.join(sorted(found))} are replicated"
        for (size, letter), found in names.items()
    ]


def _letters(letters: str, count: int) -> list[str]:
    """The letters of "DxHxK", with "" for the layers in front of them."""
    named = letters.split("x")
    return [""] * (count - len(named)) + named
