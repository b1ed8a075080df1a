"""Where a transformers PyTorch model has the values of a site. (torch itself is not needed to say it.)"""

import dataclasses
import difflib
from typing import Any

from saejax.errors import UserError
from saejax.models.families import FAMILIES, Modules
from saejax.models.sites import AnySite, ModuleSite, Site

MODULES = {name: family.modules for name, family in FAMILIES.items()}


def modules_of(model: Any) -> Modules:
    """Where a transformers model of one of the ``FAMILIES`` computes what."""
    modules, parallel = FAMILIES[model.config.model_type].modules, getattr(model.config, "use_parallel_residual", False)
    return dataclasses.replace(modules, mid=None) if parallel else modules


def places(model: Any, site: AnySite) -> list[tuple[Any, bool]]:
    """The modules at whose input (False) or output (True) a site is read; its value is the sum of what is there.

    Raises:
      UserError: the model has no such module.
    """
    if isinstance(site, ModuleSite):
        return [(_module(model, site), site.kind == "module")]
    assert isinstance(site, Site)  # those of a second model are read from that, under their own names
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
