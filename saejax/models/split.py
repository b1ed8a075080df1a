"""A decoder split at a site into a head and a tail, as pure functions.

    head   token ids -> the stream there, the site's value, and what a dictionary reads        once per prompt
    tail   a value of the site -> the stream leaving the last layer, and the readouts          once per edit

The tail of an edit may run only the tokens from the first changed one on (``tail_of_tree``): attention is causal, so
the keys and values of the tokens before it are those of the clean run. Of prompts that begin alike, it runs the first
tokens once. Logits are computed at each prompt's last position, two of them unless more readouts are asked for.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from saejax.models import decoder
from saejax.models.attention import RunAttention
from saejax.models.config import DecoderConfig
from saejax.models.rules import GRADIENT, RunRules
from saejax.models.run import KEYS, VALUES, Hook, LayersRun, run_layers
from saejax.models.sites import Site
from saejax.models.tree import Past, Tree


@dataclasses.dataclass(frozen=True)
class SplitPoint:
    """Where a decoder is split, and how it is run. Hashable, so that it can be a static argument of ``jax.jit``.

    Attributes:
      config: the decoder.
      site: the site whose value the tail starts from.
      reads: the site that the dictionary reads: the same one, or one before it.
      mesh: the devices.
      rules: what differentiation goes by.
    """

    config: DecoderConfig
    site: Site
    reads: Site
    mesh: Mesh
    rules: RunRules = GRADIENT

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
        x_BxTxD = decoder.embed(self.config, params, ids_BxT)
        if self.in_stream and self.reads == self.site:
            x_BxTxD = run_layers(self.config, params, x_BxTxD, 0, self._start, rules=self.rules).x
            return x_BxTxD, x_BxTxD, x_BxTxD
        seen: dict[Site, jax.Array] = {}

        def look(kind: str, layer: int | jax.Array, value_BxTxD: jax.Array) -> jax.Array:
            assert isinstance(layer, int)
            return seen.setdefault(Site(kind, layer), value_BxTxD)

        layers = {self.reads.layer, self.site.layer}
        run_layers(self.config, params, x_BxTxD, 0, self.site.layer + 1, look, layers, rules=self.rules)
        stream = self.site if self.in_stream else Site("resid_pre", self.site.layer)
        return seen[stream], seen[self.site], seen[self.reads]

    def tail(self, params: decoder.Params, stream_BxTxD: jax.Array, value_BxTxD: jax.Array) -> jax.Array:
        """Runs on with another value of the site.

        Args:
          stream_BxTxD: from ``head``.
          value_BxTxD: the site's value, edited or not.

        Returns:
          The stream leaving the last layer, [B, T, D].
        """
        return self._run_on(params, stream_BxTxD, value_BxTxD).x

    def record(self, params: decoder.Params, stream_BxTxD: jax.Array, value_BxTxD: jax.Array) -> tuple[jax.Array, Past]:
        """As ``tail``, and the keys and values of its layers too."""
        run = self._run_on(params, stream_BxTxD, value_BxTxD, collect=(KEYS, VALUES))
        return run.x, Past(run.collected[KEYS], run.collected[VALUES])

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
        attention = tree.attention(self.config, past, self._start)
        return self._run_on(params, stream_SxNxD, value_SxNxD, attention).x

    def _run_on(
        self,
        params: decoder.Params,
        stream: jax.Array,
        value: jax.Array,
        attention: RunAttention | None = None,
        collect: tuple[str, ...] = (),
    ) -> LayersRun:
        """Runs the tail. Unless the site is the stream, a hook in the first layer puts the value there."""
        put: Hook | None = None
        if not self.in_stream:
            put = lambda kind, layer, own: value if kind == self.site.kind else own  # noqa: E731
        return run_layers(
            self.config,
            params,
            value if self.in_stream else stream,
            self._start,
            self.config.n_layers,
            put,
            (self._start,),
            rules=self.rules,
            attention=attention,
            collect=collect,
        )

    def difference(
        self, params: decoder.Params, x_BxTxD: jax.Array, last_B: jax.Array, answers_Bx2: jax.Array
    ) -> jax.Array:
        """The logit difference at each prompt's last position.

        Args:
          x_BxTxD: the stream leaving the last layer.
          last_B: index of each prompt's last token.
          answers_Bx2: token ids of the correct and the wrong answer.

        Returns:
          logit(correct) - logit(wrong), fp32 [B].
        """
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
          fp32 [R, 1] or [R, 4]: logit(correct) - logit(wrong); and, beside ``logp_RxV``, the log-likelihood of the
          correct answer's first token, whether that token is the likeliest of all, and the Kullback-Leibler divergence
          of the next token's probabilities from those without an edit, in nats.
        """
        if logp_RxV is None:
            logits_Rx2 = self.logits(params, x_RxD, answers_Rx2)
            return logits_Rx2[:, :1] - logits_Rx2[:, 1:]
        logits_RxV = decoder.unembed(self.config, params, x_RxD, self.rules)
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
        """The logits [R, N] of these ids only, from the stream x leaving the last layer."""

        def one(x_D: jax.Array, ids_N: jax.Array) -> jax.Array:
            head = decoder.head_of(self.config, params, ids_N)
            return decoder.unembed(self.config, head, x_D[None, :], self.rules)[0]

        return jax.vmap(one)(x_RxD, ids_RxN)
