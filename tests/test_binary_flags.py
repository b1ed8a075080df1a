"""Each binary accepts the flags of its stage and of the stages it reads, refuses others, and explains those it has."""

import os
import re
import sys

import pytest
import runs
from absl import flags

from saejax import cli
from saejax.activations.settings import CaptureConfig
from saejax.config import Configs, group_name, own_settings
from saejax.errors import UserError
from saejax.interventions.settings import AblateConfig, PatchConfig, ProbeConfig, SteerConfig, StudyConfig
from saejax.runner import command, command_line
from saejax.runner.flags import flag_fields
from saejax.runner.registry import accepted_groups, all_groups, all_stages, flag_of, with_inputs
from saejax.runner.workplan import Workplan
from saejax.tasks.settings import CorpusConfig
from saejax.training.settings import TrainConfig


def read(stages, *flags):
    return command_line.read_configs(command_line.stage_flags(), ["program", *flags], stages)


def test_stages_and_flags_are_those_of_a_stage_and_of_all_that_it_reads():
    assert with_inputs(["evaluate"]) == ["tokenize", "capture", "train", "evaluate"]
    assert sorted(accepted_groups(["capture"])) == ["capture", "corpus", "mesh", "model", "task"]
    for everything in (["report"], ["preflight"], list(all_stages())):
        assert set(accepted_groups(everything)) == set(all_groups())


@pytest.mark.parametrize("flag", ["--patch.positions=3", "--patch.positions", "--notrain.zero_optimizer", "-train.k=3"])
def test_another_stages_flag_is_refused_on_the_command_line(flag, tmp_path, capsys):
    flags = [flag, "3"] if flag == "--patch.positions" else [flag]
    assert command.run(["capture"], "", ["program", f"--workdir={tmp_path / 'run'}", *flags]) == 2
    name, owner = flag.lstrip("-").partition("=")[0], "patch" if "patch" in flag else "train or ground_truth"
    line = f"error: --{name} belongs to the stage {owner}, which capture does not read: "
    assert capsys.readouterr().err == line + "leave it out (in a flag file it is ignored)\n"
    assert not (tmp_path / "run").exists()


def test_another_stages_flag_is_ignored_in_a_file(tmp_path):
    flag = runs.flag_file(["--patch.positions=0", "--train.k=3", "--capture.bos=never"], tmp_path)
    configs = read(["capture"], flag)
    assert configs[CaptureConfig].bos == "never"
    assert (configs[PatchConfig], configs[TrainConfig]) == (PatchConfig(), TrainConfig())
    assert read(["train"], flag)[TrainConfig].k == (3,)


def test_a_shared_flag_is_accepted_where_a_group_that_shares_it_is():
    configs = read(["ablate"], "--causal.seed=7", "--causal.batch_rows=5")
    assert (configs[AblateConfig].seed, configs[AblateConfig].batch_rows, configs[PatchConfig].seed) == (7, 5, 456)
    assert read(["patch"], "--causal.seed=7")[PatchConfig].seed == 7
    shared = read(None, "--causal.seed=7")
    assert {shared[group].seed for group in (AblateConfig, PatchConfig, SteerConfig, StudyConfig, ProbeConfig)} == {7}
    with pytest.raises(UserError, match=r"--causal.seed belongs to the stage ablate or .* which capture does not read"):
        read(["capture"], "--causal.seed=7")
    with pytest.raises(UserError, match=r"--causal.batch_rows is 0: expected at least 1"):
        read(["ablate"], "--causal.batch_rows=0")
    assert [flag_of(setting) for setting in ("ablate.seed", "ablate.top", "train.topk.k")] == [
        "causal.seed", "ablate.top", "train.topk.k",
    ]  # fmt: skip


@pytest.mark.parametrize("stage", all_stages())
def test_help_lists_the_accepted_flags_with_their_defaults(stage):
    flag_values = command_line.stage_flags()
    command_line.read_configs(flag_values, ["program", "--help"], [stage])
    text = command_line.help_text([stage], "", flag_values)
    accepted = {flag for group in accepted_groups([stage]) for flag in flag_fields(group, all_groups()[group])}
    for group, cls in all_groups().items():
        for flag in flag_fields(group, cls):
            assert text.count(f"\n  --{flag}  ") == (flag in accepted), (group, flag)
    lines = [line for line in text.replace("\n      ", " ").splitlines() if line.startswith("  --")]
    assert all("(default: " in line or "(required)" in line for line in lines)
    first = text.replace("\n      ", " ").split("\n\n")[1].splitlines()
    assert first[0] == "The most common flags:" and 3 <= len(first) <= 11


