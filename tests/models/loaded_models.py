"""Models in folders as the decoder reads them, meshes of the first devices, and prompts."""

import json

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

from saejax.files import read_json
from saejax.models import source
from saejax.models.families import read_config
from saejax.models.settings import ModelConfig
from saejax.models.weights import load_params
from saejax.parallel.mesh import AXES


def mesh_of(*shape) -> Mesh:
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def config_of(folder):
    return read_config(read_json(folder / "config.json"), "config.json")


def resolve(path, revision="main", decoder=False):
    return source.resolve(ModelConfig(path=str(path), revision=revision), decoder)


def change_config(folder, **changes):
    fields = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(fields))


def load(folder, dtype="float32", mesh=None):
    """Config and parameters; without a mesh, on the first device."""
    config = config_of(folder)
    return config, load_params(folder, config, mesh or mesh_of(1, 1, 1), dtype)


def load_tiny(folder, family, **changes):
    """Config and parameters of a random model, and the same in transformers."""
    save_tiny(folder, family, **changes)
    return *load(folder), AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def fifty_prompts() -> list[str]:
    """Prompts of different lengths and kinds."""
    nouns = ["key", "teacher", "river", "engine", "captain", "window", "poem", "cabinet", "merchant", "violin"]
    shapes = (
        "The {0} near the {1}s",
        "Question: is every {0} also a {1}? Answer:",
        "3 + {2} = {3}\n7 + {2} =",
        "Nobody could say why the {0} was sold for {3} coins, or what",
        "def {0}({1}):\n    return",
    )
    return [
        shape.format(noun, nouns[(3 * index + 1) % 10], index, 9 - index)
        for index, noun in enumerate(nouns)
        for shape in shapes
    ]
