"""Operations and bytes of a pass through the model, counted by hand.

XLA's own count takes the body of a loop over layers once. A product of [m, k] and [k, n] is 2 m k n operations; norms,
softmax and other elementwise work are left out. Bytes per device: arrays that stay are counted exactly, by the rule by
which they are placed; what comes and goes is estimated from the largest arrays that are alive at once, and a compiler
may need less or up to twice as much.
"""

from math import prod

from saejax.costs.cost import WIDTH, Axes, PlannedRun
from saejax.dictionaries import DictionaryConfig
from saejax.dictionaries.cross_layer import FORM
from saejax.dictionaries.modules import parameter_table as dictionary_table
from saejax.models.config import DecoderConfig
from saejax.models.parameters import LAYERS, parameter_table
from saejax.parallel.mesh import part_size


def pass_flops(model: DecoderConfig, tokens: int, length: int, layers: float) -> float:
    """A forward pass through some layers.

    Args:
      tokens: in all, padding included.
      length: of each prompt; scores of later tokens are computed and masked, as the decoder does it.
      layers: how many.
    """
    weights = sum(
        prod(shape[1:])
        for name, (shape, _) in parameter_table(model).items()
        if name.startswith(LAYERS) and len(shape) > 2 and "_bias_" not in name
    )
    return tokens * layers * (2.0 * weights + 4.0 * length * model.n_heads * model.d_head)


def head_flops(model: DecoderConfig, positions: int) -> float:
    """Logits of the whole vocabulary at so many positions."""
    return 2.0 * positions * model.d_model * model.vocab


def step_flops(tokens: int, d_in: int, features: int) -> float:
    """A training step: encoder and decoder, each once forwards and twice backwards."""
    return 12.0 * tokens * d_in * features


def weights_share(form: str, layers: int) -> float:
    """Weights of what is trained on so many layers, in those of a stack of dictionaries.

    Of each layer's two matrices a cross-layer transcoder has one encoder, and (layers + 1) / 2 decoders on average.

    Args:
      form: as in ``--train.form``.
      layers: how many.
    """
    return (layers + 3) / 4 if form == FORM else 1.0


def parameters(model: DecoderConfig) -> int:
    """Number of parameters of the decoder."""
    return sum(prod(shape) for shape, _ in parameter_table(model).values())


def weight_bytes(model: DecoderConfig, axes: Axes, dtype: str, layers: int | None = None) -> int:
    """The weights outside the layers and of the first ``layers``, all if that is None."""
    count = model.n_layers if layers is None else layers
    sizes = (
        part_size(axes, (count if name.startswith(LAYERS) else shape[0], *shape[1:]), *spec)
        for name, (shape, spec) in parameter_table(model).items()
    )
    return WIDTH[dtype] * sum(sizes)


def dictionary_bytes(dictionary: DictionaryConfig, dtype: str, axes: Axes | None = None) -> int:
    """A dictionary's arrays: whole, or split over axes as training does it."""
    return WIDTH[dtype] * sum(
        prod(shape) if axes is None else part_size(axes, shape, *spec)
        for shape, spec in dictionary_table(dictionary).values()
    )


def layer_bytes(plan: PlannedRun, rows: int, length: int, dtype: str, kept: int = 0) -> int:
    """A pass through the layers: the stream and what the largest of them makes, and ``kept`` copies of a site."""
    model, axes, width = plan.model, plan.axes, WIDTH[dtype]
    data_rows = part_size(axes, (rows,), "data")
    heads, kv_heads, mlp = (
        part_size(axes, (size,), "model") for size in (model.n_heads, model.n_kv_heads, model.d_mlp)
    )
    stream = data_rows * length * model.d_model * width
    heads_wide = data_rows * length * (heads + 2 * kv_heads) * model.d_head * width
    scores = data_rows * heads * length * length * (2 * 4 + width)  # scores and their softmax in fp32, and the weights
    hidden = data_rows * length * mlp * width * (3 if model.gated else 2)
    return (4 + kept) * stream + max(2 * heads_wide + scores, hidden)


def logit_bytes(plan: PlannedRun, rows: int, length: int) -> int:
    """fp32 logits at every position, and as much again for their softmax."""
    return 2 * 4 * part_size(plan.axes, (rows, length, plan.model.vocab), "data", None, "model")


def feature_bytes(n_features: int, rows: int, length: int) -> int:
    """fp32 activations of all features, before and after the sparsity function."""
    return 2 * 4 * rows * length * n_features


def generated_bytes(plan: PlannedRun, rows: int, length: int, new: int) -> int:
    """The pass over the prompts, and keys and values of all tokens, which are copied when room is made for new ones."""
    model = plan.model
    heads = part_size(plan.axes, (rows, model.n_kv_heads), "data", "model")
    cache = 2 * WIDTH[plan.dtype] * model.n_layers * heads * (length + new) * model.d_head
    return layer_bytes(plan, rows, length, plan.dtype) + 2 * cache
