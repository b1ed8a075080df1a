"""SynthSAEBench's world and protocol, scaled down: our dictionaries judged by sae-lens' own evaluation, beside our own.

Run: python -m benchmarks.bench_synthsaebench [--scale 8] [--samples 1000000] [--kinds batchtopk] [--width_share 0.25]
A world by the settings of configs/synthsaebench-16k.flags with a scale-th of the features, of the trees and of the L0
aimed at, and as many dimensions as keep L0 over dimensions as it is (--scale 1 is the benchmark itself). It is trained
on by experiments.ground_truth; the best dictionary of each kind is exported and judged by sae-lens on sae-lens' own
samples of the same world, which also says whether both generators agree. Samples a second of both are medians of runs
of one batch in this machine's present state, in processor and in wall seconds. Ends with one line of JSON. sae-lens is
installed into build/saelens at the first run. What is there already is not run again. With --trained DIR, a workdir
of experiments.ground_truth on this very world, nothing is trained and its dictionaries are judged. On two free cores
--scale 8 takes about ten minutes; with --samples 0 only the generators are compared, in a minute.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from scipy.stats import norm

from benchmarks.tool_environments import saelens_python
from saejax.dictionaries import load_dictionary, save_dictionary
from saejax.files import read_json
from saejax.ground_truth.settings import TruthConfig
from saejax.ground_truth.world import HELD_OUT, World, batch_key, make_world, sample

ROOT = Path(__file__).parent.parent
BATCH, REPEATS = 1024, 7
SETTINGS = dict(magnitude_first=5.0, magnitude_last=4.0, factors=25, correlation=0.1, orthogonalise=100)
TRAIN = dict(
    epochs=1,
    batch=1024,
    matmul="bfloat16",
    learning_rate=1e-3,
    auxk=0.03125,
    dead_tokens=100_000,
    log_every=200,
    checkpoint_every=2000,
)


def settings(scale: int, samples: int, held_out: int) -> TruthConfig:
    """Return the world of an n-th of the benchmark."""
    return TruthConfig(
        features=16384 // scale,
        dimensions=DIMENSIONS.get(scale, 768 // scale),
        roots=128 // scale,
        samples=samples,
        held_out=held_out,
        **SETTINGS,
    )


DIMENSIONS = {1: 768, 4: 358, 8: 247, 16: 162}  # true L0 / dimensions as in the benchmark, with whole trees
L0 = {1: 25, 4: 12, 8: 9, 16: 6}  # of the most frequent quarter of the features


def save_world(world: World, file: Path) -> None:
    """Return what sae-lens needs to draw from it."""
    arrays = {
        field.name: np.asarray(getattr(world, field.name))
        for field in dataclasses.fields(world)
        if field.name not in ("roots", "branching", "depth", "noise")
    }
    np.savez(file, rate_J=norm.sf(arrays.pop("threshold_J")).astype(np.float32), parent_J=world.parent_J, **arrays)


def our_generator(world: World, seed: int, count: int) -> tuple[dict[str, float], np.ndarray, tuple[float, float]]:
    """Return L0 and mean square of our samples, firing rates of features, and processor and wall seconds of a batch."""

    @jax.jit
    def sums(x_BxD: jax.Array, code_BxJ: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (code_BxJ > 0).sum(0), (x_BxD**2).sum()

    seconds, fired_J, square = [], np.zeros(len(world.mean_J)), 0.0
    for number in range(max(count // BATCH, REPEATS + 1)):
        key = batch_key(seed, HELD_OUT, np.int32(number))
        start = time.process_time(), time.perf_counter()
        jax.block_until_ready(sample(world, key, BATCH))
        seconds.append((time.process_time() - start[0], time.perf_counter() - start[1]))
        fires_J, squares = sums(*sample(world, key, BATCH))
        fired_J, square = fired_J + np.asarray(fires_J), square + float(squares)
    seen = len(seconds) * BATCH
    processor, wall = (statistics.median(column) for column in zip(*seconds[1:], strict=True))
    return dict(l0=float(fired_J.sum() / seen), square=square / seen), fired_J / seen, (processor, wall)


def train(args: argparse.Namespace, truth: TruthConfig) -> None:
    """Train dictionaries of all kinds with ``experiments.ground_truth``."""
    flag_values = {f"truth.{field.name}": getattr(truth, field.name) for field in dataclasses.fields(truth)}
    flag_values |= {f"train.{name}": value for name, value in TRAIN.items()}
    expansion = max(round(args.width_share * truth.features / truth.dimensions), 1)
    flag_values |= {
        "train.kinds": args.kinds,
        "train.k": L0.get(args.scale, 25 // args.scale),
        "train.expansion": expansion,
    }
    flags = [f"--{name}={value}" for name, value in flag_values.items()]
    command = [sys.executable, "-m", "experiments.ground_truth", f"--workdir={args.folder}"]
    for kind in args.kinds.split(","):
        subprocess.run([*command, f"--unit=ground_truth/{kind}", *flags, *args.more], cwd=ROOT, check=True)


def run_saelens(args: argparse.Namespace, folder: str) -> dict:
    """Return sae-lens' figures of the world, and of the dictionary exported to ``folder`` unless it is empty."""
    script = str(Path(__file__).with_name("synthsaebench_saelens.py"))
    python = args.saelens or saelens_python()
    command = [python, "-W", "ignore", script, str(args.folder / "world.npz"), folder, str(args.held_out), str(BATCH)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def judge(args: argparse.Namespace, kind: str) -> tuple[dict, dict]:
    """Return sae-lens' scores of the dictionary of a kind, and ours."""
    (scores,) = ((args.trained or args.folder) / "ground_truth" / kind).glob("**/scores.json")
    dictionary = load_dictionary(scores.parent / "dictionary")
    dictionary.config = dataclasses.replace(dictionary.config, site="resid_post.0")  # a name that sae-lens knows
    folder = args.folder / "exported" / kind
    if args.trained:
        shutil.rmtree(folder, ignore_errors=True)  # of another dictionary, perhaps
    if not folder.exists():
        save_dictionary(folder, dictionary, "saelens")
    return run_saelens(args, str(folder)), read_json(scores)


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=8, help="what the benchmark is divided by: 1, 4, 8 or 16")
    parser.add_argument("--samples", type=int, default=1_000_000, help="to train on; 0: only compare generators")
    parser.add_argument("--held_out", type=int, default=50_000, help="samples that judge")
    parser.add_argument("--kinds", default="batchtopk", help="of dictionary, the kinds of experiments.ground_truth")
    parser.add_argument("--width_share", type=float, default=0.25, help="features of a dictionary, over the world's")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench_synthsaebench")
    parser.add_argument("--trained", type=Path, default=None, help="a workdir whose dictionaries are judged")
    parser.add_argument("--saelens", default="", help="an interpreter that has sae-lens; empty: one is installed")
    parser.add_argument("more", nargs="*", help="further flags of experiments.ground_truth, after --")
    args = parser.parse_args()
    args.folder = args.folder.absolute()
    args.folder.mkdir(parents=True, exist_ok=True)
    truth = settings(args.scale, max(args.samples, 1), args.held_out)
    world = make_world(truth)
    save_world(world, args.folder / "world.npz")
    ours, rate_J, ours_seconds = our_generator(world, truth.seed, args.held_out)
    line: dict[str, dict] = {}
    if not args.samples:
        line["generators"] = compared(args, run_saelens(args, ""), ours, rate_J, ours_seconds)
    else:
        if not args.trained:
            train(args, truth)
        for kind in args.kinds.split(","):
            theirs, our_scores = judge(args, kind)
            line[kind] = scored(kind, theirs["judged"], our_scores) | compared(args, theirs, ours, rate_J, ours_seconds)
    print(json.dumps(dict(bench="synthsaebench", scale=args.scale, samples=args.samples, kinds=line)))