@pytest.mark.parametrize(
    "wrong", [dict(b2=1.0), dict(bootstrap=1), dict(top=0), dict(strengths=(0.0,)), dict(seed=-1)], ids=str
)
def test_settings_that_are_no_flags_are_checked(wrong):
    (name,) = wrong
    group = dict(b2=TrainConfig, bootstrap=AblateConfig, top=PatchConfig, strengths=ProbeConfig, seed=CorpusConfig)[
        name
    ]
    assert name not in flag_fields(group_name(group), group) and name not in own_settings(group)
    with pytest.raises(UserError, match=rf"^{name} is .*: expected at "):
        group(**wrong)


def test_there_are_few_flags():
    """Each is one more that a reader of ``--help`` must pass by; a setting that nobody changes is a plain field."""
    flag_values = command_line.stage_flags()
    command_line.read_configs(flag_values, ["program", "--help"])
    text = command_line.help_text(list(all_stages()), "", flag_values)
    # Without those of a plugin that other tests import, and without --help. Commands that are no stages have five more.
    listed = {flag for flag in re.findall(r"^  --([\w.]+)  ", text, re.M) if not flag.startswith("train.shrunk.")}
    assert len(listed) <= 225


@pytest.mark.parametrize("width", [60, 100, 163])
def test_help_fits_the_terminal(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    flag_values = command_line.stage_flags()
    command_line.read_configs(flag_values, ["program", "--help"])
    lines = command_line.help_text(list(all_stages()), "about", flag_values).splitlines()
    assert all(len(line) <= width or len(line.split()) == 1 for line in lines) and max(map(len, lines)) > width - 8
    assert lines[3].startswith("  --workdir  ")


def test_the_command_line_wins_over_a_flag_file(tmp_path, capsys):
    """In either order, and however the file is named; of several files the later one counts."""
    file = tmp_path / "mine.flags"
    lines = "--train.k=3\n# one line\u2028--train.k=x\r\n--train.zero_optimizer\n--train.kinds=topk\n"
    file.write_text(f"--workdir={tmp_path / 'other'}\n{lines}")
    (tmp_path / "later.flags").write_text("--train.kinds=standard\n")
    given = [f"--workdir={tmp_path / 'run'}", "--train.k=5", "--notrain.zero_optimizer"]
    for named in ([f"--flagfile={file}"], ["--flagfile", str(file)], [f"-flagfile={file}"]):
        for arguments in ([*given, *named], [*named, *given], [given[0], *named, *given[1:]]):
            flag_values = command_line.stage_flags()
            arguments = [*arguments, f"--flagfile={tmp_path / 'later.flags'}"]
            train = command_line.read_configs(flag_values, ["program", *arguments])[TrainConfig]
            assert command_line.named_workdir(flag_values) == str(tmp_path / "run")
            assert (train.k, train.zero_optimizer, train.kinds) == ((5,), False, ("standard",))
    assert command.run(["capture"], "", ["program", given[0], f"--flagfile={file}", "--dry_run"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(f"the workdir is {tmp_path / 'run'}")


def test_what_is_wrong_with_a_flag_is_said_in_a_line(tmp_path):
    for number, value in enumerate(("'The city'", '"The city"')):  # a shell would take the quotes away
        path = tmp_path / f"{number}.flags"
        path.write_text(f"--train.k=8\n--graph.prompt={value}\n")
        with pytest.raises(UserError, match=f"{number}.flags, line 2: no shell reads .* the quotes around {value}"):
            read(None, f"--flagfile={path}")
    assert read(None, '--graph.prompt="The city"').named("graph").prompt == '"The city"'
    assert read(None, "--ablate.baselines=pca, ,neurons,").named("ablate").baselines == ("neurons", "pca")
    for argument, said in (
        ("--train.K=3", r"Did you mean: train\.k(, train\.\w+){2} \?$"),
        ("--dry_run=maybe", "'maybe' is neither"),
    ):
        with pytest.raises(flags.Error, match=said):
            read(None, argument)


@pytest.mark.parametrize(
    "line",
    [
        "--train.epochs=3  # short", "--train.zero_optimizer # yes", "--train.kinds=topk\t# one",
        "--patch.positions=3 // few", "--workdir=runs/a # here", "--model.path=smollm2 #small",
    ],
)  # fmt: skip
def test_a_comment_behind_a_flag_is_refused(line, tmp_path):
    path = tmp_path / "mine.flags"
    path.write_text(f"# a comment\n{line}\n")
    flag = re.split(r"\s", line)[0]
    with pytest.raises(UserError, match=f"mine.flags, line 2: a comment needs a line .* what follows {flag}, or, if"):
        read(["train"], f"--flagfile={path}")


def test_a_plugin_that_ends_the_process_is_told(tmp_path):
    (tmp_path / "ends.py").write_text("import sys\n\nsys.exit(3)\n")
    with pytest.raises(UserError, match="--plugins=.*ends.py cannot be run: SystemExit: 3"):
        read(["train"], f"--plugins={tmp_path / 'ends.py'}")


def test_texts_in_a_flag_file_keep_their_number_signs(tmp_path):
    path = tmp_path / "mine.flags"
    path.write_text("--graph.prompt=Track # 1 // is\n--graph.target= #\n--report.title=Model #1\n--corpus.path=a#b\n")
    configs = read(None, f"--flagfile={path}")
    assert (configs.named("graph").prompt, configs.named("report").title) == ("Track # 1 // is", "Model #1")
    assert (configs.named("graph").target, configs.named("corpus").path) == (" #", "a#b")
    assert read(None, "--model.path=a # b").named("model").path == "a # b"  # by the command line


def test_stages_take_the_only_kind_that_is_trained():
    """Not where a flag names one, not among several, and no dictionary stays none."""

    def dictionaries(*flags):
        configs = command_line.read_configs(command_line.stage_flags(), ["program", *flags])
        return [configs.named(stage).dictionary for stage in ("ablate", "probe", "study", "patch", "steer")]

    assert dictionaries("--train.kinds=jumprelu") == ["jumprelu"] * 3 + ["", ""]
    assert dictionaries("--train.kinds=jumprelu", "--ablate.dictionary=topk", "--steer.dictionary=gated") == [
        "topk", "jumprelu", "jumprelu", "", "gated",
    ]  # fmt: skip
    assert dictionaries() == dictionaries("--train.kinds=jumprelu,gated") == ["topk"] * 3 + ["", ""]


def test_a_flag_file_is_read_once(tmp_path, monkeypatch):
    """A pipe, such as --flagfile=<(...), gives its lines to the first reader alone; here another file names it."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as pipe:
        pipe.write("--train.k=3\n")
    around = tmp_path / "around.flags"
    around.write_text(f"# a comment\n--flagfile=/dev/fd/{reader}\n")
    monkeypatch.setattr(sys, "argv", ["saejax", "train", "--flagfile", str(around), "--train.batch=7"])

    def read_again(stages, about, argv):
        train = read(stages, *argv[1:])[TrainConfig]
        return train.k == (3,) and train.batch == 7

    monkeypatch.setattr(cli.command, "run", read_again)
    with pytest.raises(SystemExit, match="True"):
        cli.main()
    os.close(reader)
    around.write_text(f"--flagfile={around}\n")
    with pytest.raises(UserError, match="is read from itself"):
        read("train", f"--flagfile={around}")


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


# With these every stage but those on benchmarks has something to make.
EVERYTHING = dict.fromkeys(
    [f"{stage}__dictionaries" for stage in ("interpret", "export", "transfer", "cluster", "explain", "track")]
    + [f"{stage}__dictionary" for stage in ("patch", "steer")],
    "topk",
)
EVERYTHING |= dict(
    explain__url="http://localhost/v1", explain__model="judge", track__prompt="A cat sat.", known__circuits="logic",
    algorithm__names="addition", truth__features=64, patch__kinds="mlp_out", probe__labels="answer",
    ablate__effects="all", graph__behaviours="capital", circuits__behaviours="capital", corpus__stream=True,
    transfer__dictionaries="topk,standard",
)  # fmt: skip


@pytest.fixture(scope="module")
def everything(inputs, tmp_path_factory):
    """Flags of such a run, and its settings."""
    folder = tmp_path_factory.mktemp("everything")
    flags = runs.small_flags(*inputs, folder / "run", **EVERYTHING, graph__transcoders=folder)
    return flags, read(list(all_stages()), *flags)


@pytest.mark.parametrize("stage", all_stages())
def test_units_and_hashes_of_a_stage_follow_from_the_groups_that_its_binary_accepts(stage, everything):
    """Otherwise a binary, which ignores other flags, would make other units than the pipeline does."""
    flags, together = everything
    configs = Noting(together)
    units = all_stages()[stage].units(configs)
    assert units or stage in ("benchmark", "study")  # without a hub there are no benchmarks
    all_stages()[stage].check(configs)
    all_stages()[stage].places(configs)
    if stage not in ("attribute", "circuits"):  # there is no set of transcoders
        plan, alone = Workplan(configs), Workplan(read([stage], *flags))
        assert [alone.fingerprint(unit) for unit in units] == [plan.fingerprint(unit) for unit in units]
    assert configs.seen <= set(accepted_groups([stage]))


def test_every_stage_comes_after_those_whose_units_it_reads(everything):
    benchmarks = ["--task.benchmarks=gsm8k", "--study.benchmarks=logic", "--graph.transcoders=set"]
    configs, order = read(list(all_stages()), *everything[0], *benchmarks), list(all_stages())
    for name, declared in all_stages().items():
        names = declared.names(configs)
        assert names, f"{name} has no unit here"
        for need in (need.partition("/")[0] for unit in names for need in declared.units_read(configs, unit)):
            assert order.index(need) < order.index(name), f"{name} reads {need}"
