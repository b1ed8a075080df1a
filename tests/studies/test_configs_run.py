"""Every flag file of the studies, end to end, on a tiny random model of its family with a tokenizer in its format."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
import yaml
from absl import flags
from safetensors.numpy import save_file
from tiny_models import save_tiny

from saejax import load_model, load_results
from saejax.activations.store import Store
from saejax.config import Configs
from saejax.runner import command
from saejax.runner.flags import define_flags, from_flags
from saejax.runner.registry import all_groups, all_stages
from saejax.runner.workplan import Workplan
from saejax.studies.rows import read_rows
from saejax.tasks.benchmark_definitions import LOGIC_TASKS
from saejax.training.members import make_members

sys.path.insert(0, str(Path(__file__).parent.parent / "tasks"))
from tokenizer_kinds import tokenizer

from saejax.activations.settings import CaptureConfig
from saejax.interventions.settings import StudyConfig
from saejax.tasks.settings import TaskConfig
from saejax.training.settings import TrainConfig

pytestmark = pytest.mark.usefixtures("single_device")

CONFIGS = Path(__file__).parent.parent.parent / "configs"
# Stem of a file, up to the benchmark -> family, and format of the tokenizer.
MODELS = {
    "gpt2-medium": ("gpt2", "gpt2"),
    "pythia-1.4b": ("gpt_neox", "pythia"),
    "gemma-2b": ("gemma", "gemma"),
    "phi-2": ("phi", "phi2"),
    "llama-3-8b": ("llama", "llama3"),
    "mistral-7b": ("mistral", "mistral"),
    "smollm2-135m": ("llama", "gpt2"),
    "qwen3": ("qwen3", "qwen3"),
}
PUBLISHED = "qwen3-4b-instruct-2507-behaviours"  # with transcoders of others: nothing is trained
FILES = [
    path for path in sorted(CONFIGS.glob("*.flags")) if path.stem.startswith(tuple(MODELS)) and path.stem != PUBLISHED
]


def model_of(path: Path, folder: Path, layers: int) -> Path:
    """A tiny random model with as many layers as the file's sites need."""
    family, kind = next(found for stem, found in MODELS.items() if path.stem.startswith(stem))
    names = dict(gpt2=dict(n_layer=layers, n_positions=256)).get(family)
    changes = names or dict(num_hidden_layers=layers, max_position_embeddings=256)
    save_tiny(folder, family, vocab_size=3100, **changes)
    tokenizer(kind).save_pretrained(folder)
    return folder


