"""Settings of groups of features that fire together."""

import dataclasses

from saejax import shared_settings as shared
from saejax.config import Config, Place, setting


@dataclasses.dataclass(frozen=True)
class ClusterConfig(Config):
    """Groups of features that fire together."""

    dictionaries: tuple[Place, ...] = setting(
        (),
        "dictionaries whose features to group: kinds trained here with all members of their stacks (topk), members "
        "(topk/seed5), or folders; empty: none",
    )
    batch_tokens: int = shared.analysis_batch_tokens()
    seed: int = 789  #: of the order of pieces, samples and resamples; no flag
    tokens: int = 32768  #: approximate number of tokens of the text on which firings are compared; no flag
