"""What is looked at before anything runs: folders that flags name, and the files that users wrote."""

import csv
import json

import pytest
from runs import make_configs
from test_pipeline import OPTIONS, go

from saejax.attribution.local.dictionaries import open_transcoders
from saejax.dictionaries.hashes import hash_dictionaries
from saejax.errors import UserError
from saejax.runner.pipeline import RunOptions, without_decoder_stages
from saejax.runner.registry import all_stages

TYPO = "runs/typo"
NAMING = dict(
    ablate__baselines=("pca", TYPO), ablate__repeats=(TYPO,), ablate__dictionary=TYPO, patch__dictionary=TYPO,
    steer__dictionary=TYPO, transfer__dictionaries=("topk", TYPO), cluster__dictionaries=(TYPO,),
    train__init_from=TYPO, graph__features=TYPO, graph__labels=TYPO, graph__transcoders=f"./{TYPO}",
    study__dictionary=TYPO, study__repeats=(TYPO,), study__baselines=(TYPO,), track__dictionaries=(TYPO,),
)  # fmt: skip
WITH = dict(
    graph=dict(graph__prompt="a", graph__transcoders="org/name"),
    study=dict(study__benchmarks=("word_problems",)),
    track=dict(track__prompt="a"),
)


@pytest.mark.parametrize("options", [OPTIONS, RunOptions(dry_run=True), RunOptions(keep_going=True)])
@pytest.mark.parametrize("setting", NAMING)
def test_a_folder_that_is_missing_is_refused_before_anything_runs(tmp_path, monkeypatch, setting, options):
    monkeypatch.chdir(tmp_path)
    more = WITH.get(setting.partition("__")[0], {}) | {setting: NAMING[setting]}
    line = f"--{setting.replace('__', '.')}=(./)?{TYPO} does not exist, and this run does not make it: name files or"
    with pytest.raises(UserError, match=f"^{line}"):
        go(tmp_path / "run", options=options, **more)
    assert not [*tmp_path.glob("run/*")]


def test_all_that_is_missing_is_said_at_once_and_addresses_are_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = dict(ablate__baselines=("a/b", "hf://org/name/folder"), transfer__dictionaries=("c/d", "saelens:r/id"))
    lens = dict(WITH["graph"], graph__lens="none.pt")
    missing = "--ablate.baselines=a/b, --model.lens=none.pt, --transfer.dictionaries=c/d do not exist, and this run"
    with pytest.raises(UserError, match=f"^{missing} does not make them: name files or folders"):
        go(tmp_path / "run", **settings, **lens)


def test_a_folder_that_the_run_makes_first_is_no_missing_one(tmp_path):
    whole = dict(transfer__dictionaries=("topk", str(tmp_path / "run/train/topk")))
    assert "transfer" in go(tmp_path / "run", **whole)
    stack = dict(train__k=(4, 8), ablate__dictionary="topk/k8", options=RunOptions(dry_run=True))
    for name in ("train/topk", "train", "train/topk/k8"):
        go(tmp_path / "other", **stack, transfer__dictionaries=("topk", str(tmp_path / "other" / name)))
    for name in ("train/topk/k9", "train/gated", "evaluated/topk"):
        with pytest.raises(UserError, match=f"{name} does not exist"):
            go(tmp_path / "other", **stack, transfer__dictionaries=("topk", str(tmp_path / "other" / name)))
    # Nor is what a later stage makes there for an earlier one.
    with pytest.raises(UserError, match="--train.init_from=.*transfer does not exist"):
        go(
            tmp_path / "other",
            train__init_from=str(tmp_path / "other/transfer"),
            transfer__dictionaries=("topk", "standard"),
        )


def test_what_is_missing_in_a_folder_here_is_none_of_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "set").mkdir(parents=True)
    for missing in ("runs/set/own/topkk", "runs/typo"):
        with pytest.raises(UserError, match=f"^--graph.transcoders={missing} does not exist"):
            go(tmp_path / "run", graph__prompt="a", graph__transcoders=missing)
        with pytest.raises(UserError, match=f"^there is no folder {missing} of transcoders: expected one, a hub id"):
            open_transcoders(missing)
    with pytest.raises(UserError, match="hub cannot be reached"):  # asked where the address says so
        open_transcoders("hf://runs/typo")


def test_a_missing_folder_has_no_hash(tmp_path):
    with pytest.raises(UserError, match="none does not exist"):
        hash_dictionaries(str(tmp_path / "none"))


