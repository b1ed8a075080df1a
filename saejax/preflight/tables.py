"""What the preflight stage prints."""

from collections.abc import Mapping, Sequence

from saejax.attribution.trace.memory import PHASES, Bytes
from saejax.parallel import describe
from saejax.preflight import memory
from saejax.preflight.graphs import GraphWork
from saejax.preflight.memory import GIB, Memory
from saejax.preflight.place import Place
from saejax.preflight.programs import Program
from saejax.preflight.topology import Compiled
from saejax.preflight.work import Work

_COLUMNS = ("parameters", "dtype", "layers", "model", "dictionary", "optimizer", "activations", "peak")


def place_line(place: Place) -> str:
    """The devices and their mesh."""
    facts = describe(place.mesh)
    axes = " x ".join(f"{axis} {size}" for axis, size in facts.axes.items())
    return f"{facts.devices} x {', '.join(facts.kinds)}, {place.limit / GIB:.2f} GiB each; mesh {axes}"


def memory_lines(works: Sequence[Work], found: Sequence[Memory], place: Place) -> list[str]:
    """Memory per device, one line a model, and what is replicated."""
    width = max([len("GiB per device"), *(len(work.name) for work in works)])
    lines = [f"{'GiB per device':<{width}}  {_row(_COLUMNS)}"]
    for work, need in zip(works, found, strict=True):
        sizes = (need.model, need.whole_dictionary, need.optimizer, max(need.activations.values()), need.peak)
        cells = [f"{memory.parameters(work.model) / 1e6:,.1f} M", work.dtype, f"{work.model.n_layers}"]
        cells += [f"{size / GIB:.2f}" for size in sizes]
        verdict = "fits" if need.peak <= place.limit else "does not fit"
        lines.append(f"{work.name:<{width}}  {_row(cells)}  in {need.largest}: {verdict}")
    for work in works:
        lines += [f"{work.name}: {line}" for line in memory.replicated(work, place.mesh.shape)]
    return lines


def _row(cells: Sequence[str]) -> str:
    widths = (11, 8, 6, 6, 10, 9, 11, 6)
    return "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def graphs_line(graphs: GraphWork, needs: Mapping[str, Bytes], most: int) -> str:
    """What the attribution graphs take, the limit first."""
    phase = max(needs, key=lambda name: sum(needs[name]))
    count = f"{len(graphs.lengths)} prompts, the longest" if len(graphs.lengths) > 1 else "a prompt"
    return (
        f"attribute/{graphs.unit}: up to about {most:,} tokens fit; {count} of about {graphs.longest:,}, "
        f"{graphs.rows:,} rows in all: {needs[phase].device / GIB:.2f} GiB a device beside the model, "
        f"{needs[phase].host / GIB:.2f} on the host, for {PHASES[phase]}"
    )


def verdict_line(work: Work, program: str, needed: int, fits: bool, place: Place) -> str:
    """What a model needs, by the compiler."""
    sizes = f"{needed / GIB:.2f} of {place.limit / GIB:.2f} GiB per device"
    return f"{work.name}: at the peak ({program}) {sizes}: {'fits' if fits else 'does not fit'}"


def programs_header(work: Work, topology: str) -> str:
    """What the lines of a model's programs mean."""
    return (
        f"{work.name}, compiled for {topology}: memory of a device, what else the stage keeps there included; GFLOP of "
        "all devices by formula (by XLA, of one device, counting the body of a loop once)"
    )


def program_line(program: Program, compiled: Compiled, place: Place) -> str:
    """What a program needs."""
    verdict = "fits" if compiled.fits else f"does not fit into {place.limit / GIB:.2f}"
    counted = "-" if compiled.counted_flops is None else f"{compiled.counted_flops / 1e9:,.1f}"
    return (
        f"  {program.name:<21} {program.size:<44} {compiled.memory / GIB:7.2f} GiB {verdict} "
        f"{program.flops / 1e9:>13,.1f} GFLOP ({counted})  compiled in {compiled.seconds:.0f} s"
    )
