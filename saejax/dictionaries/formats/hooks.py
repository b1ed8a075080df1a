"""Names of places in other tools, and the sites here that they mean.

TransformerLens, which SAELens and circuit-tracer build on, names hooks: ``blocks.15.hook_resid_post``, which is
``blocks.15.hook_out`` in its version 3. With a model of the transformers library SAELens names modules, whose output is
meant: ``model.layers.15``; sparsify names them without the model's prefix: ``layers.15``. nnsight says which side of a
module it means: ``model.layers[15].output[0]``. dictionary_learning names its training site: ``resid_post_layer_15``.

Some names need care. ``blocks.L.mlp.hook_out`` and a module ``...L.mlp`` are what the MLP gives, which is what it adds
to the stream (``mlp_out.L``) only in models that neither normalise nor scale it first. ``blocks.L.hook_mlp_in`` is the
stream before the norm, not ``mlp_in.L``, which is ``blocks.L.mlp.hook_in``. And ``blocks.L.ln2.hook_normalized`` is the
norm before the MLP before its gain: it is called ``mlp_normed.L``, which attribution graphs can read, and nothing else.
``attn.hook_z`` has an axis for heads, which are side by side in ``attn_z.L``. ``mlp.hook_post`` are the hidden
activations that the last projection of an MLP reads, ``mlp_act.L``.
"""

import contextlib
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from saejax.errors import UserError
from saejax.models.sites import ALL_KINDS, Site
from saejax.models.source import read_model_config

UNKNOWN = "unknown"  # in place of a site that a file does not name
MODULE = "module:"  # before the path of a module that is no site of the decoder
NO_SITE = "hook:"  # before the name of a hook that is no site
NORMED = "mlp_normed"  # kind of the site before the gain of the norm before the MLP

