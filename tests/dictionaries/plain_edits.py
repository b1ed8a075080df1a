"""Edits done the plain way: hooks in a transformers model in fp64, one prompt and one position after the other."""

import contextlib
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import torch
from torch_sites import MODULES

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.models import source
from saejax.models.tokens import pad

N_FEATURES = 60
FEATURES, SITE = [3, 17, 40], "resid_post.1"


def make_dictionary(lm, tokens, site: str, target: str = "", skip: bool = False) -> Dictionary:
    """A random ReLU dictionary whose features fire on 10 to 40 % of the tokens, about 15 % of which are sinks."""
    rng = np.random.default_rng(5)
    x_NxD = np.asarray(lm(tokens, capture=[site], logits=False).sites[site], np.float64)[tokens.mask_BxT]
    width = x_NxD.shape[1]
    arrays = dict(W_dec_FxD=rng.normal(size=(N_FEATURES, width)), b_dec_D=x_NxD.mean(axis=0))
    arrays["W_dec_FxD"] *= rng.uniform(0.7, 1.4, (N_FEATURES, 1)) / width**0.5
    arrays["W_enc_DxF"] = arrays["W_dec_FxD"].T + 0.02 * rng.normal(size=(width, N_FEATURES))
    pre_NxF = (x_NxD - (0 if target else arrays["b_dec_D"][None])) @ arrays["W_enc_DxF"]
    arrays["b_enc_F"] = -np.array([np.quantile(pre_F, rng.uniform(0.6, 0.9)) for pre_F in pre_NxF.T])
    if skip:
        arrays["W_skip_DxD"] = 0.1 * rng.normal(size=(width, width))
    norms_N = np.sort(np.linalg.norm(x_NxD, axis=1))
    limit = int(0.85 * len(norms_N))
    config = DictionaryConfig(
        kind="standard", site=site, target=target, d_in=width, n_features=N_FEATURES, centred=not target, skip=skip,
        max_norm=float(norms_N[limit - 1 : limit + 1].mean()),
    )  # fmt: skip
    return Dictionary(config, **{name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()})


class PlainDictionary:
    """Its formulas for one position, x_D, in fp64."""

    def __init__(self, dictionary: Dictionary):
        self.config = dictionary.config
        self.w = {name: np.asarray(array, np.float64) for name, array in dictionary.arrays.items()}

    def encode(self, x_D):
        centred_D = x_D - self.w["b_dec_D"] if self.config.centred else x_D
        return np.maximum(centred_D @ self.w["W_enc_DxF"] + self.w["b_enc_F"], 0)

    def decode(self, f_F, x_D):
        y_D = f_F @ self.w["W_dec_FxD"] + self.w["b_dec_D"]
        return y_D + x_D @ self.w["W_skip_DxD"] if self.config.skip else y_D

    def edited(self, x_TxD, y_TxD, features, new: Callable, positions="all", error="keep", prompt=None, before=None):
        """y with features changed: ``new(k, t, f)`` is the activation in place of f of the k-th feature at t.

        Sinks are told by x, or where x was edited by its value ``before`` that.
        """
        out_TxD = y_TxD.copy()
        for t, x_D in enumerate(x_TxD):
            sink = np.linalg.norm((x_TxD if before is None else before)[t]) > self.config.max_norm
            if sink or not wanted(t, positions, len(x_TxD) if prompt is None else prompt):
                continue
            f_F, g_F, changed = self.encode(x_D), self.encode(x_D), False
            for k, i in enumerate(features):
                if positions != "fires" or f_F[i] > 0:
                    g_F[i], changed = new(k, t, f_F[i]), True
            if changed and error == "keep":
                out_TxD[t] = y_TxD[t] + (g_F - f_F) @ self.w["W_dec_FxD"]
            elif changed:
                out_TxD[t] = self.decode(g_F, x_D)
        return out_TxD


def wanted(t: int, positions, prompt: int) -> bool:
    """Whether an edit acts at position t of a text whose prompt has so many tokens."""
    if isinstance(positions, tuple):
        return positions[0] <= t and (positions[1] is None or t < positions[1])
    return t >= prompt - 1 if positions == "last" else True


class PlainModel:
    """A transformers model in fp64 with a function put on sites."""

    def __init__(self, model):
        self.model = model.double().eval()
        self.where = MODULES[model.config.model_type]

    @contextlib.contextmanager
    def _hooked(self, site: str, call: Callable):
        kind, layer = site.split(".")
        block = self.model.get_submodule(self.where.layers)[int(layer)]
        reads = {"resid_pre": "", "mlp_in": self.where.mlp}
        gives = {"attn_out": self.where.attn_out, "mlp_out": self.where.mlp_out, "resid_post": ""}

        def swap(value):
            if isinstance(value, tuple):
                return swap(value[0]), *value[1:]
            return torch.as_tensor(call(value[0].numpy()))[None]

        module = block.get_submodule(reads[kind] if kind in reads else gives[kind])
        if kind in reads:
            handle = module.register_forward_pre_hook(lambda module, inputs: swap(inputs))
        else:
            handle = module.register_forward_hook(lambda module, inputs, output: swap(output))
        try:
            yield
        finally:
            handle.remove()

    def logits(self, ids_T, *edits: tuple[str, Callable]) -> np.ndarray:
        """Logits [T, V]; each edit is a site and what makes its new value [T, D] of the old, in their order."""
        with contextlib.ExitStack() as stack, torch.no_grad():
            for site, call in edits:
                stack.enter_context(self._hooked(site, call))
            return self.model(torch.as_tensor([list(ids_T)])).logits[0].numpy()

    def value(self, ids_T, site: str) -> np.ndarray:
        """The value [T, D] at a site."""
        kept = []
        self.logits(ids_T, (site, lambda value: kept.append(value) or value))
        return kept[0]


class EditedModel:
    """A model, here and in PyTorch, three prompts and a dictionary."""

    def __init__(self, lm):
        self.lm = lm
        self.plain = PlainModel(source.load_torch_model(lm.source, "float32"))
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
