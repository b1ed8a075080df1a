"""Names of folders: readable, as long as a file system takes, and different for what is different."""

import pytest

from saejax.dictionaries.names import folder_name
from saejax.matching.track.texts import name_text


@pytest.mark.parametrize(
    ("dictionary", "name"),
    [
        ("topk/k32", "topk-k32"),
        ("/runs/demo/train/topk/", "runs-demo-train-topk"),
        ("runs/数学 模型", "runs-数学-模型"),
        ("../..", "dictionary"),
        ("कि की", "कि-की"),
    ],
)
def test_names_are_readable_in_all_scripts(dictionary, name):
    assert folder_name(dictionary) == name


def test_long_names_fit_and_stay_apart():
    long = [f"{start}/{'数据/' * 80}topk" for start in "ab"]
    names = [folder_name(dictionary) for dictionary in long]
    assert names[0] != names[1] and all(name.endswith("topk") and len(name.encode()) < 120 for name in names)
    prompts = ["The capital of France is the city of Paris, and that of Spain is"[:length] for length in (30, 55, 60)]
    assert len({*map(name_text, prompts)} | {*map(name_text, ("1 + 1", "1 - 1", "😀", "🙃", "ที่", "ที"))}) == 9
    assert name_text(prompts[0]) == "The-capital-of-France-is-the-c"
