"""Features as files for Neuronpedia.

v1/<model>/<source>/      Neuronpedia's import bundle of a dictionary: release, model, sourceset and source (``.jsonl``,
                          one line each); features, activations and explanations in batches (``.jsonl.gz``). Its
                          importer takes the columns from a file's first line, so all lines of a file have the same keys

The keys of rows are columns of its database (``apps/webapp/prisma/schema.prisma`` of hijohnnylin/neuronpedia). Groups
of contexts are tenths of a feature's firings by activation; ``binContains`` is the share of all tokens in one. Columns
about a model's neurons, and about text that is not kept, are left at their defaults.
"""

import dataclasses
import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saejax.activations.store import Store
from saejax.dictionaries import load_dictionary
from saejax.dictionaries.formats import own
from saejax.dictionaries.formats.hooks import bare_model_name, to_hook
from saejax.dictionaries.labels import Label
from saejax.dictionaries.names import full_name
from saejax.dictionaries.results import TrainedMember
from saejax.errors import Interrupted, UserError
from saejax.files import read_json, whole_file, write_text
from saejax.interpret.feature_record import FEATURES, FeatureRecord, LogitHistogram
from saejax.interpret.records import GROUPS, LOWEST, PER_OCTAVE
from saejax.links import member_folder
from saejax.models.sites import Site
from saejax.parallel.mesh import on_host
from saejax.runner.workspace import Run
from saejax.stages.atlas.labels import read_member_labels
from saejax.stages.export.settings import ExportConfig
from saejax.unicode import replace_surrogates

CREATOR_ID = "clkht01d40000jv08hvalcvly"  # the account that imported bundles belong to, as other writers give it
_ALIGNED = 3  # coordinates of the stream that a feature writes to most
_LONGEST = 512  # characters of an explanation, at most
# Names that Neuronpedia gives sets of sources, by the site that the dictionaries read.
_SHORT = dict(resid_pre="res", resid_mid="res", resid_post="res", attn_out="att", mlp_in="transcoder", mlp_out="mlp")
_SHORT |= dict(attn_z="att")
_MODEL_ID = re.compile(r"(?!.*(--|\.\.))[a-z][a-z0-9.-]{0,30}[a-z0-9]")
_SET = re.compile(r"(?!neurons$)(?!.*--)(?!.{101})[a-z][a-z0-9-]*")


@dataclasses.dataclass(frozen=True)
class NeuronpediaSource:
    """A dictionary at Neuronpedia."""

    model: str  #: its id there
    set: str  #: name of the set of sources, such as "res-topk"
    layer: int  #: of the site that the dictionary reads
    hook: str | None  #: TransformerLens' name of the site that it writes to; None where there is none

    @property
    def id(self) -> str:
        """The source's name, such as "15-res-topk"."""
        return f"{self.layer}-{self.set}"

    def key(self, feature: int) -> dict[str, str]:
        """Return the columns that name a feature."""
        return dict(modelId=self.model, layer=self.id, index=str(feature))

    def row_id(self, *parts: Any) -> str:
        """Return a name of a row, as long as the database's own names; the same in every run."""
        return "c" + hashlib.sha256("/".join(map(str, (self.model, self.id, *parts))).encode()).hexdigest()[:24]


def setting_of(member: TrainedMember) -> str:
    """Return the part of a member's name after its site: "k16" of "resid_post.3-k16", "" of "resid_post.3"."""
    return member.name.removeprefix(member.site).removeprefix("-")


def write_bundle(run: Run, unit: Path, members: Sequence[TrainedMember]) -> list[str]:
    """Write the bundles of all members of a train unit.

    Args:
      run: of the stage, which reads the capture, and ``interpret`` and perhaps ``explain`` of the dictionaries.
      unit: the train unit.
      members: its dictionaries.

    Returns:
      The folder of each member's bundle.

    Raises:
      UserError: Neuronpedia does not take a name, two members would get the same name, or labels of the user's own
        cannot be read.
      Interrupted: asked to stop.
    """
    config = run.configs[ExportConfig]
    kind, store = run.name.partition("-")[2], Store.open(run.inputs["capture"])
    model = _model_id(config, store)
    sources = [_source(member, kind, model, config) for member in members]
    if len({source.id for source in sources}) < len(sources):
        ids = ", ".join(source.id for source in sources)
        raise UserError(
            f"members of {kind} would be one source of Neuronpedia: {ids}; export one at a time, with --train.sites"
        )
    folders = [f"v1/{model}/{source.id}" for source in sources]
    configs = {member.name: own.read_config(member_folder(unit, member.name) / "dictionary") for member in members}
    labels_of = read_member_labels(run, kind, {name: config.n_features for name, config in configs.items()})
    for member, source, folder in zip(members, sources, folders, strict=True):
        with on_host():
            W_dec_FxD = np.asarray(load_dictionary(member_folder(unit, member.name)).W_dec_FxD[...])
        labels = labels_of[member.name].automatic | labels_of[member.name].by_hand
        described = sorted((member_folder(run.inputs[f"interpret/{kind}"], member.name) / FEATURES).glob("*.json"))
        _write_about(run.folder / folder, source, store.manifest.documents.train)
        for number, path in enumerate(described):
            check_stop(run)
            records = read_json(path)
            _write_batch(run.folder / folder, number, source, records, labels, W_dec_FxD)
        run.say(f"{full_name(kind, member.name)}: {len(W_dec_FxD):,} features, {len(labels):,} of them labelled")
    return folders


