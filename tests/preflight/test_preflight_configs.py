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

FILES = sorted(CONFIGS.rglob("*.flags"))
# Files that are not for the whole pipeline.
STAGES_OF = dict(
    demo_graphs=["tokenize", "train"],
    demo_depth=["tokenize", "train"],
    circuits=["baseline", "circuits"],
    ground_truth=["known_circuits", "algorithm", "ground_truth", "report"],
) | {"synthsaebench-16k": ["ground_truth"]}


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
