"""A made-up workspace with the files that a report reads. Its numbers mean nothing; no model was run for them."""

import json
import math
from pathlib import Path

import numpy as np

from saejax import registry, settings
from saejax.causal.ablate.importance import Importance
from saejax.causal.results import HalvesAgreement
from saejax.config import to_json
from saejax.files import write_json
from saejax.page.strips import Example
from saejax.results import to_json as results_to_json
from saejax.workspace import SUMMARY, Run

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
    for name, accuracy in zip(NAMES, (0.97, 0.99, 1.0, 0.7), strict=True):
        splits = {
            split: dict(
                n=n,
                accuracy=dict(mean=accuracy, low=accuracy - 0.1 * (accuracy < 1), high=min(accuracy + 0.06, 1.0)),
                top1=interval(accuracy - 0.2, 0.08),
                logit_diff=interval(6 * accuracy - 3, 0.6),
                separation=interval(2 * accuracy, 0.3),
                counterpart_accuracy=None,
            )
            for split, n in (("train", 80), ("test", 20))
        }
        text, correct, wrong = PROMPTS[name]
        example = dict(text=text, correct=correct, wrong=wrong, logit_diff=3.21)
        scores[name] = dict(**splits, flags=[], examples=[example] * 3)
    scores["addition"]["flags"] = ["accuracy 0.70 on test prompts is below 0.80", "separation -0.1 is below 1.00"]
    scores["addition"]["train"]["separation"] = dict(mean=-0.1, low=-1e6, high=1.2)
    return dict(behaviours=scores)


def made_up_member(kind: str, name: str, place: int) -> dict:
    """Scores of a member; those of later places are denser and better."""
    edges = np.linspace(-6, 0, 25)
    counts = (900 * np.exp(-((edges[:-1] + 2.3) ** 2) / 0.8)).astype(int)
    explained_variance = 0.86 if kind == "topk" else 0.79
    return dict(
        name=name,
        site="resid_post.15",
        target="resid_post.15",
        tokens=24_990,
        explained_variance=1 - (1 - explained_variance) * 0.8**place,
        fvu=(1 - explained_variance) * 0.8**place,
        cosine=0.9312,
        l0=(32.0 if kind == "topk" else 58.7) * 1.8**place,
        dead_fraction=0.071,
        dense_fraction=0.0123,
        decoder_neighbours=dict(mean=0.33, median=0.31, p90=0.52, p99=0.93, max=0.99, near=0.02),
        ce=dict(clean=3.211, reconstructed=3.268, mean_ablated=9.82, zero_ablated=11.3, tokens=24_000),
        kl=dict(clean=0.0, reconstructed=0.061, mean_ablated=6.1, zero_ablated=8.2),
        ce_recovered_mean=1 - (0.009 if kind == "topk" else 0.015) * 0.7**place,
        ce_recovered_zero=0.993,
        kl_recovered_mean=0.9876,
        kl_recovered_zero=0.9921,
        density_histogram=dict(log10_edges=edges.tolist(), counts=counts.tolist(), never=327),
        sinks=dict(position_0=1017, beyond=41, share_beyond=0.0016, max_norm=1778.0),
    )


def made_up_effects(name: str, rng, top: int, draws: int) -> dict:
    strong = name in ("agreement", "capital")
    features = rng.permutation(FEATURES)[:top].tolist()
    features[1] = 7  # among the top features of every behaviour
    singles = [
        dict(
            feature=feature,
            attribution=float(3.0 / (i + 1)),
            firing_rate=float(rng.uniform(0, 0.6)),
            mean_activation=float(rng.uniform(1, 30)),
            logit_diff_drop=interval((2.2 if strong else 0.1) / (i + 1), 0.15),
            accuracy_drop=interval(0.05 if strong and i < 2 else 0.0, 0.05),
            control_drop=float(rng.normal(0, 0.02)),
        )
        for i, feature in enumerate(features)
    ]
    singles[-1] |= dict(firing_rate=0.0, mean_activation=0.0, logit_diff_drop=interval(0.0, 0.0), control_drop=None)
    if name == "greater_than":  # a control without any spread
        controls, drop, accuracy_drop = [0.0] * draws, interval(0.05, 0.11), interval(0.0, 0.0)
        accuracy = [0.0] * draws
    else:
        controls = rng.normal(0.1 if strong else -12.1, 0.25, draws).tolist()
        accuracy = (rng.integers(-1, 3, draws) * 0.05).tolist()
        drop = interval(4.3 if strong else -10.9, 0.7)
        accuracy_drop = dict(mean=0.55, low=0.35, high=0.75) if strong else interval(0.05, 0.1)
    if name == "capital":  # a yes whose loss of accuracy could be chance
        accuracy_drop = dict(mean=0.1, low=0.0, high=0.25)
    mean = float(np.mean(controls))
    return dict(
        top=singles,
        rows=120,
        joint=dict(
            n=top,
            firing=top - 1,
            clean_accuracy=0.95,
            ablated_accuracy=0.95 - accuracy_drop["mean"],
            accuracy_drop=accuracy_drop,
            clean_logit_diff=4.1,
            logit_diff_drop=drop,
        ),
        controls=dict(
            draws=draws,
            logit_diff_drop=controls,
            accuracy_drop=accuracy,
            match=dict(firing_rate_ratio=0.97, activation_ratio=None if name == "addition" else 1.04, norm_ratio=1.0),
        ),
        difference={key: value - mean for key, value in drop.items()},
        percentile=1.0 if strong else 0.93,
        grades=made_up_grades(name, strong),
        **(dict(doses=made_up_doses()) if strong else {}),
    )


