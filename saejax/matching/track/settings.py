"""Settings of tracking: the texts that are followed through the layers."""

import dataclasses

from saejax import shared_settings as shared
from saejax.config import Config, Place, Text, setting


@dataclasses.dataclass(frozen=True)
class TrackConfig(Config):
    """Prompts and worked solutions, followed through the layers."""

    prompt: Text = setting("", "the text to follow; its sentences are the steps")
    prompts: Place = setting(
        "",
        'file of up to four instead, shown side by side, .jsonl: {"slug": "apples", "prompt": "...", "solution": '
        '"...", "answer": " 12"}; the sentences of a solution, or the texts of a list of them, are the steps',
    )
    generate: int = setting(
        0,
        "tokens that the model writes after each prompt, shown as its output; the output of a prompt without a "
        "solution is followed as one (0: none)",
        low=0,
    )
    dictionaries: tuple[Place, ...] = setting(
        (),
        "dictionaries of the layers: trained stacks such as topk, members such as topk/resid_post.3, or folders; at "
        "most one of each layer",
    )
    lens: Place = shared.lens()
    random_sets: int = shared.random_sets()
    seed: int = shared.causal_seed()
