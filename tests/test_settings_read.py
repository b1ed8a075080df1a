"""A unit's fingerprint covers exactly the settings that its code reads: a whole small run on recording settings."""

import sys
from collections import defaultdict

import pytest
import runs

from saejax.runner import command, pipeline
from saejax.runner.config import Configs, flag_fields, group_name
from saejax.runner.registry import STAGES, groups_of
from saejax.runner.workplan import settings_read

# Read by the code only where something else is true, which other settings do not say: the model, the text, a result.
MAY_STAY_UNREAD = {
    "evaluate.ce_documents",
}


def recording(config, read: set[str]):
    """The settings with every field that is looked at noted; copies made by ``dataclasses`` note theirs, too."""
    cls = type(config)
    fields = set(cls.__dataclass_fields__)

    def __getattribute__(self, name):
        if name in fields and sys._getframe(1).f_globals["__name__"] != "dataclasses":
            read.add(f"{group_name(cls)}.{name}")
        return object.__getattribute__(self, name)

    recorder = type(cls.__name__, (cls,), {"__getattribute__": __getattribute__, "__post_init__": lambda self: None})
    copy = object.__new__(recorder)
    for name in fields:
        object.__setattr__(copy, name, object.__getattribute__(config, name))
    return copy


class RecordingConfigs(Configs):
    """Settings whose groups note what is read of them."""

    def __init__(self, configs: Configs, read: set[str]):
        super().__init__(*configs)
        self._recorders = {type(group): recording(group, read) for group in configs}

    def __getitem__(self, group):
        return self._recorders[group]

    def get(self, group):
        return self._recorders.get(group)

    def named(self, name):
        return next(recorder for cls, recorder in self._recorders.items() if group_name(cls) == name)

    def __or__(self, group):
        joined = RecordingConfigs.__new__(RecordingConfigs)
        Configs.__init__(joined, *(super().__or__(group)))
        base = next(cls for cls in type(group).__mro__ if cls in self._recorders)
        joined._recorders = {**self._recorders, base: group}
        return joined


@pytest.fixture(scope="module")
def recorded(inputs, tmp_path_factory, single_device):
    """Of each unit of a small run the settings that its code read, and all settings."""
    read, every = defaultdict(set), []
    patch = pytest.MonkeyPatch()

    def make_run(stage, name, folder, configs, *rest):
        every[:] = [configs]
        unit = f"{stage}/{name}" if name else stage
        return run_class(stage, name, folder, RecordingConfigs(configs, read[unit]), *rest)

    run_class = pipeline.Run
    patch.setattr(pipeline, "Run", make_run)
    stages = ["baseline", "capture", "train", "evaluate"]
    flags = runs.small_flags(*inputs, tmp_path_factory.mktemp("recorded") / "run", train__auxk=0.03)
    try:
        assert command.run(stages, "", ["program", *flags]) == 0
    finally:
        patch.undo()
    return dict(read), every[0]


def declared(unit, configs) -> set[str]:
    stage, _, name = unit.partition("/")
    groups = settings_read(STAGES[stage], configs, name)
    return {f"{group}.{field}" for group, fields in groups.items() for field in fields}


def test_what_is_read_is_declared(recorded):
    """Otherwise a changed setting would leave an old result in its place."""
    read, configs = recorded
    assert {unit.partition("/")[0] for unit in read} == {"baseline", "capture", "train", "evaluate"}
    missing = {}
    for unit, names in read.items():
        groups = groups_of(STAGES[unit.partition("/")[0]])
        fields = {
            f"{group_name(group)}.{field.name}": field
            for group in groups
            for field in flag_fields(group_name(group), group).values()
        }
        counted = {flag for flag in names & fields.keys() if fields[flag].metadata["changes_results"]}
        if left := counted - declared(unit, configs):
            missing[unit] = sorted(left)
    assert missing == {}


def test_what_is_declared_is_read(recorded):
    """Otherwise a changed setting would make again what is the same."""
    read, configs = recorded
    unread = {unit: sorted(declared(unit, configs) - names - MAY_STAY_UNREAD) for unit, names in read.items()}
    assert {unit: names for unit, names in unread.items() if names} == {}


def test_settings_of_groups_that_a_stage_does_not_declare_are_not_read(recorded):
    read, _ = recorded
    for unit, names in read.items():
        stage = STAGES[unit.partition("/")[0]]
        groups = {group_name(group) for group in (*groups_of(stage), *stage.placement)}
        undeclared = {name for name in names if name.partition(".")[0] not in groups}
        assert not undeclared, f"{unit} reads {sorted(undeclared)} of groups that it does not declare"
