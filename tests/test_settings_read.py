"""A hash covers exactly the settings that the code reads: ``settings_read`` watches every stage that a test runs."""

import runs
import settings_read

from saejax.runner import command

# Read by the code only where something else is true, which other settings do not say: the model, the text, a result.
MAY_STAY_UNREAD = {"evaluate.ce_documents"}


def test_what_is_declared_is_read(inputs, tmp_path, single_device):
    """Otherwise a changed setting would make again what is the same."""
    settings_read.READ.clear()
    flags = runs.small_flags(*inputs, tmp_path / "run", train__auxk=0.03, train__epochs=1)
    assert command.run(["baseline", "capture", "train", "evaluate"], "", ["program", *flags]) == 0
    assert {unit.partition("/")[0] for unit in settings_read.READ} == {"baseline", "capture", "train", "evaluate"}
    unread = {unit: settings_read.DECLARED[unit] - read - MAY_STAY_UNREAD for unit, read in settings_read.READ.items()}
    assert not [*filter(None, unread.values())], unread
