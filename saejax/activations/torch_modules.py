"""Where a transformers PyTorch model has the values of a site. (torch itself is not needed to say it.)"""

import dataclasses
import difflib
from typing import Any

from saejax.errors import UserError
from saejax.models.sites import AnySite, ModuleSite


@dataclasses.dataclass(frozen=True)
class Modules:
    """Where a family computes what.

    Attributes:
      layers: path from the model to its layers; the others start at a layer.
      attn_out, mlp_out: modules whose output is added to the stream.
      mlp: module that reads ``mlp_in``.
      mid: module that reads the stream between attention and MLP; None if there is none, because both are added at
        once.
    """

    layers: str
    attn_out: str
    mlp: str
    mlp_out: str
    mid: str | None


_LLAMA = Modules("model.layers", "self_attn", "mlp", "mlp", "post_attention_layernorm")
_GEMMA2 = Modules(
    "model.layers", "post_attention_layernorm", "mlp", "post_feedforward_layernorm", "pre_feedforward_layernorm"
)
MODULES = {
    "gpt2": Modules("transformer.h", "attn", "mlp", "mlp", "ln_2"),
    "gpt_neox": Modules("gpt_neox.layers", "attention", "mlp", "mlp", "post_attention_layernorm"),
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3": dataclasses.replace(_GEMMA2, layers="model.language_model.layers"),
    "gemma3_text": _GEMMA2,
    "phi": dataclasses.replace(_LLAMA, mid=None),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


def modules_of(model: Any) -> Modules:
    """Where a transformers model of one of the ``MODULES``' families computes what."""
    kind = model.config.model_type
    modules = MODULES[kind]
    parallel = kind == "gpt_neox" and model.config.use_parallel_residual
    return dataclasses.replace(modules, mid=None) if parallel else modules


def places(model: Any, site: AnySite) -> list[tuple[Any, bool]]:
    """The modules at whose input (False) or output (True) a site is read; its value is the sum of what is there.

    Raises:
      UserError: the model has no such module.
    """
    if isinstance(site, ModuleSite):
        return [(_module(model, site), site.kind == "module")]
    names = modules_of(model)
    layer = model.get_submodule(names.layers)[site.layer]
    entering, attended = ("", False), (names.attn_out, True)
    found = {
        "resid_pre": [entering],
        "attn_out": [attended],
        "resid_mid": [(names.mid, False)] if names.mid else [entering, attended],
        "mlp_in": [(names.mlp, False)],
        "mlp_out": [(names.mlp_out, True)],
        "resid_post": [("", True)],
    }[site.kind]
    return [(layer.get_submodule(path), after) for path, after in found]


def _module(model: Any, site: ModuleSite) -> Any:
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    if site.path not in names:
        near = difflib.get_close_matches(site.path, names, n=3, cutoff=0.5) or names[:3]
        raise UserError(f"{site}: {type(model).__name__} has no such module; expected a path such as {', '.join(near)}")
    return model.get_submodule(site.path)
