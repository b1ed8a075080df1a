"""A language model that runs with sites captured and edits applied.

``LanguageModel`` runs the JAX decoder; ``torch_model.TorchModel`` overrides what another backend does differently, and
returns the same ``Output`` and ``Generated`` under the same edits.
"""

import copy
import dataclasses
import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from saejax.arguments import as_index, as_numbers, suggests_names
from saejax.errors import UserError, one_of
from saejax.models import decoder, decoding, generation, lens, sinks
from saejax.models.config import DecoderConfig
from saejax.models.decoder import run_layers
from saejax.models.decoding import SamplingParams
from saejax.models.edits import Edit as Edit
from saejax.models.edits import ForwardPass, Positions, edited_layers, fit_values
from saejax.models.generation import Generated
from saejax.models.layers import Taps
from saejax.models.lengths import round_length
from saejax.models.lens import LensOutput
from saejax.models.sites import PATTERN, AnySite, Site, readable_site
from saejax.models.source import ModelSource
from saejax.models.tokens import BOS, Tokens, as_tokens, encode, pad, single_token_id, tokenize
from saejax.parallel.mesh import BY_DOCUMENT, fitting_sharding, sharding
from saejax.progress import show_progress
from saejax.short_reprs import has_short_repr
from saejax.wording import counted

_UNROLLED = 4  # when more layers than this are captured, all go into one scan: unrolled ones take long to compile


@suggests_names
@has_short_repr
@dataclasses.dataclass(frozen=True)
class Output:
    """Result of a forward pass."""

    logits_BxTxV: jax.Array | None  #: fp32 logits at every position; None if they were not asked for
    #: value [B, T, D] of every captured site by its name, after the edits there; of an attention pattern the share of
    #: each head's attention from each token to each, fp32 [B, H, T, T].
    sites: dict[str, jax.Array]
    tokens: Tokens  #: the prompts; values beyond a prompt's end are meaningless
    _tokenizer: Any = dataclasses.field(repr=False)

    def logit(self, answer: str | int) -> np.ndarray:
        """Return the logit of an answer at each prompt's last position, fp32 [B]; a float if B is 1.

        Args:
          answer: a token's id, or a word of one token that continues the text; "Paris" is read as " Paris" if that is
            one token.

        Raises:
          UserError: the pass has no logits, the word has several tokens, or the model has no such id.
        """
        if self.logits_BxTxV is None:
            raise UserError("this pass has no logits: it was run with logits=False")
        if isinstance(answer, str):
            is_word = answer and not answer[0].isspace()
            # "8" is as it is where " 8" is two tokens.
            answer = single_token_id(self._tokenizer, [f" {answer}", answer] if is_word else [answer])
        token, vocab = as_index(answer), self.logits_BxTxV.shape[-1]
        if not 0 <= token < vocab:
            raise UserError(f"the answer is {answer!r:.60}: expected a token's id, 0 to {vocab - 1}, or a word")
        last_B = np.asarray(self.logits_BxTxV[np.arange(len(self.tokens.last_B)), self.tokens.last_B, token])
        return last_B if len(last_B) > 1 else last_B[0]


