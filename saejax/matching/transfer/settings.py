"""Settings of the comparison of dictionaries of different layers, seeds, sizes and models."""

import dataclasses

from saejax.config import Config, Place, setting
from saejax.shared_settings import analysis_batch_tokens

MEASURES = ("decoder", "encoder", "activity")


@dataclasses.dataclass(frozen=True)
class TransferConfig(Config):
    """Comparison of dictionaries of different layers, seeds, sizes and models."""

    dictionaries: tuple[Place, ...] = setting(
        (),
        "dictionaries to compare, at least two: kinds trained here with all members of their stacks (topk), members "
        "(topk/seed5), or folders; empty: none",
    )
    measures: tuple[str, ...] = setting(
        ("decoder", "encoder"),
        "how features are matched: by cosines of decoder or encoder rows (within one model), or by activity, the "
        "correlation of activations on text that both models read",
        choices=MEASURES,
    )
    reconstruction: bool = setting(
        False, "evaluate each dictionary at the site of each other, unchanged and between affine maps"
    )
    tokens: int = setting(
        8192,
        "approximate number of tokens of held-out text for activity and reconstruction; maps need 8 per dimension of "
        "the widest site",
        low=64,
    )
    batch_tokens: int = analysis_batch_tokens()
    seed: int = 789  #: of the order of documents, rows and rotations; no flag
