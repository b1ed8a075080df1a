"""Settings of the evaluation of dictionaries."""

import dataclasses

from saejax import shared_settings as shared
from saejax.config import Config, setting


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(Config):
    """Held-out scores of dictionaries."""

    ce_documents: int = setting(40, "held-out documents on which cross-entropy is measured; 0: all", low=0)
    batch_tokens: int = shared.analysis_batch_tokens()
