"""A made-up workspace with the files that a report reads. Its numbers mean nothing; no model was run for them."""

import json
import math
import shutil
from pathlib import Path

import numpy as np

from saejax.config import to_json
from saejax.files import write_json
from saejax.interventions.answers import AblateResults, FeatureEffect, ImportanceSummary, VerdictConfig
from saejax.interventions.table import (
    RANKS,
    TEXT,
    EditDefinition,
    EffectsTable,
    PromptDefinition,
    merge_tables,
    save_effects,
)
from saejax.interventions.verdict import verdict
from saejax.page.strips import Example
from saejax.results import Interval
from saejax.results import to_json as results_to_json
from saejax.runner import registry
from saejax.runner.workspace import SUMMARY, Run
from saejax.stages.report.settings import ReportConfig

FEATURES = 512
NAMES = ("agreement", "capital", "greater_than", "addition")
PROMPTS = {
    "agreement": ("The key to the cabinets", " is", " are"),
    "capital": ("The capital of France is the city of", " Paris", " Rome"),
    "greater_than": ("The war lasted from the year 1732 to the year 17", "54", "12"),
    "addition": ("2 + 3 = 5\n4 + 1 = 5\n<b>6 & 2</b> |\n7 + 1 =", " 8", " 9"),
}


def interval(mean: float, half: float) -> dict:
    return dict(mean=mean, low=mean - half, high=mean + half)


def made_up_baseline() -> dict:
    scores = {}
    for (name, (text, correct, wrong)), accuracy in zip(PROMPTS.items(), (0.97, 0.99, 1.0, 0.7), strict=True):
        measured = dict(
            accuracy=dict(mean=accuracy, low=accuracy - 0.1 * (accuracy < 1), high=min(accuracy + 0.06, 1.0)),
            top1=interval(accuracy - 0.2, 0.08),
            logit_diff=interval(6 * accuracy - 3, 0.6),
            separation=interval(2 * accuracy, 0.3),
            counterpart_accuracy=None,
            answer_accuracy=interval(accuracy - 0.1, 0.08),
            log_likelihood=interval(-2.0, 0.5),
        )
        example = dict(text=text, correct=correct, wrong=wrong, logit_diff=3.21)
        splits = dict(train=measured | dict(n=80), test=measured | dict(n=20))
        scores[name] = dict(**splits, flags=[], examples=[example] * 3, p_value=1e-6)
    scores["addition"]["flags"] = ["accuracy 0.70 on test prompts is below 0.80", "separation -0.1 is below 1.00"]
    scores["addition"]["train"]["separation"] = dict(mean=-0.1, low=-1e6, high=1.2)
    return dict(behaviours=scores)


def made_up_member(kind: str, name: str, place: int) -> dict:
    """Scores of a member; those of later places are denser and better."""
    edges = np.linspace(-6, 0, 25)
    counts = (900 * np.exp(-((edges[:-1] + 2.3) ** 2) / 0.8)).astype(int)
    unexplained = (0.14 if kind == "topk" else 0.21) * 0.8**place
    scores = dict(name=name, site="resid_post.15", target="resid_post.15", tokens=24_990, cosine=0.9312)
    scores |= dict(dead_fraction=0.071, dense_fraction=0.0123, ce_recovered_zero=0.993, kl_recovered_mean=0.9876)
    return scores | dict(
        explained_variance=1 - unexplained,
        l0=(32.0 if kind == "topk" else 58.7) * 1.8**place,
        decoder_neighbours=dict(mean=0.33, median=0.31, p90=0.52, p99=0.93, max=0.99, near=0.02),
        ce=dict(clean=3.211, reconstructed=3.268, mean_ablated=9.82, zero_ablated=11.3, tokens=24_000),
        kl=dict(clean=0.0, reconstructed=0.061, mean_ablated=6.1, zero_ablated=8.2),
        ce_recovered_mean=1 - (0.009 if kind == "topk" else 0.015) * 0.7**place,
        kl_recovered_zero=0.9921,
        density_histogram=dict(log10_edges=edges.tolist(), counts=counts.tolist(), never=327),
        sinks=dict(position_0=1017, beyond=41, share_beyond=0.0016, max_norm=1778.0),
    )


