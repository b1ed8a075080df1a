"""What the preflight stage prints."""

from collections.abc import Mapping, Sequence

from saejax.costs.cost import PlannedRun
from saejax.costs.passes import parameters
from saejax.parallel.collectives import process_count
from saejax.preflight.advice import GIB
from saejax.preflight.place import Place
from saejax.preflight.results import CompiledProgram
from saejax.preflight.sums import Needs, replicated
from saejax.results import MeshShape

_COLUMNS = ("parameters", "dtype", "layers", "model", "dictionary", "optimizer", "activations", "peak")


def place_line(place: Place) -> str:
    """The devices and their mesh."""
    facts = MeshShape.of(place.mesh, process_count())
    axes = " x ".join(f"{axis} {size}" for axis, size in facts.axes.items())
    return f"{facts.devices} x {', '.join(facts.kinds)}, {place.limit / GIB:.2f} GiB each; mesh {axes}"


def memory_lines(found: Sequence[tuple[PlannedRun, Needs]], place: Place) -> list[str]:
    """Memory per device, one line a model, and what is replicated."""
    width = max([len("GiB per device"), *(len(plan.name) for plan, _ in found)])
    lines = [f"{'GiB per device':<{width}}  {_row(_COLUMNS)}"]
    for plan, needs in found:
        most = needs.bytes
        sizes = (most.model, most.dictionary, most.optimizer, most.activations, needs.peak)
        cells = [f"{parameters(plan.model) / 1e6:,.1f} M", plan.dtype, f"{plan.model.n_layers}"]
        cells += [f"{size / GIB:.2f}" for size in sizes]
        verdict = "fits" if needs.peak <= place.limit else "does not fit"
        lines.append(f"{plan.name:<{width}}  {_row(cells)}  in {needs.largest.partition('/')[0]}: {verdict}")
    return lines + [f"{plan.name}: {line}" for plan, needs in found for line in replicated(plan, needs)]


def _row(cells: Sequence[str]) -> str:
    widths = (11, 8, 6, 6, 10, 9, 11, 6)
    return "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def unit_lines(needs: Needs) -> list[str]:
    """What else stages say of their units: what they count, and lines of their own."""
    lines = [line for cost in needs.units.values() for line in cost.lines]
    for unit, cost in needs.units.items():
        if cost.counts:
            lines.append(f"{unit}: about {', '.join(f'{count:,} {what}' for what, count in cost.counts.items())}")
    return lines


def seconds_line(seconds: Mapping[str, float]) -> str:
    """How long the stages take."""
    stages = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
    return f"roughly {sum(seconds.values()) / 60:.0f} minutes if nothing is done yet: {stages}"


def verdict_line(name: str, programs: Sequence[CompiledProgram], place: Place) -> str:
    """What a model needs, by the compiler."""
    largest, fits = max(programs, key=lambda program: program.memory), all(program.fits for program in programs)
    sizes = f"{largest.memory / GIB:.2f} of {place.limit / GIB:.2f} GiB per device"
    return f"{name}: at the peak ({largest.name}) {sizes}: {'fits' if fits else 'does not fit'}"


def programs_header(name: str, topology: str) -> str:
    """What the lines of a model's programs mean."""
    return (
        f"{name}, compiled for {topology}: memory of a device, what else the stage keeps there included; GFLOP of "
        "all devices by formula (by XLA, of one device, counting the body of a loop once)"
    )


def program_line(program: CompiledProgram, place: Place) -> str:
    """What a program needs."""
    verdict = "fits" if program.fits else f"does not fit into {place.limit / GIB:.2f}"
    counted = "-" if program.counted_flops is None else f"{program.counted_flops / 1e9:,.1f}"
    return (
        f"  {program.name:<21} {program.size:<44} {program.memory / GIB:7.2f} GiB {verdict} "
        f"{program.flops / 1e9:>13,.1f} GFLOP ({counted})  compiled in {program.seconds:.0f} s" + _sends(program.sends)
    )


def _sends(sends: Mapping[str, int] | None) -> str:
    parts = [f"{count / 2**20:,.1f} MiB by {kind}" for kind, count in (sends or {}).items()]
    return f"; a device sends {', '.join(parts)}" if parts else ""
