"""Contexts, logits and labels of features from files of circuit-tracer, Neuronpedia and our own runs."""

import dataclasses
import gzip
import json
import os
import shutil

import pytest

from saejax.attribution.forms import features
from saejax.attribution.forms.features import EXAMPLES, FeatureDetails, parse_feature, read_details
from saejax.attribution.forms.neuronpedia import cantor_pair
from saejax.attribution.settings import GraphConfig
from saejax.errors import UserError
from saejax.stages.attribute.requests import identity

CONTEXT = dict(tokens=["The", " city", " of"], tokens_acts_list=[0.0, 2.5, 0.5], train_token_ind=1)
WEAKER = dict(tokens=["a", " town"], tokens_acts_list=[0.0, 1.0], train_token_ind=1)
TRACER = dict(
    index=7, top_logits=[" Paris"], bottom_logits=[" the"],
    examples_quantiles=[
        dict(quantile_name="Subsample", examples=[WEAKER] * 9), dict(quantile_name="Top", examples=[CONTEXT]),
    ],
)  # fmt: skip
NEURONPEDIA = dict(
    modelId="m", layer="3-plt", index="7", pos_str=[" Paris"], neg_str=[" the"],
    activations=[dict(tokens=["The", " city"], values=[0, 3], maxValue=3)], explanations=[dict(description="cities")],
)  # fmt: skip


def pack(folder, features: dict[int, dict | None], layer=3):
    """Write circuit-tracer's packed files: of None, a feature that never fired."""
    folder.mkdir(parents=True)
    offsets, content = [0], b""
    for data in features.values():
        if data is not None:
            part = gzip.compress(json.dumps(data).encode())
            content += len(part).to_bytes(4, "little") + part
        offsets.append(len(content))
    (folder / f"layer_{layer}.bin").write_bytes(content)
    index = {str(layer): dict(filename=f"layer_{layer}.bin", offsets=offsets)}
    (folder / "index.json.gz").write_bytes(gzip.compress(json.dumps(index).encode()))


def test_packed_files_beside_a_set_are_read(tmp_path):
    pack(tmp_path / "set" / "features", {0: None, 1: TRACER, 2: dict(TRACER, label="towns")})
    found = read_details([tmp_path / "set"], [], [(3, 0), (3, 1), (3, 2), (3, 3), (4, 1)])
    assert found.keys() == {(3, 1), (3, 2)} and found[3, 2].label == "towns"
    first = found[3, 1]
    assert first.examples[0] == dict(tokens=CONTEXT["tokens"], activations=CONTEXT["tokens_acts_list"])
    assert len(first.examples) == EXAMPLES and first.top_logits == (" Paris",) and first.bottom_logits == (" the",)
    weaker = dict(tokens=WEAKER["tokens"], activations=WEAKER["tokens_acts_list"])
    assert first.quantiles == (("Top", first.examples[:1]), ("Subsample", (weaker, weaker)))
    assert first.histogram == ()


@pytest.mark.parametrize("name", [f"{cantor_pair(3, 7)}.json", "3_7.json", f"plt/{cantor_pair(3, 7)}.json"])
def test_single_files_are_read(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps(NEURONPEDIA))
    found = read_details([], [tmp_path], [(3, 7), (2, 7)])
    contexts = (dict(tokens=["The", " city"], activations=[0.0, 3.0]),)
    assert found == {(3, 7): FeatureDetails(contexts, (" Paris",), (" the",), "cities")}


def test_contexts_are_told_apart_by_activation_and_activations_are_counted(tmp_path):
    """Neuronpedia's, whose strongest contexts are in no bin; what is written is read."""
    contexts = [dict(tokens=["a", "b"], values=[0, value]) for value in (3.0, 0.5, 2.0)]
    bins = [dict(binMin=-1.0, binMax=3.0), dict(binMin=0.0, binMax=1.0), dict(binMin=1.0, binMax=3.0)]
    bars = dict(freq_hist_data_bar_values=[0.5, 2.5], freq_hist_data_bar_heights=[9, 1])
    activations = [context | each for context, each in zip(contexts, bins, strict=True)]
    details = parse_feature(dict(activations=activations, **bars))
    values = [(name, [context["activations"][1] for context in some]) for name, some in details.quantiles]
    assert values == [("activation 1 to 3", [2.0]), ("activation 0 to 1", [0.5])] and details.histogram == (
        (0.5, 9),
        (2.5, 1),
    )
    features.write_details(tmp_path / "features", {(3, 7): details, (3, 8): FeatureDetails()})
    found = read_details([tmp_path], [], [(3, 7), (3, 8)])
    assert found == {(3, 7): details}


