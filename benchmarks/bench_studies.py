"""Memory and time of the studies' configs on GPUs and TPUs that are not there: does every program of every stage fit?

Run: python -m benchmarks.bench_studies [--configs FILE ...] [--topologies h100:1,h100:4,h100:8,v5e:2x4]
Each file of configs/ that names a model's shape goes through `experiments.preflight`, which compiles its programs for
each topology; the `model` axis is as small as fits, and the other devices are on `data`. The table says the peak of a
device, in GiB and in which program, and the floor of all stages: their operations by formula at full bfloat16 rate of
all devices. TPUs need libtpu, and are left out without it. Prints a table in Markdown and, last, one line of JSON.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.bench_scaling import HARDWARE
from saejax.preflight.results import PreflightResults
from saejax.runner.results import load_results

CONFIGS = Path(__file__).parents[1] / "configs"
TOPOLOGIES = "h100:1,h100:4,h100:8,v5e:2x4"


class Fitted(NamedTuple):
    """The smallest mesh on which a config fits a topology."""

    model: int  # size of the mesh's model axis
    peak: float  # GiB of a device
    program: str  # that takes it
    hours: float  # at least


def study_configs() -> list[Path]:
    """Return the configs that name the shape of a real model, or change a file that does."""

    def lines(path: Path) -> list[str]:
        return path.read_text().splitlines()

    def names_a_shape(path: Path) -> bool:
        included = [line.partition("=")[2] for line in lines(path) if line.startswith("--flagfile=")]
        has_models = any(line.startswith("--preflight.models=") for line in lines(path))
        return has_models or any(names_a_shape(CONFIGS.parent / file) for file in included)

    return [path for path in sorted(CONFIGS.glob("*.flags")) if names_a_shape(path)]


def devices(topology: str) -> int:
    """Return the number of devices of a topology: 8 for "h100:8" or "v5e:2x4"."""
    count = 1
    for part in topology.partition(":")[2].split("x"):
        count *= int(part)
    return count


def fitted(config: Path, topology: str) -> Fitted | str:
    """Return the smallest model axis with which everything fits; or the error of the largest."""
    model, why = 1, ""
    while model <= devices(topology):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "experiments.preflight", f"--workdir={folder}", f"--flagfile={config}"]
            command += [f"--preflight.topology={topology}", f"--mesh.model={model}"]
            done = subprocess.run(
                command, cwd=CONFIGS.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            if done.returncode == 0:
                results = load_results(Path(folder) / "preflight")
                assert isinstance(results, PreflightResults)
                return _fit(results, topology, model)
            why = done.stderr.strip().splitlines()[-1]
        model *= 2
    return why


def _fit(results: PreflightResults, topology: str, model: int) -> Fitted:
    (needs,) = results.models
    rate = HARDWARE[topology.partition(":")[0]].flops * devices(topology)
    flops = sum(program.runs * program.flops for program in needs.programs)
    largest = max(needs.programs, key=lambda program: program.memory)
    return Fitted(model, needs.peak_bytes / 2**30, largest.name, flops / rate / 3600)


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="*", type=Path, default=study_configs())
    parser.add_argument("--topologies", default=TOPOLOGIES)
    args = parser.parse_args()
    topologies = [
        name
        for name in args.topologies.split(",")
        if name.startswith("h100") or importlib.util.find_spec("libtpu") is not None
    ]
    print(f"| config | {' | '.join(topologies)} |")
    print(f"|---|{'---|' * len(topologies)}", flush=True)
    fits: dict[str, dict[str, bool]] = {}
    for config in args.configs:
        cells = []
        for topology in topologies:
            result = fitted(config, topology)
            fits.setdefault(config.stem, {})[topology] = not isinstance(result, str)
            cells.append(
                result
                if isinstance(result, str)
                else f"{result.peak:.1f} ({result.program}), model {result.model}, {result.hours:.2g} h"
            )
        print(f"| {config.stem} | {' | '.join(cells)} |", flush=True)
    print(json.dumps(dict(bench="studies", fits=fits)))


if __name__ == "__main__":
    main()