def check_stop(run: Run) -> None:
    """Raise ``Interrupted`` where an export is asked to stop."""
    if run.stopping():
        raise Interrupted("stopped; nothing is kept of a part: run the same command to start again")


def _model_id(config: ExportConfig, store: Store) -> str:
    model = config.model_id or _tame(bare_model_name(store.model.name))
    if not _MODEL_ID.fullmatch(model):
        raise UserError(
            f"--export.model_id is {model!r}: Neuronpedia takes 2 to 32 small letters, digits, single dots and dashes, "
            "a letter first"
        )
    return model


def _source(member: TrainedMember, kind: str, model: str, config: ExportConfig) -> NeuronpediaSource:
    site, hook = Site.parse(member.site), to_hook(member.target)  # which refuses what other tools have no name for
    parts = (f"{_SHORT.get(site.kind, site.kind)}-{kind}", setting_of(member))
    by_site, setting = (_tame(part).replace(".", "-") for part in parts)
    name = "-".join(filter(None, [config.source_set or by_site, setting]))
    if not _SET.fullmatch(name):
        raise UserError(
            f"--neuronpedia.source_set makes a set {name!r:.120}: Neuronpedia takes small letters, digits and single "
            "dashes, at most 100, a letter first"
        )
    return NeuronpediaSource(model, name, site.layer, hook)


