"""The flag files: their settings, and what of their jobs fits machines that are not here."""

import dataclasses

import jax
import pytest
import runs
from absl import flags
from preflight_setup import CONFIGS, needs_libtpu

from benchmarks import bench_jobs
from saejax import config
from saejax.errors import UserError
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.preflight import topology
from saejax.preflight.plan import check_dictionaries, plan_run
from saejax.preflight.shapes import read_shapes
from saejax.runner.flags import define_flags, from_flags
from saejax.runner.pipeline import RunOptions, run_stages
from saejax.runner.registry import all_groups, all_stages
from saejax.runner.workplan import Workplan
from saejax.stages.train.plan import train_programs
from saejax.training.members import choose_sites

FILES = sorted(CONFIGS.rglob("*.flags"))
# Files that are not for the whole pipeline.
STAGES_OF = dict(
    demo_graphs=["tokenize", "train"],
    demo_depth=["tokenize", "train"],
    circuits=["baseline", "circuits"],
    ground_truth=["known_circuits", "algorithm", "ground_truth", "report"],
) | {"synthsaebench-16k": ["ground_truth"]}
AT_HAND = ("demo", "addition")  # of models that are at hand, or made by the stage before
STUDIES = [
    path
    for path in CONFIGS.glob("*.flags")
    if "--model.path=" in path.read_text() and not path.name.startswith(AT_HAND)
]


def plan_of(shape, configs):
    return plan_run(shape.path, shape.config, configs, make_mesh(MeshConfig(), jax.devices()[:1]))


def read(path) -> config.Configs:
    values = flags.FlagValues()
    define_flags(all_groups(), values)
    values(["binary", f"--flagfile={path}"])
    return from_flags(all_groups(), values)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_file_is_commented_and_no_stage_refuses_it(path, monkeypatch):
    """Its units have fingerprints, and its sites and dictionaries are there, before anything runs."""
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ") and (path.parent != CONFIGS or sum(line.startswith("#") for line in lines) >= 2)
    monkeypatch.chdir(CONFIGS.parent)
    configs = read(path)
    # Files of the hub and of earlier runs are not here: what they hold counts as nothing.
    here = {name: dataclasses.replace(stage, inputs=stage.units_read) for name, stage in all_stages().items()}
    for name, stage in here.items():
        monkeypatch.setitem(all_stages(), name, stage)
    units = [unit for name in STAGES_OF.get(path.stem, here) for unit in here[name].units(configs)]
    plan = Workplan(configs)
    plan.check(units)
    marks = [plan.fingerprint(part) for unit in units for part in (unit, *(f"{unit}/{m}" for m in plan.members(unit)))]
    assert len(set(marks)) == len(marks) >= 1
    preflight, study = configs.named("preflight"), configs.named("study")
    if study.benchmarks:
        enough = 20 * len(study.benchmarks) - 1
        assert min(study.random_sets, study.placebo_targets) >= enough, "no yes would be possible"
    if path.stem not in STAGES_OF and not configs.named("model").path.startswith("runs/"):
        if not preflight.models:
            configs |= dataclasses.replace(preflight, models=("configs/shapes/smollm2-135m.json",))
        for shape in read_shapes(configs):
            check_dictionaries(plan_of(shape, configs))


def test_what_a_later_stage_refuses_is_refused_before_any_runs(tmp_path):
    """Also in a dry run: training from the model takes no "all" sites, and is scored on stored ones."""
    configs = runs.make_configs(train__source="model", train__sites=("all",))
    for changes, words in (
        ({}, "--train.sites=all with --train.source=model: name the sites"),
        (dict(sites=("resid_post.3", "resid_post.4")), "stored activations of resid_post.3 and 1 more, which"),
    ):
        configs |= dataclasses.replace(configs.named("train"), **changes)
        for dry_run in (False, True):
            with pytest.raises(UserError, match=words):
                run_stages([*all_stages()], configs, tmp_path / "run", options=RunOptions(dry_run=dry_run))
    assert not [*tmp_path.rglob("*.json")]


