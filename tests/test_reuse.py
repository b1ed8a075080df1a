"""Which units a changed flag makes and which it reuses; docs/your_model.md shows the table."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import runs
from torch_sites import relative_error

from saejax import versions
from saejax.attribution.settings import GraphConfig
from saejax.config import counted
from saejax.files import file_sha256
from saejax.runner import command, command_line
from saejax.runner.registry import all_stages
from saejax.runner.workplan import Workplan
from saejax.stages.attribute import requests
from saejax.stages.attribute.traces import trace_key

READ = ["baseline", "benchmark", "capture", "train", "evaluate", "ablate", "probe", "interpret", "report"]


def plan_of(inputs, tmp_path, **changes) -> Workplan:
    flags = runs.small_flags(*inputs, tmp_path / "run", **dict(interpret__dictionaries="topk") | changes)
    return Workplan(command_line.read_configs(command_line.stage_flags(), ["program", *flags]))


def marks(inputs, tmp_path, **changes) -> dict[str, str]:
    """The hashes of all units of a small configuration."""
    plan = plan_of(inputs, tmp_path, **changes)
    return {unit: plan.fingerprint(unit) for stage in READ for unit in all_stages()[stage].units(plan.configs)}


DICTIONARIES = {"train/topk", "train/standard"}
AFTER_TRAINING = {"evaluate/topk", "evaluate/standard", "interpret/topk", "ablate/topk", "report"}
OF_TOPK = {"train/topk", "evaluate/topk", "interpret/topk", "ablate/topk", "report"}
PROMPTS = {"baseline", "ablate/topk", "report"}


# Statement 3 of WORKSPACE.md, what must hold.
@pytest.mark.parametrize(
    ("changes", "units"),
    [
        (dict(train__k="8,16", ablate__dictionary="topk/k8"), OF_TOPK - {"ablate/topk"} | {"ablate/topk-k8"}),
        (dict(train__k=16), OF_TOPK),
        (dict(train__l1=0.1), {"train/standard", "evaluate/standard", "report"}),
        (dict(train__kinds="topk,standard,gated"), {"train/gated", "evaluate/gated", "report"}),
        (dict(capture__sites="resid_post.0,resid_post.1"), {"capture", "report"}),
        (dict(corpus__context=64), {"capture", *DICTIONARIES, *AFTER_TRAINING}),
        (dict(task__test_prompts=4), PROMPTS),
        (dict(task__benchmarks="gsm8k", task__path="items.jsonl"), {"benchmark/gsm8k", "report"}),
        (dict(evaluate__ce_documents=5), {"evaluate/topk", "evaluate/standard", "report"}),
        (dict(causal__seed=1), {"ablate/topk", "report"}),
        (dict(report__title="Another title"), {"report"}),
        (dict(ablate__top=9), {"ablate/topk", "report"}),
        (dict(train__batch=9), {*DICTIONARIES, *AFTER_TRAINING}),
        # It sets the windows that rows are shuffled in, those of a store too.
        (dict(train__buffer_rows=9), {*DICTIONARIES, *AFTER_TRAINING}),
        (dict(task__seed=9), PROMPTS),  # other prompts: no other activations
        (dict(model__dtype="bfloat16"), {"baseline", *AFTER_TRAINING}),
        (dict(train__penalty_warmup=0.5), {"train/standard", "evaluate/standard", "report"}),
        (dict(ablate__dictionary="standard"), {"ablate/standard", "report"}),
        (dict(probe__labels="answer"), {"probe/topk", "report"}),
        (dict(probe__labels="answer", probe__dictionary="standard"), {"probe/standard", "report"}),
        (dict(train__kinds="topk"), {"report"}),
        (dict(train__auxk_features=9, train__resample_from="errors", probe__shuffles=9), set()),
        (dict(train__checkpoint_every=7, train__log_every=3, mesh__data=2, capture__batch_tokens=99), set()),
        (dict(analysis__batch_tokens=99, causal__batch_rows=9), set()),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_changed_flag_makes_what_depends_on_it(inputs, tmp_path, monkeypatch, changes, units):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "items.jsonl").write_text(json.dumps(dict(question="1 + 1?", answer="2 #### 2")) + "\n")
    before, after = marks(inputs, tmp_path), marks(inputs, tmp_path, **changes)
    assert {unit for unit, mark in after.items() if before.get(unit) != mark} == units


def test_the_page_is_made_again_after_an_upgrade_and_nothing_else_is(inputs, tmp_path, monkeypatch):
    """A defect: it showed what the code of an earlier version had written."""
    before = marks(inputs, tmp_path)
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "package" / "versions.py"))
    hashes, page = [], tmp_path / "package" / "page" / "words.py"
    page.parent.mkdir(parents=True)
    for words in ("one", "other", "other"):
        page.write_text(words)
        versions.hash_code.cache_clear()
        hashes.append(marks(inputs, tmp_path))
    monkeypatch.undo()
    versions.hash_code.cache_clear()
    assert [unit for unit, mark in hashes[0].items() if before[unit] != mark] == ["report"]
    assert [unit for unit, mark in hashes[1].items() if hashes[0][unit] != mark] == ["report"]
    assert hashes[1] == hashes[2] and marks(inputs, tmp_path) == before


def test_the_place_of_model_and_text_and_the_kind_of_device_change_nothing(inputs, tmp_path, monkeypatch):
    before = marks(inputs, tmp_path)
    model, corpus = inputs
    moved = shutil.copytree(model, tmp_path / "moved"), shutil.copy(corpus, tmp_path / corpus.name)
    assert marks(moved, tmp_path) == before
    for platform in ("cpu", "cuda", "tpu"):
        monkeypatch.setenv("JAX_PLATFORMS", platform)
        assert marks(inputs, tmp_path) == before


STREAMED = dict(train__source="model", train__kinds="topk")
SITES = dict(train__kinds="topk", train__sites="resid_post.1,resid_post.2", capture__sites="resid_post.1,resid_post.2")
GROWN = {name: sites if name == "train__kinds" else f"resid_post.0,{sites}" for name, sites in SITES.items()}
EXPLAINED = dict(interpret__dictionaries="topk", explain__dictionaries="topk", explain__model="judge")


# Statement 3 of WORKSPACE.md, what must hold.
@pytest.mark.parametrize(
    ("base", "changes", "units"),
    [
        (STREAMED, dict(capture__shard_rows=77, capture__max_sink_share=0.9), ["train/topk"]),
        ({}, dict(model__backend="jax"), ["capture", "baseline", "train/topk", "evaluate/topk", "ablate/topk"]),
        (SITES, GROWN, ["train/topk/resid_post.1", "train/topk/resid_post.2", "evaluate/topk/resid_post.1"]),
        (EXPLAINED | dict(explain__url="http://a:1/v1"), dict(explain__url="http://a:2/v1"), ["explain/topk"]),
        (EXPLAINED | dict(explain__features="1,2"), dict(explain__features="2,1,2"), ["explain/topk"]),
        (EXPLAINED | dict(explain__features="1,2"), dict(explain__sample=9), ["explain/topk"]),
        (EXPLAINED, dict(explain__scores="fuzzing,detection"), ["explain/topk"]),
        (
            dict(task__behaviours="agreement,capital"),
            dict(task__behaviours="capital,agreement,capital"),
            ["baseline", "ablate/topk", "probe/topk"],
        ),
        (dict(train__kinds="batchtopk"), dict(train__batchtopk__across_layers=True), ["train/batchtopk"]),
        (dict(truth__features=32), dict(train__buffer_rows=999), ["ground_truth/topk"]),
        (dict(ablate__baselines="neurons,pca"), dict(ablate__baselines="pca,neurons"), ["ablate/topk"]),
    ],
    ids=[
        "settings of stores in training from the model",
        "backend",
        "a layer in front",
        "another port",
        "the order of features",
        "a sample that named features replace",
        "the order of scores",
        "the order of behaviours",
        "layers that SAEs do not have",
        "windows of stored rows",
        "the order of bases",
    ],
)
def test_what_changes_no_result_makes_nothing_again(inputs, tmp_path, base, changes, units):
    before, after = (plan_of(inputs, tmp_path, **base | more) for more in ({}, changes))
    for unit in units:
        assert before.fingerprint(unit) == after.fingerprint(unit), unit
    if changes == GROWN:  # of a lone site the name seeds nothing, so a second one trains its dictionary again
        alone = plan_of(inputs, tmp_path, **GROWN | dict(train__sites="resid_post.1"))
        assert alone.fingerprint("train/topk") != before.fingerprint("train/topk/resid_post.1")
    if "model__backend" in changes:
        in_torch = plan_of(inputs, tmp_path, **base | dict(model__backend="torch"))
        assert all(before.fingerprint(unit) != in_torch.fingerprint(unit) for unit in units)


@pytest.mark.usefixtures("single_device")
def test_one_more_site_captures_one_site(inputs, tmp_path, capsys, monkeypatch):
    """The store of both sites is the one made at once, to rounding, and the model is read for the new one alone."""
    from saejax.activations.writer import StoreWriter

    written, write = [], StoreWriter.write_site
    monkeypatch.setattr(StoreWriter, "write_site", lambda *call: written.append(call[1]) or write(*call))

    def capture(workdir, sites, stages=("capture", "train")):
        written.clear()
        flags = runs.small_flags(*inputs, workdir, capture__sites=sites, task__behaviours="", train__kinds="topk")
        assert command.run(stages, "", ["program", *flags]) == 0, capsys.readouterr().err
        return {*written}, capsys.readouterr().out

    grown, whole = tmp_path / "run", tmp_path / "whole"
    assert capture(grown, "resid_post.0")[0] == {"resid_post.0"}
    sites, output = capture(grown, "resid_post.0,resid_post.1")
    assert sites == {"resid_post.1"} and "train/topk: done before, unchanged" in output
    capture(whole, "resid_post.0,resid_post.1", ["capture"])
    files = sorted(path.relative_to(whole / "capture") for path in (whole / "capture").rglob("*.npy"))
    assert len(files) > 6
    for file in files:
        ours, theirs = (np.load(folder / "capture" / file) for folder in (grown, whole))
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, file
        if ours.dtype == np.float32:  # passes for one site and for two may round otherwise
            assert relative_error(ours, theirs) < 1e-5, file
        else:
            assert np.array_equal(ours, theirs), file
    assert capture(grown, "resid_post.1", ["capture"])[0] == set(), "a store of fewer sites takes all of them"
    # A defect: where a new revision of the stage captures other values, it took those of earlier ones.
    monkeypatch.setitem(all_stages(), "capture", dataclasses.replace(all_stages()["capture"], revision=99))
    assert capture(grown, "resid_post.1", ["capture"])[0] == {"resid_post.1"}


@pytest.mark.parametrize("written", ["runs/bases/", "./runs/bases", ".//runs/./bases//"])
def test_a_folder_is_the_same_however_its_name_is_written(inputs, tmp_path, monkeypatch, written):
    folder = tmp_path / "runs" / "bases"
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text("{}")
    monkeypatch.chdir(tmp_path)

    def hashes(name):
        """Of units whose settings name folders, as they are written, and of a trace."""
        settings = dict(ablate__baselines=f"neurons,{name}", transfer__dictionaries=f"topk,{name}")
        plan = plan_of(inputs, tmp_path, graph__transcoders=name, graph__prompt="a/ ", **settings)
        stages = [all_stages()[name] for name in ("ablate", "transfer", "attribute")]
        units = [unit for stage in stages for unit in stage.units(plan.configs)]
        return [*map(plan.fingerprint, units), requests.set_identity(plan.configs[GraphConfig])]

    assert hashes(written) == hashes("runs/bases") and len(hashes(written)) == 4


@pytest.mark.parametrize("flag", ["graph__transcoders", "graph__dictionaries"])
def test_feature_files_of_a_set_make_pages_and_no_trace_again(inputs, tmp_path, flag):
    """In its folder ``features/``, which graphs show; a file of the set itself traces again."""
    folder = tmp_path / "set"
    (folder / "features" / "below").mkdir(parents=True)
    (folder / "layer_0").mkdir()
    (folder / "cfg.json").write_text("{}")

    def marks_of_graph() -> tuple[str, str]:
        plan = plan_of(inputs, tmp_path, graph__prompt="a", **{flag: str(folder)})
        (unit,) = all_stages()["attribute"].units(plan.configs)
        return plan.fingerprint(unit), trace_key(plan.configs, requests.Request("a", "a", ()))

    unit, trace = marks_of_graph()
    for name in ("3_17.json", "below/3_18.json", "index.json.gz"):
        (folder / "features" / name).write_text("{}")
        again = marks_of_graph()
        assert again[0] != unit and again[1] == trace, name
        unit = again[0]
    for name in ("layer_0/cfg.json", "features.json"):
        (folder / name).write_text("{}")
        again = marks_of_graph()
        assert again[0] != unit and again[1] != trace, name
        unit, trace = again


# Statement 3 of WORKSPACE.md, what must hold.
def test_settings_of_text_that_is_not_read_make_nothing_again(inputs, tmp_path):
    """Of held-out text no stage reads how it becomes tokens for training, and some read no text at all."""
    folder = tmp_path / "bases"
    folder.mkdir()
    (folder / "cfg.json").write_text("{}")
    names = [f"{stage}__dictionary" for stage in ("ablate", "steer")]
    names += [f"{stage}__dictionaries" for stage in ("transfer", "cluster")]
    base = dict.fromkeys(names, folder)

    def changed_by(before=(), **changes):
        plans = [plan_of(inputs, tmp_path, **base | dict(before) | more) for more in ({}, changes)]
        units = {"ablate", "steer", "transfer", "cluster"}
        both = ([plan.fingerprint(*all_stages()[unit].units(plan.configs)) for unit in sorted(units)] for plan in plans)
        return {unit for unit, *marks in zip(sorted(units), *both, strict=True) if marks[0] != marks[1]}

    another = runs.save_corpus(tmp_path / "another.jsonl.gz", 41)
    assert changed_by(corpus__pack=True, corpus__max_tokens=9) == set()
    assert changed_by(corpus__context=64) == {"cluster"}
    assert changed_by(corpus__held_out=0.2) == changed_by(corpus__path=another) == {"ablate", "steer", "cluster"}
    no_text = dict(ablate__text_documents=0)
    for changes in (dict(corpus__held_out=0.2), dict(corpus__path=another)):
        assert changed_by(no_text, **changes) == {"steer", "cluster"}
    for reads in (dict(transfer__reconstruction=True), dict(transfer__measures="activity")):
        assert changed_by(reads, corpus__context=64) == {"cluster", "transfer"}
        assert changed_by(reads, corpus__path=another) == {"ablate", "steer", "cluster", "transfer"}


def test_large_files_are_hashed_once(inputs, tmp_path, monkeypatch):
    """A lens, labels, and dictionaries that are named by their file."""
    monkeypatch.setenv("SAEJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("saejax.models.identity._HASHED_AT_ONCE", 1000)
    hashed = []

    def count(path):
        hashed.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr("saejax.models.identity.file_sha256", count)
    names = ["lens.pt", "labels.jsonl", "groups.json", "sae.safetensors"]
    for name in names:
        (tmp_path / name).write_bytes(b"x" * 2000)
    settings = dict(model__lens=tmp_path / "lens.pt", track__prompt="a", track__dictionaries=tmp_path / names[3])
    settings |= dict(circuits__groups=tmp_path / "groups.json", atlas__labels=tmp_path / "labels.jsonl")
    settings |= dict(graph__dictionaries=tmp_path / names[3], graph__prompt="a")

    def marks():
        configs = plan_of(inputs, tmp_path, **settings).configs
        read = dict(track="track", atlas="labels", attribute="graph", circuits="graph")
        return [all_stages()[stage].inputs(configs, "topk")[name](configs) for stage, name in read.items()]

    before = marks()
    assert sorted(hashed) == sorted(names) and marks() == before and len(hashed) == len(names)
    (tmp_path / names[3]).write_bytes(b"y" * 2000)
    assert [a == b for a, b in zip(before, marks(), strict=True)] == [False, True, False, False]


def test_names_on_the_hub_and_texts_are_hashed_as_they_are_written():
    for name in ("org/name", "org/name@main", "hf://org/name/folder", "topk", ""):
        assert counted(GraphConfig(transcoders=name))["graph.transcoders"] == name
    for text in ("a/", "./", "/"):
        assert counted(GraphConfig(target=text))["graph.target"] == text
