"""Sites: the named places of a decoder where values are captured and edited.

In the order in which layer L computes them:

- ``resid_pre.L``: the residual stream entering the layer;
- ``attn_q.L``, ``attn_k.L``, ``attn_v.L``: queries, keys and values, as their projections give them, before the norms
  of heads and the rotary embedding;
- ``attn_z.L``: the attended values that the output projection reads;
- ``attn_out.L``: what attention adds to the stream, after the norm that follows it in some families (Gemma 2 and 3);
- ``resid_mid.L``: the stream after that, ``resid_pre.L + attn_out.L``;
- ``mlp_in.L``: what the MLP reads, after its norm;
- ``mlp_act.L``: the hidden activations that the MLP's last projection reads, of a gated MLP its product;
- ``mlp_out.L``: what the MLP adds, after the norm that follows it in those families;
- ``resid_post.L``: the stream leaving the layer, ``resid_mid.L + mlp_out.L``, equal to ``resid_pre.(L+1)``.

All have the width ``d_model`` but the *inner* ones: the four of heads have the width of all heads side by side, [H x K]
for ``attn_q`` and ``attn_z``, [N x K] for ``attn_k`` and ``attn_v``; ``mlp_act`` has the hidden width of the MLP, and
no mixture of experts has it, as each token has the activations of other experts there. The embeddings that enter the
first layer, with learned positions where a model adds them, are ``resid_pre.0``.

In families whose layers are parallel (GPT-NeoX, Phi), the MLP reads ``resid_pre.L`` too: ``mlp_in.L`` is a norm of
that, and an edit of ``attn_out.L`` or ``resid_mid.L`` reaches ``resid_post.L`` without going through the MLP. No
module of the transformers model gives their ``resid_mid.L``; it is defined by the sum above. In Phi, attention and the
MLP read the same normed stream; an edit of ``mlp_in.L`` changes what the MLP reads only.

``attn_pattern.L`` is read and not changed: the attention of each head from each token to each, [B, H, T, T], as
``lm(tokens, capture="attn_pattern.5")`` returns it. It has no place for a dictionary, a store or an edit.

A *joined site*, ``resid_post.5+resid_post.15``, is what a crosscoder reads: its parts side by side, which may be of two
models, ``resid_post.5+other:resid_post.5`` (``--model.other``).
"""

import dataclasses
import re
from typing import Self, cast

from saejax.errors import UserError
from saejax.models.config import DecoderConfig

HEAD_KINDS = ("attn_q", "attn_k", "attn_v", "attn_z")
NEURONS = "mlp_act"  # kind of the MLP's hidden activations
INNER_KINDS = (*HEAD_KINDS, NEURONS)  # within attention and the MLP; not of the width of the stream
PATTERN = "attn_pattern"  # kind of the attention of each head, which a run returns and nothing edits
# In the order in which a layer computes them.
ALL_KINDS = ("resid_pre", *HEAD_KINDS, "attn_out", "resid_mid", "mlp_in", NEURONS, "mlp_out", "resid_post")
KINDS = tuple(kind for kind in ALL_KINDS if kind not in INNER_KINDS)
IN_STREAM = tuple(kind for kind in KINDS if kind != "mlp_in")  # the stream, and what is added to it
# A layer's number. With digits of other scripts or zeros in front, which ``int`` reads, one site would have two names.
_LAYER = re.compile("0|[1-9][0-9]{0,5}")
# What some dictionaries read that is no site, and what to do: see ``dictionaries.formats.hooks``.
_ELSEWHERE = {
    "unknown": "stands for a site that a dictionary's files do not name: give it as site= of saejax.load_dictionary",
    "embed": "is named resid_pre.0 here: the embeddings, with learned positions where a model adds them",
    "mlp_normed": "is the norm before an MLP before its gain, which only attribution graphs read (--graph.transcoders)",
}


