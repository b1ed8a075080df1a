"""Tokens that features raise and lower, as a Jacobian lens reads what they write to the stream."""

import dataclasses

import numpy as np
from made_transcoders import made_set

from saejax.attribution.local.dictionaries import LayerTranscoders, open_saes
from saejax.dictionaries import Dictionary
from saejax.interpret import neighbours
from saejax.models.tokens import token_text


def test_tokens_through_a_jacobian_lens(lm):
    """What is written to each layer goes through that layer's Jacobian, then through final norm and unembedding."""
    rng, width = np.random.default_rng(1), lm.config.d_model
    jacobians = {layer: rng.normal(size=(width, width)).astype(np.float32) for layer in (0, 1)}
    features = [(1, 3), (0, 5), (3, 2), (1, 0)]

    def expected(parts):
        """The tokens at either end, of a sum of directions and the layers that they are written to."""
        arriving_D = sum(jacobians[layer] @ row_D if layer in jacobians else row_D for layer, row_D in parts)
        ids = neighbours.output_tokens(lm, np.asarray(arriving_D, np.float32)[None], 3).ids[0]
        texts = list(map(token_text(lm.tokenizer), ids.tolist()))
        return tuple(texts[:3]), tuple(reversed(texts[3:]))

    made = made_set(lm)
    found = neighbours.tokens_through_lens(lm, LayerTranscoders.of(made), features, jacobians, 3)
    rows = {(layer, index): np.asarray(made[layer].W_dec_FxD[...])[index] for layer, index in features}
    assert found == {(layer, index): expected([(layer, row)]) for (layer, index), row in rows.items()}
    plain = neighbours.tokens_through_lens(lm, LayerTranscoders.of(made), features, {}, 3)
    assert {feature for feature in features if plain[feature] != found[feature]} == {(1, 3), (0, 5), (1, 0)}
    # Across layers what arrives is added up; SAEs of a stream that enters a layer write to the one leaving that below.
    write_LxFxLxD = rng.normal(size=(4, 48, 4, width)).astype(np.float32)
    writes = lambda layer, feature_U: write_LxFxLxD[layer, feature_U, layer:]  # noqa: E731
    across = LayerTranscoders("", [each.config for each in made], made.__getitem__, writes=writes)
    (ends,) = neighbours.tokens_through_lens(lm, across, [(0, 7)], jacobians, 3).values()
    assert ends == expected(enumerate(write_LxFxLxD[0, 7]))
    for site, layer in (("resid_pre.1", 0), ("resid_post.1", 1), ("mlp_in.1", None)):
        sae = Dictionary(dataclasses.replace(made[1].config, site=site, target=""), **made[1].arrays)
        found = neighbours.tokens_through_lens(lm, open_saes(sae), [(1, 3)], jacobians, 3)
        assert found == ({} if layer is None else {(1, 3): expected([(layer, rows[1, 3])])})