def test_of_a_set_on_the_hub_the_bytes_of_its_features_are_fetched(tmp_path, monkeypatch):
    """circuit-tracer's sets carry ``features/``: an index, and one file of gigabytes for each layer."""
    folder, fetched, read = tmp_path / "hub" / "set" / "features", [], []
    pack(folder, {0: None, 1: TRACER, 2: dict(TRACER, label="towns")})

    def fetch_file(address):
        fetched.append(address)
        if "nothing" in address:
            raise UserError("the hub has no index.json.gz")
        return folder / "index.json.gz"

    class Files:
        def cat_file(self, path, start, end):
            read.append((path, end - start))
            return (folder / path.rpartition("/")[2]).read_bytes()[start:end]

    monkeypatch.setattr("saejax.attribution.forms.features.fetch_file", fetch_file)
    monkeypatch.setattr("huggingface_hub.HfFileSystem", Files)
    monkeypatch.setattr("saejax.models.hub._answers", lambda address: True)
    monkeypatch.setenv("SAEJAX_CACHE", str(tmp_path / "cache"))
    features._set_features_on_hub.cache_clear()
    found = read_details(["hf://org/set@v2"], [], [(3, 0), (3, 2)])
    assert found.keys() == {(3, 2)} and found[3, 2].label == "towns"
    assert fetched == ["hf://org/set/features/index.json.gz@v2"]
    ((path, length),) = read
    assert path == "org/set@v2/features/layer_3.bin" and length < (folder / "layer_3.bin").stat().st_size
    assert read_details(["org/nothing"], [], [(3, 2)]) == {}
    # Once: from then on it is in the cache, and what is not there is fetched only where that is wanted.
    assert read_details([], ["hf://org/set/features"], [(3, 1), (3, 2)], fetched=[]).keys() == {(3, 2)}
    assert read_details(["hf://org/set@v2"], [], [(3, 1), (3, 2)], fetched=[(3, 1)])[3, 2].label == "towns"
    assert len(read) == 2 and fetched.count("hf://org/set/features/index.json.gz@v2") == 1
    for absent in ("hf://org/nothing/features", tmp_path / "none"):
        with pytest.raises(UserError, match=r"no index|no folder"):
            read_details([], [absent], [])  # even if no feature is looked for


def test_feature_files_belong_to_the_identity_of_graphs(tmp_path):
    pack(tmp_path / "features", {0: None, 1: TRACER})
    (tmp_path / "set").mkdir()
    pack(tmp_path / "others", {0: None, 1: dict(TRACER, label="towns")})
    shutil.copytree(tmp_path / "features", tmp_path / "copy")
    without = GraphConfig(prompt="a", transcoders=str(tmp_path / "set"))
    paths = [str(tmp_path / name) for name in ("features", "copy", "others")]
    first, copy, others = (identity(dataclasses.replace(without, features=path)) for path in paths)
    assert first == copy and len({first, others, identity(without)}) == 3


