"""A unit's fingerprint covers exactly the settings that its code reads: a whole small run on recording settings."""

import sys
from collections import defaultdict

import pytest
import runs

from saejax.config import Configs, group_name
from saejax.runner import command, pipeline
from saejax.runner.flags import flag_fields
from saejax.runner.registry import all_stages, groups_of
from saejax.runner.workplan import settings_read

# Read by the code only where something else is true, which other settings do not say: the model, the text, a result.
MAY_STAY_UNREAD = {"evaluate.ce_documents"}


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
def settings_of(inputs, tmp_path_factory, single_device):
    """By unit of a small run, the settings that its code read, and those that it declares."""
    read, declared, run_class = defaultdict(set), {}, pipeline.Run

    def make_run(stage, name, folder, configs, *rest):
        unit = f"{stage}/{name}" if name else stage
        groups = settings_read(all_stages()[stage], configs, name)
        declared[unit] = {f"{group}.{field}" for group, fields in groups.items() for field in fields}
        return run_class(stage, name, folder, RecordingConfigs(configs, read[unit]), *rest)

    flags = runs.small_flags(*inputs, tmp_path_factory.mktemp("recorded") / "run", train__auxk=0.03)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "Run", make_run)
        assert command.run(["baseline", "capture", "train", "evaluate"], "", ["program", *flags]) == 0
    return {unit: (read[unit], declared[unit]) for unit in read}


def test_what_is_read_is_declared_and_what_is_declared_is_read(settings_of):
    """Otherwise a changed setting would leave an old result in its place, or make again what is the same."""
    assert {unit.partition("/")[0] for unit in settings_of} == {"baseline", "capture", "train", "evaluate"}
    for unit, (read, declared) in settings_of.items():
        stage = all_stages()[unit.partition("/")[0]]
        counted = {
            f"{group_name(group)}.{field.name}"
            for group in groups_of(stage)
            for field in flag_fields(group_name(group), group).values()
            if field.metadata["changes_results"]
        }
        assert not (read & counted) - declared, unit
        groups = {group_name(group) for group in (*groups_of(stage), *stage.placement)}
        assert {name.partition(".")[0] for name in read} <= groups, f"{unit} reads groups that it does not declare"
        assert not declared - read - MAY_STAY_UNREAD, unit
