"""A tiny model whose features are edited, here and by hooks in transformers in fp64."""

import numpy as np
from plain_edits import PlainModel, make_dictionary
from tiny_models import save_tiny, save_tiny_tokenizer

from saejax import load_model
from saejax.models import source
from saejax.models.tokens import pad

FEATURES = [3, 17, 40]
SITE = "resid_post.1"


class EditedModel:
    """A tiny model of a family, here and in PyTorch, three prompts and a dictionary."""

    def __init__(self, family, folder, mesh):
        save_tiny(folder, family, vocab_size=257)
        save_tiny_tokenizer(folder, 257)
        self.lm = load_model(str(folder), mesh=mesh)
        self.plain = PlainModel(source.load_torch_model(self.lm.source, "float32"))
        rng = np.random.default_rng(7)
        self.prompts = [rng.integers(1, 257, n).tolist() for n in (5, 13, 9)]
        self.tokens = pad(self.prompts)
        self.sae = make_dictionary(self.lm, self.tokens, SITE)
        self.clean = self.lm(self.tokens, capture=[SITE])
        self.given_BxTxK = rng.uniform(0, 3, (3, 13, 3)).astype(np.float32)

    def check(self, edits, plain):
        """Logits with edits equal those with plain(b)'s edits; errors relative to the largest logit."""
        found = np.asarray(self.lm(self.tokens, edits=edits).logits_BxTxV)
        for b, ids in enumerate(self.prompts):
            expected = self.plain.logits(ids, *plain(b))
            assert np.abs(found[b, : len(ids)] - expected).max() < 1e-4 * np.abs(expected).max()
        change = np.abs(found - np.asarray(self.clean.logits_BxTxV))[self.tokens.mask_BxT].max()
        assert change > 0.01 * np.abs(expected).max()
