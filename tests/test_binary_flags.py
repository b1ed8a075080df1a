"""Each binary accepts the flags of its stage and of the stages it reads, refuses others, and explains those it has."""

import pytest
import runs

from saejax.errors import UserError
from saejax.runner import command, command_line
from saejax.runner.config import Configs, flag_fields, group_name
from saejax.runner.registry import GROUPS, STAGES, accepted_groups, flag_of, with_inputs
from saejax.runner.workplan import Workplan
from saejax.settings import AblateConfig, CaptureConfig, PatchConfig, ProbeConfig, SteerConfig, StudyConfig, TrainConfig


def read(stages, *flags):
    return command_line.read_configs(command_line.stage_flags(), ["program", *flags], stages)


def test_stages_and_flags_are_those_of_a_stage_and_of_all_that_it_reads():
    assert with_inputs(["evaluate"]) == ["tokenize", "capture", "train", "evaluate"]
    assert sorted(accepted_groups(["capture"])) == ["capture", "corpus", "mesh", "model", "task"]
    for everything in (["report"], ["preflight"], list(STAGES)):
        assert set(accepted_groups(everything)) == set(GROUPS)


@pytest.mark.parametrize("flag", ["--patch.top=3", "--patch.top", "--notrain.zero_optimizer", "-train.k=3"])
def test_another_stages_flag_is_refused_on_the_command_line(flag, tmp_path, capsys):
    flags = [flag, "3"] if flag == "--patch.top" else [flag]
    assert command.run(["capture"], "", ["program", f"--workdir={tmp_path / 'run'}", *flags]) == 2
    name, owner = flag.lstrip("-").partition("=")[0], "patch" if "patch" in flag else "train or ground_truth"
    line = f"error: --{name} belongs to the stage {owner}, which capture does not read: "
    assert capsys.readouterr().err == line + "leave it out (in a flag file it is ignored)\n"
    assert not (tmp_path / "run").exists()


def test_another_stages_flag_is_ignored_in_a_file(tmp_path):
    file = tmp_path / "shared.flags"
    file.write_text("--patch.top=0\n--train.k=3\n--capture.bos=never\n")
    configs = read(["capture"], f"--flagfile={file}")
    assert (configs[CaptureConfig].bos, configs[PatchConfig], configs[TrainConfig]) == (
        "never",
        PatchConfig(),
        TrainConfig(),
    )
    assert read(["train"], f"--flagfile={file}")[TrainConfig].k == (3,)


def test_a_shared_flag_is_accepted_where_a_group_that_shares_it_is(tmp_path, capsys):
    configs = read(["ablate"], "--causal.seed=7", "--causal.batch_rows=5")
    assert (configs[AblateConfig].seed, configs[AblateConfig].batch_rows, configs[PatchConfig].seed) == (7, 5, 456)
    assert read(["patch"], "--causal.seed=7")[PatchConfig].seed == 7
    everything = read(None, "--causal.seed=7")
    assert {everything[group].seed for group in (AblateConfig, PatchConfig, SteerConfig, StudyConfig, ProbeConfig)} == {
        7
    }
    with pytest.raises(UserError, match=r"--causal.seed belongs to the stage ablate or .* which capture does not read"):
        read(["capture"], "--causal.seed=7")
    with pytest.raises(UserError, match=r"--causal.batch_rows is 0: expected at least 1"):
        read(["ablate"], "--causal.batch_rows=0")
    assert (flag_of("ablate", "seed"), flag_of("ablate", "top"), flag_of("train.topk", "k")) == (
        "causal.seed",
        "ablate.top",
        "train.topk.k",
    )


@pytest.mark.parametrize("stage", STAGES)
def test_help_lists_the_accepted_flags_with_their_defaults(stage):
    flag_values = command_line.stage_flags()
    command_line.read_configs(flag_values, ["program", "--help"], [stage])
    text = command_line.help_text([stage], "", flag_values)
    accepted = {flag for group in accepted_groups([stage]) for flag in flag_fields(group, GROUPS[group])}
    for group, cls in GROUPS.items():
        for flag in flag_fields(group, cls):
            assert text.count(f"\n  --{flag}  ") == (flag in accepted), (group, flag)
    lines = [line for line in text.splitlines() if line.startswith("  --")]
    assert all("(default: " in line or "(required)" in line or "--flagfile" in line for line in lines)


class Noting(Configs):
    """Settings that note which groups are looked at."""

    def __init__(self, configs):
        super().__init__(*configs)
        self.seen = set()

    def __getitem__(self, group):
        self.seen.add(group_name(group))
        return super().__getitem__(group)

    def named(self, name):
        self.seen.add(name)
        return super().named(name)


@pytest.mark.parametrize("stage", STAGES)
def test_units_and_hashes_of_a_stage_follow_from_the_groups_that_its_binary_accepts(stage, inputs, tmp_path):
    """Otherwise a binary, which ignores other flags, would make other units than the pipeline does."""
    changes = {f"{group}__{field}": value for group, field, value in (
        ("interpret", "dictionaries", "topk"), ("export", "dictionaries", "topk"), ("transfer", "dictionaries", "topk"),
        ("cluster", "dictionaries", "topk"), ("explain", "dictionaries", "topk"),
        ("explain", "url", "http://localhost/v1"), ("explain", "model", "judge"), ("track", "prompt", "A cat sat."),
        ("track", "dictionaries", "topk"), ("known", "circuits", "chain"), ("algorithm", "names", "addition"),
        ("truth", "features", "64"), ("patch", "kinds", "mlp_out"), ("patch", "dictionary", "topk"),
        ("probe", "labels", "answer"), ("steer", "dictionary", "topk"), ("ablate", "effects", "all"),
        ("graph", "behaviours", "capital"), ("circuits", "behaviours", "capital"),
        ("graph", "transcoders", str(tmp_path)), ("corpus", "stream", "True"),
    )}  # fmt: skip
    flags = runs.small_flags(*inputs, tmp_path / "run", **changes)
    configs = Noting(read(list(STAGES), *flags))
    units = STAGES[stage].units(configs)
    assert units or stage in ("benchmark", "study")  # without a hub there are no benchmarks
    STAGES[stage].check(configs)
    plan = Workplan(configs)
    if stage not in ("attribute", "circuits"):  # there is no set of transcoders
        marks = [plan.fingerprint(unit) for unit in units]
        alone = Workplan(read([stage], *flags))
        assert [alone.fingerprint(unit) for unit in units] == marks
    assert configs.seen <= set(accepted_groups([stage]))
