"""The same verdict for every item as lm-evaluation-harness, on SmolLM2 and real items.

The harness runs its own task definitions on local files, builds its own prompts, and runs the model in PyTorch.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from benchmark_rows import DATA, NEEDS_DATA

from saejax.tasks.benchmark_prompts import worked_examples
from saejax.tasks.benchmark_scores import score_items
from saejax.tasks.benchmarks import read_items
from saejax.tasks.settings import TaskConfig

GSM8K_SHOTS, LOGIC_SHOTS = 1, 0
NEW_TOKENS = 128

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200), NEEDS_DATA]


@pytest.fixture(scope="module")
def harness(smollm2):
    """The harness's model: SmolLM2's folder, in PyTorch, fp32."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -c constraints.txt -e '.[judge]'")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(smollm2.source.folder), device="cpu", dtype="float32", batch_size=8)


def judged(harness, folder: Path, definitions: dict) -> dict[str, list[dict]]:
    """What the harness logs for each task, by task; ``definitions`` are changes to its own task files."""
    import lm_eval
    import yaml
    from lm_eval.tasks import TaskManager

    own = Path(lm_eval.__file__).parent / "tasks"
    tasks = folder / "tasks"
    tasks.mkdir()
    for name, (base, docs, changes) in definitions.items():
        lines = folder / f"{name}.jsonl"
        lines.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
        local = dict(data_files=dict(test=str(lines)), cache_dir=str(folder / "cache"))
        definition = dict(include=str(own / base), task=name, dataset_path="json", dataset_name=None)
        definition |= dict(dataset_kwargs=local)
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump(definition | changes))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(harness, tasks=list(definitions), task_manager=manager, bootstrap_iters=0)["samples"]


def test_gsm8k(smollm2, harness, tmp_path):
    task = TaskConfig(benchmarks=("gsm8k",), path=str(DATA), examples=20, shots=GSM8K_SHOTS, batch=10)
    task = dataclasses.replace(task, max_new_tokens=NEW_TOKENS)
    items = read_items("gsm8k", task)
    rows = score_items(smollm2, "gsm8k", items, task)
    docs = [dict(question=item.question, answer=item.solution) for item in items]
    shown = [dict(question=q, answer=a) for q, a in worked_examples()["gsm8k"]]
    changes = dict(training_split=None, fewshot_split=None, num_fewshot=GSM8K_SHOTS)
    changes |= dict(fewshot_config=dict(sampler="first_n", samples=shown))
    until = ["Question:", "</s>", "<|im_end|>"]
    changes |= dict(generation_kwargs=dict(until=until, do_sample=False, temperature=0.0, max_gen_toks=NEW_TOKENS))
    samples = judged(harness, tmp_path, {"local_gsm8k": ("gsm8k/gsm8k.yaml", docs, changes)})["local_gsm8k"]
    same_text = 0
    for rule, name in (("strict", "strict-match"), ("flexible", "flexible-extract")):
        theirs = {sample["doc_id"]: sample for sample in samples if sample["filter"] == name}
        assert len(theirs) == len(rows) == 20
        for number, row in enumerate(rows):
            sample = theirs[number]
            assert sample["arguments"][0][0] == row.prompt
            assert sample["filtered_resps"][0] == (getattr(row, rule).answer or "[invalid]"), row.id
            # The flexible rule compares values where the harness compares text.
            assert sample["exact_match"] <= getattr(row, rule).correct, row.id
            assert rule == "flexible" or sample["exact_match"] == row.strict.correct, row.id
            same_text += sample["resps"][0][0] == row.output
    right = {rule: sum(getattr(row, rule).correct for row in rows) for rule in ("strict", "flexible")}
    print(f"gsm8k: {same_text // 2} of 20 texts are equal to the character; {right} are right")
    # A model of this size may solve none of 20; that it gives answers to judge is what makes this a test.
    assert any(row.strict.answer for row in rows) and any(row.flexible.answer for row in rows)


def test_logic(smollm2, harness, tmp_path):
    task = TaskConfig(benchmarks=("logic",), path=str(DATA), examples=100, shots=LOGIC_SHOTS)
    items = read_items("logic", task)
    rows = score_items(smollm2, "logic", items, task)
    parts, definitions = sorted({item.task for item in items}), {}
    metrics = [dict(metric=metric, aggregation="mean", higher_is_better=True) for metric in ("acc", "acc_norm")]
    for part in parts:
        some = [item for item in items if item.task == part]
        docs = [dict(id=i.id, input=i.question, target=i.answer, options=list(i.choices)) for i in some]
        options = sorted({answer for _, answer in worked_examples()[part]})
        shown = [dict(input=q, target=a, options=options) for q, a in worked_examples()[part]]
        changes = dict(doc_to_choice="{{options}}", num_fewshot=LOGIC_SHOTS, metric_list=metrics)
        changes |= dict(fewshot_config=dict(sampler="first_n", samples=shown))
        definitions[f"local_{part}"] = "leaderboard/bbh_mc/_fewshot_template_yaml", docs, changes
    samples = judged(harness, tmp_path, definitions)
    theirs = {sample["doc"]["id"]: sample for part in samples.values() for sample in part}
    assert len(parts) == 6 and len(theirs) == len(rows) == 100
    errors, gaps = [], []
    for row in rows:
        sample = theirs[row.id]
        assert sample["arguments"][0][0] == row.prompt
        totals = [float(resp[0][0]) for resp in sample["resps"]]
        np.testing.assert_allclose(row.log_likelihoods, totals, rtol=1e-4)
        errors.append(np.abs(np.subtract(row.log_likelihoods, totals)).max())
        gaps.append(np.diff(np.sort(totals)[-2:])[0])
        assert sample["acc"] == row.raw.correct and sample["acc_norm"] == row.normalised.correct, row.id
    print(f"logic: likelihoods differ by at most {max(errors):.1e} nats, the closest two choices by {min(gaps):.1e}")
    assert 0 < sum(row.raw.correct for row in rows) < 100
    assert any(row.raw != row.normalised for row in rows)