def made_up_table(rng, tops: dict[str, list[int]], sets: int) -> EffectsTable:
    """Top features with an effect on two behaviours, random sets without one, placebo sets with up to half of it."""
    prompts = [
        PromptDefinition(f"{name}/{p:02d}", name, f"template {p % 3}", p % 3 == 2, text="Text", correct="A", wrong="B")
        for name in (*NAMES, TEXT)
        for p in range(20)
    ]
    blocks = []

    def add(edit: EditDefinition, on: str = "", **values) -> None:
        some = [prompt for prompt in prompts if prompt.behaviour == (on or edit.behaviour)]
        noisy = {name: value + rng.normal(0, 0.02, (1, 20)) for name, value in values.items()}
        blocks.append(EffectsTable.block([edit], some, noisy))

    add(EditDefinition(TEXT, "clean"), ce=3.0)
    for name in NAMES:
        add(EditDefinition(name, "clean"), logit_diff=4.1, log_prob=-0.5, two_way=0.95, top1=0.8)
    for name, top in tops.items():
        k, strong = len(top), name in ("agreement", "capital")
        lost = 4.3 if strong else 0.0 if name == "greater_than" else -1.5
        shown = [prompt for prompt in prompts if prompt.behaviour == name]
        for fraction in (0.2, 0.4, 0.6, 0.8, 1.0):
            edit = EditDefinition(name, "top", 0, tuple(top), fraction)
            add(edit, logit_diff=4.1 - fraction * lost, change_norm=60 * fraction)
        add(edit, on=TEXT, kl=0.1, ce=3.02)
        add(edit, log_prob=-0.5 - lost / 4, two_way=0.4 if strong else 0.95, top1=0.2 if strong else 0.8)
        for measured in NAMES:
            if measured != name:
                add(edit, on=measured, logit_diff=4.1 - (1.0 if measured == "addition" else 0.05))
        # Other likely tokens, of whose differences the top features take a fifth.
        left = np.array([1.0, 0.8])[:, None] + rng.normal(0, 0.02, (2, 20))
        ranks = {rank: -0.5 * number * left for number, rank in enumerate(RANKS)}
        blocks.append(EffectsTable.block([EditDefinition(name, "clean"), edit], shown, ranks))
        for group, features, largest in (
            ("random", [tuple(range(1000 + k * n, 1000 + k * (n + 1))) for n in range(sets)], 0.1),
            ("placebo", [tuple(top)] * sets, 0.6 * lost),
            ("trained", [tuple(top)], lost),
            ("untrained", [tuple(range(k))] * sets, 0.4 * lost),
        ):
            target = (" lamp", " river") if group == "placebo" else None
            some = [EditDefinition(name, group, n, each, 1.0, target=target) for n, each in enumerate(features)]
            drop_Ex1 = largest * (1.0 if group == "trained" else rng.uniform(0, 1, (len(some), 1)))
            noise_ExPx2 = rng.normal(0, 0.02, (len(some), 20, 2))
            values = dict(logit_diff=4.1 - drop_Ex1 + noise_ExPx2[..., 0], change_norm=60 + noise_ExPx2[..., 1])
            blocks.append(EffectsTable.block(some, shown, values))
        for basis, effect in (("neurons", 0.4), ("pca", 1.0)) if strong else ():
            edit = EditDefinition(name, f"basis:{basis}", 0, (0, 1), 0.8)
            add(edit, logit_diff=4.1 - effect * lost * 0.9, change_norm=60)
    return merge_tables(blocks)


def made_up_ablation(rng, dictionary: str, k: int, sets: int) -> tuple[AblateResults, EffectsTable]:
    """The results of the ablate stage, with the table that its verdict is computed from."""
    tops = {}
    for name in NAMES:
        tops[name] = rng.permutation(FEATURES)[:k].tolist()
        tops[name][1] = 7  # among the top features of every behaviour

    def single(feature, drop):
        fired = dict(firing_rate=float(rng.uniform(0, 0.6)), mean_activation=float(rng.uniform(1, 30)))
        return FeatureEffect(
            feature, attribution=3 * drop / 2.2, drop=Interval(drop, drop - 0.15, drop + 0.15), **fired
        )

    singles = {
        name: tuple(single(feature, 2.2 / rank) for rank, feature in enumerate(features, 1))
        for name, features in tops.items()
    }
    table = made_up_table(rng, tops, sets)
    edit = dict(site="resid_post.15", k=k, replacement="zero", positions="all", error="keep")
    results = AblateResults(
        dictionary=dictionary,
        **edit,
        top=singles,
        verdict=verdict(table, VerdictConfig(resamples=1000)),
        importance={NAMES[0]: ImportanceSummary(900, 40, 0.91, None)},
    )
    return results, table


def write_summary(folder: Path, stage: str, name: str, results: dict, **changes) -> None:
    """The summary of a finished unit."""
    about = dict(schema_version=1, stage=stage, name=name, fingerprint="0" * 16, config={}, inputs={}, files={})
    about |= dict(packages=dict(jax="0.10.2", numpy="2.4.6"), devices=None, seeds=dict(task=42, train=[123]))
    about |= dict(start="2025-01-01T00:00:00+00:00", seconds=12.34)
    write_json(folder / SUMMARY, about | dict(results=results) | changes)


