"""Held-out explained variance of dictionaries at equal sparsity: ours and sae-lens', on one real store.

Run: python -m benchmarks.bench_quality --text FILE [--text FILE ...] [--kinds standard,topk]
Captures SmolLM2's residual stream (layer 15) on equal parts of the texts, then trains dictionaries 8 times as wide on
the same tokens, as often: sae-lens' own trainer at three sparsities (the middle one at both learning rates, the better
of which the others take), and ours through experiments.train, a stack of three. Where sae-lens cannot be told its L0,
ours is aimed at what it reached. Held-out explained variance at sae-lens' L0 is read off the line between our points
(logarithm of L0). Prints a table and, last, one line of JSON; frontier.png is in the folder. Whatever is there already
is not run again. Texts: .jsonl or .jsonl.gz with "text", or "question" and "answer". About two hours on two cores.
"""

import argparse
import gzip
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.tool_environments import saelens_python
from saejax.activations.store import Store
from saejax.dictionaries import Dictionary, load_dictionary
from saejax.evaluation.reconstruction import Reconstruction, reconstruct
from saejax.files import read_json, write_json
from saejax.page import style
from saejax.parallel.mesh import make_mesh
from saejax.runner import stacks

ROOT = Path(__file__).parent.parent
SITE, FEATURES, BATCH, EPOCHS = "resid_post.15", 4608, 1024, 4
# sae-lens' three sparsities, the middle one first.
THEIRS: dict[str, tuple[str, Sequence[float]]] = dict(
    topk=("k", (32, 16, 64)),
    batchtopk=("k", (32, 16, 64)),
    standard=("l1", (2.0, 4.0, 1.0)),
    jumprelu=("l0_coefficient", (0.5, 1.0, 0.25)),
)
OURS = {
    "topk": dict(k="16,32,64", auxk=0.03125, learning_rate=1.5e-3, dead_tokens=50_000),
    "batchtopk": dict(k="16,32,64", auxk=0.03125, dead_tokens=100_000),
    "standard": dict(l1="0.25,0.5,1"),
    "jumprelu": dict(jumprelu__l0_penalty="target", jumprelu__l0_coefficient=200),
}
# Of ours: the precision of sae-lens' autocast, and a learning rate found on topk with k 64 (1e-3 gave 0.891, 2e-3
# 0.898, 3e-3 0.899 with 7 % dead features; with k 16, 2e-3 left 23 % dead, hence less for topk). The coefficients of
# standard and JumpReLU dictionaries were found here too.
TRAIN = dict(sites=SITE, expansion=8, batch=BATCH, epochs=EPOCHS, matmul="bfloat16", learning_rate=2e-3, warmup=50)


def passages(path: Path) -> Iterator[str]:
    """Return the texts of a file, cut after paragraphs into pieces of about a thousand characters."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for line in lines:
            item, piece = json.loads(line), ""
            for paragraph in (item.get("text") or f"{item['question']}\n{item['answer']}").split("\n\n"):
                piece = f"{piece}\n\n{paragraph}" if piece else paragraph
                if len(piece) > 1000:
                    yield piece
                    piece = ""
            if piece:
                yield piece


def write_text(paths: Sequence[Path], target: Path, characters: int) -> None:
    """Write a corpus of about ``characters`` characters of each file."""
    with target.open("w") as out:
        for path in paths:
            written = 0
            for text in passages(path):
                out.write(json.dumps(dict(text=text)) + "\n")
                written += len(text)
                if written >= characters:
                    break


def run_stage(stage: str, args: argparse.Namespace, **flags: object) -> None:
    """Run ``experiments.<stage>`` in the folder of the benchmark."""
    settings = dict(model__path="smollm2", corpus__path=args.folder / "text.jsonl", corpus__max_tokens=args.tokens)
    settings |= dict(
        corpus__held_out=args.held_out, task__behaviours="", capture__sites=SITE, capture__dtype="bfloat16"
    )
    named = [f"--{name.replace('__', '.')}={value}" for name, value in (settings | flags).items()]
    subprocess.run(
        [sys.executable, "-m", f"experiments.{stage}", f"--workdir={args.folder / 'run'}", *named], cwd=ROOT, check=True
    )


def check_same(args: argparse.Namespace) -> None:
    """End the program unless the folder's dictionaries were trained on the same activations."""
    recorded, used = args.folder / "activations.json", read_json(args.folder / "run" / "capture" / "done.json")
    if not recorded.exists():
        write_json(recorded, used["fingerprint"])
    if read_json(recorded) != used["fingerprint"]:
        raise SystemExit(f"{args.folder} holds dictionaries trained on other activations: name another --folder")