def test_long_contexts_are_cut_around_their_strongest_token_and_odd_ones_mended():
    """Fewer activations than tokens, no tokens, none of the activations known, and half of a character."""
    long = dict(tokens=[str(k) for k in range(200)], values=[float(k == 150) for k in range(200)])
    (context,) = parse_feature(dict(activations=[long])).examples
    assert len(context["tokens"]) < 60 and context["tokens"][context["activations"].index(1.0)] == "150"
    contexts = [
        dict(tokens=["a", " b", " c"], values=[0.5, 1.0]), dict(tokens=[], values=[2.0]), dict(tokens=["x"], values=[]),
        dict(tokens=["\ud83d", " y"], values=[3.0, 0.0, 9.0]), dict(tokens=["n"], values=[None]),
    ]  # fmt: skip
    details = parse_feature(dict(activations=contexts, pos_str=["\udc00"], explanations=[dict(description="\ud83d e")]))
    assert details.examples == (
        dict(tokens=["�", " y"], activations=[3.0, 0.0]),
        dict(tokens=["a", " b"], activations=[0.5, 1.0]),
        dict(tokens=["n"], activations=[0.0]),
    )
    assert details.top_logits == ("�",) and details.label == "� e" and details.peaks()
    with pytest.raises(UserError, match="no feature of circuit-tracer or Neuronpedia"):
        parse_feature(dict(activations=[dict(tokens=["a"], values=["much"])]))


def test_damaged_files_are_one_line(tmp_path):
    pack(tmp_path / "features", {0: TRACER})
    whole = (tmp_path / "features" / "layer_3.bin").read_bytes()
    (tmp_path / "features" / "layer_3.bin").write_bytes(whole[:-9])
    with pytest.raises(UserError, match=r"layer_3\.bin is damaged: fetch") as error:
        read_details([tmp_path], [], [(3, 0)])
    assert "\n" not in str(error.value)
    (tmp_path / "features" / "index.json.gz").write_bytes(b"no gzip")
    os.utime(tmp_path / "features" / "index.json.gz", (1, 1))  # some kernels date files by ticks of 10 ms
    with pytest.raises(UserError, match=r"index\.json\.gz is damaged"):
        read_details([tmp_path], [], [(3, 0)])
    for other in ({}, dict(examples_quantiles=[{}]), dict(activations=[dict(tokens=[])])):
        with pytest.raises(UserError, match="no feature of circuit-tracer or Neuronpedia"):
            parse_feature(other)
    for index in (
        [],
        {"3": {}},
        {"3": dict(filename="a", offsets=[0, "9"])},
        {"3": dict(filename="a", offsets=[9, 0])},
    ):
        (tmp_path / "features" / "index.json.gz").write_bytes(gzip.compress(json.dumps(index).encode()))
        with pytest.raises(UserError, match=r"index\.json\.gz is damaged"):
            read_details([tmp_path], [], [(3, 0)])


def test_a_folder_is_listed_once_for_all_features(tmp_path, monkeypatch):
    """Some have a file for each of a million features."""
    (tmp_path / "plt").mkdir()
    (tmp_path / "plt" / "3_7.json").write_text(json.dumps(NEURONPEDIA))
    listed, scandir = [], os.scandir
    monkeypatch.setattr("os.scandir", lambda path: listed.append(path) or scandir(path))
    assert read_details([], [tmp_path], [(3, feature) for feature in range(20)]).keys() == {(3, 7)}
    assert len(listed) == 1


def test_a_feature_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "3_7.json").write_text("[]")
    with pytest.raises(UserError, match=f"^{tmp_path}/3_7.json holds a list, no JSON object: expected a feature of"):
        read_details([], [tmp_path], [(3, 7)])


def test_missing_lists_and_values_that_are_no_numbers_leave_the_rest():
    """Neuronpedia's JSON of features that never fired, without contexts, or whose first explanation is empty."""
    label = dict(explanations=[dict(description=None), dict(description="cities")])
    assert parse_feature(label) == parse_feature(label | dict(activations=None)) == FeatureDetails(label="cities")
    nan = dict(activations=[dict(tokens=["a", "b"], values=[float("nan"), 2.0])])
    assert parse_feature(nan).examples == (dict(tokens=["a", "b"], activations=[0.0, 2.0]),)
    bars = dict(freq_hist_data_bar_values=[0.5, 1.5, float("inf")], freq_hist_data_bar_heights=[float("nan"), 4, 1])
    assert parse_feature(nan | bars).histogram == ((1.5, 4.0),)
    silent = dict(examples_quantiles=None, top_logits=[" Paris"])
    assert parse_feature(silent | dict(pos_str=None)) == FeatureDetails(top_logits=(" Paris",))
