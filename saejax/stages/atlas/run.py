"""The stage ``atlas``: a folder that opens from disk and shows every feature.

``index.html`` opens on an overview, finds features and shows one at a time, ``index.html#topk/123``. Browsers do not
let a page read files of its folder, but run scripts from it: ``data/index.js`` has a few columns of all features,
``data/00000.js`` and so on the records of ``CHUNK`` features each, which are loaded when one is looked at.
"""

import itertools
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from saejax.dictionaries.labels import EXPLAINED, LABELS, Label
from saejax.dictionaries.names import full_name
from saejax.errors import Interrupted
from saejax.files import read_json, write_json, write_text
from saejax.interpret.feature_record import FeatureRecord, TokenMap, iterate_records, read_records, top_tokens
from saejax.interpret.heatmaps import MAPS
from saejax.interpret.results import AtlasPages, AtlasResults, InterpretResults
from saejax.interpret.review import write_sheets
from saejax.links import member_folder
from saejax.page.scripts import ELEMENTS, elements_script, embedded
from saejax.results import to_json
from saejax.runner.results import load_results
from saejax.runner.workspace import Run
from saejax.stages.atlas.labels import read_member_labels

CHUNK = 32  # features of a file that is loaded at once
_VIEWER = Path(__file__).parent / "viewer"
_PAGE = ("index.html", "atlas.css", "atlas.js", "feature.js", "heatmap.js", "overview.js")


def run_atlas(run: Run) -> AtlasResults:
    """Write the pages of the dictionaries of ``interpret/<name>``, in folders of their names if there are several.

    Raises:
      UserError: the file of labels cannot be read, or names a feature that does not exist.
      Interrupted: asked to stop.
    """
    interpreted: InterpretResults = load_results(run.inputs[f"interpret/{run.name}"])
    # All of them before anything is written.
    labels = read_member_labels(run, run.name, {member.name: member.features for member in interpreted.members})
    ablated = [load_results(folder) for unit, folder in run.inputs.items() if unit.startswith("ablate/")]
    pages = []
    for member in interpreted.members:
        name, (automatic, hand_labels) = full_name(run.name, member.name), labels[member.name]
        folder, source = run.folder / member.name, member_folder(run.inputs[f"interpret/{run.name}"], member.name)
        explained = run.inputs.get(f"explain/{run.name}")
        judged = read_json(explained / member.name / EXPLAINED) if explained else {}
        every = ablated[0].top if ablated and ablated[0].dictionary == name else {}
        top = {behaviour: tuple(item for item in items if not item.site) for behaviour, items in every.items()}
        effects: dict[int, dict[str, float]] = {}
        for behaviour, items in top.items():
            for item in items:
                effects.setdefault(item.feature, {})[behaviour] = round(item.drop.mean, 4)
        maps = read_json(source / MAPS)
        write_atlas(folder, name, _records(run, source, judged), automatic | hand_labels, effects, maps)
        records = read_records(source, set(effects)) if effects else {}
        reviewed = write_sheets(folder / "review", name, top, records, automatic, hand_labels)
        pages.append(AtlasPages(name, member.name, member.features, len(hand_labels), reviewed))
        run.say(f"open {folder / 'index.html'}")
    return AtlasResults(run.name, tuple(pages))


def _records(run: Run, folder: Path, judged: Mapping[str, Any]) -> Iterator[FeatureRecord]:
    """Yield the records that ``interpret`` wrote to a folder, with the scores that a language model gave labels."""
    for record in iterate_records(folder):
        if run.stopping():
            raise Interrupted("stopped; run the same command to write the atlas")
        if scores := judged.get(str(record["feature"])):
            record["judged"] = scores
        yield record


def write_atlas(
    folder: Path,
    dictionary: str,
    records: Iterable[FeatureRecord],
    labels: Mapping[int, Label],
    effects: Mapping[int, Mapping[str, float]],
    maps: Sequence[TokenMap] = (),
) -> None:
    """Write the atlas of a dictionary; files of a killed run are replaced.

    Args:
      folder: folder to write to.
      dictionary: its name, the prefix of addresses on the page.
      records: records of all features in order.
      labels: labels by feature.
      effects: feature -> behaviour -> drop in logit difference when it is ablated, where it was measured.
      maps: heatmaps as ``interpret`` writes them.
    """
    shutil.rmtree(folder / "data", ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    columns: dict[str, list] = {name: [] for name in ("label", "by", "words", "rate", "f1", "effect")}
    stream = iter(records)
    while records_of_file := list(itertools.islice(stream, CHUNK)):
        number, chunk = records_of_file[0]["feature"] // CHUNK, list[dict[str, Any]]()
        for record in records_of_file:
            label, effect = labels.get(record["feature"]), effects.get(record["feature"], {})
            row = dict(
                label=label.label if label else "",
                by=label.by if label else "",
                words=top_tokens(record),
                rate=record["rate"],
                f1=record["detector"]["f1"]["mean"] if "detector" in record else 0,
                effect=max(effect.values(), key=abs, default=0),
            )
            for name, value in row.items():
                columns[name].append(value)
            extra = dict(label=to_json(label)) if label else {}
            chunk.append(dict(record) | extra | (dict(effects=dict(effect)) if effect else {}))
        write_text(folder / "data" / f"{number:05d}.js", f"atlas.chunk({number},{embedded(chunk)})\n")
    about = dict(dictionary=dictionary, features=len(columns["rate"]), chunk=CHUNK, columns=columns, maps=len(maps))
    write_text(folder / "data" / "index.js", f"atlas.index({embedded(about)})\n")
    write_text(folder / "data" / "maps.js", f"atlas.maps({embedded(maps)})\n")
    write_json(folder / LABELS, {str(feature): to_json(label) for feature, label in labels.items()})
    for name in _PAGE:
        write_text(folder / name, (_VIEWER / name).read_text(encoding="utf-8"))
    write_text(folder / ELEMENTS, elements_script())
