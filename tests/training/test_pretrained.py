"""Dictionaries that other tools made, in every stage: as a train unit, and named by their folders."""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import runs

sys.path.append(str(Path(__file__).parents[1] / "dictionaries"))
sys.path.append(str(Path(__file__).parents[1] / "tasks"))
import foreign_formats as foreign
from benchmark_rows import write_all

from saejax import load_dictionary, load_model, load_results, save_dictionary, save_transcoders
from saejax.activations.store import Store
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.dictionaries.formats.circuit_tracer import save_cross_layer
from saejax.errors import UserError
from saejax.runner import command
from saejax.stages.train.plan import planned_stacks
from saejax.stages.train.pretrained import find_pretrained
from saejax.training.settings import TrainConfig

pytestmark = pytest.mark.usefixtures("single_device")
D, F = 32, 64
FORMATS = ("own", "saelens", "gemma_scope", "gemma_scope_2", "llama_scope", "qwen_scope", "sparsify")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A dictionary of the first layer in every format."""
    root = tmp_path_factory.mktemp("elsewhere")
    names = ["own", "saelens", "gemma-scope-2b-pt-res/layer_0/width_64", "resid_post_all/layer_0_width_64_l0_small"]
    names += ["L0R-2x", "layer0.sae.pt", "layers.0"]
    folders = dict(zip(FORMATS, (root / name for name in names), strict=True))
    config = DictionaryConfig(kind="standard", site="resid_post.0", d_in=D, n_features=F)
    made = Dictionary.initial(config, jax.random.key(0))
    save_dictionary(folders["own"], made)
    save_dictionary(folders["saelens"], made, "saelens")
    foreign.gemma_scope(folders["gemma_scope"], D, F)
    foreign.gemma_scope(folders["gemma_scope_2"], D, F, version=2)
    foreign.llama_scope(folders["llama_scope"], D, F)
    foreign.qwen_scope(folders["qwen_scope"], D, F, k=16)
    foreign.sparsify(folders["sparsify"], D, F, k=16)
    return folders


@pytest.fixture(scope="module")
def transcoders(tmp_path_factory):
    """A circuit-tracer set of the model's two layers."""
    fields, layers = dict(kind="jumprelu", d_in=D, n_features=F, centred=False, model="some"), []
    for i in (0, 1):
        config = DictionaryConfig(site=f"mlp_in.{i}", target=f"mlp_out.{i}", **fields)
        layers.append(Dictionary.initial(config, jax.random.key(i)))
    folder = tmp_path_factory.mktemp("set") / "transcoders"
    save_transcoders(folder, layers)
    return folder


