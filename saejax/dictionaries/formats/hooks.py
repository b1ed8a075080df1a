"""Names of places in other tools, and the sites here that they mean.

TransformerLens, which SAELens and circuit-tracer build on, names hooks: ``blocks.15.hook_resid_post``. With a model of
the transformers library SAELens names modules, whose output is meant: ``model.layers.15``; sparsify names them without
the model's prefix: ``layers.15``.

Some names need care. ``blocks.L.mlp.hook_out`` and a module ``...L.mlp`` are what the MLP gives, which is what it adds
to the stream (``mlp_out.L``) only in models that do not normalise it first. And ``blocks.L.ln2.hook_normalized`` is the
norm's output before its gain, ``blocks.L.hook_mlp_in`` the stream before the norm: neither is ``mlp_in.L``, which is
``blocks.L.mlp.hook_in``.
"""

import re

from saejax.errors import UserError
from saejax.models.sites import KINDS, Site

UNKNOWN = "unknown"  # in place of a site that a file does not name
MODULE = "module:"  # before the path of a module that is no site of the decoder

_WRITTEN = {
    "resid_pre": "hook_resid_pre",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_in": "mlp.hook_in",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
_READ = {hook: kind for kind, hook in _WRITTEN.items()} | {"mlp.hook_out": "mlp_out"}
_MODULES = {None: "resid_post", "mlp": "mlp_out", "self_attn": "attn_out", "attn": "attn_out", "attention": "attn_out"}
_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")
_MODULE = re.compile(r"(?:\w+\.)*(?:layers|h)\.(\d+)(?:\.(mlp|self_attn|attn|attention))?")
# Parts of the names of models that normalise what attention and the MLP give before it is added to the stream.
_POST_NORMS = ("gemma-2", "gemma2", "gemma-3", "gemma3", "olmo-2", "olmo2")


def has_post_norms(model: str) -> bool:
    """Whether a model of this name normalises what attention and the MLP give before it is added."""
    return any(part in model.lower() for part in _POST_NORMS)


def to_site(hook: str | None, model: str = "") -> str:
    """The site that a hook or a module means, "module:<path>" for a module that is no site, "unknown" for no name.

    Args:
      hook: such as "blocks.3.hook_mlp_out" or "model.layers.3.mlp".
      model: name of the model, which decides what the output of its MLPs is.

    Raises:
      UserError: it is a hook that none of the sites is.
    """
    if not hook:
        return UNKNOWN
    if found := _HOOK.fullmatch(hook):
        layer, place = found.groups()
        if place in _READ and not (place == "mlp.hook_out" and has_post_norms(model)):
            return f"{_READ[place]}.{layer}"
    elif found := _MODULE.fullmatch(hook):
        layer, part = found.groups()
        if part is None or not has_post_norms(model):
            return f"{_MODULES[part]}.{layer}"
    if "hook_" in hook:
        raise UserError(
            f"the hook {hook} is none of the sites here ({', '.join(KINDS)}): to load it all the same, say which site "
            "stands for it (site= or target= of load_dictionary)"
        )
    return MODULE + hook


def to_hook(site: str) -> str | None:
    """The TransformerLens name of a site, or the path of a module; None for "unknown".

    Raises:
      UserError: the other tools have no name for it.
    """
    if site in ("", UNKNOWN):
        return None
    if site.startswith(MODULE):
        return site.removeprefix(MODULE)
    if ":" in site:
        raise UserError(f"SAELens and circuit-tracer have no name for the site {site}: export sites such as mlp_in.3")
    parsed = Site.parse(site)
    return f"blocks.{parsed.layer}.{_WRITTEN[parsed.kind]}"


def kept(name: str | None, site: str, model: str = "") -> bool:
    """Whether a name that a file had still means this site of a language model."""
    try:
        return to_site(name, model) == site
    except UserError:
        return False
