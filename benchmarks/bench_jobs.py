"""Memory of a dictionary for each of Qwen3-4B's layers, from text to report, on machines not at hand.

Run: python -m benchmarks.bench_jobs [--jobs node,nodes,slice] [--config FILE]
The file's stages go through `experiments.preflight`, which compiles every program for one node of eight H100, for four
nodes, and for a v5e slice of 64 chips (needs libtpu), with the flags that docs/scaling.md advises. The table says of
each program what a device holds. Ends with status 1 if a program does not fit. Last, one
line of JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from saejax.preflight.results import CompiledProgram, PreflightResults
from saejax.runner.results import load_results

ROOT = Path(__file__).parents[1]
JOBS = {
    "node": ("h100:8", ["--mesh.member=4"]),
    "nodes": ("h100:4x8", ["--mesh.member=4", "--capture.batch_tokens=1024"]),
    "slice": (
        "v5e:8x8",
        ["--mesh.member=4", "--mesh.model=2", "--train.zero_optimizer", "--capture.batch_tokens=1024"],
    ),
}


def programs(config: Path, job: str) -> PreflightResults:
    """Return what preflight says of a job."""
    topology, flags = JOBS[job]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "experiments.preflight", f"--workdir={folder}", f"--flagfile={config}"]
        # Programs do not depend on the text, whose hub may be out of reach.
        command += [f"--preflight.topology={topology}", "--corpus.path=", "--nocorpus.stream", *flags]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{job}: {done.stderr.strip().splitlines()[-1]}")
        results = load_results(Path(folder) / "preflight")
    assert isinstance(results, PreflightResults)
    return results


def row(program: CompiledProgram) -> str:
    """Return a line of the table."""
    return f"| {program.name} | {program.size} | {program.memory / 2**30:.2f} | {program.flops / 1e12:,.1f} |"


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default=",".join(JOBS), help="with commas between")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/large/qwen3-4b-every-layer.flags")
    args = parser.parse_args()
    summary = {}
    for job in args.jobs.split(","):
        results = programs(args.config, job)
        (needs,) = results.models
        axes = " x ".join(f"{size} {axis}" for axis, size in results.mesh.axes.items())
        limit = results.limit_bytes / 2**30
        print(f"\n{results.topology}: {axes}; {needs.peak_bytes / 2**30:.1f} of {limit:.1f} GiB\n")
        print("| program | size | GiB a device | TFLOP |\n|---|---|---|---|")
        print("\n".join(map(row, needs.programs)), flush=True)
        summary[job] = dict(fits=needs.fits, gib=round(needs.peak_bytes / 2**30, 2), programs=len(needs.programs))
    print(json.dumps(dict(bench="jobs", **summary)))
    sys.exit(0 if all(job["fits"] for job in summary.values()) else 1)


if __name__ == "__main__":
    main()