def train_theirs(kind: str, value: float, rate: float, rows: Path, args: argparse.Namespace) -> Path:
    """Return the folder of sae-lens' dictionary, trained now unless it is there."""
    name = THEIRS[kind][0]
    folder = args.folder / "saelens" / f"{kind}-{name}{value:g}-lr{rate:g}"
    if not (folder / "cfg.json").exists():
        tokens = len(np.load(rows, mmap_mode="r")) * EPOCHS // BATCH * BATCH
        settings = dict(kind=kind, features=FEATURES, batch=BATCH, tokens=tokens, lr=rate, seed=0)
        settings |= {name: value, "hook": "blocks.15.hook_resid_post"}
        script = str(Path(__file__).with_name("bench_quality_saelens.py"))
        python = args.saelens or saelens_python()
        subprocess.run([python, "-W", "ignore", script, str(rows), str(folder), json.dumps(settings)], check=True)
    return folder


def score(dictionary: Dictionary, store: Store) -> dict[str, float]:
    """Return the held-out scores of a dictionary."""
    rows = store.rows("held_out", SITE)
    blocks = ([store.read(SITE, rows[start : start + 4096])] for start in range(0, len(rows), 4096))
    scores: Reconstruction = reconstruct([dictionary], blocks, make_mesh())[0]
    return dict(
        l0=scores.l0, explained_variance=scores.explained_variance, dead=scores.dead_fraction, tokens=scores.tokens
    )


def measure_theirs(kind: str, store: Store, rows: Path, args: argparse.Namespace) -> list[dict]:
    """Return sae-lens' scores at three sparsities, with the learning rate that is best at the middle one."""
    middle, *remaining = THEIRS[kind][1]

    def measure(value: float, rate: float) -> dict:
        folder = train_theirs(kind, value, rate, rows, args)
        return dict(setting=value, rate=rate) | score(load_dictionary(folder), store)

    tried = [measure(middle, float(rate)) for rate in args.rates.split(",")]
    best = max(tried, key=lambda scores: scores["explained_variance"])
    for result in tried:
        print(f"{kind}: sae-lens at {result['rate']:g}: {result['explained_variance']:.4f} at L0 {result['l0']:.1f}")
    return sorted([best, *(measure(value, best["rate"]) for value in remaining)], key=lambda scores: scores["l0"])


def measure_ours(kind: str, theirs: Sequence[dict], store: Store, args: argparse.Namespace) -> list[dict]:
    """Return the scores of our stack, by rising L0."""
    targets = ",".join(f"{scores['l0']:.1f}" for scores in theirs)
    flags = TRAIN | OURS[kind] | (dict(jumprelu__target_l0=targets) if kind == "jumprelu" else {})
    run_stage("train", args, train__kinds=kind, **{f"train__{name}": value for name, value in flags.items()})
    trained = args.folder / "run" / "train" / kind
    members = stacks.members(trained)
    results = [dict(setting=member.name) | score(load_dictionary(trained / member.name), store) for member in members]
    return sorted(results, key=lambda scores: scores["l0"])


def at_l0(ours: Sequence[dict], l0: float) -> float:
    """Return explained variance at an L0: linear in log L0 through the two nearest points."""
    place = np.log([scores["l0"] for scores in ours])
    value = [scores["explained_variance"] for scores in ours]
    left = int(np.clip(np.searchsorted(place, np.log(l0)) - 1, 0, len(ours) - 2))
    slope = (value[left + 1] - value[left]) / (place[left + 1] - place[left])
    return float(value[left] + slope * (np.log(l0) - place[left]))


