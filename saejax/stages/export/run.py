"""The export stage: all members of a train unit in the format of another tool.

saelens           a folder for each member, of its name; of its site where it is alone; pushed to the hub if asked for
circuit_tracer    the members of all layers in one set; where the stack is a sweep, a set for each setting, in a folder
                  of the setting's name; a cross-layer transcoder is one already, and copied
neuronpedia       what their features are, for Neuronpedia, see ``export.neuronpedia``
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from saejax.dictionaries.formats import circuit_tracer, load_dictionary, own, saelens
from saejax.dictionaries.modules import Dictionary, DictionaryConfig
from saejax.dictionaries.publish import CARD, write_card
from saejax.dictionaries.results import TrainedMember
from saejax.errors import UserError
from saejax.links import member_folder
from saejax.models.hub import push_folder
from saejax.parallel.mesh import on_host
from saejax.runner import stacks
from saejax.runner.results import load_results
from saejax.runner.workspace import CLAIM, STARTED, Run
from saejax.stages.export.neuronpedia import check_stop, setting_of, write_bundle
from saejax.stages.export.results import ExportedMember, ExportResults
from saejax.stages.export.settings import ExportConfig
from saejax.wording import counted


def run_export(run: Run) -> ExportResults:
    """Export the train unit that ``run`` reads; all of it or nothing.

    Raises:
      UserError: the format has nothing like these dictionaries.
      Interrupted: asked to stop; the next run starts from the beginning.
    """
    config = run.configs[ExportConfig]
    (unit,) = (folder for name, folder in run.inputs.items() if name.startswith("train/"))
    members, joined = stacks.members(unit, layers=True), circuit_tracer.is_cross_layer(unit)
    if joined and config.format != "circuit_tracer":
        raise UserError(
            f"--export.format={config.format} has no cross-layer transcoders, and {unit} is one: use circuit_tracer"
        )
    described = (
        [] if joined else [own.read_config(member_folder(unit, member.name) / "dictionary") for member in members]
    )
    _clear(run.folder)  # a killed run may have left files
    try:
        if joined:
            circuit_tracer.copy_cross_layer(unit, run.folder)
            folders = ["."] * len(members)
        elif config.format == "neuronpedia":
            folders = write_bundle(run, unit, members)
        else:
            write = _write_sets if config.format == "circuit_tracer" else _write_folders
            folders = write(run, unit, members, described)
        if config.push:
            _push(run, config.push, dict(zip(folders, members, strict=True)), described)
    except BaseException:
        _clear(run.folder)
        raise
    exported = (ExportedMember(m.name, m.site, m.target, folder) for m, folder in zip(members, folders, strict=True))
    run.say(
        f"{counted(len(members), 'dictionary')} to {run.folder} ({config.format}): {', '.join(sorted(set(folders)))}"
    )
    return ExportResults(config.format, tuple(exported))


def _write_folders(
    run: Run, unit: Path, members: Sequence[TrainedMember], configs: list[DictionaryConfig]
) -> list[str]:
    """Write SAELens folders; returns their names, by member."""
    for config in configs:
        saelens.check(config)
    folders = [member.name or member.site for member in members]
    for member, folder in zip(members, folders, strict=True):
        check_stop(run)
        with on_host():
            saelens.save(run.folder / folder, load_dictionary(member_folder(unit, member.name)))
    return folders


def _push(run: Run, name: str, members: Mapping[str, TrainedMember], configs: Sequence[DictionaryConfig]) -> None:
    """Publish SAELens folders, with a card that has the scores on held-out text."""
    (scores,) = (load_results(folder) for unit, folder in run.inputs.items() if unit.startswith("evaluate/"))
    by_member = {score.name: score for score in scores.members}
    figures = {
        folder: {
            "explained variance": score.explained_variance,
            "L0": score.l0,
            "dead features": score.dead_fraction,
            "cross-entropy recovered": score.ce_recovered_mean,
        }
        for folder, member in members.items()
        if (score := by_member.get(member.name))
    }
    write_card(run.folder, name, dict(zip(members, configs, strict=True)), figures)
    commit = push_folder(
        run.folder, name, f"Dictionaries of {name}", patterns=[CARD, *(f"{folder}/*" for folder in members)]
    )
    run.say(f"pushed: {commit}")


def _write_sets(run: Run, unit: Path, members: Sequence[TrainedMember], configs: list[DictionaryConfig]) -> list[str]:
    """Write circuit-tracer sets; returns their folders, by member."""
    settings = [setting_of(member) for member in members]
    sets = {setting: [i for i, of in enumerate(settings) if of == setting] for setting in settings}
    for indices in sets.values():
        circuit_tracer.check([configs[i] for i in indices])
    for setting, indices in sets.items():
        folders = [member_folder(unit, members[i].name) for i in indices]

        def load(index: int, folders: Sequence[Path] = folders) -> Dictionary:
            check_stop(run)
            return load_dictionary(folders[index])

        # One at a time, and on the host: all layers may be larger than the memory, and one larger than a device's.
        with on_host():
            circuit_tracer.save_each(run.folder / setting, [configs[i] for i in indices], load)
    return [setting or "." for setting in settings]


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (STARTED, CLAIM):
            path.unlink()
