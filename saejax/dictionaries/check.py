"""A measurement that a dictionary was read correctly: L0 and explained variance on 64 tokens of text."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging

from saejax.dictionaries import joined, losses
from saejax.dictionaries.bos import follow_bos
from saejax.dictionaries.modules import Dictionary
from saejax.errors import UserError
from saejax.models.sites import is_joined, site_parts
from saejax.models.tokens import pad
from saejax.short_reprs import has_short_repr

TOKENS = 64
_TEXT = (
    "The harbour was quiet when the first boats came back in the morning. Two of the crew had stayed on the pier to "
    "mend the nets, and the others carried the boxes of fish up the steps to the market, where people were already "
    "waiting. In 1987 the town had about four thousand inhabitants, most of whom worked in the cannery or on the ferry "
    "to the island; today many of them rent rooms to visitors, and the old school has become a small museum."
)


@has_short_repr
@dataclasses.dataclass(frozen=True)
class DictionaryCheck:
    """Measurements of a dictionary on a sample of text."""

    l0: float  #: mean number of active features of a token
    #: 1 - squared error / variance of its target, summed over tokens and dimensions.
    explained_variance: float
    tokens: int  #: number of tokens measured; attention sinks are left out


def check_dictionary(lm: Any, dictionary: Dictionary) -> DictionaryCheck:
    """Measure a dictionary on a sample of text, and log one line; below 0 explained variance it is a warning.

    A dictionary that explains less than nothing reads another site or model than it was trained on, or its settings
    were not followed: nothing that is found with it means anything. The text begins with BOS as the texts of the
    training did.

    Args:
      lm: the language model.
      dictionary: a dictionary of a site of this model.

    Raises:
      UserError: it reads what this model has not, or is of another width.
    """
    config = dictionary.config
    read, written = site_parts(config.site), site_parts(config.target or config.site)
    lm = follow_bos(lm, [config], logging.debug)
    tokens = pad([lm.encode(_TEXT)[: min(TOKENS, lm.config.context)]])
    try:
        sites = lm(tokens, capture=list(dict.fromkeys((*read, *written))), logits=False).sites
    except UserError as error:
        raise UserError(f"a dictionary of {config.site} cannot be measured: {error}") from None
    x_TxD, y_TxO = (
        joined.join(config, sites)[0] if is_joined(site) else jnp.asarray(sites[site][0], jnp.float32)
        for site in (config.site, config.target or config.site)
    )
    for verb, site, width, values in (
        ("reads", config.site, config.d_in, x_TxD),
        ("writes", config.target or config.site, config.d_out, y_TxO),
    ):
        if values.shape[-1] != width:
            raise UserError(f"the dictionary {verb} {width} dimensions, but {site} has {values.shape[-1]}")
    dictionary = dictionary.with_sink_norms(lm.sink_norm)
    f_TxF = dictionary.encode(x_TxD)
    # In fp64: both sums are over thousands of squares of very different sizes.
    error_TxO = np.asarray(y_TxO - dictionary.decode(f_TxF, x_TxD), np.float64)
    kept_T = np.asarray(dictionary.is_not_sink(x_TxD, y_TxO))
    target_NxO = np.asarray(y_TxO, np.float64)[kept_T]
    sizes = (error_TxO[kept_T], target_NxO - target_NxO.mean(0), target_NxO) if kept_T.any() else (np.zeros(0),) * 3
    squared_error, variance, square = (float(np.square(array).sum()) for array in sizes)
    explained = losses.explained_share(squared_error, variance, square, constant=np.nan)
    active_NxF = np.asarray(dictionary.fires(f_TxF))[kept_T]
    check = DictionaryCheck(
        float(active_NxF.sum(1).mean()) if kept_T.any() else 0.0, float(explained), int(kept_T.sum())
    )
    line = (
        f"{config.kind} dictionary of {config.site}: L0 {check.l0:.1f}, explained variance "
        f"{check.explained_variance:.3f} on {check.tokens} tokens"
    )
    if not check.explained_variance >= 0:  # or not a number
        logging.warning("%s: it was trained on another site or model, or with other settings than were read", line)
    else:
        logging.info("%s", line)
    return check
