"""Plugins: Python files that users name with ``--plugins``, and that add kinds of dictionary or stages."""

import dataclasses
import hashlib
import importlib.util
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from absl import flags

from saejax.config import Configs, group_name
from saejax.dictionaries import kinds
from saejax.errors import UserError
from saejax.files import explain_bad_name
from saejax.runner import registry
from saejax.runner.stage import Input, Stage

# Names of other programs, and of other folders of a workdir.
TAKEN = ("pipeline", "study_run", "runs", "serve", "hours", "logs")


def load_named(argv: Sequence[str]) -> None:
    """Load the files of ``--plugins`` in a command line, before the flags that they add are defined.

    Args:
      argv: arguments without the program's name, with the lines of flag files; other flags are ignored.
    """
    early = flags.FlagValues()
    flags.DEFINE_multi_string("plugins", [], "", flag_values=early)
    early(["", *argv], known_only=True)
    load([file for value in early["plugins"].value or [] for file in value.split(",") if file])


def load(files: Sequence[str | Path]) -> None:
    """Run each file; record its hash with the kinds that it registers and the stages that it declares.

    Raises:
      UserError: a file is missing, fails, adds nothing, or declares a stage or a group of settings by a name that is
        taken; one line names it and says why.
    """
    added_stages: list[Stage] = []
    for file in map(Path, files):
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"--plugins={file} cannot be read: {error.strerror}") from None
        source = hashlib.sha256(content).hexdigest()
        before = dict(kinds.KINDS)
        module = _run(file, f"saejax_plugin_{source[:16]}")
        added = [name for name, kind in kinds.KINDS.items() if before.get(name) is not kind]
        declared = [value for value in vars(module).values() if isinstance(value, Stage)]
        # It may import saejax's own.
        stages = {stage.name: stage for stage in declared if registry.own_stages().get(stage.name) is not stage}
        if not added and not stages:
            raise UserError(
                f"--plugins={file} adds nothing: decorate the class of a kind with saejax.dictionaries.kinds.register, "
                "or declare a saejax.runner.stage.Stage"
            )
        for name in added:
            kinds.KINDS[name].source = source
        added_stages += _check_stages(file, stages, source)
    try:
        if added_stages:
            registry.add_stages(added_stages)
    except ValueError as error:
        raise UserError(f"--plugins={','.join(map(str, files))}: {error}") from None


def _check_stages(file: Path, stages: Mapping[str, Stage], source: str) -> Iterator[Stage]:
    """Check the stages that a file declares, and yield each with the file's hash among its inputs."""
    for name, stage in stages.items():
        if name in registry.own_stages() or name in TAKEN:
            raise UserError(f"--plugins={file} declares the stage {name}, which saejax has: give it another name")
        if wanted := explain_bad_name(name, "_-"):
            raise UserError(f"--plugins={file} declares the stage {name!r}, which names a folder: {wanted}")
        groups = [group for present in registry.own_stages().values() for group in present.groups]
        taken = {group_name(group): group for group in groups}
        for group in stage.groups:
            if taken.get(group_name(group), group) is not group:
                raise UserError(
                    f"--plugins={file} has settings {group.__name__}, whose flags --{group_name(group)}.* saejax has: "
                    "give the class another name"
                )

        def read(configs: Configs, unit: str, of_stage: Stage = stage) -> dict[str, Input]:
            return {**of_stage.inputs(configs, unit), "plugin": source}

        yield dataclasses.replace(stage, inputs=read)


def _run(file: Path, name: str) -> types.ModuleType:
    """Run a file as a module of this name."""
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"--plugins={file} is no Python file: expected a name that ends in .py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where its dataclasses look for their types
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"--plugins={file} cannot be run: {type(error).__name__}: {error}") from error
    return module
