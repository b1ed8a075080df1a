"""The interface of a kind of dictionary: everything in which dictionaries of one kind differ from others.

A kind is a subclass of ``Kind`` that is registered (``@register``). Its methods are pure functions of arrays that are
traced, compiled and differentiated; a new kind overrides those in which it differs from a ReLU without a penalty.
Training may compute a kind's activations by another route (``sparse_products``), but only where all methods that define
them are the package's own, so that a kind has the same mathematics on every device.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias, TypedDict

import jax

from saejax.config import Config
from saejax.short_reprs import has_short_repr

# ``saejax.dictionaries.Dictionary``, whose file imports the kinds: types in this package cannot name it.
Dictionary: TypeAlias = Any
Arrays = dict[str, Any]  # of jax, or of numpy where they are on the host
Numbers = Mapping[str, Any]  # settings by name: Python's, or scalars of jax


class Facts(TypedDict, total=False):
    """Fields of ``DictionaryConfig`` that follow from a kind's settings."""

    k: int
    groups: tuple[int, ...]
    fires_above: float


@has_short_repr
@dataclasses.dataclass(frozen=True)
class EncoderInputs:
    """The values from which a kind makes activations; leading dimensions are free."""

    x_xD: jax.Array  #: what the encoder reads, normalised if the dictionary normalises; its centre is still in it
    projected_xF: jax.Array  #: pre-activations without the encoder's bias
    pre_xF: jax.Array  #: pre-activations


@dataclasses.dataclass(frozen=True)
class EncodedBatch:
    """A dictionary on one batch of training, from which its losses are computed."""

    #: the dictionary that is trained. A layer of a cross-layer transcoder has no decoder of its own, only its length,
    #: ``decoder_norms_F``.
    dictionary: Dictionary
    #: x_BxD and y_BxO: inputs and targets, scaled to a mean norm of sqrt(d).
    x_BxD: jax.Array
    y_BxO: jax.Array
    pre_BxF: jax.Array  #: pre-activations, with the encoder's bias
    f_BxF: jax.Array  #: activations as in training
    dead_F: jax.Array  #: True for features that have been silent for too long
    metric_DxD: jax.Array | None  #: matrix that errors are multiplied with before they are squared; None: the identity
    values: Numbers  #: this dictionary's values of the settings that can be swept, scalars by name
    settings: Any  #: the other settings of the kind


