"""Every kind of bad input: one clear line, exit status 2, nothing half-written."""

import errno
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import runs

from saejax.runner import command, command_line
from saejax.runner.workplan import Workplan
from saejax.runner.workspace import Workspace

pytestmark = pytest.mark.usefixtures("two_devices")


@pytest.fixture(scope="module")
def captured(inputs, tmp_path_factory):
    """A workdir with baseline and capture done."""
    workdir = tmp_path_factory.mktemp("captured") / "run"
    assert command.run(["baseline", "capture"], "", ["program", *runs.small_flags(*inputs, workdir)]) == 0
    return workdir


@pytest.fixture
def refuse(inputs, tmp_path, capsys):
    """Runs stages that must be refused; gives the line that says why."""

    def run(stages, *extra, workdir=tmp_path / "run", model=inputs[0], corpus=inputs[1], **changes):
        capsys.readouterr()
        flags = [*runs.small_flags(model, corpus, workdir, **changes), *extra]
        assert command.run(stages, "", ["program", *flags]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and error[0].startswith("error: "), error
        for stage in stages[-1:]:
            assert not (tmp_path / "run" / stage / "done.json").exists()
        return error[0]

    return run


def copy_of(captured, tmp_path):
    return runs.copy_run(captured, tmp_path / "run")


def test_no_such_model_or_folder(refuse, tmp_path):
    assert "--model.path is empty" in refuse(["preflight"], model="")
    assert "there is no model folder" in refuse(["baseline"], model=tmp_path / "nowhere")
    assert "someone/nothing" in refuse(["preflight"], model="someone/nothing")


def test_an_unsupported_family_is_named_with_the_supported_ones(refuse, inputs, tmp_path):
    shutil.copytree(inputs[0], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | dict(model_type="rwkv")))
    line = refuse(["preflight"], model=tmp_path / "model")
    assert "rwkv" in line and "llama" in line


def test_a_site_or_layer_that_does_not_exist(refuse):
    assert "there is no site 'resid_last.0'" in refuse(["baseline", "capture"], capture__sites="resid_last.0")
    line = refuse(["preflight"], capture__sites="resid_post.7", train__sites="resid_post.7")
    assert "resid_post.7" in line and "0 to 1" in line
    assert "--train.sites needs mlp_out.0, which --capture.sites=" in refuse(["preflight"], train__sites="mlp_out.0")
    line = refuse(["preflight"], capture__sites="mlp_in.0", train__sites="mlp_in.0", train__form="transcoder")
    assert "--train.sites needs mlp_out.0, which --capture.sites=" in line
    assert "has no mlp_in sites" in refuse(["preflight"], train__sites="all", train__form="skip_transcoder")


def test_a_stack_of_which_no_member_is_named(refuse):
    line = refuse(["preflight"], train__k="4,8")
    assert "--ablate.dictionary=topk: topk is a stack of 2" in line and "of k4, k8" in line
    assert "there is no member k9" in refuse(["preflight"], train__k="4,8", ablate__dictionary="topk/k9")
    assert "unknown dictionary" in refuse(["preflight"], ablate__dictionary="gated")


def test_settings_that_name_nothing_or_one_thing_twice(refuse):
    assert "--train.k is empty: name a value, or several" in refuse(["preflight"], train__k="")
    assert "--train.kinds=topk,topk: name each one once" in refuse(["preflight"], train__kinds="topk,topk")
    line = refuse(["preflight"], train__expansions="4,8", train__features=16)
    assert line.startswith("error: --train.expansions and --train.features=16 exclude each other")
    assert "--train.b1 is 1.0" in refuse(["preflight"], train__b1=1)
    line = refuse(["explain"], explain__dictionaries="topk", explain__model="judge")
    assert "explain/topk reads interpret/topk, which this run does not make: add --interpret.dictionaries=topk" in line
    for flags, told in (
        (dict(train__sites="resid_pst.1"), "there is no site 'resid_pst.1'"),
        (dict(train__init_from="/none"), "--train.init_from=/none does not exist"),
        (dict(ablate__baselines="foo"), "unknown basis (--ablate.baselines), and no folder of a dictionary: 'foo'"),
        (dict(interpret__dictionaries="topk", atlas__labels="/none"), "--atlas.labels=/none is no file"),
        (dict(interpret__dictionaries="topk", explain__dictionaries="topk"), "--explain.model is missing"),
    ):
        assert told in refuse(["preflight"], **flags)
    assert "there is no site 'resid_pst.1'" in refuse(["train"], train__sites="resid_pst.1")
    assert "it patches activations" in refuse(["patch"]) and "--patch.dictionary is set" in refuse(["patch"])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--mesh.process_id=5"], "--mesh.process_id=5 is none of 2 processes"),
        (["--mesh.coordinator=foo"], "--mesh.coordinator=foo names no port: expected HOST:PORT"),
        ([], "process 0 of 2 finds no others by --mesh.coordinator= "),
    ],
)
def test_processes_that_cannot_find_one_another(tmp_path, flags, told):
    flags = [f"--workdir={tmp_path / 'run'}", "--mesh.processes=2", *flags]
    made = subprocess.run(
        [sys.executable, "-m", "experiments.preflight", *flags], cwd=runs.ROOT, capture_output=True, text=True
    )
    assert made.returncode == 2 and told in made.stderr and made.stderr.startswith("error: ")
    assert len(made.stderr.splitlines()) == 1