@dataclasses.dataclass(frozen=True)
class Site:
    """A kind, one of ``ALL_KINDS`` or ``PATTERN``, and a layer, counted from 0."""

    kind: str
    layer: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the site that a text such as "resid_post.15" names; a ``UserError`` if the text names none."""
        if is_joined(text) or OtherSite.names(text):
            raise UserError(
                f"{text} is a site of a crosscoder, which train, evaluate, ablate, patch and steer use: expected one "
                "site of one model, such as resid_post.15"
            )
        if ModuleSite.names(text):
            raise UserError(
                f"the site {text} is a module of the PyTorch model, which only capture, train, "
                "and lm(...) of a model loaded with backend='torch' can use: the other stages run a model up to "
                "a site of a layer and on from there, and a module is no such place; expected one such as resid_post.15"
            )
        kind, _, layer = text.partition(".")
        if kind in _ELSEWHERE:
            raise UserError(f"{text} {_ELSEWHERE[kind]}")
        if kind == PATTERN and not _LAYER.fullmatch(layer):
            raise UserError(
                f"the site {text!r} names no layer: expected {PATTERN}, a dot and a layer, as in {PATTERN}.5"
            )
        if kind == PATTERN:
            raise UserError(
                f"{text} is the attention of each head, [B, H, T, T], which lm(tokens, capture={text!r}) returns and "
                "nothing edits, stores or trains on: to change it, edit attn_q or attn_k of the layer"
            )
        if kind not in ALL_KINDS or not _LAYER.fullmatch(layer):
            raise UserError(
                f"there is no site {text!r}: expected one of {', '.join(ALL_KINDS)}, a dot and a layer, "
                f"as in resid_post.15, or {PATTERN} in the same way to read attention"
            )
        return cls(kind, int(layer))

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"

    def check(self, config: DecoderConfig) -> Self:
        """Return the site; raise a ``UserError`` if the model has no such layer, or experts for ``mlp_act``."""
        if not 0 <= self.layer < config.n_layers:
            raise UserError(
                f"there is no site {self}: the model has {config.n_layers} layers, 0 to {config.n_layers - 1}"
            )
        if self.kind == NEURONS and config.n_experts:
            raise UserError(
                f"there is no site {self}: a router sends each token to {config.experts_per_token} of "
                f"{config.n_experts} MLPs, whose hidden activations are no vector of one site; mlp_in.{self.layer} and "
                f"mlp_out.{self.layer} are sites"
            )
        return self

    def width(self, config: DecoderConfig) -> int:
        """Return the size of the last dimension of the values at this site."""
        if self.kind in HEAD_KINDS:
            return config.d_head * (config.n_heads if self.kind in ("attn_q", "attn_z") else config.n_kv_heads)
        if self.kind == NEURONS:
            return config.d_mlp
        return config.d_model


@dataclasses.dataclass(frozen=True)
class ModuleSite:
    """A module of a PyTorch model of any architecture, captured by a hook."""

    path: str  #: the module's name in ``model.named_modules()``, such as "transformer.h.3.mlp.act"
    kind: str = "module"  #: "module", its output, or "module_in", its first input; of several outputs, the first

    @staticmethod
    def names(text: str) -> bool:
        """Return whether a text is like "module:transformer.h.3.mlp.act" or "module_in:..."."""
        return text.partition(":")[0] in ("module", "module_in")

    def __str__(self) -> str:
        return f"{self.kind}:{self.path}"

    def check(self, config: DecoderConfig) -> Self:
        """Raise a ``UserError``: a decoder has no modules of PyTorch."""
        raise UserError(
            f"the site {self} is a module of the PyTorch model, which {config.family} in JAX does not have: load it "
            "with backend=torch (--model.backend), or name a site of the decoder, such as resid_post.15"
        )


@dataclasses.dataclass(frozen=True)
class OtherSite:
    """A site of the second model (``--model.other``), which reads the same tokens; written "other:resid_post.15"."""

    site: Site

    @staticmethod
    def names(text: str) -> bool:
        """Return whether a text names such a site."""
        return text.startswith(_OTHER)

    def __str__(self) -> str:
        return f"{_OTHER}{self.site}"

    def check(self, config: DecoderConfig) -> Self:
        """Raise a ``UserError``: each model has its own sites."""
        raise UserError(f"{self} is a site of the second model: run that model and name the site {self.site}")


AnySite = Site | ModuleSite | OtherSite
_OTHER = "other:"


def readable_site(text: str) -> AnySite:
    """Return what a run can return by a name: a site, or the attention pattern of a layer, "attn_pattern.15".

    Raises:
      UserError: the text names none.
    """
    kind, _, layer = text.partition(".")
    return Site(PATTERN, int(layer)) if kind == PATTERN and _LAYER.fullmatch(layer) else parse_site(text)


def edit_site(site: str | Site) -> Site:
    """Return the site where an edit acts; of a ``TorchModel`` it may be a ``ModuleSite``, which decoders refuse."""
    if not isinstance(site, str) and not hasattr(site, "check"):
        raise UserError(f"the site is {site!r:.60}: expected one such as resid_post.15")
    return cast(Site, parse_site(site) if isinstance(site, str) else site)


def decoder_site(text: str) -> Site:
    """Return the decoder's site that a text names, also if it is the second model's."""
    site = parse_site(text)
    return site.site if isinstance(site, OtherSite) else Site.parse(text)


def is_joined(text: str) -> bool:
    """Return whether a text names a joined site."""
    # A module's path is free text, which may hold a plus sign itself.
    return "+" in text and not ModuleSite.names(text)


def site_parts(text: str) -> tuple[str, ...]:
    """Return the names of a joined site's parts; the name itself of a site that is not joined.

    Raises:
      UserError: a part is empty, or named twice.
    """
    parts = tuple(text.split("+")) if is_joined(text) else (text,)
    if "" in parts or len(set(parts)) < len(parts):
        raise UserError(
            f"the joined site {text!r} has an empty part, or one twice: expected different sites, as in "
            "resid_post.5+resid_post.15 or resid_post.5+other:resid_post.5"
        )
    return parts


def parse_site(text: str) -> AnySite:
    """Return the site that a text names: "resid_post.15", "module:transformer.h.3.mlp", "module_in:...", "other:...".

    Raises:
      UserError: the text names none.
    """
    if OtherSite.names(text) and not is_joined(text):
        return OtherSite(Site.parse(text.removeprefix(_OTHER)))
    kind, _, path = text.partition(":")
    return ModuleSite(path, kind) if ModuleSite.names(text) else Site.parse(text)
