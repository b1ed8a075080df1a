"""What a kind of dictionary is: everything in which dictionaries of one kind differ from those of others.

A kind is a subclass of ``Kind`` that is registered (``@register``). Its methods are pure functions of arrays that are
traced, compiled and differentiated; a new kind overrides those in which it differs from a ReLU without a penalty.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypedDict

import jax
import jax.numpy as jnp

from saejax.config import Config
from saejax.dictionaries.description import DictionaryConfig

Arrays = dict[str, Any]  # of jax, or of numpy where they are on the host
Numbers = Mapping[str, Any]  # settings by name: Python's, or scalars of jax


class Facts(TypedDict, total=False):
    """Fields of ``DictionaryConfig`` that follow from a kind's settings."""

    k: int
    groups: tuple[int, ...]
    fires_above: float


class MemberEncoder(Protocol):
    """What a kind sees of a ``Dictionary`` whose activations it makes and weighs.

    It is a whole one, or a layer of a cross-layer transcoder, whose decoder is not its own: there W_dec_FxD holds the
    lengths of the joined decoders' rows, [F, 1], which are all that penalties read of a decoder.
    """

    config: DictionaryConfig
    matmul_dtype: str

    @property
    def arrays(self) -> Arrays:
        """W_enc_DxF, b_enc_F, W_dec_FxD, b_dec_D, those of ``Kind.vectors``, and W_skip_DxD of a skip transcoder."""


class Coder(MemberEncoder, Protocol):
    """A whole dictionary, which also rebuilds its target."""

    def decode(self, f_xF: jax.Array, x_xD: jax.Array | None = None) -> jax.Array:
        """f W_dec + b_dec, and x W_skip of a skip transcoder."""


@dataclasses.dataclass(frozen=True)
class EncodedBatch:
    """One member of a stack on one batch of training, of which its losses are made.

    Attributes:
      member: the dictionary that is trained.
      x_BxD, y_BxD: inputs and targets, scaled to a mean norm of sqrt(d).
      pre_BxF: what the encoder gives, with its bias.
      f_BxF: activations as in training.
      dead_F: True for features that have been silent for too long.
      metric_DxD: what errors are multiplied with before they are squared; None: nothing.
      values: the member's own of the settings that can be swept, scalars by name.
      own: the other settings of the kind.
    """

    member: MemberEncoder
    x_BxD: jax.Array
    y_BxD: jax.Array
    pre_BxF: jax.Array
    f_BxF: jax.Array
    dead_F: jax.Array
    metric_DxD: jax.Array | None
    values: Numbers
    own: Any


class Kind:
    """A kind of dictionary; this one is ReLU without a penalty.

    Attributes:
      name: as in ``--train.kinds`` and ``DictionaryConfig.kind``.
      about: a line for the report that goes on after "which".
      Settings, reads: of a kind that is registered, ``own`` and ``reads`` of its ``settings.kinds.KindSettings``; for
        the package's own kinds both stand there.
      vectors: names of its arrays beyond the common ones, each [F], 0 at the start.
      unscaled: those of them that are not in units of activations.
      numbers: fields of ``DictionaryConfig``, besides shapes, that its inference reads and a stack's members differ in.
      signed: whether activations may be below 0.
      keeps_k: whether activations are a token's k largest pre-activations above 0, in training and at inference.
      depends_on_decoder_norms: whether inference compares features with each other, so that the lengths of decoder rows
        decide which are active.
      jumprelu: whether at inference it is a JumpReLU dictionary, that of ``as_jumprelu``: so other tools can have it.
      no_free_decoder: why decoder rows may not grow freely; empty: they may.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    Settings: ClassVar[type[Config]] = Config
    reads: ClassVar[Sequence[str]] = ()
    vectors: ClassVar[Sequence[str]] = ()
    unscaled: ClassVar[Sequence[str]] = ()
    numbers: ClassVar[Sequence[str]] = ()
    signed: ClassVar[bool] = False
    keeps_k: ClassVar[bool] = False
    depends_on_decoder_norms: ClassVar[bool] = False
    jumprelu: ClassVar[bool] = False
    no_free_decoder: ClassVar[str] = ""

    # What it computes.

    def encode(self, member: MemberEncoder, pre_xF: jax.Array, projected_xF: jax.Array, numbers: Numbers) -> jax.Array:
        """Activations at inference [..., F].

        Args:
          pre_xF: what its encoder gives, with its bias; ``projected_xF``: before its bias.
          numbers: the fields of ``Kind.numbers``, which may be traced.
        """
        return jax.nn.relu(pre_xF)

    def fires(self, f_xF: jax.Array, numbers: Numbers) -> jax.Array:
        """Where activations count as active."""
        return f_xF > 0

    def bound(self, arrays: Arrays) -> tuple[Any, Any]:
        """W_enc and b_enc of pre-activations which activations never exceed, in size where they are signed."""
        return arrays["W_enc_DxF"], arrays["b_enc_F"]

    def move_bias(self, arrays: Arrays, shift_F: Any) -> Arrays:
        """The same dictionary for an encoder that gives ``shift_F`` less before its bias."""
        return arrays | dict(b_enc_F=arrays["b_enc_F"] + shift_F)

    def as_jumprelu(self, arrays: Arrays) -> Arrays:
        """The arrays, with "threshold_F", of the JumpReLU dictionary that it is; called if ``jumprelu`` says so."""
        return arrays

    # How it is trained.

    def encode_in_training(
        self, member: MemberEncoder, pre_BxF: jax.Array, projected_BxF: jax.Array, values: Numbers, own: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Activations [B, F] in training, and the smallest that was kept (0 where nothing is made of that).

        Args:
          member, pre_BxF, projected_BxF: as for ``encode``, of one batch.
          values: the member's own of the settings that can be swept, scalars that may be traced.
          own: the other settings of the kind.
        """
        return self.encode(member, pre_BxF, projected_BxF, values), jnp.zeros((), pre_BxF.dtype)

    def reconstructions(self, member: Coder, f_BxF: jax.Array, x_BxD: jax.Array) -> list[jax.Array]:
        """What must be like the targets, each [B, D], made of f and x; the last is the whole dictionary's."""
        return [member.decode(f_BxF, x_BxD)]

    def penalty(self, batch: EncodedBatch) -> jax.Array | None:
        """The penalty on activations, a mean over tokens; it rises over the warm-up."""
        return None

    def losses(self, batch: EncodedBatch) -> dict[str, jax.Array]:
        """Further terms of the loss by the names of their metrics."""
        return {}

    def start(self, own: Any) -> dict[str, float]:
        """Values at which ``vectors`` start where that is not 0."""
        return {}

    def constrain(self, params: Arrays) -> Arrays:
        """What must hold of its arrays after every step."""
        return params

    # What becomes of it.

    def facts(self, values: Numbers, own: Any, n_features: int) -> Facts:
        """Fields of ``DictionaryConfig`` of a member with these settings.

        Args:
          values, own: as for ``encode_in_training``, Python's numbers.
          n_features: number of features F.

        Raises:
          UserError: they do not fit the number of features.
        """
        return Facts(k=values["k"]) if "k" in values else Facts()

    def finish(self, arrays: Arrays, kept: jax.Array) -> Arrays:
        """The arrays at the end; ``kept`` is the running mean of the smallest activations that were kept."""
        return arrays

    def resume(self, arrays: Arrays) -> Arrays:
        """The arrays of a finished dictionary as training takes them up again."""
        return arrays