@suggests_names
class LanguageModel:
    """A JAX decoder with its weights and tokenizer.

    Attributes:
      config: sizes and choices of the decoder.
      params: its parameters, for the functions of ``saejax.models.decoder``.
      tokenizer: the model's own; None if it has none.
      source: where it came from.
      mesh: the devices it is on.
      bos: how its texts begin, as ``tokenize`` takes it; see ``with_bos``.
    """

    def __init__(
        self, config: DecoderConfig, params: dict[str, jax.Array], tokenizer: Any, source: ModelSource, mesh: Mesh
    ):
        self.config, self.params, self.tokenizer, self.source, self.mesh = config, params, tokenizer, source, mesh
        self.bos = "auto"
        self._by_bos: weakref.WeakValueDictionary[str, LanguageModel] = weakref.WeakValueDictionary({self.bos: self})

    def __repr__(self) -> str:
        config, dtype = self.config, self.params["embed_VxD"].dtype
        return (
            f"<{type(self).__name__} {self.source.name}: {config.family}, {counted(config.n_layers, 'layer')} of width "
            f"{config.d_model}, {counted(config.n_heads, 'head')}, {config.vocab:,} token ids, "
            f"context {config.context:,}, {dtype}>"
        )

    def with_bos(self, bos: str) -> "LanguageModel":
        """Return this model with texts that begin otherwise; nothing is copied.

        Args:
          bos: "auto", "always" or "never"; see ``tokens.encode``.
        """
        one_of(bos, BOS, "bos")
        # The same object each time: what is kept of a model is kept by its identity.
        lm = self._by_bos.get(bos)
        if lm is None:
            lm = copy.copy(self)
            lm.bos = bos
            self._by_bos[bos] = lm
        return lm

    def tokenize(self, texts: Sequence[str], bos: str | None = None) -> Tokens:
        """Return the token ids of texts.

        Args:
          texts: at least one.
          bos: "auto" (what the tokenizer puts in front, once), "always" or "never"; None: as the model's ``bos``.

        Raises:
          UserError: a text is empty or longer than the context, or has a token that the model lacks; or the model has
            no tokenizer.
        """
        tokens = tokenize(self.tokenizer, texts, self.config.context, bos or self.bos)
        tokens.check(self.config.vocab, self.config.context)  # a tokenizer may have more tokens than the model
        return tokens

    def encode(self, text: str) -> list[int]:
        """Return the token ids of one text of any length; see ``tokens.encode``."""
        ids = encode(self.tokenizer, text, self.bos)
        if ids:
            pad([ids]).check(self.config.vocab, len(ids))
        return ids

    def token_id(self, text: str) -> int:
        """Return the id of the token with which an answer continues a text: " Paris" and "Paris" differ.

        Raises:
          UserError: the answer is several tokens, of which other answers may have the first, too; or it is no text.
        """
        if not isinstance(text, str):
            raise UserError(f"the answer is {text!r}: expected a text")
        return single_token_id(self.tokenizer, [text])

    def __call__(
        self,
        tokens: Tokens,
        capture: Sequence[str | Site] | str | Site = (),
        edits: Sequence[Edit] = (),
        logits: bool = True,
    ) -> Output:
        """Run the model. Compiled once for each combination of sites, kinds of edits and padded shape.

        Args:
          tokens: the prompts, as ``tokenize`` returns them.
          capture: sites whose values are returned, or a single one, such as "resid_post.15". With "attn_pattern.15" the
            attention of that layer's heads is returned, [B, H, T, T]: entry [b, h, t, s] is how much token t attends to
            token s. Rows sum to 1, or to less where heads have sinks of their own (gpt-oss).
          edits: applied in the given order where several act at one site; see ``Dictionary`` and ``SiteEdit``.
          logits: False stops after the last captured site.

        Raises:
          UserError: a site does not exist, or an edit does not fit it or the prompts.
        """
        tokens = as_tokens(tokens, self.tokenizer)
        length = tokens.ids_BxT.shape[1]
        padded = round_length(length)
        sites, edits = self._prepare(tokens, capture, edits, padded)
        ids_BxT = np.pad(tokens.ids_BxT, ((0, 0), (0, padded - length)))
        by_document = fitting_sharding(self.mesh, tokens.lengths_B.shape, BY_DOCUMENT)
        ids_BxT, lengths_B = jax.device_put((ids_BxT, tokens.lengths_B), by_document)
        decoder_sites = cast(tuple[Site, ...], sites)  # it has no others: they were checked
        output = forward(self.config, decoder_sites, logits, self.params, ids_BxT, lengths_B, edits)
        # Programs are compiled for few lengths; the caller sees the length that was asked for.
        all_logits = None if output[0] is None else output[0][:, :length]
        values = {
            str(site): value[..., :length, :length] if site.kind == PATTERN else value[:, :length]
            for site, value in zip(decoder_sites, output[1], strict=True)
        }
        return Output(all_logits, values, tokens, self.tokenizer)

    def generate(
        self,
        tokens: Tokens,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 789,
        stop: Sequence[str] = (),
        edits: Sequence[Edit] = (),
    ) -> list[Generated]:
        """Continue the prompts, each until the model or a stop string ends it.

        Args:
          tokens: the prompts, as ``tokenize`` returns them.
          max_new_tokens: largest number of new tokens of each, at least 1.
          temperature: divides the logits before sampling; 0: the most probable token is taken.
          top_p: in (0, 1]: sampling is from the smallest set of most probable tokens with this total probability.
          seed: seed of the sampling; each prompt of a batch is sampled independently.
          stop: strings that end the text where they first occur, wherever tokens begin; they are not part of it.
          edits: act on the prompt's positions and on new tokens as they are read. To an edit of the last position,
            every new token is the last one when it is read. Values given for each position of the prompts, and
            edits of a crosscoder's features other than steering, leave new tokens unchanged.

        Raises:
          UserError: a site does not exist, an edit does not fit, the context is too short, a setting is out of range,
            or logits are not finite.
        """
        tokens = as_tokens(tokens, self.tokenizer)
        # What is no whole number is refused below, by ``check_limit``.
        new = int(max_new_tokens) if isinstance(max_new_tokens, Integral) else 0
        _, edits = self._prepare(tokens, (), edits, self._length_with_cache(tokens), new)
        generation.check_limit(tokens.lengths_B, max_new_tokens, self.config.context)
        sampling = decoding.sampling_params(temperature, top_p, seed)
        eos = generation.eos_ids(self.source.folder, self.tokenizer)
        condition = generation.StopCondition(self.tokenizer, eos, stop)
        chunks = self._decode(tokens, new, sampling, condition, edits)
        with show_progress("generate") as on_progress:
            chunks = generation.count_tokens(chunks, new, on_progress)
            return generation.collect(chunks, len(tokens.lengths_B), condition)

    def _length_with_cache(self, tokens: Tokens) -> int:
        """Return the length to which prompts are padded before generation."""
        return decoding.decoding_length(tokens.ids_BxT.shape[1])

    def _decode(
        self,
        tokens: Tokens,
        max_new_tokens: int,
        sampling: SamplingParams,
        condition: generation.StopCondition,
        edits: tuple[Edit, ...],
    ) -> Iterator[np.ndarray]:
        """Yield the new tokens of every prompt, some at a time, each [B, N]."""
        # With stop strings the host has to look at the text now and then; otherwise one call makes all tokens.
        chunk = generation.CHUNK if condition.strings else max_new_tokens
        model = self.config, self.params, self.mesh
        return decoding.decode_in_chunks(*model, tokens, max_new_tokens, sampling, condition.ids, edits, chunk)

    def sink_norm(self, site: str, factor: float = sinks.SINK_FACTOR) -> float:
        """Return the norm at a site above which a position is an attention sink; see ``models.sinks``."""
        return sinks.sink_norm(self, site, factor)

    def unembed(self, x_BxTxD: jax.Array) -> jax.Array:
        """Return the fp32 logits [B, T, V] of a stream leaving the last layer, such as ``resid_post`` of that layer.

        Raises:
          UserError: the stream has another width.
        """
        shape, width = np.shape(x_BxTxD), self.config.d_model
        if shape[-1:] != (width,):
            raise UserError(f"the stream has the shape {list(shape)}: expected [B, T, {width}]")
        return _unembed(self.config, self.params, x_BxTxD)

    def lens(
        self,
        tokens: Tokens,
        *,
        answers: Sequence[int] = (),
        top: int = 5,
        seed: int = 456,
        jacobians: Mapping[int, np.ndarray] | None = None,
    ) -> LensOutput:
        """Read the stream leaving each layer through the final norm and unembedding: the logit lens.

        Args:
          tokens: the prompts, padded on the right.
          answers: ids of tokens whose log-probability and rank are returned at every position.
          top: number of most probable tokens returned, at least 1.
          seed: seed of the control's rotation.
          jacobians: matrices [D, D] that carry the streams of some layers to the last one before they are read, such as
            ``JacobianLens.jacobians``; None: all are read as they are.

        Returns:
          The readings of the lens and of its control at all layers, positions and prompts; see ``lens``.

        Raises:
          UserError: the prompts do not fit the model, an answer is no id of a token, or ``top`` is below 1.
        """
        ids = as_numbers(answers, whole=True)
        listed: list[int] = [] if ids is None else ids.ravel().tolist()
        wrong = [answers] if ids is None else [answer for answer in listed if not 0 <= answer < self.config.vocab]
        if wrong:
            raise UserError(
                f"answers has {wrong[0]!r:.60}: expected ids of tokens, 0 to {self.config.vocab - 1}, as lm.token_id "
                "returns them"
            )
        if as_index(top) < 1:
            raise UserError(f"top is {top!r}: expected a whole number, 1 or more")
        layers = range(self.config.n_layers)
        sites = self(tokens, capture=[Site("resid_post", layer) for layer in layers], logits=False).sites
        x_LxBxTxD = jnp.stack([sites[f"resid_post.{layer}"] for layer in layers])
        for layer, jacobian_DxD in (jacobians or {}).items():
            x_LxBxTxD = x_LxBxTxD.at[layer].set(lens.carry(x_LxBxTxD[layer], jacobian_DxD))
        return lens.read_lens(self.config, self.params, x_LxBxTxD, tuple(listed), top, seed)

    def _prepare(
        self,
        tokens: Tokens,
        capture: Sequence[str | AnySite] | str | AnySite,
        edits: Sequence[Edit],
        length: int,
        new: int = 0,
    ) -> tuple[tuple[AnySite, ...], tuple[Edit, ...]]:
        """Check what a model is called with; return the captured sites, and the edits as they are applied.

        Args:
          tokens: the prompts.
          capture: sites or their names, or a single one.
          edits: as the user gave them.
          length: length of the padded prompts, to which the edits' values are padded.
          new: number of tokens that are generated.
        """
        wanted = [capture] if isinstance(capture, str) or not isinstance(capture, Sequence) else capture
        sites = tuple(readable_site(site) if isinstance(site, str) else site for site in wanted)
        if none := [site for site in sites if not hasattr(site, "check")]:
            raise UserError(f"capture has {none[0]!r:.60}: expected sites such as resid_post.15, or ()")
        edits = edits if isinstance(edits, Sequence) else [edits]
        wrong = [type(edit).__name__ for edit in edits if isinstance(getattr(edit, "site", ""), str)]
        if wrong:
            raise UserError(f"edits has a {wrong[0]}: expected edits such as sae.ablate([3]) or SiteEdit.ablate(SITE)")
        tokens.check(self.config.vocab, self.config.context)
        # Edits of dictionaries that do not know their sink rule yet get the model's rule.
        edits = [edit.with_sink_norms(self.sink_norm) if hasattr(edit, "with_sink_norms") else edit for edit in edits]
        self._warn_of_sinks(edits, tokens)
        self._warn_of_ends(edits, tokens, new)
        if len({edit.site for edit in edits}) > 1:  # an edit may make sinks of positions at sites that come later
            edits = self._with_clean_sinks(edits, tokens)
        edits = [single for edit in edits for single in self._at_single_sites(edit, tokens, new)]
        for site in (*sites, *(edit.site for edit in edits)):
            self._check_site(site)
        for edit in edits:
            if edit.site.kind == PATTERN:
                Site.parse(str(edit.site))  # which says why nothing can be edited there
        return sites, self._place_edits(fit_values(edits, tokens.ids_BxT.shape, length))

    def _warn_of_sinks(self, edits: Sequence[Any], tokens: Tokens) -> None:
        """Name the edits of features at first tokens that change nothing, since these are attention sinks."""
        for edit in edits:
            positions = edit.first_tokens(int(tokens.lengths_B.min())) if hasattr(edit, "first_tokens") else None
            if positions is None:
                continue
            sites = edit.parts or tuple(dict.fromkeys((edit.reads, edit.site)))
            if edit.is_at_sinks(self(tokens, capture=sites, logits=False).sites, positions):
                first, last = positions.start, positions.stop - 1
                where = f"token {first}" if first else "the first token"
                where = f"tokens {first} to {last}" if last > first else where
                logging.warning(
                    "an edit at %s changes nothing: it acts at %s alone, %s in each of these %d prompts, and edits of "
                    "features leave sinks alone",
                    "+".join(map(str, edit.parts or (edit.site,))),
                    where,
                    "attention sinks" if last > first else "an attention sink",
                    len(tokens.lengths_B),
                )

    def _warn_of_ends(self, edits: Sequence[Any], tokens: Tokens, new: int) -> None:
        """Name the edits at spans of positions that begin behind all prompts and new tokens."""
        longest = int(tokens.lengths_B.max()) + new
        for edit in edits:
            positions = getattr(edit, "positions", None)
            if isinstance(positions, Positions) and (start := int(positions.start)) >= longest:
                logging.warning(
                    "an edit at %s changes nothing: it begins at token %d, counted from 0, and the longest text has %d",
                    "+".join(map(str, getattr(edit, "parts", ()) or (edit.site,))), start, longest,
                )  # fmt: skip

    def _with_clean_sinks(self, edits: Sequence[Any], tokens: Tokens) -> list[Any]:
        """Return the edits; edits of features at single sites act by the attention sinks of the unedited run."""
        # Those of a crosscoder's parts read the unedited run anyway: see ``_at_single_sites``.
        is_single = [hasattr(edit, "with_sinks_of") and not edit.parts for edit in edits]
        singles = [edit for edit, single in zip(edits, is_single, strict=True) if single]
        sites = list(dict.fromkeys(site for edit in singles for site in (edit.reads, edit.site)))
        values = self(tokens, capture=sites, logits=False).sites if sites else {}
        return [edit.with_sinks_of(values) if single else edit for edit, single in zip(edits, is_single, strict=True)]

    def _at_single_sites(self, edit: Any, tokens: Tokens, new: int) -> Sequence[Edit]:
        """Return the edits of single sites that an edit makes: of a crosscoder, at each of its sites."""
        if not getattr(edit, "parts", ()):
            return [edit]
        values = self(tokens, capture=edit.parts, logits=False).sites
        of_prompts = edit.at_parts(values, ForwardPass.over(jnp.asarray(tokens.mask_BxT)))
        return [*of_prompts, *(edit.at_parts_of_new_tokens() if new else ())]

    def _check_site(self, site: AnySite) -> None:
        """Raise a ``UserError`` unless the model has the site."""
        site.check(self.config)

    def _place_edits(self, edits: tuple[Edit, ...]) -> tuple[Edit, ...]:
        """Return the edits with their arrays on this model's devices."""
        # An edit of a dictionary that was loaded on another mesh, for instance.
        devices = set(self.mesh.devices.flat)

        def place(leaf: Any) -> Any:
            """Move an array that is on other devices."""
            must_move = isinstance(leaf, jax.Array) and leaf.sharding.device_set != devices
            return jax.device_put(leaf, sharding(self.mesh)) if must_move else leaf

        return jax.tree.map(place, edits)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("arrays",), meta_fields=("places",))