def test_a_line_of_a_flag_file_is_named(refuse, tmp_path):
    file = tmp_path / "bad.flags"
    for line, told in (
        ("--train.kind=topk", "Unknown command line flag 'train.kind'"),
        ("train.kinds=topk", "'train.kinds=topk' is not a flag"),
        ("--train.k=x", "flag --train.k=x"),
        ('{"prompt": "' + "long " * 100 + '"}', "is not a flag"),
    ):
        file.write_text(f"# a comment\n\n{line}\n")
        found = refuse(["train"], f"--flagfile={file}")
        assert f"error: {file}, line 3: {told}" in found or (told in found and f"{file}, line 3: " in found)
        assert len(found) < len(str(file)) + 250


def test_a_start_that_was_refused_leaves_nothing_behind(inputs, tmp_path, capsys):
    for sites, status in (("resid_post.99", 2), ("resid_post.98", 2), ("resid_post.0", 0)):
        flags = runs.small_flags(*inputs, tmp_path / "run", capture__sites=sites, task__behaviours="")
        assert command.run(["capture"], "", ["program", *flags]) == status
    assert len(list((tmp_path / "run").glob("capture-*"))) == 1 and (tmp_path / "run" / "capture").is_symlink()


@pytest.mark.parametrize("content", ["{}", "[]", "1", "{"])
def test_json_that_is_something_else(refuse, captured, tmp_path, content):
    workdir = copy_of(captured, tmp_path)
    (workdir / "capture" / "done.json").write_text(content)
    assert "done.json" in refuse(["train"], workdir=workdir)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "dictionary.json").write_text(content)
    assert "dictionary.json" in refuse(["preflight"], ablate__dictionary=tmp_path / "made")


def test_truncated_and_corrupted_shards(refuse, captured, tmp_path):
    workdir = copy_of(captured, tmp_path)
    shard = workdir / "capture" / "resid_post.0" / "shard-00000.npy"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    assert "shard-00000.npy" in refuse(["train"], workdir=workdir)
    shard.write_bytes(content[:-100] + bytes(100))
    assert "shard-00000.npy" in refuse(["train"], workdir=workdir)


def test_a_store_from_another_model(refuse, captured, tmp_path):
    wider_model = runs.save_model(tmp_path / "other", hidden_size=64)
    line = refuse(["train"], workdir=copy_of(captured, tmp_path), model=wider_model)
    assert "was made with other settings (model is different)" in line


def test_nan_in_activations_is_located(refuse, inputs, tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(inputs[0], tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] = weights["model.layers.0.mlp.down_proj.weight"].copy()
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = np.nan
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata=dict(format="pt"))
    line = refuse(["baseline", "capture"], model=tmp_path / "model")
    assert "nan" in line.lower()


