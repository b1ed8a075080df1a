"""The flag files of both studies."""

import dataclasses
import re

import pytest
from absl import flags
from preflight_setup import CONFIGS, ONE

from saejax.attribution.cost import planned_graphs
from saejax.errors import UserError
from saejax.preflight.advice import GIB, SLICES
from saejax.preflight.shapes import read_shapes
from saejax.preflight.sums import Needs, plan_run
from saejax.runner import config
from saejax.runner.registry import GROUPS
from saejax.settings import AblateConfig, CaptureConfig, CorpusConfig, GraphConfig, StudyConfig, TaskConfig, TrainConfig
from saejax.training.stack_shape import named_sites

FILES = sorted(CONFIGS.glob("*.flags"))
OWN = ("demo", "addition")  # of models that are at hand, or made by the stage before
STUDIES = [path for path in FILES if "--model.path=" in path.read_text() and not path.name.startswith(OWN)]
FITS = re.compile(r"^# Fits a TPU slice: --preflight.topology=(\S+)(?: --mesh.model=(\d+))?", re.M)


def read(path) -> config.Configs:
    values = flags.FlagValues()
    config.define_flags(GROUPS, values)
    values(["binary", f"--flagfile={path}"])
    return config.from_flags(GROUPS, values)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_valid_and_commented(path):
    read(path)
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ") and sum(line.startswith("#") for line in lines) >= 2


def test_the_studies_models_and_layers():
    found = {path.stem: read(path) for path in STUDIES}
    layers = {
        "gpt2-medium-gsm8k": 12,
        "pythia-1.4b-gsm8k": 12,
        "gemma-2b-math": 9,
        "phi-2-logic": 16,
        "llama-3-8b-gsm8k": 16,
        "mistral-7b-gsm8k": 16,
    }
    for name, layer in layers.items():
        configs = found[name]
        assert configs[TrainConfig].sites == (f"resid_post.{layer}",) == configs[CaptureConfig].sites
        benchmarks = configs[TaskConfig].benchmarks
        assert benchmarks[0] == name.rpartition("-")[2] and configs[TaskConfig].score == "auto"
        study = configs[StudyConfig]
        assert study.benchmarks == benchmarks and study.draws >= 20 * len(benchmarks) - 1, "no yes would be possible"
        train = configs[TrainConfig]
        assert (train.kinds, train.expansion, train.l1, train.decorrelation) == (("linear",), 8, (1e-4,), 0.01)
        assert (train.batch, train.epochs, train.learning_rate) == (32, 20, (1e-4,))
    circuit = found["qwen3-4b-instruct-2507-behaviours"]
    assert circuit[CaptureConfig].last == 5
    assert circuit[CaptureConfig].sites == tuple(
        f"mlp_{end}.{layer}" for end in ("in", "out") for layer in range(10, 25)
    )
    assert {"qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-14b"} <= {x.rpartition("-")[0] for x in found}


def test_every_layer_of_four_models():
    found = [read(path) for path in FILES if path.stem.endswith("-all-layers")]
    assert sum(len(configs[CaptureConfig].sites) for configs in found) == 98
    for configs in found:
        train = configs[TrainConfig]
        assert (train.batch, train.epochs, train.l1_by_depth) == (64, 10, (1.5e-4, 1e-4, 5e-5))
        assert (
            configs[AblateConfig].dictionary
            == configs[StudyConfig].dictionary
            in [f"linear/{site}" for site in configs[CaptureConfig].sites]
        )


def test_training_from_the_model_needs_no_captured_sites(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    configs = read(CONFIGS / "demo_graphs.flags")
    configs |= dataclasses.replace(configs[AblateConfig], dictionary="topk/mlp_in.0")
    (shape,) = read_shapes(configs)
    (stack,) = plan_run(shape.path, shape.config, configs, ONE).stacks.values()
    assert [member.site for member in stack.members] == [f"mlp_in.{layer}" for layer in range(30)]
    configs |= dataclasses.replace(configs[TrainConfig], source="store")
    with pytest.raises(UserError, match="--train.sites needs mlp_in.0"):
        plan_run(shape.path, shape.config, configs, ONE)


def test_a_cross_layer_transcoder_costs_what_its_triangle_of_decoders_has(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    configs = read(CONFIGS / "demo_clt.flags")
    (shape,) = read_shapes(configs)
    plan = plan_run(shape.path, shape.config, configs, ONE, documents=800, tokens=120_000)
    weights, units = (30 + 465) * 576 * 576, Needs.of(plan).units
    unit = units["train/batchtopk"]
    assert 1 < units["evaluate/batchtopk"].bytes.dictionary / (4 * weights) < 1.1  # the first write of each layer twice
    assert 1 < unit.bytes.dictionary / (4 * weights) < 1.03 and unit.bytes.optimizer == 3 * unit.bytes.dictionary
    assert 6 * weights < unit.flops / 108_000 < 1.4 * 6 * weights  # the model's own passes come to it
    split = Needs.of(dataclasses.replace(plan, axes=ONE | dict(model=8))).units["train/batchtopk"]
    assert split.bytes.dictionary < unit.bytes.dictionary / 7
    with pytest.raises(UserError, match="--mesh.member=2"):
        Needs.of(dataclasses.replace(plan, axes=ONE | dict(member=2)))


def test_transcoders_of_all_layers_and_a_graph_of_them(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    path = CONFIGS / "qwen3-0.6b-transcoders.flags"
    configs = read(path)
    graph = dataclasses.replace(
        configs[GraphConfig], transcoders="runs/qwen3/train/topk", prompt="The capital of France is", target=" Paris"
    )
    (shape,) = read_shapes(configs)
    plan = plan_run(shape.path, shape.config, configs | graph, ONE)
    (stack,) = plan.stacks.values()
    assert [(member.site, member.target) for member in stack.members] == [
        (f"mlp_in.{layer}", f"mlp_out.{layer}") for layer in range(28)
    ]
    assert named_sites(configs[TrainConfig]) == [member.site for member in stack.members]  # straight from the model
    steps = configs[CorpusConfig].max_tokens // configs[TrainConfig].batch
    assert 48_800 <= steps < 48_900 and "48,800 steps" in path.read_text()
    buffer = configs[TrainConfig].buffer_rows * 2 * 28 * 1024 * 2
    assert Needs.of(plan).units["train/topk"].bytes.total + buffer < 80e9
    devices, gib = SLICES["v6e:2x4"]
    split = Needs.of(dataclasses.replace(plan, axes=dict(member=1, data=1, model=devices))).units["train/topk"]
    assert split.bytes.total + buffer < gib * GIB
    # The set is not trained yet, but its sizes are known.
    size = planned_graphs(plan).size
    assert size.transcoder.n_features == 16_384 and size.active == 64


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_each_fits_the_slice_that_it_names(path, monkeypatch):
    """By the estimate; the compiler's word takes minutes (test_preflight_topology)."""
    monkeypatch.chdir(CONFIGS.parent)
    configs = read(path)
    (shape,) = read_shapes(configs)
    assert shape.path.endswith(f"{path.stem.rpartition('-')[0]}.json")
    name, model = FITS.search(path.read_text()).groups()
    devices, gib = SLICES[name]
    axes = dict(member=1, data=devices // int(model or 1), model=int(model or 1))
    needs = Needs.of(plan_run(shape.path, shape.config, configs, axes))
    tested = {unit for unit in needs.units if unit.startswith("ablate/")} or needs.units  # without behaviours: all
    assert all(needs.units[unit].bytes.total < gib * GIB for unit in tested)
    assert configs[TrainConfig].batch % axes["data"] == 0