def write_benchmarks(folder: Path) -> Path:
    def write(path: Path, rows: list[dict]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    for number, name in enumerate(LOGIC_TASKS):  # no question is asked twice
        rows = [dict(input=f"{number}: pick {a}\n(A) x\n(B) y\n(C) z", target=f"({a})") for a in "BAC"]
        if name in ("boolean_expressions", "web_of_lies"):
            rows = [dict(input=f"{number}: is {n}", target="True" if name[0] == "b" else "No") for n in range(3)]
        write(folder / "logic" / f"{name}.jsonl", rows)
    write(folder / "gsm8k.jsonl", [dict(question=f"{n} + 3?", answer=f"{n + 3}\n#### {n + 3}") for n in range(12)])
    write(folder / "math.jsonl", [dict(problem=f"{n} + 3?", solution=f"\\boxed{{{n + 3}}}") for n in range(12)])
    return folder


SMALL = """
--task.train_prompts=6 --task.test_prompts=4 --task.gate=1 --task.examples=12 --task.shots=0 --task.max_new_tokens=3
--corpus.max_tokens=1500 --corpus.held_out=0.3 --capture.max_sink_share=0.5 --preflight.models=
--train.expansion=2 --train.epochs=1 --train.k=8 --evaluate.ce_documents=2
--ablate.top=2 --ablate.baselines=pca --ablate.untrained_dictionaries=0 --ablate.text_documents=2
--causal.random_sets=6 --causal.placebo_targets=4
--study.items=6 --study.top=2 --study.scored_sets=1 --study.untrained_dictionaries=3
"""


def small(configs: dict, model: Path, folder: Path) -> list[str]:
    """Flags that make a file's run small: its model, sites, kinds, losses and tests are those of the file."""
    own = [*SMALL.split(), f"--workdir={folder / 'run'}", f"--model.path={model}"]
    own += [f"--task.path={write_benchmarks(folder / 'benchmarks')}"]
    own += [f"--corpus.path={runs.save_corpus(folder / 'corpus.jsonl.gz')}"]
    if configs[CaptureConfig].last:  # so few positions of a document are no batch
        own += ["--train.batch=32"]
    if configs[TrainConfig].source == "model":
        own += ["--train.buffer_rows=512", "--train.batch=128"]
    return own


def read_file(path: Path) -> Configs:
    """Return the settings of a file, which names others from the working directory."""
    values = flags.FlagValues()
    define_flags(all_groups(), values)
    values(["binary", f"--flagfile={path}"])
    return from_flags(all_groups(), values)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_names_dictionaries_that_are_trained(path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    configs = read_file(path)
    plan = Workplan(configs)
    for stage in ("ablate", "study"):
        for unit in all_stages()[stage].units(configs):
            assert plan.needs(unit), unit


@pytest.mark.slow  # each stage has fast tests, and the files are read above
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_ends_in_its_report(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(CONFIGS.parent)
    configs = read_file(path)
    layers = 1 + max(int(name.rpartition(".")[2]) for name in configs[CaptureConfig].sites)
    own = small(configs, model_of(path, tmp_path / "model", layers), tmp_path)
    assert command.run(all_stages(), "", ["pipeline", f"--flagfile={path}", *own]) == 0, capsys.readouterr().err
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    text = re.sub("<[^>]*>", " ", page)
    for benchmark in configs[StudyConfig].benchmarks:
        assert f"{benchmark} (" in text and (tmp_path / "run" / "study" / benchmark / "done.json").exists()
    for benchmark in configs[TaskConfig].benchmarks:
        assert benchmark in text
    assert "Explained variance" in text and "How to reproduce" in text


@pytest.mark.parametrize("folder", ["study", "phase4", "phase5"])
def test_rows_of_a_folder_name_dictionaries_that_are_trained(folder, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    rows = read_rows([f"configs/{folder}"], [])
    controls = [row.configs[StudyConfig].control for row in rows]
    assert controls == (["", "relative", "stranger"] if folder == "study" else [""] * 4)
    for row in rows:
        train, capture, study = (row.configs[group] for group in (TrainConfig, CaptureConfig, StudyConfig))
        sites = capture.sites if train.sites == ("all",) else train.sites
        made = {member.name for kind in train.kinds for member in make_members(train, kind, sites)}
        named = (study.dictionary, *study.repeats)
        assert {name.partition("/")[2] for name in named} <= made and study.falsify
        assert len(named) == (1 if folder == "phase5" else 3)


def write_published_set(folder: Path, model: Path, features: int = 32) -> Path:
    """A set in the layout of the published ones: a file for each layer, ReLU, feature files beside them."""
    lm, rng = load_model(str(model)), np.random.default_rng(0)
    width = lm.config.d_model
    folder.mkdir()
    hooks = dict(feature_input_hook="mlp.hook_in", feature_output_hook="mlp.hook_out")
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(model_name="some", model_kind="transcoder_set", **hooks)))
    (folder / "features").mkdir()
    for layer in range(lm.config.n_layers):
        arrays = {name: rng.normal(size=(features, width)) / width**0.5 for name in ("W_enc", "W_dec")}
        arrays |= dict(b_enc=np.zeros(features), b_dec=np.zeros(width))
        arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
        save_file(arrays, folder / f"layer_{layer}.safetensors")
        for feature in range(features):
            context = dict(tokens=["a", " word"], tokens_acts_list=[0.0, 1.0])
            known = dict(examples_quantiles=[dict(examples=[context])])
            known |= dict(label=f"label {layer}.{feature}") if feature % 2 else {}  # most published ones have none
            (folder / "features" / f"{layer}_{feature}.json").write_text(json.dumps(known))
    return folder


@pytest.mark.slow  # another file goes through its stages above, and the plan of this one is made below
def test_published_transcoders_by_name(tmp_path, monkeypatch, capsys):
    """The file's stages on a tiny model of the family: graphs and circuits open with labels, nothing is trained."""
    monkeypatch.chdir(CONFIGS.parent)
    model = model_of(CONFIGS / f"{PUBLISHED}.flags", tmp_path / "model", 3)
    transcoders = write_published_set(tmp_path / "set", model)
    own = [f"--workdir={tmp_path / 'run'}", f"--model.path={model}", f"--graph.transcoders={transcoders}"]
    own += [f"--{group}.behaviours=addition" for group in ("task", "graph", "circuits")]
    own += ["--circuits.traced=2"]
    own += [flag for flag in SMALL.split() if flag.startswith(("--task.t", "--task.g", "--causal", "--ablate.t"))]
    layer = transcoders / "layer_1.safetensors"  # its features are ablated and patched one layer at a time
    own += ["--model.dtype=float32", f"--ablate.dictionary={layer}", f"--patch.dictionary={layer}"]
    own += ["--ablate.baselines=", "--ablate.untrained_dictionaries=0"]
    stages = ["baseline", "patch", "attribute", "circuits", "ablate"]
    flagfile = f"--flagfile={CONFIGS / PUBLISHED}.flags"
    assert command.run(stages, "", ["pipeline", flagfile, *own]) == 0, capsys.readouterr().err
    run = tmp_path / "run"
    assert not (run / "train").exists() and not (run / "capture").exists()
    page = run / "circuits" / "addition.html"
    for path in (run / "attribute" / "behaviours" / "addition.html", page):
        assert "label 1." in path.read_text()
    drawn = page.with_suffix(".svg").read_text()  # text is drawn as paths, and is said in comments
    assert "“word”" in drawn and "label" in drawn and not re.search(r"<!-- (feature |#)\d+ -->", drawn)
    assert "Published claims" in (run / "circuits" / "index.html").read_text()
    (tested,) = (unit for unit in (run / "ablate").iterdir() if unit.is_symlink())
    ablated = load_results(run, f"ablate/{tested.name}")
    assert ablated.site.endswith(".1") and set(ablated.top) == {"addition"}
    patched = {unit.name for unit in (run / "patch").iterdir() if unit.is_symlink()}
    assert patched == {"resid_post", "mlp_out", tested.name}
    # The activations that the file records: of the behaviours' prompts, at their last 5 positions.
    own = [flag for flag in own if flag.startswith(("--workdir", "--model", "--task"))]
    own += [f"--corpus.path={run / 'baseline' / 'prompts.jsonl'}", "--capture.dtype=float32"]
    own += ["--capture.sites=resid_post.1-2,mlp_in.1-2,mlp_out.1-2", "--capture.max_sink_share=0.5"]
    assert command.run(["capture"], "", ["capture", flagfile, *own]) == 0, capsys.readouterr().err
    store = Store.open(run / "capture")
    assert 0 < len(store.rows("train", "mlp_in.1")) <= 20 * 5


def test_published_transcoders_are_planned_for_one_device(tmp_path, monkeypatch, capsys):
    """Memory and time of one A100 without the model, the set, or the device."""
    monkeypatch.chdir(CONFIGS.parent)
    flagfile = f"--flagfile={CONFIGS / PUBLISHED}.flags"
    flags = ["preflight", f"--workdir={tmp_path}", flagfile, "--preflight.topology=a100-80:1"]
    assert command.run(["preflight"], "", flags) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "ablate: " in said and "device-hours" in said