def make_workspace(
    root: Path, kinds=("topk", "standard"), top: int = 20, sets: int = 80, members=("",)
) -> dict[str, Path]:
    """Writes the units' folders; returns them as a report's inputs. Each kind has these members."""
    rng = np.random.default_rng(0)
    tested = f"{kinds[0]}/{members[-1]}".rstrip("/")
    ablation, table = made_up_ablation(rng, tested, top, sets)
    sinks = dict(position_0=1017, beyond=41, share_beyond=0.0016)
    site = dict(rows=9, bytes=9, d=4, median_norm=1.0, largest_norm=2.0, max_norm=10.0, sinks=sinks)
    counts = dict(train=8, held_out=1)
    captured = dict(sites={"resid_post.15": site}, documents=counts, tokens=counts)
    captured |= dict(tokens_per_second=0.0, backend="jax", dtype="float32")
    results = dict(baseline=made_up_baseline(), capture=captured)
    trained = dict(site="resid_post.15", target="resid_post.15", settings=dict(seed=123), final={})
    trained |= dict(input_scale=1.0, output_scale=1.0, dead_fraction=0.0)
    for kind in kinds:
        work = dict(kind=kind, steps=1300, tokens=1_331_200, tokens_per_second=14_021.5, seconds=95.0)
        mesh = dict(devices=1, kinds=["cpu"], axes=dict(member=1, data=1, model=1), processes=1)
        results[f"train/{kind}"] = work | dict(mesh=mesh, members=[dict(name=name, **trained) for name in members])
        scores = [made_up_member(kind, name, place) for place, name in enumerate(members)]
        results[f"evaluate/{kind}"] = dict(kind=kind, members=scores)
    results[f"ablate/{kinds[0]}"] = results_to_json(ablation)
    groups = dict(baseline=("model", "task"), capture=("model", "corpus", "capture"), train=("train",))
    groups |= dict(evaluate=("model", "evaluate"), ablate=("model", "ablate"))
    inputs = {}
    for unit, result in results.items():
        inputs[unit] = root / "inputs" / unit
        inputs[unit].mkdir(parents=True)
        stage, _, name = unit.partition("/")
        config = {group: to_json(registry.all_groups()[group]()) for group in groups[stage]}
        devices = None if unit == "capture" else dict(count=1, kinds=["cpu"], processes=1)
        write_summary(inputs[unit], stage, name, result, config=config, devices=devices)
    save_effects(inputs[f"ablate/{kinds[0]}"], table)
    for kind in kinds:
        lines = [
            dict(step=step, tokens=step * 1024, seconds=step / 10, member=name, loss=1.0, mse=1.0, sparsity=0.0)
            | dict(
                l0=(32.0 if kind == "topk" else 60 + 3000 * math.exp(-step / 100)) * 1.8**place,
                explained_variance=0.87 + 0.02 * place - 0.9 * math.exp(-step / 150),
                learning_rate=1e-3,
            )
            for step in range(20, 1301, 20)
            for place, name in enumerate(members)
        ]
        (inputs[f"train/{kind}"] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        rate = rng.uniform(0, 0.02, FEATURES)
        rate[7] = 0.0
        for folder in (inputs[f"evaluate/{kind}"] / name for name in members):
            folder.mkdir(exist_ok=True)
            np.save(folder / "firing_rate.npy", rate)
            np.save(folder / "mean_activation.npy", rng.uniform(1, 30, FEATURES) * (rate > 0))
    return inputs


def copy_inputs(root: Path, folder: Path) -> dict[str, Path]:
    """Copies the units' folders; returns them as a report's inputs."""
    shutil.copytree(root / "inputs", folder / "inputs")
    summaries = sorted((folder / "inputs").rglob(SUMMARY))
    return {path.parent.relative_to(folder / "inputs").as_posix(): path.parent for path in summaries}


def made_up_contexts(features, count: int) -> dict[int, list[Example]]:
    """Contexts with awkward tokens; feature 7 has none."""
    tokens = (
        "Once", " upon", " <b>", "&amp;", "\n", "\n\n", " *", "|", "key", "s", " to", " the", " cabinets", "\ufffd",
        " ", " the", " end",
    )  # fmt: skip
    examples = {}
    for feature in features:
        examples[feature] = []
        for i in range(count if feature != 7 else 0):
            peak = (feature + 5 * i) % len(tokens)
            values = [max(0.0, 9.0 - i - 2.5 * abs(j - peak)) for j in range(len(tokens))]
            values[0] = math.nan if peak else values[0]
            place = f"document {40 + i} of the corpus, position {11 + peak}"
            examples[feature].append(Example(tokens, tuple(values), peak, place))
    return examples


def make_run(root: Path, inputs: dict[str, Path], **changes) -> Run:
    """A run of the report stage over the inputs, with settings changed."""
    configs = registry.default_configs() | ReportConfig(**changes)
    (root / "report").mkdir()
    return Run("report", "", root / "report", configs, inputs, say=lambda line: None)
