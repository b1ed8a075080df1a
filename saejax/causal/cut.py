"""The two halves of a language model that is cut at a site, as pure functions.

    head   token ids -> the stream there, the site's value, and what the dictionary reads      once per prompt
    tail   a value of the site -> the readouts                                                 once per edit

The tail of an edit runs only the tokens from the first changed one on: attention is causal, so the keys and values of
the tokens before it are those of the clean run. Of prompts that begin alike, it runs the first tokens once. Logits are
computed at each prompt's last position, two of them unless more readouts are asked for.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from saejax.models import decoder
from saejax.models.config import DecoderConfig
from saejax.models.incremental import Past, Tree, run_recorded, run_tree
from saejax.models.sites import Site


@dataclasses.dataclass(frozen=True)
class Cut:
    """Where the model is cut. Hashable, so that it can be a static argument of ``jax.jit``.

    Attributes:
      config: the decoder.
      site: the site whose value the tail starts from.
      reads: the site that the dictionary reads: the same one, or one before it in the same layer.
      mesh: the devices.
    """

    config: DecoderConfig
    site: Site
    reads: Site
    mesh: Mesh

    @property
    def in_stream(self) -> bool:
        """Whether the site is the whole stream between two layers; then nothing else enters the tail."""
        return self.site.kind in ("resid_pre", "resid_post")

    @property
    def _start(self) -> int:
        """The tail's first layer."""
        return self.site.layer + (self.site.kind == "resid_post")

    def head(self, params: decoder.Params, ids_BxT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Runs up to the site.

        Returns:
          The stream entering the tail's first layer, the site's value, and what the dictionary reads, all [B, T, D];
          the same array where they are the same site.
        """
        stream_BxTxD = decoder.embed(self.config, params, ids_BxT)
        stream_BxTxD = decoder.run_layers(self.config, params, stream_BxTxD, 0, self._start)
        if self.in_stream:
            return stream_BxTxD, stream_BxTxD, stream_BxTxD
        seen = {}

        def look(site: Site, value_BxTxD: jax.Array) -> jax.Array:
            seen[site] = value_BxTxD
            return value_BxTxD

        layer = self.site.layer
        decoder.run_layers(self.config, params, stream_BxTxD, layer, layer + 1, look, (layer,))
        return stream_BxTxD, seen[self.site], seen[self.reads]

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
        return self.difference(params, self.run_on(params, stream_BxTxD, value_BxTxD), last_B, answers_Bx2)

    def run_on(self, params: decoder.Params, stream_BxTxD: jax.Array, value_BxTxD: jax.Array) -> jax.Array:
        """The stream leaving the last layer, [B, T, D], with ``value_BxTxD`` as the site's value; see ``tail``."""
        hook, x_BxTxD = self._entry(stream_BxTxD, value_BxTxD)
        return decoder.run_layers(self.config, params, x_BxTxD, self._start, self.config.n_layers, hook, (self._start,))

    def record(self, params: decoder.Params, stream_BxTxD: jax.Array, value_BxTxD: jax.Array) -> tuple[jax.Array, Past]:
        """Runs on without an edit.

        Returns:
          The stream leaving the last layer [B, T, D], and the keys and values of the tail's layers.
        """
        hook, x_BxTxD = self._entry(stream_BxTxD, value_BxTxD)
        return run_recorded(self.config, params, x_BxTxD, self._start, self.config.n_layers, hook)[:2]

    def tail_of_tree(
        self, params: decoder.Params, past: Past, tree: Tree, stream_SxNxD: jax.Array, value_SxNxD: jax.Array
    ) -> jax.Array:
        """``tail`` of the tokens of edited prompts, those from the first changed one on.

        Args:
          past: from ``record``.
          tree: which tokens follow which.
          stream_SxNxD, value_SxNxD: as for ``tail``, of these tokens.

        Returns:
          The stream leaving the last layer, [S, N, D].
        """
        hook, x_SxNxD = self._entry(stream_SxNxD, value_SxNxD)
        return run_tree(self.config, params, x_SxNxD, self._start, past, tree, hook)

    def difference(
        self, params: decoder.Params, x_BxTxD: jax.Array, last_B: jax.Array, answers_Bx2: jax.Array
    ) -> jax.Array:
        """logit(correct) - logit(wrong) at the last position of the stream leaving the last layer, fp32 [B]."""
        last_BxD = jnp.take_along_axis(x_BxTxD, last_B[:, None, None], axis=1)[:, 0]
        return self.readouts(params, last_BxD, answers_Bx2)[:, 0]

    def readouts(
        self, params: decoder.Params, x_RxD: jax.Array, answers_Rx2: jax.Array, logp_RxV: jax.Array | None = None
    ) -> jax.Array:
        """What the stream leaving the last layer says of the answers.

        Args:
          x_RxD: of R prompts, at their last positions.
          answers_Rx2: token ids of the correct and the wrong answer.
          logp_RxV: log-probabilities of the next token without an edit; None: they are not compared with.

        Returns:
          fp32 [R, M]: logit(correct) - logit(wrong); and, beside ``logp_RxV``, the log-likelihood of the correct
          answer's first token, whether that token is the likeliest of all, and the Kullback-Leibler divergence of the
          next token's probabilities from those without an edit, in nats.
        """
        if logp_RxV is None:
            logits_Rx2 = self.logits(params, x_RxD, answers_Rx2)
            return logits_Rx2[:, :1] - logits_Rx2[:, 1:]
        logits_RxV = decoder.unembed(self.config, params, x_RxD)
        edited_RxV = jax.nn.log_softmax(logits_RxV)
        logits_Rx2 = jnp.take_along_axis(logits_RxV, answers_Rx2, axis=1)
        correct_Rx1 = answers_Rx2[:, :1]
        values = (
            logits_Rx2[:, 0] - logits_Rx2[:, 1],
            jnp.take_along_axis(edited_RxV, correct_Rx1, axis=1)[:, 0],
            jnp.argmax(logits_RxV, axis=1) == correct_Rx1[:, 0],
            jnp.sum(jnp.exp(logp_RxV) * (logp_RxV - edited_RxV), axis=1),
        )
        return jnp.stack([value.astype(logits_RxV.dtype) for value in values], axis=1)

    def logits(self, params: decoder.Params, x_RxD: jax.Array, ids_RxN: jax.Array) -> jax.Array:
        """The logits [R, N] of these ids only, from the stream leaving the last layer."""

        def one(x_D: jax.Array, ids_N: jax.Array) -> jax.Array:
            return decoder.unembed(self.config, decoder.head_of(self.config, params, ids_N), x_D[None, :])[0]

        return jax.vmap(one)(x_RxD, ids_RxN)

    def _entry(self, stream: jax.Array, value: jax.Array) -> tuple[decoder.Hook | None, jax.Array]:
        """What makes the tail start from a value of the site: a hook in its first layer, if any, and the stream."""
        if self.in_stream:
            return None, value
        return (lambda site, own: value if site == self.site else own), stream