@pytest.fixture(scope="module")
def workdir(inputs, places, tmp_path_factory):
    """A store, and all of them taken and scored."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    assert go(["baseline", "capture", "train", "evaluate"], inputs, folder, places) == 0
    return folder


def go(stages, inputs, folder, places, **changes) -> int:
    named = ",".join(map(str, places.values()))
    taken = dict(train__kinds="pretrained", train__pretrained=named) if places else {}
    taken["capture__sites"] = "resid_post.0,mlp_in.0-1,mlp_out.0-1"
    return command.run(stages, "", ["program", *runs.small_flags(*inputs, folder, **taken | changes)])


def test_they_are_scored_as_what_they_are(workdir, places):
    trained, scores = (load_results(workdir / stage / "pretrained") for stage in ("train", "evaluate"))
    assert [one.settings["from"] for one in trained.members] == [str(place) for place in places.values()]
    assert [one.name for one in scores.members] == [one.name for one in trained.members]
    assert trained.members[5].name == "resid_post.0-layer0.sae.pt" and trained.members[5].settings["k"] == 16
    store = Store.open(workdir / "capture")
    x = store.read("resid_post.0", store.rows("held_out", "resid_post.0")).astype(np.float32)
    for place, one in zip(places.values(), scores.members, strict=True):
        dictionary = load_dictionary(place)
        error = np.square(x - np.asarray(dictionary(x), np.float64)).sum() / np.square(x - x.mean(0)).sum()
        assert one.explained_variance == pytest.approx(1 - error, rel=1e-3)
        assert one.l0 == pytest.approx(float((np.asarray(dictionary.encode(x)) > 0).sum(1).mean()), rel=1e-4)


def test_a_set_is_taken_layer_by_layer_and_names_tell_dictionaries_apart(transcoders, places, tmp_path):
    pairs = [("mlp_in.0", "mlp_out.0"), ("mlp_in.1", "mlp_out.1"), ("resid_post.0", "resid_post.0")]
    taken = find_pretrained([str(transcoders), str(places["own"])])
    assert [(each.name, each.target) for each in taken] == pairs
    assert [each.load().config.site for each in taken] == [each.site for each in taken]
    copies = [tmp_path / run / "train" / "own" for run in ("a", "b")]
    for copy in copies:
        shutil.copytree(places["own"], copy)
    taken = find_pretrained([*map(str, copies), str(places["saelens"])])
    ends = ["a-train-own", "b-train-own", "saelens"]
    assert [each.name for each in taken] == [f"resid_post.0-{end}" for end in ends]


def test_a_file_may_stand_for_its_folder(places):
    taken = find_pretrained([str(places["saelens"] / "sae_weights.safetensors")])
    assert [(each.name, each.load().site) for each in taken] == [("", "resid_post.0")]


def test_another_dictionary_in_its_place_is_taken_anew(workdir, inputs, places, tmp_path, capsys):
    run = tmp_path / "run"
    runs.copy_run(workdir, run)
    copy = tmp_path / "L0R-2x"
    shutil.copytree(places["llama_scope"], copy)
    only = dict(llama_scope=copy)
    assert go(["train"], inputs, run, only) == 0
    assert load_results(run / "train" / "pretrained").members[0].name == ""  # one alone
    assert go(["train"], inputs, run, only) == 0
    capsys.readouterr()
    settings = json.loads((copy / "hyperparams.json").read_text()) | dict(jump_relu_threshold=0.5)
    (copy / "hyperparams.json").write_text(json.dumps(settings))
    assert go(["train"], inputs, run, only) == 0
    assert "train/pretrained: done" in capsys.readouterr().out
    assert float(load_dictionary(run / "train" / "pretrained").threshold_F[0]) == 0.5


@pytest.mark.parametrize(
    "addresses,message",
    [
        ([], "--train.kinds=pretrained needs --train.pretrained=FOLDER"),
        (["own", "own"], r"--train.pretrained names .*/own twice: name each dictionary once"),
        (["nowhere"], "--train.pretrained: .*nowhere holds no dictionary"),
        (["unknown"], "unknown does not say which site it reads .unknown.: load it with site="),
        (
            ["cross_layer"],
            "--train.pretrained: .*cross_layer is a cross-layer transcoder, whose",
        ),
    ],
)
def test_what_cannot_be_taken_is_refused(addresses, message, places, tmp_path):
    foreign.gemma_scope(tmp_path / "unknown", D, F)
    config = DictionaryConfig(kind="standard", site="mlp_in.0", target="mlp_out.0", d_in=D, n_features=F, centred=False)
    layer = Dictionary.initial(config, jax.random.key(0))
    save_cross_layer(tmp_path / "cross_layer", 1, lambda index: (layer, np.asarray(layer.W_dec_FxD[...])[:, None]))
    with pytest.raises(UserError, match=message):
        find_pretrained([str(places.get(name, tmp_path / name)) for name in addresses])


def test_plans_know_their_sites_and_widths(inputs, places):
    model = load_model(str(inputs[0])).config

    def planned(place, captured=("resid_post.0",)):
        return planned_stacks(TrainConfig(kinds=("pretrained",), pretrained=(str(place),)), captured, model)

    stack = planned(places["qwen_scope"])["pretrained"]
    assert [member.site for member in stack.members] == ["resid_post.0"]
    assert stack.dictionary.n_features == F
    with pytest.raises(UserError, match="--train.pretrained needs resid_post.0, which --capture.sites=resid_post.1 "):
        planned(places["own"], ("resid_post.1",))
    wide = foreign.llama_scope(places["own"].parent / "wide", D + 1, F)
    with pytest.raises(UserError, match="wide reads 33 dimensions, but resid_post.0 has 32"):
        planned(wide)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FORMATS, "circuit_tracer"])
def test_each_format_goes_through_each_stage(name, workdir, inputs, places, transcoders, tmp_path):
    """By its folder where a stage takes one dictionary, and as the train unit where it takes units."""
    only = {name: places.get(name, transcoders)}
    run, place = tmp_path / "run", str(places.get(name, "pretrained/mlp_in.0"))
    runs.copy_run(workdir, run)
    benchmarks = dict(task__benchmarks="gsm8k", task__path=write_all(tmp_path / "benchmarks"), task__shots=0)
    benchmarks |= dict(task__examples=12, task__max_new_tokens=6, study__benchmarks="gsm8k")
    benchmarks |= dict(study__top=2, causal__random_sets=2, causal__placebo_targets=2, task__score="likelihood")
    tested = {f"{stage}__dictionary": place for stage in ("ablate", "patch", "probe", "steer", "study")}
    units = {f"{stage}__dictionaries": "pretrained" for stage in ("interpret", "transfer", "track", "export")}
    more = dict(probe__labels="answer", graph__prompt="The river follows the teacher")
    more |= dict(graph__transcoders=transcoders)
    beside = f"pretrained,{place}" if name in places else "pretrained"
    more |= dict(transfer__measures="decoder", transfer__dictionaries=beside)
    more |= dict(track__prompts=tmp_path / "prompts.jsonl")
    (tmp_path / "prompts.jsonl").write_text(json.dumps(dict(slug="river", prompt="The river follows the teacher")))
    stages = ["benchmark", "interpret", "ablate", "patch", "probe", "steer", "study", "attribute", "atlas"]
    # SAELens has no TopK that keeps negative activations.
    stages += ["transfer", "track"] if name == "qwen_scope" else ["transfer", "track", "export"]
    assert go(["train", "evaluate"], inputs, run, only) == 0
    assert go([*stages, "report"], inputs, run, only, **benchmarks | tested | units | more) == 0
    for stage in stages:
        assert list((run / stage).rglob("done.json")), stage
    assert (run / "report" / "index.html").exists()
