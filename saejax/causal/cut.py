"""The two halves of a language model that is cut at a site, as pure functions.

    head   token ids -> the stream there, and the site's value      once per prompt
    tail   a value of the site -> logit(correct) - logit(wrong)     once per edit

The tail of an edit runs only the tokens from the first changed one on: attention is causal, so the keys and values of
the tokens before it are those of the clean run. It computes two logits, at each prompt's last position.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from saejax.models import decoder
from saejax.models.config import DecoderConfig
from saejax.models.incremental import Past, run_after, run_recorded
from saejax.models.sites import Site


@dataclasses.dataclass(frozen=True)
class Cut:
    """Where the model is cut. Hashable, so that it can be a static argument of ``jax.jit``.

    Attributes:
      config: the decoder.
      site: the site whose value the tail starts from.
      mesh: the devices.
    """

    config: DecoderConfig
    site: Site
    mesh: Mesh

    @property
    def in_stream(self) -> bool:
        """Whether the site is the whole stream between two layers; then nothing else enters the tail."""
        return self.site.kind in ("resid_pre", "resid_post")

    @property
    def _start(self) -> int:
        """The tail's first layer."""
        return self.site.layer + (self.site.kind == "resid_post")

    def head(self, params: decoder.Params, ids_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Runs up to the site.

        Returns:
          The stream entering the tail's first layer and the site's value, both [B, T, D]; the same array
          where the site is that stream.
        """
        stream_BxTxD = decoder.embed(self.config, params, ids_BxT)
        stream_BxTxD = decoder.run_layers(self.config, params, stream_BxTxD, 0, self._start)
        if self.in_stream:
            return stream_BxTxD, stream_BxTxD
        seen = []

        def look(site: Site, value_BxTxD: jax.Array) -> jax.Array:
            if site == self.site:
                seen.append(value_BxTxD)
            return value_BxTxD

        layer = self.site.layer
        decoder.run_layers(self.config, params, stream_BxTxD, layer, layer + 1, look, (layer,))
        return stream_BxTxD, seen[0]

    def tail(
        self,
        params: decoder.Params,
        stream_BxTxD: jax.Array,
        value_BxTxD: jax.Array,
        last_B: jax.Array,
        answers_Bx2: jax.Array,
    ) -> jax.Array:
        """Runs on with ``value_BxTxD`` as the site's value.

        Args:
          stream_BxTxD: from ``head``.
          value_BxTxD: the site's value, edited or not.
          last_B: index of each prompt's last token.
          answers_Bx2: token ids of the correct and the wrong answer.

        Returns:
          logit(correct) - logit(wrong) at the last position, fp32 [B].
        """
        run = functools.partial(decoder.run_layers, self.config, params, start=self._start, stop=self.config.n_layers)
        if self.in_stream:
            x_BxTxD = run(value_BxTxD)
        else:
            x_BxTxD = run(stream_BxTxD, hook=self._put(value_BxTxD), hook_layers=(self.site.layer,))
        return self.difference(params, x_BxTxD, last_B, answers_Bx2)

    def record(self, params: decoder.Params, stream_BxTxD: jax.Array) -> Past:
        """The keys and values of the tail's layers in a run without edits."""
        return run_recorded(self.config, params, stream_BxTxD, self._start, self.config.n_layers)[1]

    def tail_after(
        self,
        params: decoder.Params,
        past: Past,
        place_R: jax.Array,
        first_R: jax.Array,
        stream_RxTxD: jax.Array,
        value_RxTxD: jax.Array,
        last_R: jax.Array,
        answers_Rx2: jax.Array,
    ) -> jax.Array:
        """``tail`` of T tokens of each row only, those from position ``first_R`` on; the ones before are not changed.

        Args:
          past: from ``record``.
          place_R: which of the past's prompts each row edits.
          stream_RxTxD, value_RxTxD, last_R: as for ``tail``, of these T tokens.

        Returns:
          logit(correct) - logit(wrong) at the last position, fp32 [R].
        """
        hook, x_RxTxD = (None, value_RxTxD) if self.in_stream else (self._put(value_RxTxD), stream_RxTxD)
        x_RxTxD = run_after(self.config, params, x_RxTxD, self._start, past, place_R, first_R, hook)
        return self.difference(params, x_RxTxD, last_R, answers_Rx2)

    def _put(self, value_BxTxD: jax.Array) -> decoder.Hook:
        """A hook that sets the site's value."""
        return lambda site, own_BxTxD: value_BxTxD if site == self.site else own_BxTxD

    def difference(
        self, params: decoder.Params, x_BxTxD: jax.Array, last_B: jax.Array, answers_Bx2: jax.Array
    ) -> jax.Array:
        """logit(correct) - logit(wrong) at the last position of the stream leaving the last layer, fp32 [B]."""
        last_BxD = jnp.take_along_axis(x_BxTxD, last_B[:, None, None], axis=1)[:, 0]
        logits_Bx2 = self._logits(params, last_BxD, answers_Bx2)
        return logits_Bx2[:, 0] - logits_Bx2[:, 1]

    def _logits(self, params: decoder.Params, x_BxD: jax.Array, ids_BxN: jax.Array) -> jax.Array:
        """The logits of ``ids_BxN`` only: the rest of the head's columns are not multiplied."""

        def one(x_D: jax.Array, ids_N: jax.Array) -> jax.Array:
            return decoder.unembed(self.config, decoder.head_of(self.config, params, ids_N), x_D[None, :])[0]

        return jax.vmap(one)(x_BxD, ids_BxN)
