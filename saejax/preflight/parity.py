"""Parity of the decoder with transformers, on random tokens and on real text, at every site.

The relative error of a site is max |a - b| / max |b| over the real positions of all prompts, b being transformers'.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from saejax.activations.plan import Batch, CapturedValues
from saejax.config import Configs
from saejax.models import source
from saejax.models.language_model import LanguageModel
from saejax.models.loading import load_model
from saejax.models.settings import ModelConfig
from saejax.models.sites import KINDS, Site
from saejax.models.tokens import Tokens, pad
from saejax.tasks.corpora import documents
from saejax.tasks.settings import CorpusConfig, TaskConfig

LOGITS = "logits"
_PROMPTS, _LENGTH = 4, 64  # prompts of each kind, and most tokens of one
_SEED = 789


class Error(NamedTuple):
    """The largest relative error, infinite where either side is not finite, and its layer; -1 for the logits."""

    value: float
    layer: int


def measure(configs: Configs, model: ModelConfig, mesh: Mesh) -> dict[str, dict[str, Error]]:
    """Run a model both ways, in the dtype of its settings.

    Args:
      configs: the groups of configuration; the corpus gives the real text.
      model: settings that name the model.
      mesh: the devices of the decoder.

    Returns:
      For "random tokens" and "real text", the error of every kind of site, in the order of the forward pass, and of the
      ``LOGITS``.
    """
    lm = load_model(model.path, model.revision, model.dtype, mesh, check=False)
    prompts = {"random tokens": _random(lm), "real text": _real(lm, configs)}
    ours = {name: _decoder(lm, tokens) for name, tokens in prompts.items()}
    torch_model = source.load_torch_model(lm.source, model.dtype)
    logits = {
        name: source.torch_logits(torch_model, tokens.ids_BxT, tokens.lengths_B) for name, tokens in prompts.items()
    }
    expected = _transformers(torch_model, list(ours["real text"][1]), list(prompts.values()))
    return {
        name: _errors(tokens, (logits[name], sites), ours[name])
        for (name, tokens), sites in zip(prompts.items(), expected, strict=True)
    }


def _random(lm: LanguageModel) -> Tokens:
    """Token ids drawn from the vocabulary, in prompts of different lengths, one of them a single token."""
    rng = np.random.default_rng(_SEED)
    longest = min(_LENGTH, lm.config.context)
    lengths = [longest, *rng.integers(1, longest + 1, _PROMPTS - 2), 1]
    return pad([rng.integers(0, lm.config.vocab, length).tolist() for length in lengths])


def _real(lm: LanguageModel, configs: Configs) -> Tokens:
    """Return the beginnings of the corpus's first documents."""
    longest = min(_LENGTH, lm.config.context)
    first = itertools.islice(documents(configs[CorpusConfig], configs[TaskConfig]), _PROMPTS)
    texts = [document.text[: 8 * longest] for document in first]
    return pad([lm.encode(text)[:longest] for text in texts])


def _decoder(lm: LanguageModel, tokens: Tokens) -> tuple[np.ndarray, dict[Site, np.ndarray]]:
    sites = [Site(kind, layer) for layer in range(lm.config.n_layers) for kind in KINDS]
    with jax.default_matmul_precision("highest"):
        output = lm(tokens, capture=sites)
    return np.asarray(output.logits_BxTxV), {site: np.asarray(output.sites[str(site)]) for site in sites}


def _transformers(model: Any, sites: Sequence[Site], prompts: Sequence[Tokens]) -> list[dict[Site, np.ndarray]]:
    """Return the same sites by hooks in the transformers model, for each batch of prompts."""
    from saejax.activations.torch_capture import SiteReader  # imports torch

    values: list[dict[Site, np.ndarray]] = [{} for _ in prompts]

    def take(batch: Batch, site: Any, value: CapturedValues) -> None:
        (values[batch.documents_B[0]][site],) = value.pieces

    batches = []
    for number, tokens in enumerate(prompts):
        count = len(tokens.lengths_B)
        rows_B = tuple(np.arange(length) for length in tokens.lengths_B)
        documents_B, first_B = np.full(count, number), np.zeros(count, np.int32)
        where = documents_B, first_B, tokens.lengths_B, rows_B, np.ones(count, bool)
        batches.append(Batch(tokens.ids_BxT, *where, tokens.ids_BxT.shape))
    SiteReader(model, sites).read(batches, take)
    return values


def _errors(
    tokens: Tokens,
    expected_values: tuple[np.ndarray, dict[Site, np.ndarray]],
    decoder_values: tuple[np.ndarray, dict[Site, np.ndarray]],
) -> dict[str, Error]:
    """Return the largest error of every kind."""
    mask_BxT = tokens.mask_BxT

    def error(actual_BxTxD: np.ndarray, expected_BxTxD: np.ndarray) -> float:
        actual, expected = (value[mask_BxT].astype(np.float64) for value in (actual_BxTxD, expected_BxTxD))
        if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
            return float("inf")
        return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), np.finfo(np.float64).tiny))

    errors: dict[str, list[Error]] = {kind: [] for kind in KINDS}
    for site, values_BxTxD in decoder_values[1].items():
        errors[site.kind].append(Error(error(values_BxTxD, expected_values[1][site]), site.layer))
    worst = {kind: max(of_kind) for kind, of_kind in errors.items()}
    return worst | {LOGITS: Error(error(decoder_values[0], expected_values[0]), -1)}
