"""Models known by their config.json alone."""

import json
import os

import pytest
import torch
from preflight_setup import CONFIGS, shape
from runs import make_configs
from transformers import AutoConfig, AutoModelForCausalLM

from saejax.errors import UserError
from saejax.flops import parameters
from saejax.preflight import shapes

# As the models' own papers and pages count them.
PARAMETERS = {
    "gpt2-medium": 354_823_168,
    "pythia-1.4b": 1_414_647_808,
    "gemma-2b": 2_506_172_416,
    "phi-2": 2_779_683_840,
    "llama-3-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-4b-instruct-2507": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


IN_TRANSFORMERS = ("gpt2-medium", "pythia-1.4b", "gemma-2b", "phi-2", "mistral-7b", "qwen3-0.6b")


def test_every_shape_is_counted():
    assert {path.stem for path in (CONFIGS / "shapes").glob("*.json")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    """Of one family each also as transformers counts them."""
    assert parameters(shape(name)) == PARAMETERS[name]
    if name in IN_TRANSFORMERS:
        fields = json.loads((CONFIGS / "shapes" / f"{name}.json").read_text())
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_files_folders_and_the_default(tiny_llama):
    listed = make_configs(preflight__models=(str(CONFIGS / "shapes/phi-2.json"), str(tiny_llama)))
    file, folder = shapes.read_shapes(listed)
    assert (file.config.family, file.has_weights, folder.has_weights) == ("phi", False, True)
    (default,) = shapes.read_shapes(make_configs(model__path=str(tiny_llama)))
    assert default.config == folder.config
    assert shapes.identity(listed) != shapes.identity(make_configs(model__path=str(tiny_llama)))


def test_the_identity_follows_the_file_not_its_name(tmp_path):
    fields = json.loads((CONFIGS / "shapes/phi-2.json").read_text())
    marks = []
    for layers in (32, 31):
        (tmp_path / "m.json").write_text(json.dumps(fields | dict(num_hidden_layers=layers)))
        marks.append(shapes.identity(make_configs(preflight__models=(str(tmp_path / "m.json"),))))
    assert marks[0] != marks[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("[1]", "holds a list, no JSON object: expected a model's shape"),
        ("{", "is not valid JSON: expected a model's shape"),
        ('{"model_type": "t5"}', "does not have the family 't5'"),
        ('{"model_type": "llama", "hidden_size": 64}', "has no field"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "m.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        shapes.read_shapes(make_configs(preflight__models=(str(path),)))
    assert "m.json" in str(error.value)


def test_a_hub_that_cannot_be_reached_leaves_the_shape():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(UserError, match=r"someone/nothing .*--preflight\.models=FILE\.json"):
        shapes.read_shapes(make_configs(preflight__models=("someone/nothing",)))