@style.styled
def frontiers(measured: Mapping[str, Mapping]) -> Figure:
    """Return a figure of held-out explained variance against L0, ours and sae-lens', a panel per kind."""
    figure, below = style.panels([1.9] * len(measured), [f"{kind}: held-out explained variance" for kind in measured])
    for axes, sides in zip(below, measured.values(), strict=True):
        for name, (color, line, marker) in zip(("ours", "saelens"), style.LINES, strict=False):
            l0, value = ([scores[key] for scores in sides[name]] for key in ("l0", "explained_variance"))
            axes.plot(l0, value, color=color, linestyle=line, marker=marker, label=name.replace("lens", "-lens"))
        axes.set_xscale("log")
        axes.set_xlim(*style.log_limits([scores["l0"] for side in ("ours", "saelens") for scores in sides[side]]))
        style.plain_log(axes.xaxis)
        axes.grid(color=style.INK, alpha=0.13, linewidth=0.7)
    below[-1].set_xlabel("features active per token (L0)")
    style.legend(below[-1], 2)
    return figure


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text",
        type=Path,
        action="append",
        required=True,
        help="a .jsonl or .jsonl.gz file with 'text', or 'question' and 'answer'; several are taken in equal parts",
    )
    parser.add_argument("--kinds", default=",".join(THEIRS), help="which to compare")
    parser.add_argument("--rates", default="1e-3,3e-4", help="sae-lens' learning rates, of which it gets the best")
    parser.add_argument("--tokens", type=int, default=322_000, help="tokens captured")
    parser.add_argument("--held_out", type=float, default=0.17, help="share of the passages that is held out")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench_quality")
    parser.add_argument("--saelens", default="", help="an interpreter that has sae-lens; empty: one is installed")
    args = parser.parse_args()
    args.folder = args.folder.absolute()
    args.folder.mkdir(parents=True, exist_ok=True)
    write_text(args.text, args.folder / "text.jsonl", 5 * args.tokens // len(args.text))
    run_stage("capture", args)
    store = Store.open(args.folder / "run" / "capture")
    check_same(args)
    train_rows, rows = store.rows("train", SITE), args.folder / "rows.npy"
    if not rows.exists():
        np.save(rows, store.read(SITE, train_rows).astype(np.float32))
    print(f"{len(train_rows):,} training rows, {EPOCHS} epochs", flush=True)
    line: dict[str, dict] = {}
    for kind in args.kinds.split(","):
        theirs = measure_theirs(kind, store, rows, args)
        ours = measure_ours(kind, theirs, store, args)
        margins = [at_l0(ours, scores["l0"]) - scores["explained_variance"] for scores in theirs]
        write_json(args.folder / f"{kind}.json", dict(ours=ours, saelens=theirs, margins=margins))
        for scores, margin in zip(theirs, margins, strict=True):
            print(
                f"{kind:10} L0 {scores['l0']:6.1f}: sae-lens {scores['explained_variance']:.4f} (rate "
                f"{scores['rate']:g}, dead {scores['dead']:.1%}), ours {margin:+.4f}"
            )
        for scores in ours:
            print(
                f"{kind:10} ours {scores['setting']}: {scores['explained_variance']:.4f} at L0 {scores['l0']:.1f}, "
                f"dead {scores['dead']:.1%} of {FEATURES:,} on {scores['tokens']:,} tokens",
                flush=True,
            )
        line[kind] = dict(worst_margin=round(min(margins), 4), dead=round(max(scores["dead"] for scores in ours), 3))
    measured = {kind: read_json(args.folder / f"{kind}.json") for kind in args.kinds.split(",")}
    style.save(frontiers(measured), args.folder, "frontier")
    print(json.dumps(dict(bench="quality", kinds=line)))


if __name__ == "__main__":
    main()
