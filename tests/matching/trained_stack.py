"""Dictionaries of both layers of the tiny model, with two values of k, trained once for the files that read them."""

import functools
from pathlib import Path

import runs

from saejax.runner import command

SITES = "resid_post.0,resid_post.1"
SETTINGS = dict(
    capture__sites=SITES, train__sites=SITES, train__k="4,8", train__kinds="topk", train__epochs=10,
    task__train_prompts=2, task__test_prompts=2, analysis__batch_tokens=128,
)  # fmt: skip


@functools.cache
def _trained(inputs) -> Path:
    folder = inputs[0].parent / "trained_stack"
    flags = runs.small_flags(*inputs, folder, **SETTINGS)
    assert command.run(["baseline", "capture", "train"], "", ["test", *flags]) == 0
    return folder


def copy(inputs, tmp_path_factory, **changes) -> tuple[Path, list[str]]:
    """Copy the workdir; gives the copy, and flags of a run in it."""
    folder = runs.copy_run(_trained(inputs), tmp_path_factory.mktemp("copy") / "run")
    return folder, runs.small_flags(*inputs, folder, **SETTINGS | changes)
