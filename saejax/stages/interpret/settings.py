"""Settings of the descriptions of features."""

import dataclasses

from saejax import shared_settings as shared
from saejax.config import Config, setting
from saejax.dictionaries.kinds import unit_names


@dataclasses.dataclass(frozen=True)
class InterpretConfig(Config):
    """Descriptions of the features of trained dictionaries."""

    dictionaries: tuple[str, ...] = setting(
        (),
        "kinds of trained dictionaries to interpret, each with all members of its stack; empty: none",
        choices=unit_names,
        changes_results=False,
    )
    categories: bool = setting(
        False,
        "associate features with the behaviours and benchmarks on whose prompts, or right answers, they are active",
    )
    batch_tokens: int = shared.analysis_batch_tokens()
    attention_tokens: int = 8192  #: tokens of text at which features are compared with what heads look at; no flag
    seed: int = 789  #: of the samples and random directions that are drawn; no flag