class Kind:
    """A kind of dictionary; this one is ReLU without a penalty."""

    name: ClassVar[str]  #: as in ``--train.kinds`` and ``DictionaryConfig.kind``
    about: ClassVar[str]  #: a line for the report that goes on after "which"
    #: the class of the settings that only this kind has, ``--train.<kind>.<field>``. Fields made with ``setting(...,
    #: swept=True)`` are lists; each value makes a member of a stack.
    Settings: ClassVar[type[Config]] = Config
    reads: ClassVar[Sequence[str]] = ()  #: the settings of ``--train`` that several kinds share: "k", "l1"
    source: str = ""  #: hash of the plugin's file; "" for a kind of saejax
    vectors: ClassVar[Sequence[str]] = ()  #: names of its arrays beyond the common ones, each [F], 0 at the start
    unscaled: ClassVar[Sequence[str]] = ()  #: the vectors that are not in units of activations
    #: fields of ``DictionaryConfig``, besides shapes, that its inference reads and that members of a stack differ in.
    numbers: ClassVar[Sequence[str]] = ()
    signed: ClassVar[bool] = False  #: whether activations may be below 0
    #: whether, at inference, a feature's activation depends on its own column, bias and vectors only, so that some
    #: features can be encoded without the others.
    elementwise: ClassVar[bool] = False
    #: whether inference compares features with each other, so that the lengths of decoder rows decide which are active.
    depends_on_decoder_norms: ClassVar[bool] = False
    #: whether at inference it is a JumpReLU dictionary, made by ``as_jumprelu``: so other tools can have it.
    jumprelu: ClassVar[bool] = False
    #: whether it is for SAEs of one site alone, whose input its rows explain, so that it has no encoder.
    rebuilds_input: ClassVar[bool] = False
    no_free_decoder: ClassVar[str] = ""  #: why decoder rows may not grow freely; empty: they may

    @classmethod
    def is_elementwise(cls) -> bool:
        """Return ``elementwise`` if it was declared for the ``encode`` that this class has.

        A subclass that overrides ``encode`` must say so again.
        """
        # From the class itself upwards: whichever of the two comes first belongs to its ``encode``.
        for parent in cls.__mro__:
            if "elementwise" in vars(parent) or "encode" in vars(parent):
                return bool(vars(parent).get("elementwise", False))
        return False

    # Inference.

    def encode(self, dictionary: Dictionary, inputs: EncoderInputs, numbers: Numbers) -> jax.Array:
        """Return activations at inference, [..., F]; ``numbers`` are the fields of ``Kind.numbers``, maybe traced."""
        return jax.nn.relu(inputs.pre_xF)

    def fires(self, f_xF: jax.Array, numbers: Numbers) -> jax.Array:
        """Return where activations count as active."""
        return f_xF > 0

    def move_bias(self, arrays: Arrays, shift_F: Any) -> Arrays:
        """Return the same dictionary for an encoder whose output before the bias is ``shift_F`` lower."""
        return arrays | dict(b_enc_F=arrays["b_enc_F"] + shift_F)

    def as_jumprelu(self, arrays: Arrays) -> Arrays:
        """Return the arrays, with "threshold_F", of the equal JumpReLU dictionary; called if ``jumprelu`` is True."""
        return arrays

    # Training.

    def encode_in_training(
        self, dictionary: Dictionary, inputs: EncoderInputs, values: Numbers, settings: Any
    ) -> jax.Array:
        """Return activations [B, F] in training.

        Args:
          dictionary: the dictionary whose arrays are read.
          inputs: inputs of one batch, [B, ...].
          values: this dictionary's values of the settings that can be swept, scalars that may be traced.
          settings: the other settings of the kind.
        """
        return self.encode(dictionary, inputs, values)

    def reconstructions(self, dictionary: Dictionary, f_BxF: jax.Array, x_BxD: jax.Array) -> list[jax.Array]:
        """Return what is compared with the targets, each [B, D]; the last is the whole dictionary's.

        A skip transcoder needs the inputs x besides the activations f.
        """
        return [dictionary.decode(f_BxF, x_BxD)]

    def penalty(self, batch: EncodedBatch) -> jax.Array | None:
        """Return the penalty on activations, a mean over tokens; its weight rises over the warm-up."""
        return None

    def losses(self, batch: EncodedBatch) -> dict[str, jax.Array]:
        """Return further terms of the loss by the names of their metrics."""
        return {}

    def start(self, settings: Any) -> dict[str, float]:
        """Return initial values of those ``vectors`` that do not start at 0."""
        return {}

    def constrain(self, params: Arrays) -> Arrays:
        """Project the arrays to what they must satisfy after every step."""
        return params

    # Configuration, and the finished dictionary.

    def facts(self, values: Numbers, settings: Any, n_features: int) -> Facts:
        """Return fields of ``DictionaryConfig`` of a dictionary with these settings and number of features F.

        ``values`` are Python's numbers; a ``UserError`` if they do not fit. See ``encode_in_training``.
        """
        return Facts(k=values["k"]) if "k" in values else Facts()

    def finish(self, arrays: Arrays, kept: jax.Array) -> Arrays:
        """Return the finished arrays; ``kept`` is the level above which training keeps activations of many tokens.

        It lies halfway between the smallest that is kept and the largest that is left out, and is measured (see
        ``training.thresholds``) only for kinds that override this method.
        """
        return arrays

    def resume(self, arrays: Arrays) -> Arrays:
        """Return the arrays of a finished dictionary as training takes them up again."""
        return arrays