def test_a_full_disk(refuse, captured, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("this user cannot mount a tmpfs")
    try:
        line = refuse(["baseline", "capture"], workdir=small / "run")
        assert "disk is full" in line
        assert not (small / "run" / "capture" / "manifest.json").exists()
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


def test_a_disk_that_fills_during_a_checkpoint(refuse, captured, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    size = sum(path.stat().st_size for path in captured.rglob("*") if path.is_file()) // 1024 + 250
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("this user cannot mount a tmpfs")
    try:
        runs.copy_run(captured, small / "run")
        assert "disk is full" in refuse(["train"], workdir=small / "run")
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


@pytest.mark.parametrize("error", [OSError(errno.EDQUOT, "", "x"), ValueError("ABORTED: Disk quota exceeded")])
def test_a_quota_that_ends(error, capsys):
    def work():
        raise error

    flag_values = command_line.stage_flags()
    flag_values(["program", "--workdir=x"])
    assert command.run_and_report(work, flag_values) == 2
    assert capsys.readouterr().err == "error: x: the disk quota is used up: free space, then run again\n"


def test_an_unwritable_workdir(refuse, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in refuse(["baseline"], workdir=tmp_path / "file" / "run")


def test_flags(refuse, tmp_path):
    assert "Did you mean: train.batch" in refuse(["train"], "--train.bach=3")
    assert "--train.batch is 0: expected at least 1" in refuse(["train"], train__batch=0)
    assert "is not a flag" in refuse(["train"], "batch=3")
    assert "--workdir=DIR is missing" in refuse(["train"], workdir="")
    assert "error: Unable to open flagfile" in refuse(["train"], "--flagfile=nowhere.flags")


def test_corpora(refuse, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty.jsonl" in refuse(["preflight"], corpus=empty)
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
    assert "2" in refuse(["preflight"], corpus=tmp_path / "bad.jsonl")


def test_a_prompt_longer_than_the_context(refuse, tmp_path):
    short = runs.save_model(tmp_path / "short", max_position_embeddings=8)
    assert "context" in refuse(["baseline"], model=short)


def test_two_runs_that_make_one_unit(refuse, inputs, tmp_path):
    flags = ["program", *runs.small_flags(*inputs, tmp_path / "run")]
    plan = Workplan(command_line.read_configs(command_line.stage_flags(), flags))
    with Workspace(tmp_path / "run").claim("baseline", plan.fingerprint("baseline")):
        line = refuse(["baseline"])
        assert f"baseline is being made by process {os.getpid()}" in line and "--take_over" in line


def test_stages_out_of_order_and_settings_that_do_not_fit(refuse, captured, tmp_path):
    assert "run experiments.capture with the same flags first" in refuse(["train"])
    workdir = copy_of(captured, tmp_path)
    assert "fewer than one batch" in refuse(["train"], workdir=workdir, train__batch=80000)
    assert "is more than the 128 features" in refuse(["train"], workdir=workdir, train__k=129)
    streamed = dict(train__source="model", train__sites="mlp_in.0", train__form="transcoder")
    line = refuse(["train"], workdir=workdir, train__alignment=0.3, **streamed)
    assert "--train.alignment=0.3 aligns encoder and decoder" in line
    assert "not divisible by the 2 devices" in refuse(["train"], workdir=workdir, train__batch=63)
    assert "make the product 2" in refuse(["train"], workdir=workdir, mesh__model=3)
    assert "site in this store" in refuse(["train"], workdir=workdir, train__sites="mlp_out.0")
    assert "unknown dictionary" in refuse(["ablate"], workdir=workdir, ablate__dictionary="standart")


def test_what_training_starts_from(refuse, inputs, captured, tmp_path):
    workdir = copy_of(captured, tmp_path)
    (tmp_path / "empty").mkdir()
    assert "holds no dictionary" in refuse(["train"], workdir=workdir, train__init_from=tmp_path / "empty")
    line = refuse(["train"], workdir=workdir, train__resample_every=5, train__freeze="decoder")
    assert "replaces what --train.freeze=decoder keeps" in line
    flags = runs.small_flags(*inputs, workdir, train__kinds="topk", train__epochs=1)
    assert command.run(["train"], "", ["program", *flags]) == 0
    trained = tmp_path / "trained"
    shutil.copytree(workdir / "train" / "topk", trained)
    line = refuse(["train"], workdir=workdir, train__kinds="standard", train__expansion=2, train__init_from=trained)
    assert "does not fit: kind is topk, expected standard; features is 128, expected at most 64" in line


@pytest.fixture
def few_features(inputs, tmp_path):
    """The folder of a dictionary of three features."""
    from saejax import load_model
    from saejax.dictionaries import Dictionary, DictionaryConfig, save_dictionary

    source = load_model(str(inputs[0])).source
    config = DictionaryConfig(
        kind="standard", site="resid_post.0", d_in=32, n_features=3, model=source.name, fingerprint=source.fingerprint
    )
    save_dictionary(tmp_path / "few", Dictionary.initial(config, jax.random.key(0)))
    return tmp_path / "few"


def test_a_basis_without_directions(refuse, captured, few_features, tmp_path):
    changes = dict(workdir=copy_of(captured, tmp_path), ablate__dictionary=few_features)
    (tmp_path / "empty").mkdir()
    assert "empty holds no dictionary" in refuse(["ablate"], **changes, ablate__baselines=tmp_path / "empty")
    described = few_features / "dictionary.json"
    whole = json.loads(described.read_text())
    shutil.copytree(few_features, tmp_path / "none")
    whole["config"]["n_features"] = 0
    (tmp_path / "none" / "dictionary.json").write_text(json.dumps(whole))
    assert "n_features" in refuse(["ablate"], **changes, ablate__baselines=tmp_path / "none")


def test_a_tokenizer_that_merges_every_answer(refuse, monkeypatch):
    from saejax.tasks.answer_tokens import MERGED

    monkeypatch.setattr("saejax.tasks.draw.fault", lambda tokenizer, prompt: MERGED)
    line = refuse(["baseline"])
    assert "no behaviour is left to test: agreement: 0 of 4 train prompts could be made" in line and MERGED in line


def test_a_template_without_items(refuse, monkeypatch):
    from saejax.tasks.recipes import recipes

    empty = recipes()["capital"]._replace(templates=("Paris lies in", "Rome lies in", "The city lies in"))
    monkeypatch.setattr("saejax.tasks.draw.recipes", lambda: dict(capital=empty))
    line = refuse(["baseline"], task__behaviours="capital")
    assert "the word lists of capital give 2 train prompts of 4, and no more of the template 'Paris lies in'" in line