def scored(label: str, judged: dict, our_scores: dict) -> dict:
    """Print sae-lens' scores of a dictionary and ours, and return sae-lens'."""
    print(
        f"{label} sae-lens: F1 {judged['classification']['f1_score']:.4f}, MCC {judged['mcc']:.4f}, uniqueness "
        f"{judged['uniqueness']:.3f}, L0 {judged['sae_l0']:.2f}, explained variance "
        f"{judged['explained_variance']:.4f}, dead {judged['dead_latents']}\n"
        f"{label} ours:     F1 {our_scores['f1_features']:.4f}, MCC {our_scores['mcc']:.4f}, uniqueness "
        f"{our_scores['uniqueness']:.3f}, L0 {our_scores['l0']:.2f}, explained variance "
        f"{our_scores['explained_variance']:.4f}"
    )
    f1, mcc, l0 = judged["classification"]["f1_score"], judged["mcc"], judged["sae_l0"]
    return dict(f1=round(f1, 4), mcc=round(mcc, 4), l0=round(l0, 2))


def compared(
    args: argparse.Namespace, theirs: dict, ours: dict, rate_J: np.ndarray, seconds: tuple[float, float]
) -> dict:
    """Print how the two generators draw, and how fast."""
    rates = np.stack([rate_J, theirs["world"]["rate_J"]])
    error_J = np.sqrt(rates.mean(0) * (1 - rates.mean(0)) * 2 / args.held_out)
    apart = np.abs(rates[0] - rates[1]) / np.maximum(error_J, 1e-12)
    print(
        f"samples: true L0 {theirs['world']['l0']:.3f} theirs, {ours['l0']:.3f} ours; mean square "
        f"{theirs['world']['square']:.2f}, {ours['square']:.2f}; of the features' rates {np.mean(apart > 3):.2%} "
        f"are more than three standard errors apart; samples a second {BATCH / theirs['wall']:,.0f} theirs, "
        f"{BATCH / seconds[1]:,.0f} ours; processor seconds for 1,024: {theirs['processor']:.4f}, {seconds[0]:.4f}"
    )
    return dict(
        faster=round(theirs["wall"] / seconds[1], 2),
        fewer_processor_seconds=round(theirs["processor"] / seconds[0], 2),
    )


if __name__ == "__main__":
    main()