def _tame(name: str) -> str:
    """Return a name of small letters, digits, dots and single dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def _write_about(folder: Path, source: NeuronpediaSource, documents: int) -> None:
    """Make a bundle's folders and write its release, model, set of sources and source.

    Args:
      folder: the bundle's folder; it must not exist.
      source: the dictionary at Neuronpedia.
      documents: number of documents of the interpreted text.
    """
    for name in ("features", "activations", "explanations"):
        (folder / name).mkdir(parents=True)
    release, description = f"{source.model}-{source.set}", f"Features of {source.model}, interpreted by saejax"
    shared = dict(creatorId=CREATOR_ID, visibility="PUBLIC")
    public = shared | dict(creatorName="saejax", description=description, urls=[])
    titles = dict(displayName=source.model, displayNameShort=source.model)
    rows = dict(
        release=public | dict(name=release, descriptionShort=description),
        # 0 layers of 0 neurons, as other exporters write: the bundle holds no neurons.
        model=shared | titles | dict(id=source.model, layers=0, neuronsPerLayer=0, owner="", instruct=False),
        sourceset=public | dict(modelId=source.model, name=source.set, releaseName=release, hasGraphs=False),
        source=shared | dict(id=source.id, modelId=source.model, setName=source.set, num_prompts=documents),
    )
    for name, row in rows.items():
        write_text(folder / f"{name}.jsonl", _line(row))


def _write_batch(
    folder: Path,
    number: int,
    source: NeuronpediaSource,
    records: Sequence[FeatureRecord],
    labels: Mapping[int, Label],
    W_dec_FxD: np.ndarray,
) -> None:
    """Write some features, their contexts and their labels to the bundle."""
    rows_by_table: dict[str, Iterable[dict[str, Any]]] = dict(
        features=(feature_row(source, record, W_dec_FxD[record["feature"]].astype(np.float64)) for record in records),
        activations=(row for record in records for row in activation_rows(source, record)),
        explanations=(
            explanation_row(source, record["feature"], labels[record["feature"]])
            for record in records
            if record["feature"] in labels
        ),
    )
    for name, rows in rows_by_table.items():
        text = "".join(map(_line, rows))
        if text:
            with whole_file(folder / name / f"batch-{number}.jsonl.gz") as path:
                path.write_bytes(gzip.compress(text.encode(), 5, mtime=0))


def _line(row: Any) -> str:
    return json.dumps(_clean(row), separators=(",", ":"), allow_nan=False) + "\n"


def _clean(data: Any) -> Any:
    """Replace what databases refuse: unpaired surrogates and NUL in JSON strings, and empty tokens."""
    if isinstance(data, str):
        return replace_surrogates(data).replace("\0", "\ufffd")
    if isinstance(data, dict):
        fields = {name: _clean(value) for name, value in data.items()}
        return fields | ({"tokens": [token or "\ufffd" for token in fields["tokens"]]} if "tokens" in fields else {})
    return [_clean(item) for item in data] if isinstance(data, list) else data


def feature_row(source: NeuronpediaSource, record: FeatureRecord, row_D: np.ndarray) -> dict[str, Any]:
    """Return a row of features.

    Args:
      source: which set of features it belongs to.
      record: as the stage ``interpret`` writes it.
      row_D: its decoder row.
    """
    aligned, length = np.argsort(-row_D, kind="stable")[:_ALIGNED], max(float(np.abs(row_D).sum()), 1e-30)
    bins = [(i, count) for i, count in enumerate(record.get("histogram", ())) if count]
    logits = record.get("logits") or LogitHistogram(low=0.0, high=0.0, counts=[])
    edges = np.linspace(logits["low"], logits["high"], len(logits["counts"]) + 1)
    return source.key(record["feature"]) | dict(
        creatorId=CREATOR_ID,
        sourceSetName=source.set,
        maxActApprox=record.get("max", 0.0),
        frac_nonzero=record["rate"],
        pos_str=[text for text, _ in record.get("up", ())],
        pos_values=[value for _, value in record.get("up", ())],
        neg_str=[text for text, _ in record.get("down", ())],
        neg_values=[value for _, value in record.get("down", ())],
        freq_hist_data_bar_heights=[count for _, count in bins],
        freq_hist_data_bar_values=[float(f"{2 ** ((i + 0.5) / PER_OCTAVE + LOWEST):.4g}") for i, _ in bins],
        logits_hist_data_bar_heights=logits["counts"],
        logits_hist_data_bar_values=_rounded((edges[1:] + edges[:-1]) / 2),
        neuron_alignment_indices=aligned.tolist(),
        neuron_alignment_values=_rounded(row_D[aligned]),
        neuron_alignment_l1=_rounded(row_D[aligned] / length),
        topkCosSimIndices=[neighbour for neighbour, _ in record["nearest"]],
        topkCosSimValues=[cosine for _, cosine in record["nearest"]],
        hasVector=True,
        vector=_rounded(row_D),
        vectorDefaultSteerStrength=record.get("max", 0.0),
        hookName=source.hook,
    )


def activation_rows(source: NeuronpediaSource, record: FeatureRecord) -> Iterator[dict[str, Any]]:
    """Return the rows of a feature's contexts: the strongest, then its groups'; none if it never fires."""
    for number, context in enumerate([*record.get("examples", ()), *record.get("groups", ())]):
        # 0 where the store has none.
        values, group = [act or 0.0 for act in context["acts"]], context.get("group")
        if group is None:
            bounds = dict(binMin=-1.0, binMax=record["max"], binContains=-1.0)  # so the strongest are marked
        else:
            low, high = record["tenths"][group : group + 2]
            bounds = dict(binMin=low, binMax=high, binContains=record["rate"] / GROUPS)
        yield (
            source.key(record["feature"])
            | bounds
            | dict(
                id=source.row_id(record["feature"], number),
                tokens=context["tokens"],
                values=values,
                maxValue=max(values),
                maxValueTokenIndex=int(np.argmax(values)),
                minValue=min(values),
                qualifyingTokenIndex=context["peak"],
                dataIndex=str(context["document"]),
                creatorId=CREATOR_ID,
            )
        )


def explanation_row(source: NeuronpediaSource, feature: int, label: Label) -> dict[str, Any]:
    """Return the row of a feature's label. Who gave it is a note: columns for that take registered names alone."""
    score = "" if label.f1 is None else f", F1 {label.f1:.2f} on held-out text"
    return source.key(feature) | dict(
        id=source.row_id(feature, "label"),
        description=label.label[:_LONGEST],
        authorId=CREATOR_ID,
        notes=f"by {label.by}{score}" + (f": {label.note}" if label.note else ""),
    )


def _rounded(values: np.ndarray) -> list[float]:
    return np.round(values, 6).tolist()
