"""Effects of harder worlds and worse dictionaries on true and false discoveries, for all kinds.

Run: python -m benchmarks.bench_truth [--kinds topk,batchtopk]
     python -m benchmarks.bench_truth --worlds large --kinds topk,batchtopk,matryoshka,jumprelu,gated,standard
Worlds of 256 features in 64 dimensions, one thing made harder at a time, and then dictionaries made worse on the plain
one; each trained and judged by experiments.ground_truth, three seeds as a stack, beside a random decoder that stays.
The world "large" is four times that of configs/ground_truth.flags (1,024 features, 256 dimensions, a million vectors),
one seed, half a minute to a minute of processors for each kind. Prints a table with 95 % t intervals over seeds and,
last, one line of JSON. What is in the folder is not run again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from saejax import load_results
from saejax.ground_truth.results import JudgedDictionary, TruthResults
from saejax.ground_truth.settings import CONTROLS

ROOT = Path(__file__).parent.parent
BASE = {
    "truth.features": 256,
    "truth.dimensions": 64,
    "truth.samples": 100_000,
    "truth.held_out": 20_000,
    "truth.roots": 0,
    "truth.correlation": 0,
    "truth.rates": "0.1,2e-3",
    "train.expansion": 4,
    "train.k": 3,
    "train.batch": 512,
    "train.epochs": 4,
    "train.learning_rate": 3e-3,
    "train.auxk": 0.03,
    "train.dead_tokens": 100_000,
    "train.warmup": 39,
    "train.seed": "0,1,2",
    "train.log_every": 1000,
}
WORLDS: dict[str, dict[str, object]] = {
    "plain": {},
    "correlated (loadings 0.1)": {"truth.correlation": 0.1},
    "strongly correlated (0.3)": {"truth.correlation": 0.3, "truth.factors": 5},
    "trees, siblings exclusive": {"truth.roots": 3, "truth.rates": "0.3,2e-3", "train.k": 4},
    "noise of 0.25": {"truth.noise": 0.25},
    "noise of 0.5": {"truth.noise": 0.5},
    "8 at a time": {"truth.rates": "0.4,5e-3", "train.k": 8},
    "in 32 dimensions": {"truth.dimensions": 32, "train.expansion": 8},
    "plain, k of 1": {"train.k": 1},
    "plain, k of 12": {"train.k": 12},
    "plain, a quarter of the features": {"train.expansion": 1},
    "plain, four times the features": {"train.expansion": 16},
    "plain, 100 steps": {"train.max_steps": 100},
    "plain, 400 steps": {"train.max_steps": 400},
    "large": {
        "flagfile": "configs/ground_truth.flags",
        "truth.features": 1024,
        "truth.dimensions": 256,
        "truth.samples": 1_000_000,
        "truth.rates": "0.1,5e-4",
        "train.expansion": 4,
        "train.learning_rate": 6e-3,
        "train.dead_tokens": 12_000,
    },
}
# Of kinds for which the usual settings are poor, as found on the world of configs/ground_truth.flags.
OWN: dict[str, dict[str, object]] = {
    "standard": {"train.l1": 1},
    "gated": {"train.l1": 4},
    "jumprelu": {
        "train.jumprelu.l0_coefficient": 64,
        "train.jumprelu.bandwidth": 2,
        "train.jumprelu.initial_threshold": 1,
    },
}
SCORES = ("recovered", "f1", "invented", "merged", "split", "absorbed", "mcc")


def judge_world(
    args: argparse.Namespace, number: int, changes: dict[str, object]
) -> list[tuple[str, JudgedDictionary]]:
    """Train on a world; return the scored dictionaries of every kind, and the controls of the first kind."""
    workdir = args.folder / str(number)
    kinds = args.kinds.split(",")
    dictionaries: list[tuple[str, JudgedDictionary]] = []
    for unit in (*kinds, CONTROLS):
        kind = kinds[0] if unit == CONTROLS else unit
        flag_values = (changes if "flagfile" in changes else BASE | changes) | {"train.kinds": kind} | OWN.get(kind, {})
        flags = [f"--{name}={value}" for name, value in flag_values.items()]
        command = [sys.executable, "-m", "experiments.ground_truth", f"--workdir={workdir}", *flags]
        subprocess.run([*command, f"--unit=ground_truth/{unit}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        results = load_results(workdir / "ground_truth" / unit)
        assert isinstance(results, TruthResults)
        dictionaries += [(dictionary.control or unit, dictionary) for dictionary in results.dictionaries]
    return dictionaries


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default="topk", help="of dictionary")
    parser.add_argument(
        "--worlds", default="", help=f"some of: {'; '.join(WORLDS)} (separated by ;); empty: all but the last"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench_truth")
    args = parser.parse_args()
    line: dict[str, dict[str, dict[str, float]]] = {}
    print("".join(f"{heading:<34}" if not place else f"{heading:>22}" for place, heading in enumerate(("", *SCORES))))
    worlds = [name.strip() for name in args.worlds.split(";")] if args.worlds else [*WORLDS][:-1]
    if unknown := set(worlds) - set(WORLDS):
        parser.error(f"--worlds names {', '.join(sorted(unknown))}: expected some of {'; '.join(WORLDS)}")
    for number, (name, changes) in enumerate(WORLDS.items()):
        if name not in worlds:
            continue
        print(name, flush=True)
        for kind, dictionary in judge_world(args, number, changes):
            scores = {score: getattr(dictionary.scores, score) for score in SCORES}
            shown = (f"{s.mean:.3f}" + f" [{s.low:.3f}, {s.high:.3f}]" * (s.low < s.high) for s in scores.values())
            print("".join([f"  {kind:<32}", *(f"{cell:>22}" for cell in shown)]), flush=True)
            line.setdefault(name, {})[kind] = {score: round(value.mean, 3) for score, value in scores.items()}
    print(json.dumps(dict(bench="truth", worlds=line)))


if __name__ == "__main__":
    main()