def test_the_studies_models_and_layers():
    studies = {path.stem: read(path) for path in STUDIES}
    layers = {"gpt2-medium-gsm8k": 12, "pythia-1.4b-gsm8k": 12, "gemma-2b-math": 9, "phi-2-logic": 16}
    layers |= {"llama-3-8b-gsm8k": 16, "mistral-7b-gsm8k": 16}
    for name, layer in layers.items():
        configs = studies[name]
        study, train, benchmarks = configs.named("study"), configs.named("train"), configs.named("task").benchmarks
        assert train.sites == (f"resid_post.{layer}",) == configs.named("capture").sites
        assert benchmarks[0] == name.rpartition("-")[2] and configs.named("task").score == "auto"
        assert study.benchmarks == benchmarks
        assert (train.kinds, train.expansion, train.l1, train.decorrelation) == (("linear",), (8,), (1e-4,), 0.01)
        assert (train.batch, train.epochs, train.learning_rate) == (32, 20, (1e-4,))
    capture = studies["qwen3-4b-instruct-2507-behaviours"].named("capture")
    sites = tuple(f"{kind}.{layer}" for kind in ("resid_post", "mlp_in", "mlp_out") for layer in range(10, 25))
    assert capture.last == 5 and capture.sites == sites
    assert {"qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-14b"} <= {x.rpartition("-")[0] for x in studies}


def test_every_layer_of_four_models():
    models = [read(path) for path in FILES if path.stem.endswith("-all-layers")]
    assert sum(len(configs.named("capture").sites) for configs in models) == 98
    for configs in models:
        train, dictionary = configs.named("train"), configs.named("ablate").dictionary
        assert (train.batch, train.epochs, train.l1_by_depth) == (64, 10, (1.5e-4, 1e-4, 5e-5))
        assert dictionary == configs.named("study").dictionary
        assert dictionary in [f"linear/{site}" for site in configs.named("capture").sites]


def test_training_from_the_model_needs_no_captured_sites(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    configs = read(CONFIGS / "demo_graphs.flags")
    configs |= dataclasses.replace(configs.named("ablate"), dictionary="topk/mlp_in.0")
    (shape,) = read_shapes(configs)
    (stack,) = plan_of(shape, configs).stacks.values()
    assert [member.site for member in stack.members] == [f"mlp_in.{layer}" for layer in range(30)]
    configs |= dataclasses.replace(configs.named("train"), source="store")
    with pytest.raises(UserError, match="--train.sites needs mlp_in.0"):
        plan_of(shape, configs)


def test_transcoders_of_all_layers_and_a_graph_of_them(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    path = CONFIGS / "qwen3-0.6b-transcoders.flags"
    configs = read(path)
    prompt = dict(prompt="The capital of France is", target=" Paris")
    graph = dataclasses.replace(configs.named("graph"), transcoders="runs/qwen3/train/topk", **prompt)
    (shape,) = read_shapes(configs)
    plan = plan_of(shape, configs | graph)
    (stack,) = plan.stacks.values()
    assert [(member.site, member.target) for member in stack.members] == [
        (f"mlp_in.{layer}", f"mlp_out.{layer}") for layer in range(28)
    ]
    assert choose_sites(configs.named("train"), None) == [member.site for member in stack.members]
    steps = configs.named("corpus").max_tokens // configs.named("train").batch
    assert 48_800 <= steps < 48_900 and "48,800 steps" in path.read_text()
    assert (stack.dictionary.n_features, stack.dictionary.k) == (16_384, 64)


def test_phi_2s_32_layers_fit_one_device_of_80_gb_in_turn(monkeypatch, quick_compiler):
    monkeypatch.chdir(CONFIGS.parent)
    configs = read(CONFIGS / "phi-2-all-layers.flags")
    (shape,) = read_shapes(configs)
    limit = topology.find_slice("a100-80:1").limit
    plan = plan_of(shape, configs)
    (stack,) = plan.stacks.values()
    assert (len(stack.members), stack.dictionary.d_in, stack.dictionary.n_features) == (32, 2560, 8 * 2560)
    (step,) = train_programs(plan, plan.mesh)
    compiled = topology.compile_for(step, limit)
    weights = 32 * 2 * 2560 * 20_480 * 4  # of all members; Adam has two means of them
    assert 3 * weights < compiled.memory < 4.5 * weights and compiled.fits, "57 GB; with all members at once 82 GB"


@pytest.mark.slow
@pytest.mark.parametrize("job", ["node", "nodes", pytest.param("slice", marks=needs_libtpu)])
def test_every_program_of_a_large_job_fits(job):
    """A dictionary for each of Qwen3-4B's layers, from its text to its report."""
    results = bench_jobs.programs(CONFIGS / "large/qwen3-4b-every-layer.flags", job)
    (needs,) = results.models
    assert needs.layers == 36 and needs.fits and needs.peak_bytes < results.limit_bytes
    stages = {program.name.partition(":")[0] for program in needs.programs}
    assert stages == {"capture", "train", "evaluate", "ablate"}
    for program in needs.programs:
        assert program.fits, program.name
