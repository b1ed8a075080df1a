"""A model with random weights in place of its own: the control for what features owe to training.

Published dictionaries of such models score nearly as well on some measures as those of trained ones (Heap et al., 2025,
arXiv 2501.17727), so that a figure says little until it is compared with theirs.
"""

from pathlib import Path

from saejax.errors import UserError
from saejax.models.identity import settings_fingerprint
from saejax.models.model_cache import cached_model, save_pretrained

_SEED, _MAKING = 0, 1  # raise _MAKING when what is made changes


def draw_random_model(folder: Path) -> Path:
    """Return the model of ``folder``, with its configuration and tokenizer and with weights as transformers draws them.

    Args:
      folder: in the hub's format; its weights are not read and need not be there.

    Raises:
      UserError: transformers does not know the architecture, or the cache cannot be written.
    """
    name = f"random-{_SEED}-{settings_fingerprint(folder)}-{_MAKING}"
    return cached_model(name, f"random weights, seed {_SEED}", lambda target: _draw(folder, target))


def _draw(folder: Path, target: Path) -> None:
    """Save the model that transformers initialises for a configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # A generator of its own: the draws of the caller's program stay as they were.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    except (ValueError, KeyError, ImportError, OSError) as error:
        raise UserError(f"transformers cannot make a random model of {folder} ({error}): use another model") from error
    save_pretrained(model, tokenizer, target)
