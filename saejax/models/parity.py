"""The comparison of a model with transformers on 64 tokens, which its first load makes where the config needs it.

A ``config.json`` can hold fields that saejax does not know. Whether they change results is not looked up but measured.
"""

import contextlib
import gc
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from saejax.errors import UserError
from saejax.files import read_json, write_json
from saejax.models import source
from saejax.models.families import unread_fields
from saejax.models.identity import cache_folder
from saejax.models.source import ModelSource
from saejax.models.tokens import pad
from saejax.parallel.collectives import to_host

_REVISION = 2  # raised when the decoder changes, so that models are compared again
_TOKENS, _SEED = 64, 789
# Largest error that rounding explains: of deep models, operands in bfloat16 make one of a few percent.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


def needs_check(model_source: ModelSource, dtype: str) -> bool:
    """Return whether a config has unknown fields and the model has not been compared with transformers yet."""
    return bool(_unread(model_source)) and not _record(model_source, dtype).is_file()


def check_parity(lm: Any, dtype: str) -> float:
    """Compare a model's logits with transformers', and record that they agree.

    Args:
      lm: a ``LanguageModel``.
      dtype: dtype of its weights, "float32" or "bfloat16", in which transformers runs too.

    Returns:
      The relative error: the root mean square of the differences over that of transformers' logits, both less their
      mean over the vocabulary.

    Raises:
      UserError: it exceeds ``TOLERANCE``, or transformers cannot load the model.
    """
    length = min(_TOKENS, lm.config.context)
    tokens = pad([np.random.default_rng(_SEED).integers(0, lm.config.vocab, length).tolist()])
    with jax.default_matmul_precision("highest"):
        ours_TxV = to_host(lm(tokens).logits_BxTxV[0]).astype(np.float64)
    model = source.load_torch_model(lm.source, dtype)
    theirs_TxV = source.torch_logits(model, tokens.ids_BxT, tokens.lengths_B)[0].astype(np.float64)
    # Freed now, not with the next collection: it is a second copy of the weights.
    del model
    gc.collect()
    error = relative_error(ours_TxV, theirs_TxV[:, : lm.config.vocab])
    unread = _unread(lm.source)
    if not error <= TOLERANCE[dtype]:
        fields = f"; its config.json has fields that saejax does not know: {', '.join(unread)}" if unread else ""
        raise UserError(
            f"{lm.source.name}: logits differ from those of transformers by {error:.2g} of their size on {length} "
            f"tokens, expected at most {TOLERANCE[dtype]:g}{fields}: run it in PyTorch (--model.backend=torch), or use "
            "another model"
        )
    record = _record(lm.source, dtype)
    with contextlib.suppress(OSError):  # where the cache cannot be written, the next load compares again
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, dict(error=error, fields=unread, transformers=version("transformers")))
    return error


def relative_error(ours_TxV: np.ndarray, theirs_TxV: np.ndarray) -> float:
    """Return the error of logits as ``check_parity`` describes it; infinite where a logit is not finite."""
    # Less their means: softmax ignores what all logits have in common, and so does every readout.
    ours, theirs = (logits - logits.mean(axis=-1, keepdims=True) for logits in (ours_TxV, theirs_TxV))
    error = np.sqrt(np.mean((ours - theirs) ** 2) / max(np.mean(theirs**2), np.finfo(np.float64).tiny))
    return float(error) if np.isfinite(error) else float("inf")


def _unread(model_source: ModelSource) -> list[str]:
    """Return the names of a config's fields that saejax does not know."""
    file = model_source.folder / "config.json"
    return unread_fields(read_json(file), str(file))


def _record(model_source: ModelSource, dtype: str) -> Path:
    """Return the file that says that a model was compared."""
    return cache_folder() / "parity" / f"{model_source.fingerprint}-{dtype}-{_REVISION}.json"