_WRITTEN = {
    "resid_pre": "hook_resid_pre",
    "attn_z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_in": "mlp.hook_in",
    "mlp_act": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
    NORMED: "ln2.hook_normalized",
}
_OF_MODULES = {"mlp.hook_out": "mlp_out", "attn.hook_out": "attn_out"}  # what modules give, whatever of it is added
_READ = {hook: kind for kind, hook in _WRITTEN.items()} | _OF_MODULES
# In version 3 of TransformerLens the older names are aliases of these.
_READ |= {"hook_in": "resid_pre", "ln2.hook_in": "resid_mid", "hook_out": "resid_post", "attn.o.hook_in": "attn_z"}
_READ |= {"ln1_post.hook_out": "attn_out", "ln2_post.hook_out": "mlp_out", "mlp.out.hook_in": "mlp_act"}
_MODULES = {None: "resid_post", "mlp": "mlp_out", "self_attn": "attn_out", "attn": "attn_out", "attention": "attn_out"}
# Norms of models that normalise what attention and the MLP give; others have the first name for another norm.
_GEMMA_NORMS: Mapping[str | None, str] = {
    "post_attention_layernorm": "attn_out",
    "pre_feedforward_layernorm": "mlp_in",
    "post_feedforward_layernorm": "mlp_out",
}
_GLM_NORMS: Mapping[str | None, str] = {
    "post_self_attn_layernorm": "attn_out",
    "post_attention_layernorm": "mlp_in",
    "post_mlp_layernorm": "mlp_out",
}
_AFMOE_NORMS: Mapping[str | None, str] = {
    "post_attention_layernorm": "attn_out",
    "pre_mlp_layernorm": "mlp_in",
    "post_mlp_layernorm": "mlp_out",
}
_INPUTS = {None: "resid_pre", "mlp": "mlp_in"}
_INPUTS |= dict.fromkeys(("self_attn.o_proj", "attn.c_proj", "attention.dense"), "attn_z")
_INPUTS |= dict.fromkeys(("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc2"), "mlp_act")
_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")
_MODULE = re.compile(r"(?:\w+\.)*(?:layers|h)[._](\d+)(?:\.([a-z_.]+))?")
_SIDE = re.compile(r"(.+?)\.(?:(output)|inputs?)(?:\.0)*")
_INDEX = re.compile(r"\[(\d+)\]")
_SUBMODULE = re.compile(
    r"(resid_pre|resid_mid|resid_post|resid_out|resid|attn_out|attn|attention_out|mlp_out|mlp_in|mlp)"
    r"(?:_layer)?_?(\d+)"
)
_SHORT = dict(resid="resid_post", resid_out="resid_post", attn="attn_out", attention_out="attn_out", mlp="mlp_out")
_BRANCHES = {"attn_out": "self_attn", "mlp_out": "mlp"}  # modules whose output some models change before it is added
# The modules of models that add to the stream something else than their attention and MLP give: norms of it, or, where
# no module gives it, a multiple (Granite), a sum with the stream (BLOOM), or norms in some layers alone (OLMo hybrid).
# By ``model_type`` of their config.json, and by names, for where that is not here. "gemma-2b" is a Gemma 1 of two
# billion parameters.
_NO_MODULES: Mapping[str | None, str] = {}
_NORMS_OF_TYPES: dict[str, Mapping[str | None, str]] = {
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text"), _GEMMA_NORMS),
    **dict.fromkeys(("olmo2", "olmo3", "flex_olmo", "exaone4", "muse_glimmer_text"), _GEMMA_NORMS),
    **dict.fromkeys(("glm4", "glm4v_text", "kolibri1"), _GLM_NORMS),
    "afmoe": _AFMOE_NORMS,
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified_text", "beam", "olmo_hybrid"), _NO_MODULES),
    **dict.fromkeys(("granite", "granitemoe", "granitemoehybrid", "granitemoeshared"), _NO_MODULES),
    **dict.fromkeys(("bloom", "minicpm3"), _NO_MODULES),
}
_NORMS_OF_NAMES: dict[re.Pattern[str], Mapping[str | None, str]] = {
    re.compile(
        r"(?:.*/)?(?:gemma-?[23]n?-e?\d+[bm]\b|(?:med|shield|tx|data|function|translate)gemma-|paligemma-?2-"
        r"|olmo-?[23](?:\.\d+)?-\d+b?\b|exaone-4\b).*"
    ): _GEMMA_NORMS,
    re.compile(r"(?:.*/)?glm-(?:4|z1)-.*0414"): _GLM_NORMS,
    re.compile(r"(?:.*/)?(?:gemma-?4-|granite-[34]\.\d-|bloomz?(?:-|$)|minicpm3-).*"): _NO_MODULES,
}
# Owners of families on the hub, and models that TransformerLens calls otherwise.
_OWNERS = dict.fromkeys(("pythia-", "gpt-neo-", "gpt-j-"), "EleutherAI") | {"gemma-": "google", "opt-": "facebook"}
_OWNERS |= {"phi-": "microsoft", "qwen": "Qwen", "llama-3": "meta-llama", "meta-llama-": "meta-llama"}
_RENAMED = {"gpt2-small": "gpt2", "mistral-7b": "mistralai/Mistral-7B-v0.1", "llama-2-7b": "meta-llama/Llama-2-7b-hf"}
# Models by their norms, which decide what TransformerLens' centring of weights does: by ``model_type`` where the fields
# of a config.json do not tell them or have another norm's name, and by names, for where that file is not here.
_LAYER_NORMS_OF_TYPES = dict.fromkeys(("opt", "olmo", "starcoder2", "nemotron"), True)
_LAYER_NORMS_OF_TYPES |= dict.fromkeys(("qwen", "t5", "mt5", "umt5", "longt5"), False)
_LAYER_NORMS = re.compile(
    r"(?:.*/)?(?:(?:distil)?gpt-?2(?:-(?:small|medium|large|xl)\b.*)?|dialogpt-.*|stablelm-.*|phi-[12](?:[._]5)?"
    r"|(?:pythia|gpt-?neox?|gpt-j|opt|bloomz?|olmo|tiny-?stories(?:-instruct|-instuct)?)-\d.*|bloomz?"
    r"|(?:gelu|solu|attn-only)-\d+l.*|redwood_attn_2l)"
)
_RMS_NORMS = re.compile(
    r"(?:.*/)?(?:(?:code|recurrent|med|shield|function|translate)?gemma-?[23]?n?-e?\d.*|(?:meta-|code|tiny)?llama-?\d.*"
    r"|(?:mistral|mixtral|ministral|deepseek)-.*|(?:qwen|olmo-?[23]|smollm[23]?|qwq|yi|gpt-oss)-?\d.*|phi-[34]\b.*)"
)


def modules_of(model: str) -> Mapping[str | None, str]:
    """Return the kinds of site that outputs of modules are, by the modules' names in a layer; None is the layer.

    The model's config.json says what it adds to its stream where that is here; else its name does, and a line says what
    was assumed.
    """
    if fields := _fields(model):  # a model of text and images describes its decoder inside
        types = [source.get("model_type") for source in (fields, fields.get("text_config") or {})]
        norms = next((_NORMS_OF_TYPES[name] for name in types if name in _NORMS_OF_TYPES), None)
    else:
        norms = next((norms for name, norms in _NORMS_OF_NAMES.items() if name.fullmatch(model.lower())), None)
        if model:
            _say_once(
                f"the config.json of {model} is not here: by its name it is taken for a model that adds to its stream "
                f"{'what' if norms is None else 'something else than'} its attention and MLP give"
            )
    return _MODULES if norms is None else {None: "resid_post", **norms}


def _fields(model: str) -> dict[str, Any]:
    """Return the fields of a model's config.json, in a folder or in the hub's cache; empty if it is not there."""
    folder, cached = Path(model), None
    if model and not (folder / "config.json").is_file():
        with contextlib.suppress(HFValidationError):  # no name of a repository
            cached = try_to_load_from_cache(hub_name(model), "config.json")
        folder = Path(cached).parent if isinstance(cached, str) else Path()
    return read_model_config(folder) if model and folder != Path() else {}


@functools.cache
def _say_once(line: str) -> None:
    logging.info("%s", line)


