"""Labels of features, by the folders of dictionaries and from sheets that a person filled in (``--graph.labels``)."""

import csv

import pytest
from runs import write_members

from saejax.attribution.settings import GraphConfig
from saejax.dictionaries.labels import COLUMNS, Label, labels_of_sheets
from saejax.errors import UserError
from saejax.files import write_json
from saejax.results import to_json
from saejax.runner.labels import feature_names, labels_of, labels_of_folders
from saejax.stages.attribute.outputs import details_of_features
from saejax.stages.attribute.requests import identity, read_labels


def write(path, *rows: tuple[str, str, str], columns=(*COLUMNS, "dictionary")) -> None:
    """Write lines of dictionary, feature and label."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for dictionary, feature, label in rows:
            writer.writerow(dict(feature=feature, label=label, note="", reviewer="R", dictionary=dictionary))


def test_labels_are_read_by_layer_and_feature(tmp_path):
    write(
        tmp_path / "one.csv", ("topk/mlp_in.3", "17", "cities, “old”"), ("layer 12", "0", ""), ("layer 12", "4", " x ")
    )
    write(tmp_path / "two.csv", ("mlp_in.3", "17", "cities, “old”"), ("mlp_in.3", "18", "rivers"))
    one = {(3, 17): "cities, “old”", (12, 4): "x"}
    assert labels_of_sheets(tmp_path / "one.csv", "--graph.labels") == one
    assert read_labels(GraphConfig(transcoders="a/set", labels=str(tmp_path))) == one | {(3, 18): "rivers"}
    # What they say belongs to a graph's identity.
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "config.json").write_text("{}")
    config = GraphConfig(transcoders=str(tmp_path / "set"), labels=str(tmp_path))
    before = identity(config)
    write(tmp_path / "two.csv", ("mlp_in.3", "18", "lakes"))
    assert identity(config) != before


def test_labels_in_json_can_be_shown(tmp_path):
    (tmp_path / "labels.json").write_text(r'{"3_17": "\ud800 and \ud83d\ude00", "0_4": "城市"}')
    labels = read_labels(GraphConfig(transcoders="a/set", labels=str(tmp_path / "labels.json")))
    assert labels == {(3, 17): "\N{REPLACEMENT CHARACTER} and \N{GRINNING FACE}", (0, 4): "城市"}


def test_a_dictionary_without_its_layer_in_the_name(tmp_path):
    """Of a lone dictionary, or a sweep at one site, the set that is traced tells the layer; a setting is none."""
    unit = tmp_path / "run" / "train" / "topk"
    unit.mkdir(parents=True)
    write_members(unit, *((name, "resid_post.5", "resid_post.5") for name in ("k16", "k32")))
    write(tmp_path / "a.csv", ("topk/k32", "17", "cities"), ("topk/resid_post.7-k32", "1", "rivers"))
    config = GraphConfig(dictionaries=(str(unit / "k32"),), labels=str(tmp_path / "a.csv"))
    assert read_labels(config) == {(5, 17): "cities", (7, 1): "rivers"}
    for name in ("topk/k32", "topk/lr0.001", "topk"):
        write(tmp_path / "a.csv", (name, "17", "cities"))
        with pytest.raises(UserError, match=rf"line 2: '{name}' and '17' name no layer and feature"):
            labels_of_sheets(tmp_path / "a.csv", "--graph.labels")


def test_labels_of_other_dictionaries_are_not_used(tmp_path, caplog):
    """Of the layer, too: feature 17 of an SAE is not feature 17 of a transcoder. A warning names the lines."""
    unit = tmp_path / "run" / "train" / "topk"
    unit.mkdir(parents=True)
    write_members(unit, *((f"mlp_in.{layer}", f"mlp_in.{layer}", f"mlp_out.{layer}") for layer in range(4)))
    right = ("topk/mlp_in.3", "mlp_in.3", "layer 3")
    wrong = ("topk/resid_post.3", "tpok/mlp_in.3", "mlp_inn.3", "topk/mlp_in.3-k8")
    write(tmp_path / "a.csv", *((name, str(n), "a") for n, name in enumerate((*right, *wrong))), (wrong[0], "9", ""))
    config = GraphConfig(transcoders=str(unit), labels=str(tmp_path / "a.csv"))
    assert read_labels(config).keys() == {(3, 0), (3, 1), (3, 2)}
    (said,) = (record.getMessage() for record in caplog.records)
    assert all(f"a.csv, line {n} ({name})" in said for n, name in enumerate(wrong, 5)) and said.count("line") == 4
    assert said.endswith("expected topk/mlp_in.0, topk/mlp_in.1, topk/mlp_in.2, topk/mlp_in.3")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("topk", "17", "a")], r"line 2: 'topk' and '17' name no layer and feature"),
        ([("layer 3", "x", "a")], r"line 2: 'layer 3' and 'x' name no layer and feature"),
        ([("layer 3", "1", "a"), ("mlp_in.3", "1", "b")], "line 3: feature 1 of mlp_in.3 is 'b', and 'a' in an"),
        (
            [("topk", "17", "a"), ("layer 3", "1", "a"), ("layer 3", "x", "a")],
            "2 lines are no labels: line 2: 'topk' and .*; line 4: 'layer 3' and 'x'",
        ),
    ],
)
def test_a_bad_sheet_is_one_line(tmp_path, rows, message):
    write(tmp_path / "a.csv", *rows)
    with pytest.raises(UserError, match=message):
        labels_of_sheets(tmp_path / "a.csv", "--graph.labels")


def test_no_labels(tmp_path):
    write(tmp_path / "a.csv", ("layer 3", "1", "a"), columns=COLUMNS)
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("a.csv", "--graph.labels=.* has no column dictionary"),
        ("empty", "--graph.labels=.*empty is a folder without .csv files"),
        ("none.csv", "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            read_labels(GraphConfig(transcoders="a/set", labels=str(tmp_path / name)))


def test_labels_of_a_dictionary_that_was_here_before_are_not_used(tmp_path):
    """Its features had other meanings; ``interpret`` and ``atlas`` may not have run since."""

    def unit(stage: str, mark: str, needs: dict[str, str]) -> None:
        folder = tmp_path / stage / f"topk-{mark}"
        (folder / "features").mkdir(parents=True)
        write_json(folder / "started.json", dict(depends_on=dict(needs=needs)))
        record = dict(
            feature=7, tokens=[dict(text=f"token of {mark[:1]}", sum=1.0)], examples=[], histogram=[0, 3, 0, 9]
        )
        write_json(folder / "features" / "00000.json", [record])
        write_json(folder / "labels.json", {"5": to_json(Label(f"{stage} {mark[:1]}", "Ada"))})
        write_members(folder, ("", "resid_post.3", "resid_post.3"))
        (tmp_path / stage / "topk").unlink(missing_ok=True)
        (tmp_path / stage / "topk").symlink_to(folder.name)

    unit("train", "a" * 16, {})
    unit("interpret", "b" * 16, {"train/topk": "a" * 16})
    unit("atlas", "c" * 16, {"interpret/topk": "b" * 16})
    names = {5: "atlas c", 7: "“token of b”"}
    assert feature_names(tmp_path, "topk") == names and labels_of(tmp_path, "topk")[5].label == "atlas c"
    folder, feature = tmp_path / "train" / "topk", (3, 7)
    config = GraphConfig(transcoders=str(folder))
    assert labels_of_folders([folder]) == {(3, 5): "atlas c"}
    middles = 2**-9.25, 2**-8.75, 2**-8.25  # of bins
    assert details_of_features(config, [feature])[feature].histogram == tuple(zip(middles, (3, 0, 9), strict=True))
    unit("train", "d" * 16, {})
    assert feature_names(tmp_path, "topk") == labels_of(tmp_path, "topk") == labels_of_folders([folder]) == {}
    assert details_of_features(config, [feature]) == {}
    unit("interpret", "e" * 16, {"train/topk": "d" * 16})  # the atlas still shows what was interpreted before
    assert feature_names(tmp_path, "topk") == {5: "interpret e", 7: "“token of e”"}
    # A run of the earlier dictionary, which another run has replaced meanwhile, has its own labels.
    assert feature_names(tmp_path, "topk", tmp_path / "train" / f"topk-{16 * 'a'}") == names
    assert feature_names(tmp_path, "topk", tmp_path / "train" / f"topk-{16 * 'f'}") == {}


def test_labels_are_found_by_the_folder_of_a_unit_or_a_member(tmp_path):
    unit = tmp_path / "run" / "train" / "topk"
    for member in ("mlp_in.0", "mlp_in.1"):
        (unit / member).mkdir(parents=True)
        (tmp_path / "run" / "atlas" / "topk" / member).mkdir(parents=True)
        label = {"7": to_json(Label(f"of {member}", "Ada"))}
        write_json(tmp_path / "run" / "atlas" / "topk" / member / "labels.json", label)
    write_members(unit, ("mlp_in.0", "mlp_in.0", "mlp_out.0"), ("mlp_in.1", "mlp_in.1", "mlp_out.1"))
    assert labels_of_folders([unit]) == {(0, 7): "of mlp_in.0", (1, 7): "of mlp_in.1"}
    assert labels_of_folders([str(unit / "mlp_in.1")]) == {(1, 7): "of mlp_in.1"}
    assert labels_of_folders(["org/set", tmp_path, unit / "nothing"]) == {}
