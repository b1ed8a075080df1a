"""Reading the rotary embedding of a ``config.json``, in the words of transformers 4 and 5, and all its kinds.

Each kind of scaling changes the frequencies of the plain embedding, theta^(-2i/R) for pair i of R dimensions, so that
positions beyond those of pre-training can be told apart.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from saejax.errors import UserError
from saejax.models.config import Rope
from saejax.models.fields import Fields

SLIDING, FULL = "sliding_attention", "full_attention"  # kinds of layers, as configs name them


def read_rope(
    fields: Fields,
    d_head: int,
    context: int,
    theta_names: Sequence[str] = ("rope_theta",),
    share_names: Sequence[str] = (),
    default_share: float = 1.0,
    default_theta: float = 10_000.0,
) -> Rope:
    """Read the rotary embedding that all layers share.

    transformers 5 writes all of it into "rope_parameters"; transformers 4 writes the base next to "rope_scaling". Where
    both are there, the value in the object counts.

    Args:
      fields: fields of the config.
      d_head: width of a head.
      context: longest prompt in tokens.
      theta_names: fields outside of that object that may hold the base.
      share_names: names of fields for the share of a head that is rotated; none where the family rotates all of it.
      default_share: the share where no field has it.
      default_theta: the base where no field has it.
    """
    rope = rope_object(fields)
    theta = rope.first_number("rope_theta", default_theta, [(fields, name) for name in theta_names])
    share = 1.0
    if share_names:
        share = rope.first_number("partial_rotary_factor", default_share, [(fields, name) for name in share_names])
    return make_rope(rope, theta, share, d_head, context)


def read_ropes(
    fields: Fields, d_head: int, context: int, theta: float, sliding_theta: float, sliding_name: str
) -> tuple[Rope, Rope]:
    """Read the rotary embeddings of full and of sliding layers, which transformers 4 writes into different fields.

    Args:
      fields: fields of the config.
      d_head: width of a head.
      context: longest prompt in tokens.
      theta: base of full layers where no field has it.
      sliding_theta: base of sliding layers where no field has it.
      sliding_name: field of transformers 4 for the base of sliding layers.
    """
    rope = rope_object(fields)
    # What transformers 4 writes into "rope_scaling" is for full layers; sliding ones rotate plainly.
    far, near = (rope.part(FULL), rope.part(SLIDING)) if FULL in rope or SLIDING in rope else (rope, Fields({}, ""))
    theta = far.first_number("rope_theta", theta, [(fields, "rope_theta")])
    sliding_theta = near.first_number("rope_theta", sliding_theta, [(fields, sliding_name)])
    return make_rope(far, theta, 1.0, d_head, context), make_rope(near, sliding_theta, 1.0, d_head, context)


def rope_object(fields: Fields) -> Fields:
    """Return the fields of "rope_scaling", else of "rope_parameters"."""
    return fields.part("rope_scaling" if fields.take("rope_scaling", dict, {}) else "rope_parameters")


def make_rope(rope: Fields, theta: float, share: float, d_head: int, context: int) -> Rope:
    """Return the rotary embedding that an object such as "rope_parameters" describes.

    ``theta`` is the base of the frequencies, and ``share`` of a head's ``d_head`` dimensions is rotated; ``context`` is
    the longest prompt in tokens.
    """
    old, kind = (rope.take(name, str, "") for name in ("type", "rope_type"))
    kind = kind or old or "default"
    if kind not in _KINDS:
        raise rope.refuse("rope_type", kind, f"one of {', '.join(_KINDS)}")
    width = int(d_head * share)
    if width % 2 or not 2 <= width <= d_head:
        turning = f"a share of {share:g} of that turns" if share != 1 else "all of that turns"
        raise UserError(
            f"{rope.where}: heads are {d_head} wide and {turning}, but a rotary embedding needs an even width of at "
            "least 2: use another model"
        )
    frequencies, attention_scaling = _KINDS[kind](rope, theta, width, context)
    return Rope(tuple(frequencies.tolist()), attention_scaling)


_Kind = Callable[[Fields, float, int, int], tuple[np.ndarray, float]]


def _plain(rope: Fields, theta: float, width: int, context: int) -> tuple[np.ndarray, float]:
    """Return frequencies that fall geometrically with the pair, and no scaling of attention."""
    return theta ** -(np.arange(0, width, 2) / width), 1.0


def _linear(rope: Fields, theta: float, width: int, context: int) -> tuple[np.ndarray, float]:
    """Divide positions by a factor (Chen et al., 2023)."""
    frequencies, attention_scaling = _plain(rope, theta, width, context)
    return frequencies / rope.number("factor"), attention_scaling


def _dynamic(rope: Fields, theta: float, width: int, context: int) -> tuple[np.ndarray, float]:
    """Leave the base as it is: it grows only with prompts longer than the context, which are refused."""
    rope.number("factor")
    return _plain(rope, theta, width, context)


def _llama3(rope: Fields, theta: float, width: int, context: int) -> tuple[np.ndarray, float]:
    """Slow down pairs that turn rarely (Llama 3.1).

    Those that turn less than ``low`` times over the original context are slowed down by a factor, those that turn more
    than ``high`` times stay, and the others lie in between.
    """
    frequencies, attention_scaling = _plain(rope, theta, width, context)
    factor, low, high = (rope.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise rope.contradiction(f"'low_freq_factor' ({low:g})", f"'high_freq_factor' ({high:g})")
    # Turns of each pair over the original context decide, with a linear ramp between the two limits.
    turns = rope.size("original_max_position_embeddings", context) * frequencies / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / factor), attention_scaling


def _yarn(rope: Fields, theta: float, width: int, context: int) -> tuple[np.ndarray, float]:
    """Slow down pairs that turn rarely, and make attention sharper (YaRN, Peng et al., 2023).

    Pairs that turn often stay, pairs that turn rarely are slowed down by a factor, with a ramp over the pairs between.
    """
    original = rope.size("original_max_position_embeddings", context)
    factor = rope.number("factor", context / original)

    def pair(turns: float) -> float:
        """Return the pair that turns so many times over the original context."""
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(rope.number("beta_fast", 32.0)), pair(rope.number("beta_slow", 1.0))
    if rope.take("truncate", bool, True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)  # as transformers clips them, though there are width / 2 pairs
    ramp = np.clip((np.arange(width // 2) - first) / max(last - first, 1e-3), 0, 1)
    frequencies, _ = _plain(rope, theta, width, context)
    return frequencies * (1 - ramp + ramp / factor), _yarn_scaling(rope, factor)


def _yarn_scaling(rope: Fields, factor: float) -> float:
    """Return YaRN's factor on cosine and sine, written out or from the scaling factor."""

    def mscale(strength: float) -> float:
        """Return the scaling of a strength."""
        return 0.1 * strength * math.log(factor) + 1 if factor > 1 else 1.0

    scaling = rope.number_or_null("attention_factor")
    if scaling is not None:
        return scaling
    numerator, denominator = (rope.number_or_null(name) for name in ("mscale", "mscale_all_dim"))
    return mscale(numerator) / mscale(denominator) if numerator and denominator else mscale(1.0)


_KINDS: dict[str, _Kind] = {"default": _plain, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn}