@dataclasses.dataclass(frozen=True)
class SiteValues(Sequence[jax.Array]):
    """The values at captured sites, [B, T, D] or [B, H, T, T] each, in the order of the sites.

    The values of a kind may be one array. A value is cut out of it when it is read, so that it is not in memory twice.
    """

    arrays: Mapping[str, Any]  #: values by site or, those of L layers in one array, by kind
    places: tuple[tuple[str, int | None], ...]  #: for each site its key in ``arrays`` and its index, None: all

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        name, place = self.places[index]
        return self.arrays[name] if place is None else self.arrays[name][place]


@functools.partial(jax.jit, static_argnums=0)
def _unembed(config: DecoderConfig, params: decoder.Params, x_BxTxD: jax.Array) -> jax.Array:
    """Run ``decoder.unembed`` as one program."""
    return decoder.unembed(config, params, x_BxTxD)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def forward(
    config: DecoderConfig,
    capture: tuple[Site, ...],
    logits: bool,
    params: dict[str, jax.Array],
    ids_BxT: jax.Array,
    lengths_B: jax.Array,
    edits: tuple[Edit, ...] = (),
) -> tuple[jax.Array | None, SiteValues]:
    """Run a model; compiled once for each combination of static arguments, kinds of edits and shapes.

    Args:
      config: the decoder (static).
      capture: sites whose values are returned (static).
      logits: whether logits are computed (static); without them, neither the layers after the last captured site are
        run nor their parameters needed.
      params: parameters of ``parameters.parameter_table``.
      ids_BxT: int32, padded on the right.
      lengths_B: number of tokens of each prompt.
      edits: see ``Edit``.

    Returns:
      Logits [B, T, V] or None, and the values [B, T, D] at the sites of ``capture``, in their order; attention patterns
      are [B, H, T, T].
    """
    mask_BxT = jnp.arange(ids_BxT.shape[1])[None, :] < lengths_B[:, None]
    run = ForwardPass.over(mask_BxT)
    x_BxTxD = decoder.embed(config, params, ids_BxT)
    stop = config.n_layers if logits else max((site.layer + 1 for site in capture), default=0)
    if not edits and len({site.layer for site in capture}) > _UNROLLED:
        layers: dict[str, list[int]] = {}
        for site in sorted(set(capture), key=lambda site: site.layer):
            layers.setdefault(site.kind, []).append(site.layer)
        x_BxTxD, stacked, _ = run_layers(config, params, x_BxTxD, 0, stop, Taps(collect=layers))
        values = SiteValues(stacked, tuple((site.kind, layers[site.kind].index(site.layer)) for site in capture))
    else:
        patterns = sorted({site.layer for site in capture if site.kind == PATTERN})
        hook_layers = {site.layer for site in capture} | edited_layers(edits)
        taps = Taps(run.hook(edits), hook_layers, inner_sites=True, collect={PATTERN: patterns} if patterns else ())
        x_BxTxD, collected, _ = run_layers(config, params, x_BxTxD, 0, stop, taps)
        for layer, pattern_BxHxTxT in zip(patterns, collected.get(PATTERN, ()), strict=True):
            run.values[Site(PATTERN, layer)] = pattern_BxHxTxT
        at_sites = {str(site): run.values[site] for site in capture}
        values = SiteValues(at_sites, tuple((str(site), None) for site in capture))
    logits_BxTxV = decoder.unembed(config, params, x_BxTxD) if logits else None
    return logits_BxTxV, values
