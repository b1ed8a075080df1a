"""Parity of the decoder with transformers, on random tokens and on real text, at every site.

The relative error of a site is max |a - b| / max |b| over the real positions of all prompts, b being transformers'; of
logits, both less their mean over the vocabulary, which no probability depends on.

A ``config.json`` can hold fields that saejax does not know. Whether they change results is not looked up but measured,
when such a model is first loaded; ``--preflight.parity`` measures any model.
"""

import contextlib
import gc
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from saejax.errors import UserError
from saejax.files import read_json, write_json
from saejax.models import source
from saejax.models.families import unread_fields
from saejax.models.identity import cache_folder
from saejax.models.sinks import SAMPLE
from saejax.models.sites import KINDS, NEURONS, AnySite, Site
from saejax.models.source import ModelSource
from saejax.models.tokens import Tokens, pad
from saejax.parallel.collectives import to_host

LOGITS = "logits"
PROMPTS, LENGTH = 4, 64  # prompts of each kind, and most tokens of one
_REVISION = 3  # raised when the decoder changes, so that models are compared again
_SEED = 789
# Largest error that rounding explains: of deep models, operands in bfloat16 make one of a few percent.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


class Error(NamedTuple):
    """The largest relative error, infinite where either side is not finite, and its layer; -1 for the logits."""

    value: float
    layer: int


def needs_check(model_source: ModelSource, dtype: str) -> bool:
    """Return whether a config has unknown fields and the model has not been compared with transformers yet."""
    return bool(_unread(model_source)) and not _record(model_source, dtype).is_file()


def check_parity(lm: Any, dtype: str) -> float:
    """Compare a model with transformers, and record that they agree.

    Args:
      lm: a ``LanguageModel``.
      dtype: dtype of its weights, "float32" or "bfloat16", in which transformers runs too.

    Returns:
      The largest relative error of the logits.

    Raises:
      UserError: it exceeds ``TOLERANCE``, or transformers cannot load the model.
    """
    error = max(errors[LOGITS].value for errors in measure(lm, dtype).values())
    unread = _unread(lm.source)
    if not error <= TOLERANCE[dtype]:
        fields = f"; its config.json has fields that saejax does not know: {', '.join(unread)}" if unread else ""
        raise UserError(
            f"{lm.source.name}: logits differ from those of transformers by {error:.2g} of their size, expected at "
            f"most {TOLERANCE[dtype]:g}{fields}: run it in PyTorch (--model.backend=torch), or use another model"
        )
    record = _record(lm.source, dtype)
    with contextlib.suppress(OSError):  # where the cache cannot be written, the next load compares again
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, dict(error=error, fields=unread, transformers=version("transformers")))
    return error


def measure(lm: Any, dtype: str, texts: Sequence[str] = SAMPLE) -> dict[str, dict[str, Error]]:
    """Run a model both ways.

    Args:
      lm: a ``LanguageModel``.
      dtype: dtype of its weights, in which transformers runs too.
      texts: the real text, of which the beginnings of the first ``PROMPTS`` are read.

    Returns:
      For "random tokens" and, of a model with a tokenizer, "real text" the error of every kind of site and of the
      ``LOGITS``.
    """
    from saejax.models.torch_hooks import HookedModel  # imports torch

    longest = min(LENGTH, lm.config.context)
    prompts = {"random tokens": _random_tokens(lm, longest)}
    if lm.tokenizer:
        prompts["real text"] = pad([lm.encode(text[: 8 * longest])[:longest] for text in texts[:PROMPTS]])
    kinds = KINDS if lm.config.n_experts else (*KINDS, NEURONS)
    sites = [Site(kind, layer) for layer in range(lm.config.n_layers) for kind in kinds]
    with jax.default_matmul_precision("highest"):
        outputs = {name: lm(tokens, capture=sites) for name, tokens in prompts.items()}
    model = HookedModel(source.load_torch_model(lm.source, dtype))
    errors = {name: _compare(lm, outputs[name], model, tokens) for name, tokens in prompts.items()}
    # Freed now, not with the next collection: it is a second copy of the weights.
    del model
    gc.collect()
    return errors


def _random_tokens(lm: Any, longest: int) -> Tokens:
    """Return token ids drawn from the vocabulary, in prompts of different lengths, one of them a single token."""
    rng = np.random.default_rng(_SEED)
    lengths = [longest, *rng.integers(1, longest + 1, PROMPTS - 2), 1]
    return pad([rng.integers(0, lm.config.vocab, length).tolist() for length in lengths])


def _compare(lm: Any, output: Any, model: Any, tokens: Tokens) -> dict[str, Error]:
    """Return the largest error of every kind of site, and of the logits."""
    mask_BxT, errors = tokens.mask_BxT, dict[str, Error]()

    def look(site: AnySite, value: Any) -> Any:
        """Compare a site's value, and leave it unchanged."""
        assert isinstance(site, Site)
        error = relative_error(to_host(output.sites[str(site)])[mask_BxT], value.float().cpu().numpy()[mask_BxT])
        errors[site.kind] = max(errors.get(site.kind, Error(0.0, 0)), Error(error, site.layer))
        return value

    theirs = model.run(tokens.ids_BxT, mask_BxT, [Site.parse(site) for site in output.sites], look).logits
    theirs_NxV = theirs.float().cpu().numpy()[mask_BxT][:, : lm.config.vocab]
    ours_NxV = to_host(output.logits_BxTxV)[mask_BxT]
    centred = (logits - logits.mean(axis=-1, keepdims=True) for logits in (ours_NxV, theirs_NxV))
    return errors | {LOGITS: Error(relative_error(*centred), -1)}


def relative_error(ours_NxD: np.ndarray, theirs_NxD: np.ndarray) -> float:
    """Return the largest difference over the largest number of ``theirs``; infinite where a number is not finite.

    Args:
      ours_NxD: values of the JAX decoder.
      theirs_NxD: the same values of transformers.
    """
    ours, theirs = (values.astype(np.float64) for values in (ours_NxD, theirs_NxD))
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("inf")
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), np.finfo(np.float64).tiny))


def _unread(model_source: ModelSource) -> list[str]:
    """Return the names of a config's fields that saejax does not know."""
    file = model_source.folder / "config.json"
    return unread_fields(read_json(file), str(file))


def _record(model_source: ModelSource, dtype: str) -> Path:
    """Return the file that says that a model was compared."""
    return cache_folder() / "parity" / f"{model_source.fingerprint}-{dtype}-{_REVISION}.json"
