"""The export stage: whole stacks, sweeps, and what is refused."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from runs import write_members

sys.path.append(str(Path(__file__).parent.parent / "dictionaries"))
import known_dictionaries as known

from saejax.config import Configs
from saejax.dictionaries import load_dictionary, load_transcoders, save_dictionary
from saejax.errors import Interrupted, UserError
from saejax.files import write_json
from saejax.runner import command
from saejax.runner.workspace import STARTED, Run
from saejax.stages.export import run as export
from saejax.stages.export.run import run_export
from saejax.stages.export.settings import ExportConfig


def unit(folder, dictionaries):
    """A finished train unit; ``dictionaries`` by member."""
    entries = []
    for name, dictionary in dictionaries.items():
        save_dictionary(folder / name / "dictionary", dictionary)
        entries.append((name, dictionary.config.site, dictionary.config.target or dictionary.site))
    write_members(folder, *entries)
    return folder


def run(tmp_path, source, format="saelens", stopping=lambda: False, **settings):
    folder = tmp_path / "export" / f"{format}-{source.name}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STARTED, {})
    configs = Configs(ExportConfig(format=format, dictionaries=("topk",), **settings))
    stage = Run(
        "export",
        folder.name,
        folder,
        configs,
        {f"{name}/{source.name}": source for name in ("train", "evaluate")},
        say=lambda line: None,
        stopping=stopping,
    )
    return folder, lambda: run_export(stage)


def test_one_dictionary_is_in_a_folder_of_its_sites_name(tmp_path):
    source = unit(tmp_path / "topk", {"": known.make("topk")})
    folder, go = run(tmp_path, source)
    save_dictionary(folder / "resid_post.3", known.make("standard"), "saelens")  # what a killed export left
    (folder / ".writing-1").mkdir()
    assert [entry.folder for entry in go().members] == ["resid_post.3"]
    x = known.activations()
    assert (load_dictionary(folder / "resid_post.3")(x) == load_dictionary(source)(x)).all()
    assert not (folder / ".writing-1").exists()


def test_every_member_of_a_stack_is_exported(tmp_path):
    members = {f"resid_post.{layer}-k{k}": known.make("topk", layer=layer, k=k) for layer in (1, 2) for k in (2, 3)}
    folder, go = run(tmp_path, unit(tmp_path / "topk", members))
    go()
    for name, dictionary in members.items():
        config = load_dictionary(folder / name).config
        assert (config.site, config.k, config.max_norm) == (dictionary.config.site, dictionary.config.k, 123.5)


def test_transcoders_of_all_layers_become_a_set_and_a_sweep_one_for_each_setting(tmp_path):
    members = {f"mlp_in.{layer}": known.make("jumprelu", "transcoder", layer, seed=layer) for layer in range(12)}
    folder, go = run(tmp_path, unit(tmp_path / "jumprelu", members), "circuit_tracer")
    assert {entry.folder for entry in go().members} == {"."}
    x = known.activations()
    for layer, transcoder in enumerate(load_transcoders(folder)):
        assert (transcoder.encode(x) == members[f"mlp_in.{layer}"].encode(x)).all()
    sweep = {f"mlp_in.{layer}-k{k}": known.make("topk", "transcoder", layer, k=k) for layer in (0, 1) for k in (2, 3)}
    folder, go = run(tmp_path, unit(tmp_path / "topk", sweep), "circuit_tracer")
    go()
    for k in (2, 3):
        assert [transcoder.config.k for transcoder in load_transcoders(folder / f"k{k}")] == [k, k]


def test_all_of_a_stack_or_nothing(tmp_path):
    below = known.make("jumprelu", layer=1)
    below.threshold_F[...] = below.threshold_F[...] - 1
    gap = {f"mlp_in.{layer}": known.make("standard", "transcoder", layer) for layer in (0, 2)}
    for name, members, format, message in (
        ("linear", {"a": known.make("linear")}, "saelens", "SAELens has no architecture for a linear SAE"),
        ("jumprelu", {"a": known.make("jumprelu"), "b": below}, "saelens", "thresholds below 0"),
        ("standard", gap, "circuit_tracer", r"layers \[1\] are missing"),
    ):
        folder, go = run(tmp_path, unit(tmp_path / name, members), format)
        with pytest.raises(UserError, match=message):
            go()
        assert [path.name for path in folder.iterdir()] == [STARTED]


@pytest.mark.parametrize("format", ["saelens", "circuit_tracer"])
def test_a_run_that_is_to_stop_stops_between_dictionaries_and_leaves_nothing(tmp_path, format):
    role = "transcoder" if format == "circuit_tracer" else "sae"
    site = "mlp_in" if role == "transcoder" else "resid_post"
    members = {f"{site}.{layer}": known.make("standard", role, layer) for layer in range(12)}
    asked = iter([False, True])
    folder, go = run(tmp_path, unit(tmp_path / "standard", members), format, stopping=lambda: next(asked))
    with pytest.raises(Interrupted, match="run the same command to start again"):
        go()
    assert [path.name for path in folder.iterdir()] == [STARTED]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("dictionaries=", "export has nothing to make with these settings"),
        ("dictionaries=sparse", "--export.dictionaries is 'sparse': expected one of standard"),
        ("format=pt", "--export.format is 'pt': expected one of saelens"),
        ("dictionaries=gated", "unknown dictionary for export (--train.kinds) 'gated': expected one of topk"),
        ("dictionaries=topk", "export/saelens-topk reads train/topk, which has not been made"),
        ("dictionaries=topk --export.push=org/name", "takes a token that may write: set the variable HF_TOKEN"),
        (
            "dictionaries=topk --export.format=neuronpedia --export.push=org/name",
            "--export.push=org/name is for --export.format=saelens",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(settings, message, tmp_path, capsys, tiny_llama, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    flags = [f"--workdir={tmp_path}", f"--model.path={tiny_llama}", *f"--export.{settings}".split()]
    assert command.run(["export"], "export", ["export", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "export").exists()


def test_what_is_pushed_has_a_card_with_held_out_scores(tmp_path, monkeypatch):
    source = unit(tmp_path / "topk", {f"k{k}": known.make("topk", k=k) for k in (2, 3)})
    folder, go = run(tmp_path, source, push="org/saes")
    scores = [SimpleNamespace(name=f"k{k}", explained_variance=k / 4, l0=k, dead_fraction=0, ce_recovered_mean=None)
              for k in (2, 3)]  # fmt: skip
    monkeypatch.setattr(export, "load_results", lambda folder: SimpleNamespace(members=scores))
    pushed = []

    def push_folder(root, name, message, patterns):
        pushed.append(sorted(str(path.relative_to(root)) for pattern in patterns for path in root.glob(pattern)))
        if len(pushed) > 1:
            raise UserError("the hub is gone")

    monkeypatch.setattr(export, "push_folder", push_folder)
    go()
    files = [f"k{k}/{name}" for k in (2, 3) for name in ("cfg.json", "sae_weights.safetensors")]
    assert pushed == [["README.md", *files]]
    card = (folder / "README.md").read_text()
    assert "| k3 | topk (k 3) | resid_post.3 | resid_post.3 | 40 | 0.75 | 3 | 0 |  |" in card
    with pytest.raises(UserError, match="the hub is gone"):
        go()
    assert [path.name for path in folder.iterdir()] == [STARTED]
