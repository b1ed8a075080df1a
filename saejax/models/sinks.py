"""The attention-sink rule: positions with an extreme norm, which dictionaries are neither trained nor scored on.

Language models put activations of a hundred times the usual norm at a few positions, mostly the first (Xiao et al.,
2023, Efficient streaming language models with attention sinks; Sun et al., 2024, Massive activations). A dictionary's
features mean nothing there, and an edit there changes the whole prompt. So a position is a *sink* at a site where its
norm exceeds ``SINK_FACTOR`` times the median norm of the site. The rule belongs to the model and the site: a store of
activations has the median of its training rows; without one it is estimated here, from a few sentences.
"""

import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saejax.errors import UserError
from saejax.models.sites import KINDS, Site
from saejax.models.tokens import Tokens, tokenize
from saejax.parallel.collectives import to_host

SINK_FACTOR = 10.0
NO_SINKS = 3.4e38  # the rule for a model that is known to have none: no norm exceeds it

# Prose, code, numbers and another language, so that the median is the median of usual text. Only its order of magnitude
# matters: sinks are some hundred times the median, other positions at most a few times.
SAMPLE = (
    "The river rises in the hills north of the old town and runs for forty miles through farms and woodland before it "
    "reaches the sea. In spring, when the snow melts, its lower meadows are under water for weeks.",
    "Photosynthesis turns light into chemical energy. Chlorophyll absorbs mostly blue and red light; the energy splits "
    "water, and the hydrogen is used to build sugars from carbon dioxide.",
    '"You are late," she said, and put the kettle on again. He hung his wet coat over the chair, looked at the letter '
    "on the table, and did not ask who had sent it.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total / "
    "len(values)\n\nprint(mean([1, 2, 3, 4]))\n",
    "Question: A train leaves at 9:15 and arrives at 11:40. How long does the journey take? Answer: From 9:15 to "
    "11:15 are 2 hours, and 25 more minutes make 11:40, so it takes 2 hours and 25 minutes.",
    "Le marché ouvre à sept heures du matin. On y trouve des légumes, du fromage et du poisson, et le samedi un "
    "libraire vend de vieux livres devant la mairie.",
    "Table 2. Population of five cities (thousands): Lyon 522, Porto 232, Ghent 263, Turin 848, Graz 291. Figures are "
    "for 2020; suburbs are not included.",
    "The committee met on Tuesday to discuss the budget for the coming year. Members agreed to spend less on travel "
    "and to ask the council for a new roof before the winter.",
)

_medians: weakref.WeakKeyDictionary[Any, dict[str, float]] = weakref.WeakKeyDictionary()


def position_norms(x_xD: jax.Array) -> jax.Array:
    """Return the Euclidean norm of the vector at each position in fp32, by which attention sinks are told."""
    return jnp.linalg.norm(x_xD.astype(jnp.float32), axis=-1)


def sink_norm(lm: Any, site: str, factor: float = SINK_FACTOR) -> float:
    """Estimate the norm at a site above which a position is an attention sink.

    Computed once for each model and kind of site: for all layers in one pass, which costs little more than for one.

    Args:
      lm: a ``LanguageModel``, or another model with a tokenizer and ``lm(tokens, capture=[...], logits=False)``.
      site: such as "resid_post.15".
      factor: times the median norm over the tokens of ``SAMPLE``.

    Raises:
      UserError: the site does not exist, its values are not finite, or the model has no tokenizer.
    """
    medians = _medians.setdefault(lm, {})
    if site not in medians:
        medians.update(_median_norms(lm, site))
    # Rounded to float32, in which norms are compared with it.
    return float(np.float32(factor * medians[site]))


def _median_norms(lm: Any, site: str) -> dict[str, float]:
    """Return the median norm over the sample, by site, of a site and of the same kind of site in all layers."""
    sites = [site]
    if site.partition(".")[0] in KINDS:
        parsed = Site.parse(site).check(lm.config)
        sites = [str(Site(parsed.kind, layer)) for layer in range(lm.config.n_layers)]
    if lm.tokenizer is None:
        raise UserError(
            f"the norm that marks attention sinks at {site} is measured on a few sentences, and this model has no "
            "tokenizer: give the dictionary a rule, as in dictionary.with_sink_norms(lambda site: 100.0)"
        )
    # Cut to the model's context below, where the check of the tokenizer would refuse the text.
    tokens = tokenize(lm.tokenizer, SAMPLE, context=1 << 20)
    length = min(tokens.ids_BxT.shape[1], lm.config.context)
    tokens = Tokens(tokens.ids_BxT[:, :length], np.minimum(tokens.lengths_B, length).astype(np.int32))
    medians = {}
    for name, value_BxTxD in lm(tokens, capture=sites, logits=False).sites.items():
        norm_N = np.linalg.norm(to_host(value_BxTxD).astype(np.float32), axis=-1)[tokens.mask_BxT]
        medians[name] = float(np.median(norm_N))
        if not np.isfinite(medians[name]):
            raise UserError(f"activations at {name} are NaN or infinite: check the model's weights, or use float32")
        if not medians[name]:
            raise UserError(
                f"activations at {name} are 0 on most of a sample of text, so that no norm marks attention sinks: "
                "give the dictionary a max_norm, such as that of a store"
            )
    return medians
