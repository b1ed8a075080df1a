"""Settings of labels that a language model writes and judges."""

import dataclasses

from saejax.config import Config, setting
from saejax.dictionaries.kinds import unit_names


@dataclasses.dataclass(frozen=True)
class ExplainConfig(Config):
    """Labels written and judged by a language model."""

    dictionaries: tuple[str, ...] = setting(
        (),
        "kinds of interpreted dictionaries whose features to label, each with all members of its stack; empty: none",
        choices=unit_names,
        changes_results=False,
    )
    url: str = setting(
        "",
        "address of an OpenAI-compatible endpoint, such as http://localhost:8000/v1; the environment variable "
        "OPENAI_API_KEY has its key",
        changes_results=False,  # the model that answers there counts, not its place
    )
    model: str = setting("", "name of the model at the endpoint")
    features: tuple[int, ...] = setting((), "indices of the features to label; empty: a random --explain.sample", low=0)
    sample: int = setting(100, "number of random features among those that fire often enough on held-out text", low=1)
    scores: tuple[str, ...] = setting(
        ("detection", "fuzzing"),
        "how labels are judged: detection (in which contexts does the feature fire?), which decides what is kept; "
        "fuzzing (are the marked tokens the feature's?), intruder (which context does not belong?), simulation (how "
        "active is it on each token?)",
        choices=("detection", "fuzzing", "intruder", "simulation"),
    )
    most_tokens: int = setting(
        2_000_000,
        "number of tokens (prompts and answers, earlier runs of the unit included) after which no further question "
        "is asked; up to 64 questions under way still count on top",
        low=1,
        changes_results=False,
    )
    concurrency: int = setting(
        8, "number of questions that are asked at the same time", low=1, high=64, changes_results=False
    )
    seed: int = 789  #: of the features and contexts that are asked about; no flag
