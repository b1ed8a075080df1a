"""The bundle for Neuronpedia, against the published columns."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from runs import write_members

sys.path += [str(Path(__file__).parent.parent / name) for name in ("dictionaries", "interpret")]
import known_dictionaries as known
from made_up_records import BAD, made_up_record

from saejax.activations.manifest import CapturedModel, Manifest, StoredDocuments
from saejax.config import Configs
from saejax.dictionaries import save_dictionary
from saejax.dictionaries.labels import FOUND, Label
from saejax.dictionaries.names import full_name
from saejax.errors import UserError
from saejax.files import write_json
from saejax.results import to_json
from saejax.runner.workspace import STARTED, Run
from saejax.stages.atlas.settings import AtlasConfig
from saejax.stages.export import neuronpedia
from saejax.stages.export.run import run_export
from saejax.stages.export.settings import ExportConfig
from saejax.stages.interpret.settings import InterpretConfig

# Columns of prisma/schema.prisma that a row must give, with their types, and those that it may give.
NUMBER = (int, float)
REQUIRED = dict(
    release=dict(name=str, description=str, creatorName=str, creatorId=str),
    model=dict(id=str, creatorId=str, layers=int, neuronsPerLayer=int, owner=str),
    sourceset=dict(modelId=str, name=str, description=str, creatorName=str, creatorId=str),
    source=dict(id=str, modelId=str, setName=str, creatorId=str),
    features=dict(modelId=str, layer=str, index=str),
    activations=dict(
        id=str, tokens=[str], index=str, layer=str, modelId=str, maxValue=NUMBER, maxValueTokenIndex=int,
        minValue=NUMBER, values=[NUMBER], creatorId=str,
    ),
    explanations=dict(id=str, modelId=str, layer=str, index=str, description=str, authorId=str),
)  # fmt: skip
OPTIONAL = dict(
    release=dict(urls=[str], visibility=str, descriptionShort=str),
    model=dict(displayName=str, displayNameShort=str, instruct=bool, visibility=str),
    sourceset=dict(urls=[str], releaseName=str, visibility=str, hasGraphs=bool),
    source=dict(num_prompts=int, visibility=str),
    features=dict(
        creatorId=str, sourceSetName=str, maxActApprox=NUMBER, frac_nonzero=NUMBER, pos_str=[str], pos_values=[NUMBER],
        neg_str=[str], neg_values=[NUMBER], freq_hist_data_bar_heights=[NUMBER], freq_hist_data_bar_values=[NUMBER],
        logits_hist_data_bar_heights=[NUMBER], logits_hist_data_bar_values=[NUMBER], neuron_alignment_indices=[int],
        neuron_alignment_values=[NUMBER], neuron_alignment_l1=[NUMBER], topkCosSimIndices=[int],
        topkCosSimValues=[NUMBER], hasVector=bool, vector=[NUMBER], vectorDefaultSteerStrength=NUMBER, hookName=str,
    ),
    activations=dict(qualifyingTokenIndex=int, dataIndex=str, binMin=NUMBER, binMax=NUMBER, binContains=NUMBER),
    explanations=dict(notes=str),
)  # fmt: skip


def fits(row, columns):
    """Whether every column is there, of its type."""
    for name, kind in columns.items():
        items, kind = (row[name], kind[0]) if isinstance(kind, list) else ([row[name]], kind)
        assert all(isinstance(item, kind) and (kind is bool or type(item) is not bool) for item in items), (name, items)
        if kind is str:
            assert all("\0" not in item and item.encode() is not None for item in items)


def read(*paths):
    """The rows of files."""
    texts = [gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes() for path in paths]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def record(feature, fires):
    """With a token of no text, and one of NUL."""
    described = made_up_record(feature, fires)
    if fires:
        described["examples"][0]["tokens"][:2] = ["\0", ""]
    return described


def make_unit(tmp_path, members=("",), **settings):
    """A run of the stage on made-up units of transcoders or SAEs, by member."""
    names = [member or "resid_post.3" for member in members]
    config = ExportConfig(format="neuronpedia", dictionaries=("topk",), **settings)
    for member in members:
        folders = [tmp_path / stage / "topk" / member for stage in ("train", "interpret")]
        save_dictionary(folders[0] / "dictionary", known.make("topk"))
        (folders[1] / "features").mkdir(parents=True)
        records = [record(i, fires=0 if i == 2 else 12) for i in range(known.make("topk").config.n_features)]
        write_json(folders[1] / "features" / "00000.json", records[:3])
        write_json(folders[1] / "features" / "00001.json", records[3:])
        labels = {"1": Label("“ Paris”", FOUND, f1=0.9), "3": Label(f"a city {BAD}", "Ada", "seen")}
        write_json(folders[1] / "labels.json", {key: to_json(label) for key, label in labels.items()})
    sites = [name.split("-")[0] for name in names]
    write_members(tmp_path / "train" / "topk", *zip(members, sites, sites, strict=True))
    (tmp_path / "capture").mkdir()
    documents, model = StoredDocuments((), (), train=5, held_out=0), CapturedModel("Some/Model_1.5", "", "0" * 16)
    manifest = Manifest({}, "float32", dict(train=0, held_out=0), 1, model, False, 10.0, documents, {})
    write_json(tmp_path / "capture" / "manifest.json", to_json(manifest))
    folder = tmp_path / "export" / "neuronpedia-topk"
    folder.mkdir(parents=True)
    write_json(folder / STARTED, {})
    units = ("train/topk", "interpret/topk", "capture")  # without the atlas, and so without ablate
    by_hand = tmp_path / "by_hand.csv"
    lines = [f"{full_name('topk', member)},4,a river,,Bea\n" for member in members]
    by_hand.write_text("".join(["dictionary,feature,label,note,reviewer\n", *lines]))
    inputs = {unit: tmp_path / unit for unit in units}
    configs = Configs(config, AtlasConfig(labels=str(by_hand)), InterpretConfig(dictionaries=("topk",)))
    return folder, Run("export", folder.name, folder, configs, inputs, say=lambda line: None)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder, run = make_unit(tmp_path_factory.mktemp("bundle"))
    (member,) = run_export(run).members
    return folder / member.folder


def test_every_row_fits_the_published_columns(source):
    assert source.parts[-3:] == ("v1", "model-1.5", "3-res-topk")
    for name, columns in REQUIRED.items():
        rows = read(*(source / name).glob("batch-*.jsonl.gz")) or read(source / f"{name}.jsonl")
        assert rows
        for row in rows:
            assert row.keys() == (columns | OPTIONAL[name]).keys()
            fits(row, columns | OPTIONAL[name])
    about, its_set, release = read(*(source / f"{name}.jsonl" for name in ("source", "sourceset", "release")))
    assert about["setName"] == its_set["name"] == "res-topk" and its_set["releaseName"] == release["name"]


def test_rows_hold_what_was_found(source):
    features, activations, explanations = (
        read(*sorted((source / name).iterdir())) for name in ("features", "activations", "explanations")
    )
    assert [row["index"] for row in features] == [str(i) for i in range(len(features))]
    assert {(row["modelId"], row["layer"]) for row in features} == {("model-1.5", "3-res-topk")}
    W = np.asarray(known.make("topk").W_dec_FxD[...])
    np.testing.assert_allclose([row["vector"] for row in features], W, atol=1e-6)
    assert features[1]["neuron_alignment_indices"] == np.argsort(-W[1])[:3].tolist()
    assert features[1]["hookName"] == "blocks.3.hook_resid_post" and features[2]["maxActApprox"] == 0
    assert features[1]["freq_hist_data_bar_heights"] == [3, 9]
    np.testing.assert_allclose(features[1]["freq_hist_data_bar_values"], [2**-9.25, 2**-8.75], rtol=1e-3)
    assert len({row["id"] for row in activations}) == len(activations) == 4 * (len(features) - 1)
    for row in activations:
        assert len(row["tokens"]) == len(row["values"]) and all(row["tokens"]) and row["index"] != "2"
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == 2.5 and row["minValue"] == 0
    bins = [(row["binMin"], row["binMax"], row["binContains"]) for row in activations[:4]]
    assert bins[0] == bins[1] == (-1, 2.5, -1) and bins[3] == pytest.approx((0.9, 2.5, 0.0012))
    assert [(row["index"], row["description"], row["notes"]) for row in explanations] == [
        ("1", "“ Paris”", "by detector, F1 0.90 on held-out text"), ("3", f"a city {BAD}", "by Ada: seen"),
        ("4", "a river", "by Bea"),
    ]  # fmt: skip


def test_members_of_a_sweep_are_sources_of_their_own(tmp_path):
    _, run = make_unit(tmp_path, ("resid_post.3-k16", "resid_post.3-learning_rate0.01"), source_set="mine")
    assert [member.folder for member in run_export(run).members] == [
        "v1/model-1.5/3-mine-k16", "v1/model-1.5/3-mine-learning-rate0-01",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        *(dict(model_id="Model"), dict(model_id="m--1"), dict(source_set="Mine_1")),
        dict(members=("resid_pre.3", "resid_post.3")),
    ],
)
def test_names_that_neuronpedia_does_not_take_are_refused(tmp_path, settings):
    folder, run = make_unit(tmp_path, **settings)
    with pytest.raises(UserError, match="Neuronpedia takes|: 3-res-topk, 3-res-topk; export one at a time"):
        run_export(run)
    assert [path.name for path in folder.iterdir()] == [STARTED]


def test_every_site_and_kind_has_a_source_or_is_refused():
    def source(site, kind="topk"):
        member = SimpleNamespace(name="", site=site, target=site)
        return neuronpedia._source(member, kind, "tiny", ExportConfig()).id

    assert source("attn_z.3") == "3-att-topk"
    assert source("mlp_act.3", "matching_pursuit") == "3-mlp-act-matching-pursuit"
    with pytest.raises(UserError, match="no name for the site attn_k.0"):
        source("attn_k.0")
