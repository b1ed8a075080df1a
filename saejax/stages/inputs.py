"""The inputs of a stage that runs a model: the model and the dictionary that flags name, and tested behaviours."""

from collections.abc import Sequence

from jax.sharding import Mesh

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.dictionaries.bos import follow_bos
from saejax.models.language_model import LanguageModel
from saejax.models.loading import load_configured_model
from saejax.models.settings import ModelConfig
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.runner import stacks
from saejax.runner.workspace import Run
from saejax.tasks.behaviours import Prompt
from saejax.tasks.gate import read_tested


def load_run_model(run: Run, *dictionaries: DictionaryConfig) -> LanguageModel:
    """Return the model that a stage runs, on the configured mesh, with texts as ``follow_bos`` begins them."""
    lm = load_configured_model(run.configs[ModelConfig], run_mesh(run))
    return follow_bos(lm, dictionaries, run.say)


def run_mesh(run: Run) -> Mesh:
    """Return the mesh of a stage's configuration."""
    return make_mesh(run.configs.get(MeshConfig))


def load_run_dictionary(run: Run) -> Dictionary:
    """Return the dictionary that ``--<stage>.dictionary`` names, on the mesh of the stage's configuration.

    Raises:
      UserError: there is none of this name.
    """
    name, flag = run.configs.named(run.stage).dictionary, f"--{run.stage}.dictionary"
    dictionary = stacks.load_trained(name, run.inputs, flag, run_mesh(run))
    if not dictionary.config.fingerprint:  # another tool's
        named = dictionary.config.model or "no model"
        run.say(f"the dictionary names {named} and records no revision of it; check that it was trained on this model")
    return dictionary


def read_behaviours(run: Run, named: Sequence[str] = (), flag: str = "") -> dict[str, list[Prompt]]:
    """Return the prompts of the tested behaviours, and say which are left out.

    Args:
      run: the unit.
      named: behaviours to read; empty: all. See ``gate.read_tested``.
      flag: the flag that named them, for messages.
    """
    tested = read_tested(run.inputs["baseline"], named, flag)
    for name, why in tested.left_out.items():
        run.say(f"{name} is left out: {why}")
    return tested.prompts