def made_up_grades(name: str, strong: bool) -> dict:
    harms = (
        "without the 20 features accuracy goes from 95 % to 40 %, a drop of 55.0 points (more than 5)"
        if strong
        else "without the 20 features accuracy goes from 95 % to 90 %, a drop of 5.0 points (not more than 5)"
    )
    said = dict(
        harms=(strong, harms),
        beyond_matched=(strong, "the logit difference falls by 4.19 [3.49, 4.89] more than with matched random sets"),
        beyond_bases=(
            name == "agreement" if strong else None,
            "at equal dose less is lost along those of: neurons" if strong else "no other basis was compared",
        ),
        selective=(False, "Addition suffers, too"),
    )
    highest = "none" if not strong else "beyond_bases" if name == "agreement" else "beyond_matched"
    return {grade: dict(holds=holds, reason=why) for grade, (holds, why) in said.items()} | dict(highest=highest)


def made_up_doses() -> dict:
    curve = dict(size=512, top=[1, 2, 3], sizes=[1, 3], dose=[1.0, 2.5], logit_diff_drop=[0.6, 1.9], kl=[0.01, 0.02])
    apart = dict(reach=2.0, features=1.2, basis=0.7, difference=interval(0.5, 0.2))
    level = dict(reach=2.0, features=1.2, basis=1.1, difference=interval(0.1, 0.2))
    return dict(
        features=curve,
        neurons=curve | dict(by_norm=apart, by_kl=apart),
        components=curve | dict(by_norm=level, by_kl=apart),
        difference=dict(reason="its train prompts have one answer, so there is no difference of means"),
    )


def made_up_importance(rng) -> Importance:
    """Effects of 900 features, of which the first 40 have one."""
    drop_N = np.where(np.arange(900) < 40, rng.uniform(0.1, 1.0, 900), rng.normal(0, 0.01, 900))
    ones_N = np.ones(900)
    return Importance(
        feature=np.arange(900),
        firing_rate=0.1 * ones_N,
        mean_activation=ones_N,
        **{name: drop_N + rng.normal(0, 0.02, 900) for name in settings.ESTIMATES},
        drop=drop_N,
        drop_low=drop_N - 0.02,
        drop_high=drop_N + 0.02,
        accuracy_drop=0 * ones_N,
        effect_size=ones_N,
        p_value=np.where(drop_N > 0.05, 1e-5, 0.5),
        q_value=np.where(drop_N > 0.05, 1e-3, 0.9),
        p_max_t=np.where(drop_N > 0.05, 2e-3, 1.0),
        control_percentile=0.5 * ones_N,
        pearson=np.where(np.arange(900) < 890, rng.uniform(-1, 1, 900), np.nan),
        spearman=rng.uniform(-1, 1, 900),
    )


def made_up_sets(result: dict) -> dict:
    """What is asked for beside the verdict: a curve, a greedy set, the tests of a circuit."""
    sizes = list(range(result["joint"]["n"] + 1))
    left = {"top": [interval(4.1 - 0.25 * size, 0.6) for size in sizes], "controls": [interval(4.0, 0.5)] * len(sizes)}
    answers = dict(
        equivalence="refuted",
        independence="inconclusive",
        minimality="inconclusive",
        sufficiency="shown",
        necessity="shown",
    )
    tests = {
        name: dict(
            statistic=0.85,
            p_value=None if name == "independence" else 0.002,
            p_holm=None if name == "independence" else 0.01 if answer == "shown" else 0.6,
            p_against=0.03 if name in ("equivalence", "independence") else None,
            answer=answer,
        )
        for name, answer in answers.items()
    }
    grown = [interval(0.5 * size, 0.2) for size in (1, 2, 3)]
    return dict(
        curve=dict(
            draws=5, **{kind: dict(sizes=sizes, logit_diff=value, accuracy=value) for kind, value in left.items()}
        ),
        circuit=dict(
            n=len(sizes) - 1, firing=len(sizes) - 2, clean=4.1, kept=3.0, removed=0.2, tests=tests, features=[]
        ),
        greedy=dict(
            features=[3, 1, 2],
            train_drop=[0.5, 1.0, 1.5],
            top=[1, 2, 3],
            greedy_drop=grown,
            top_drop=grown,
            difference=[interval(0.1, 0.2)] * 3,
        ),
    )


def write_summary(folder: Path, stage: str, name: str, results: dict, **changes) -> None:
    """The summary of a finished unit."""
    summary = dict(
        schema_version=1,
        stage=stage,
        name=name,
        fingerprint="0" * 16,
        config={},
        inputs={},
        packages=dict(jax="0.10.2", numpy="2.4.6"),
        devices=None,
        seeds=dict(task=42, train=[123]),
        start="2025-01-01T00:00:00+00:00",
        seconds=12.34,
        results=results,
        files={},
    )
    write_json(folder / SUMMARY, summary | changes)