def refused(stage, **changes):
    """The line of the error by which a stage refuses its settings before it runs."""
    with pytest.raises(UserError) as error:
        all_stages()[stage].check(make_configs(**changes))
    return str(error.value)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_text_and_sites_beyond_a_model_in_pytorch_are_refused_before_anything_runs(tmp_path):
    """Preflight tells of others."""
    write(tmp_path / "config.json", dict(model_type="gptj", n_positions=256, n_layer=3))
    model, site = dict(model__path=str(tmp_path)), ("resid_post.3",)
    from_model = dict(train__source="model", train__kinds=("topk",))
    for stage, more in dict(capture={}, tokenize=dict(corpus__stream=True), train=from_model).items():
        line = refused(stage, corpus__context=257, **model, **more)
        assert line == "--corpus.context=257 exceeds the model's context of 256 tokens: lower it"
    sites = dict(capture=dict(capture__sites=site), train=from_model | dict(train__sites=site))
    for stage, more in sites.items():
        line = refused(stage, **model, **more)
        assert line == "there is no site resid_post.3: the model has 3 layers, 0 to 2"
    second = dict(capture__sites=("resid_post.15", "other:resid_post.3"), model__other=str(tmp_path))
    assert "no site resid_post.3" in refused("capture", **second)
    for stage in ("tokenize", "capture", "train"):
        last = dict(capture__sites=("resid_post.2",), train__sites=("resid_post.2",), train__source="model")
        all_stages()[stage].check(make_configs(corpus__context=256, **model, **last))


def test_a_pipeline_says_what_a_model_in_pytorch_has_not(tmp_path, capsys):
    write(tmp_path / "config.json", dict(model_type="gptj"))
    configs = make_configs(model__path=str(tmp_path))
    left = without_decoder_stages(["preflight", "capture"], configs, print)
    assert left == ["capture"]
    line = f"{tmp_path} runs in PyTorch: preflight left out, for models of JAX families only, so how long"
    assert capsys.readouterr().out.startswith(line)


def test_rows_of_benchmarks_are_read_before_anything_runs(tmp_path):
    good, bad = dict(question="1 + 1?", answer="2 #### 2"), dict(question="1 + 1?", answer="two")
    named = dict(task__path=write(tmp_path / "gsm8k.jsonl", bad, good, bad), task__examples=1)
    for stage in ("benchmark", "study"):
        line = refused(stage, **{f"{stage}__benchmarks".replace("benchmark__", "task__"): ("gsm8k",)}, **named)
        assert "2 rows are no questions with answers" in line and "line 1" in line and "gsm8k:3" in line
    both = dict(task__path=str(tmp_path), task__benchmarks=("gsm8k", "math"), task__examples=1)
    write(tmp_path / "math.jsonl", dict(problem="1 + 1?"))
    line = refused("benchmark", **both)
    assert "2 benchmarks cannot be asked" in line and "gsm8k.jsonl" in line and "no column 'solution'" in line
    assert "study: expected at least 4" in refused(
        "study", study__benchmarks=("gsm8k",), task__examples=2, task__path=write(tmp_path / "few.jsonl", good, good)
    )
    # The hub is not asked.
    all_stages()["benchmark"].check(make_configs(task__benchmarks=("gsm8k", "math", "logic", "word_problems")))


def test_files_of_a_graph_are_read_before_anything_runs(tmp_path):
    named = dict(graph__transcoders="org/name", graph__prompt="a")
    (tmp_path / "nodes.json").write_text("[]")
    (tmp_path / "labels.json").write_text('{"3": "cities"}')
    files = dict(graph__supernodes=str(tmp_path / "nodes.json"), graph__labels=str(tmp_path / "labels.json"))
    prompts = write(tmp_path / "prompts.jsonl", dict(prompt=""), dict(prompt="a"), dict(text="b"))
    line = refused("attribute", graph__transcoders="org/name", graph__prompts=prompts, **files)
    assert "3 files cannot be used" in line and "line 1" in line and "line 3" in line
    assert "holds no supernodes" in line and "holds no labels" in line
    (tmp_path / "nodes.json").write_text('{"other": [["cities", "3_17_4"]]}')
    others = dict(graph__supernodes=files["graph__supernodes"])
    assert "has supernodes for other: expected" in refused("attribute", **named, **others)
    with open(tmp_path / "sheet.csv", "w", newline="") as file:
        csv.writer(file).writerows([["feature", "label"], ["1", "cities"]])
    sheet = dict(graph__labels=str(tmp_path / "sheet.csv"))
    assert "has no column note" in refused("attribute", **named, **sheet)
    behaviours = dict(circuits__behaviours=("capital",), graph__transcoders="org/name")
    assert "has no column note" in refused("circuits", **behaviours, **sheet)
    (tmp_path / "groups.json").write_text('{"capital": [["mine", "3_17"], ["other", 4]]}')
    line = refused("circuits", **behaviours, circuits__groups=str(tmp_path / "groups.json"))
    assert '["mine", "3_17"] of capital, ["other", 4] of capital' in line
    assert "has no column note" in refused(
        "atlas", interpret__dictionaries=("topk",), atlas__labels=str(tmp_path / "sheet.csv")
    )


def test_text_that_is_missing_is_said_before_anything_runs(tmp_path):
    missing = str(tmp_path / "none.txt")
    assert f"--corpus.path={missing} does not exist" in refused("capture", corpus__path=missing)
    named = dict(study__benchmarks=("word_problems",), study__falsify=3, study__falsify_text=missing)
    assert f"--study.falsify_text={missing} does not exist" in refused("study", **named)
