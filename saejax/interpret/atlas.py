"""The stage ``atlas``: a folder that opens from disk and shows every feature.

``index.html`` opens on an overview, finds features and shows one at a time, ``index.html#topk/123``. Browsers do not
let a page read files of its folder, but run scripts from it: ``data/index.js`` has a few columns of all features,
``data/00000.js`` and so on the records of ``CHUNK`` features each, which are loaded when one is looked at.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from saejax.dictionaries import stacks
from saejax.dictionaries.labels import EXPLAINED, LABELS, Label, load_labels
from saejax.files import read_json, write_json, write_text
from saejax.interpret.feature_record import FeatureRecord, TokenMap, iterate_records, read_records
from saejax.interpret.heatmaps import MAPS
from saejax.interpret.labels import read_labels
from saejax.interpret.results import AtlasPages, AtlasResults, InterpretResults
from saejax.interpret.review import write_sheets
from saejax.interventions.answers import AblateResults, FeatureEffect
from saejax.page.scripts import ELEMENTS, elements_script
from saejax.results import load_results, to_json
from saejax.runner.workspace import Run, member_folder
from saejax.stages.interpret import AtlasConfig, InterpretConfig

CHUNK = 32  # features of a file that is loaded at once
_VIEWER = Path(__file__).parent / "viewer"
_PAGE = ("index.html", "atlas.css", "atlas.js", "feature.js", "heatmap.js", "overview.js")


def run_atlas(run: Run) -> AtlasResults:
    """Write the pages of the dictionaries of ``interpret/<name>``, in folders of their names if there are several.

    Raises:
      UserError: the file of labels cannot be read, or names a feature that does not exist.
    """
    interpreted: InterpretResults = load_results(run.inputs[f"interpret/{run.name}"])
    path, several = run.configs[AtlasConfig].labels, len(interpreted.members) > 1
    several = several or len(run.configs[InterpretConfig].dictionaries) > 1
    by_hand = {
        member.name: read_labels(Path(path), stacks.full_name(run.name, member.name), member.features, several)
        for member in (interpreted.members if path else ())
    }  # all of them before anything is written
    tested = _ablated(run)
    pages = []
    for member in interpreted.members:
        source = member_folder(run.inputs[f"interpret/{run.name}"], member.name)
        hand_labels = by_hand.get(member.name, {})
        name = stacks.full_name(run.name, member.name)
        by_model, judged = _explained(run, member.name)
        labels = load_labels(source / LABELS) | by_model | hand_labels
        records = _records(source, judged)
        maps = read_json(source / MAPS)
        top = tested.top if tested and tested.dictionary == name else {}
        write_atlas(run.folder / member.name, name, records, labels, _effects(top), maps)
        wanted = {item.feature for items in top.values() for item in items}
        automatic = load_labels(source / LABELS) | by_model
        sheets = run.folder / member.name / "review"
        reviewed = write_sheets(sheets, name, top, read_records(source, wanted), automatic, hand_labels) if top else ()
        written = len(by_model.keys() - hand_labels.keys())
        by_rule = len(labels) - len(hand_labels) - written
        pages.append(AtlasPages(name, member.name, member.features, len(hand_labels), by_rule, written, reviewed))
        run.say(f"open {run.folder / member.name / 'index.html'}")
    return AtlasResults(run.name, tuple(pages))


def _records(folder: Path, judged: Mapping[str, Any]) -> Iterator[FeatureRecord]:
    """Yield the records that ``interpret`` wrote to a folder, with the scores that a language model gave labels."""
    for record in iterate_records(folder):
        if scores := judged.get(str(record["feature"])):
            record["judged"] = scores
        yield record


def _explained(run: Run, member: str) -> tuple[dict[int, Label], dict[str, Any]]:
    """Return the kept labels by a language model, and the scores of all judged ones, by feature; empty without any."""
    folder = run.inputs.get(f"explain/{run.name}")
    if not folder:
        return {}, {}
    return load_labels(folder / member / LABELS), read_json(folder / member / EXPLAINED)


def _ablated(run: Run) -> AblateResults | None:
    """Return the results of the ablation that this run reads; None: it reads none."""
    folders = [folder for unit, folder in run.inputs.items() if unit.startswith("ablate/")]
    return load_results(folders[0]) if folders else None


def _effects(top: Mapping[str, Sequence[FeatureEffect]]) -> dict[int, dict[str, float]]:
    """Return feature -> behaviour -> drop in logit difference when the feature is ablated."""
    effects: dict[int, dict[str, float]] = {}
    for behaviour, items in top.items():
        for item in items:
            effects.setdefault(item.feature, {})[behaviour] = round(item.drop.mean, 4)
    return effects


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
    columns: dict[str, list] = {name: [] for name in ("label", "by", "token", "rate", "f1", "effect")}
    chunk: list[dict[str, Any]] = []
    for record in records:
        feature = record["feature"]
        label, effect = labels.get(feature), effects.get(feature, {})
        tokens, detectors = record.get("tokens") or [], record.get("detectors") or []
        row = dict(
            label=label.label if label else "",
            by=label.by if label else "",
            token=tokens[0]["text"] if tokens else "",
            rate=record["rate"],
            f1=detectors[0]["f1"]["mean"] if detectors else 0,
            effect=max(effect.values(), key=abs, default=0),
        )
        for name, value in row.items():
            columns[name].append(value)
        extra = dict(label=to_json(label)) if label else {}
        chunk.append(dict(record) | extra | (dict(effects=dict(effect)) if effect else {}))
        if len(chunk) == CHUNK:
            _script(folder, feature // CHUNK, chunk)
            chunk = []
    if chunk:
        _script(folder, chunk[-1]["feature"] // CHUNK, chunk)
    number = len(columns["rate"])
    about = dict(dictionary=dictionary, features=number, chunk=CHUNK, columns=columns, maps=len(maps))
    for place, token_map in enumerate(maps):
        write_text(folder / "data" / f"map-{place}.js", f"atlas.map({place},{_json(token_map)})\n")
    write_text(folder / "data" / "index.js", f"atlas.index({_json(about)})\n")
    write_json(folder / LABELS, {str(feature): to_json(label) for feature, label in labels.items()})
    for name in _PAGE:
        write_text(folder / name, (_VIEWER / name).read_text(encoding="utf-8"))
    write_text(folder / ELEMENTS, elements_script())


def _script(folder: Path, number: int, records: list[dict[str, Any]]) -> None:
    write_text(folder / "data" / f"{number:05d}.js", f"atlas.chunk({number},{_json(records)})\n")


def _json(data: Any) -> str:
    """Return JSON as a JavaScript expression; incomplete characters of tokens become replacement characters."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