def make_workspace(
    root: Path, kinds=("topk", "standard"), top: int = 20, draws: int = 100, members=("",)
) -> dict[str, Path]:
    """Writes the units' folders; returns them as a report's inputs. Each kind has these members."""
    rng = np.random.default_rng(0)
    ablate = dict(
        dictionary=f"{kinds[0]}/{members[-1]}".rstrip("/"),
        site="resid_post.15",
        replacement="zero",
        top=top,
        draws=draws,
        rule="Removing the top 20 features together harms a behaviour if accuracy falls by more than 5 points.",
        behaviours={name: made_up_effects(name, rng, top, draws) for name in NAMES},
    )
    sinks = dict(position_0=1017, beyond=41, share_beyond=0.0016)
    site = dict(rows=9, bytes=9, d=4, median_norm=1.0, largest_norm=2.0, max_norm=10.0, sinks=sinks)
    counts = dict(train=8, held_out=1)
    captured = dict(sites={"resid_post.15": site}, documents=counts, tokens=counts)
    results = {
        "baseline": made_up_baseline(),
        "capture": captured | dict(tokens_per_second=0.0, padding_share=0.1),
    }
    trained = dict(site="resid_post.15", target="resid_post.15", settings=dict(seed=123), final={})
    trained |= dict(input_scale=1.0, output_scale=1.0, dead_fraction=0.0)
    for kind in kinds:
        results[f"train/{kind}"] = dict(
            kind=kind,
            steps=1300,
            tokens=1_331_200,
            tokens_per_second=14_021.5,
            seconds=95.0,
            mesh=dict(devices=1, kinds=["cpu"], axes=dict(member=1, data=1, model=1), processes=1),
            members=[dict(name=name, **trained) for name in members],
        )
        results[f"evaluate/{kind}"] = dict(
            kind=kind, members=[made_up_member(kind, name, place) for place, name in enumerate(members)]
        )
    importance = made_up_importance(rng)
    summary = importance.summary(top, HalvesAgreement(0.61, 0.76), least_p=2e-6)
    ablate["behaviours"][NAMES[0]]["importance"] = results_to_json(summary)
    for result in list(ablate["behaviours"].values())[:2]:
        result |= made_up_sets(result)
    results[f"ablate/{kinds[0]}"] = ablate
    groups = dict(
        baseline=("model", "task"),
        capture=("model", "corpus", "capture"),
        train=("train",),
        evaluate=("model", "evaluate"),
        ablate=("model", "ablate"),
    )
    inputs = {}
    for unit, result in results.items():
        inputs[unit] = root / "inputs" / unit
        inputs[unit].mkdir(parents=True)
        config = {group: to_json(registry.GROUPS[group]()) for group in groups[unit.split("/")[0]]}
        devices = None if unit == "capture" else dict(count=1, kinds=["cpu"], processes=1)
        stage, _, name = unit.partition("/")
        write_summary(inputs[unit], stage, name, result, config=config, devices=devices)
    importance.save(Importance.file(inputs[f"ablate/{kinds[0]}"], NAMES[0]))
    for kind in kinds:
        steps = np.arange(20, 1301, 20)
        lines = [
            dict(
                step=int(step),
                tokens=int(step) * 1024,
                seconds=float(step) / 10,
                member=name,
                loss=1.0,
                mse=1.0,
                sparsity=0.0,
                l0=(32.0 if kind == "topk" else 60 + 3000 * math.exp(-step / 100)) * 1.8**place,
                explained_variance=0.87 + 0.02 * place - 0.9 * math.exp(-step / 150),
                learning_rate=1e-3,
            )
            for step in steps
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


def made_up_contexts(features, count: int) -> dict[int, list[Example]]:
    """Contexts with awkward tokens; feature 7 has none."""
    tokens = (
        "Once",
        " upon",
        " <b>",
        "&amp;",
        "\n",
        "\n\n",
        " *",
        "|",
        "key",
        "s",
        " to",
        " the",
        " cabinets",
        "\ufffd",
        " ",
        " the",
        " end",
    )
    examples = {}
    for feature in features:
        examples[feature] = []
        for i in range(count if feature != 7 else 0):
            peak = (feature + 5 * i) % len(tokens)
            values = [max(0.0, 9.0 - i - 2.5 * abs(j - peak)) for j in range(len(tokens))]
            values[0] = math.nan if peak else values[0]
            place = f"document {40 + i} of the corpus, position {11 + peak}"
            examples[feature].append(Example(40 + i, 11 + peak, tokens, tuple(values), peak, place))
    return examples


def make_run(root: Path, inputs: dict[str, Path], **own) -> Run:
    """A run of the report stage over the inputs, with settings of its own."""
    configs = registry.default_configs() | settings.ReportConfig(**own)
    (root / "report").mkdir()
    return Run("report", "", root / "report", configs, inputs, say=lambda line: None)