def has_layer_norms(model: str) -> bool | None:
    """Return whether a model has LayerNorms, not RMSNorms; None: neither its config.json nor its name tells.

    Its exact name decides where the file is not here, or does not tell, and a line says what was assumed.
    """
    fields = _fields(model)
    for some in (fields, fields.get("text_config") or {}):
        if some.get("model_type") in _LAYER_NORMS_OF_TYPES:
            return _LAYER_NORMS_OF_TYPES[some["model_type"]]
        if "rms_norm_eps" in some:
            return False
        if any(name in some for name in ("layer_norm_eps", "layer_norm_epsilon")):
            return True
    name = model.lower().rstrip("/")
    by_name = False if _RMS_NORMS.fullmatch(name) else True if _LAYER_NORMS.fullmatch(name) else None
    if by_name is not None:
        _say_once(
            f"the config.json of {model} {'does not tell its norms' if fields else 'is not here'}: by its name it is "
            f"taken for a model with {'LayerNorms' if by_name else 'RMSNorms'}"
        )
    return by_name


def short_model_name(model: str) -> str:
    """Return a model's name without its owner, in small letters; "" where a folder is named, which says nothing."""
    if model.startswith(("/", ".", "~")) or model.rstrip("/").count("/") > 1:
        return ""
    name = bare_model_name(model)
    return "gpt2" if name == "gpt2-small" else name  # as TransformerLens calls the smallest GPT-2


def bare_model_name(model: str) -> str:
    """Return the last part of a model's name or folder in small letters, by which other tools call it."""
    return model.rstrip("/").rpartition("/")[2].lower()


def hub_name(model: str) -> str:
    """Return the hub id of a model that TransformerLens calls by a name without an owner; other names as they are."""
    owner = next((owner for family, owner in _OWNERS.items() if model.lower().startswith(family)), "")
    return _RENAMED.get(model.lower(), model if "/" in model or not owner else f"{owner}/{model}")


def to_site(hook: str | None, model: str = "") -> str:
    """Return the site that a name means; for other names "module:<path>", or "hook:<name>", which has to be replaced.

    Args:
      hook: such as "blocks.3.hook_mlp_out", "model.layers.3.mlp" or "mlp_out_layer_3"; None or "" is "unknown".
      model: name of the model, which decides what the output of its MLPs is.
    """
    if not hook:
        return UNKNOWN
    if match := _SUBMODULE.fullmatch(hook):
        kind, layer = _SHORT.get(match[1], match[1]), int(match[2])
        if kind in _BRANCHES and _BRANCHES[kind] not in modules_of(model):  # it hooks modules
            return f"{MODULE}model.layers.{layer}.{_BRANCHES[kind]}"
        return f"{kind}.{layer}"
    if match := _HOOK.fullmatch(hook):
        layer, name = int(match[1]), match[2]
        if name in _READ and not (name in _OF_MODULES and _BRANCHES[_READ[name]] not in modules_of(model)):
            return f"{_READ[name]}.{layer}"
    return NO_SITE + hook if "hook_" in hook else _module_site(_INDEX.sub(r".\1", hook), model)


def _module_site(path: str, model: str) -> str:
    """Return the site that the path of a module means, its output unless the path ends in its input."""
    module, output = path, "output"
    if match := _SIDE.fullmatch(path):
        module, output = match.groups()
    if match := _MODULE.fullmatch(module):
        layer, part = int(match[1]), match[2]
        kinds: Mapping[str | None, str] = modules_of(model) if output else _INPUTS
        if output and kinds is _MODULES and "feedforward" in (part or ""):  # only such models have that norm
            kinds = _GEMMA_NORMS
        if part in kinds:
            return f"{kinds[part]}.{layer}"
        return MODULE + (module if output else path)
    return MODULE + path


def require_sites(*sites: str) -> None:
    """Raise a ``UserError`` for a "hook:<name>" of ``to_site``, which stands for no site."""
    for site in sites:
        if site.startswith(NO_SITE):
            raise UserError(
                f"the hook {site.removeprefix(NO_SITE)} is none of the sites here ({', '.join(ALL_KINDS)}): to load it "
                "all the same, say which site stands for it (site= or target= of load_dictionary)"
            )


def to_hook(site: str) -> str | None:
    """Return the TransformerLens name of a site, or the path of a module; None for "unknown".

    Raises:
      UserError: the other tools have no name for it.
    """
    if site in ("", UNKNOWN):
        return None
    if site.startswith(MODULE):
        return site.removeprefix(MODULE)
    kind, _, layer = site.partition(".")
    if kind not in _WRITTEN or ":" in site or "+" in site:
        raise UserError(f"SAELens and circuit-tracer have no name for the site {site}: export sites such as mlp_in.3")
    if kind != NORMED:
        Site.parse(site)
    return f"blocks.{layer}.{_WRITTEN[kind]}"


def layer_of(site: str) -> int:
    """Return the layer of a site, also of one that attribution graphs alone can read."""
    kind, _, layer = site.partition(".")
    return int(layer) if kind == NORMED and layer.isdigit() else Site.parse(site).layer
