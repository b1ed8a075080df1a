"""Settings of the capture of activations."""

import dataclasses

from saejax.config import Config, setting
from saejax.models.site_ranges import expand_ranges
from saejax.models.tokens import BOS


@dataclasses.dataclass(frozen=True)
class CaptureConfig(Config):
    """The activations that are recorded from the model."""

    sites: tuple[str, ...] = setting(
        ("resid_post.15",),
        "sites to record, such as resid_post.15,mlp_in.15,mlp_out.15, or layers of one kind such as "
        "mlp_in.0-29; where PyTorch runs the model (--model.backend=torch, or modules alone) also its modules: "
        "module:transformer.h.3.mlp (its output), module_in:transformer.h.3.mlp (its input)",
    )
    last: int = setting(0, "number of last positions of every document to record; 0: all positions", low=0)
    tokens: int = setting(
        0,
        "number of tokens of each split to record, a random sample of the text, for scores and examples of "
        "dictionaries that were trained with --train.source=model; 0: all",
        low=0,
    )
    dtype: str = setting(
        "float32",
        "dtype of the model's weights and products while it is captured (--model.dtype is for the other stages; "
        "--capture.store_dtype is of the activations on disk)",
        choices=("float32", "bfloat16"),
    )
    bos: str = setting(
        "auto",
        "whether every document begins with a BOS token: 'auto' (as the tokenizer itself does), 'always' or 'never'",
        choices=BOS,
    )
    store_dtype: str = setting(
        "bfloat16",
        "dtype of activations on disk; int8 takes half of bfloat16, with a scale for each row, and is read as bfloat16",
        choices=("float32", "bfloat16", "int8"),
    )
    batch_tokens: int = setting(
        2048, "tokens of a forward pass on each device, padding included", low=1, changes_results=False
    )
    shard_rows: int = setting(65_536, "rows (tokens) per shard file", low=1)
    sink_factor: float = setting(
        10.0,
        "positions whose norm exceeds this many times the median are attention sinks: not trained on, scored or edited",
        low=1.0,
    )
    max_sink_share: float = setting(
        0.01,
        "maximum share of the tokens after position 0 that the sink rule may drop; more is an error",
        low=0.0,
        high=1.0,
    )

    def __post_init__(self):
        object.__setattr__(self, "sites", expand_ranges(self.sites))
        super().__post_init__()
