"""Labels of features, found by the folders of dictionaries."""

from runs import write_members

from saejax.dictionaries.labels import Label, labels_of_folders
from saejax.files import write_json
from saejax.results import to_json


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
