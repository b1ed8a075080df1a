"""A tiny model, prompts, dictionaries at its sites, and a plain fp64 implementation in PyTorch to compare with."""

import contextlib
import dataclasses
import functools

import jax
import numpy as np
import pytest

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.tasks.behaviours import Prompt

N_FEATURES = 160
_SUBJECTS = ("cat", "dogs", "water", "year", "war", "capital", "way", "she", "France", "3 + 4", "Paris")


@pytest.fixture(scope="session")
def tiny(lm):
    """The tiny Llama in fp32 on one device."""
    return lm


@pytest.fixture(scope="session")
def tiny_torch(tiny):
    """The same weights in PyTorch, fp64."""
    from saejax.models import source

    return source.load_torch_model(tiny.source, "float32").double()


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """22 prompts of 6 to 30 tokens: 14 train, 8 test."""
    return [_prompt(i, "train" if i < 14 else "test") for i in range(22)]


@pytest.fixture(scope="session")
def make_prompt():
    """make_prompt(i, split, behaviour, varied): the i-th prompt."""
    return _prompt


def _prompt(i: int, split: str, behaviour: str = "tiny", varied: bool = True) -> Prompt:
    """Return a prompt of 5 to 25 tokens; of 11, if they are not varied: each length compiles programs of its own."""
    subjects = _SUBJECTS if varied else [text for text in _SUBJECTS if " " not in text]
    first, second = subjects[i % len(subjects)], subjects[(3 * i + 1 + (not varied) * (i // 10)) % len(subjects)]
    text = f"The {first} near the {second}" + " and so on" * (i % 4 if varied else 1)
    return Prompt(
        behaviour=behaviour,
        split=split,
        text=text,
        correct=" runs" if i % 2 else " the",
        wrong=" far" if i % 3 else " way",
        counterpart=text,
        counterpart_correct=" run",
        items=(first,),
    )


@pytest.fixture(scope="session")
def make_dictionary(tiny, prompts):
    """make_dictionary(site, dead=0, seed=11): random directions, a tenth of tokens fires each, some positions sinks."""

    def make(site: str, dead: int = 0, seed: int = 11) -> Dictionary:
        rng = np.random.default_rng(seed)
        tokens = tiny.tokenize([prompt.text for prompt in prompts])
        x_NxD = np.asarray(tiny(tokens, capture=[site], logits=False).sites[site])[tokens.mask_BxT]
        W_dec_FxD = rng.normal(size=(N_FEATURES, x_NxD.shape[1]))
        W_dec_FxD /= np.linalg.norm(W_dec_FxD, axis=1, keepdims=True)
        W_enc_DxF = (W_dec_FxD + 0.02 * rng.normal(size=W_dec_FxD.shape)).T
        b_dec_D = x_NxD.mean(axis=0)
        share_F = rng.uniform(0.02, 0.3, N_FEATURES)
        pre_NxF = (x_NxD - b_dec_D[None, :]) @ W_enc_DxF
        b_enc_F = -np.array([np.quantile(pre_F, 1 - share) for pre_F, share in zip(pre_NxF.T, share_F, strict=True)])
        b_enc_F[N_FEATURES - dead :] = -1e4
        norms_N = np.unique(np.linalg.norm(x_NxD, axis=1).round(4))
        limit = int(0.9 * len(norms_N))
        limit += int(np.argmax(np.diff(norms_N[limit : limit + 8])))  # in a gap, so that rounding decides nothing
        config = DictionaryConfig(
            kind="standard",
            site=site,
            d_in=x_NxD.shape[1],
            n_features=N_FEATURES,
            max_norm=float(norms_N[limit : limit + 2].mean()),
            model=tiny.source.name,
            fingerprint=tiny.source.fingerprint,
        )
        arrays = dict(W_enc_DxF=W_enc_DxF, b_enc_F=b_enc_F, W_dec_FxD=W_dec_FxD, b_dec_D=b_dec_D)
        return Dictionary(config, **{name: jax.numpy.asarray(a, np.float32) for name, a in arrays.items()})

    return make


@dataclasses.dataclass(frozen=True)
class PlainRun:
    """One prompt, the plain way: a hook in the HF model, all of it run, in fp64 (its norms in fp32)."""

    model: object
    dictionary: Dictionary
    ids_T: list[int]
    correct: int
    wrong: int

    def _module_and_side(self):
        kind, _, layer = self.dictionary.site.partition(".")
        block = self.model.model.layers[int(layer)]
        return {
            "resid_pre": (block, "in"),
            "resid_post": (block, "out"),
            "mlp_in": (block.mlp, "in"),
            "mlp_out": (block.mlp, "out"),
            "attn_out": (block.self_attn, "out"),
            "resid_mid": (block.post_attention_layernorm, "in"),
        }[kind]

    def features(self, x_TxD):
        """f_TxF in fp64; 0 at sinks."""
        arrays = (np.asarray(getattr(self.dictionary, n)[...], np.float64) for n in ("W_enc_DxF", "b_enc_F", "b_dec_D"))
        W_enc_DxF, b_enc_F, b_dec_D = arrays
        f_TxF = np.maximum((x_TxD - b_dec_D[None, :]) @ W_enc_DxF + b_enc_F[None, :], 0.0)
        return f_TxF * (np.linalg.norm(x_TxD, axis=1) <= self.dictionary.config.max_norm)[:, None]

    def run(self, change):
        """The logit difference when the site's value x_1xTxD becomes change(x_1xTxD), torch tensors."""
        import torch

        module, side = self._module_and_side()

        def swap(value):
            return (change(value[0]), *value[1:]) if isinstance(value, tuple) else change(value)

        if side == "out":
            hook = module.register_forward_hook(lambda module, inputs, output: swap(output))
        else:
            hook = module.register_forward_pre_hook(lambda module, inputs: swap(inputs))
        try:
            logits_V = self.model(torch.tensor([self.ids_T])).logits[0, -1]
        finally:
            hook.remove()
        return logits_V[self.correct] - logits_V[self.wrong]

    def ablated(self, features) -> float:
        """The logit difference without these features."""
        import torch

        def change(x_1xTxD):
            f_TxF = self.features(x_1xTxD[0].numpy())
            W_dec_FxD = np.asarray(self.dictionary.W_dec_FxD[...], np.float64)
            removed_TxD = f_TxF[:, features] @ W_dec_FxD[features]
            return x_1xTxD - torch.from_numpy(removed_TxD)[None]

        with torch.no_grad():
            return float(self.run(change))

    def clean(self):
        """The site's value x_TxD without an edit."""
        import torch

        kept = []
        with torch.no_grad():
            self.run(lambda x_1xTxD: kept.append(x_1xTxD) or x_1xTxD)
        return kept[0][0].numpy()

    def attribution(self, counterpart=None):
        """Activation x gradient of every feature, [F].

        With a counterpart, another PlainRun of as many tokens, its activations stand in their place.
        """
        W_dec_FxD = np.asarray(self.dictionary.W_dec_FxD[...], np.float64)
        x_TxD = self.clean()
        f_TxF = self.features(x_TxD)
        if counterpart is not None:
            in_domain_T = np.linalg.norm(x_TxD, axis=1) <= self.dictionary.config.max_norm
            f_TxF = (f_TxF - counterpart.features(counterpart.clean())) * in_domain_T[:, None]
        return (f_TxF * (self.slopes() @ W_dec_FxD.T)).sum(axis=0)

    def slopes(self):
        """The gradient of the logit difference with respect to the site's value, [T, D]."""
        kept = []

        def change(x_1xTxD):
            kept.append(x_1xTxD.detach().requires_grad_())
            return kept[0]

        self.run(change).backward()
        return kept[0].grad[0].numpy()

    @contextlib.contextmanager
    def relevance_rules(self):
        """Has the model's backward pass go by the rules of relevance patching."""
        from torch.nn import functional

        def norm(module, x):
            return module.weight * x * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt().detach()

        def mlp(module, x):
            gate, up = module.gate_proj(x), module.up_proj(x)
            a = gate * functional.sigmoid(gate).detach()  # SiLU
            return module.down_proj((a * up.detach() + a.detach() * up) / 2)

        rules = dict(LlamaRMSNorm=norm, LlamaMLP=mlp)
        ruled = [module for module in self.model.modules() if type(module).__name__ in rules]
        attention = [layer.self_attn for layer in self.model.model.layers]
        hooks = [
            projection.register_forward_hook(lambda module, inputs, output: output.detach())
            for module in attention
            for projection in (module.q_proj, module.k_proj)  # the weights of attention depend on nothing else
        ]
        for module in ruled:
            module.forward = functools.partial(rules[type(module).__name__], module)
        yield
        for module in ruled:
            del module.forward
        for hook in hooks:
            hook.remove()


@pytest.fixture
def plain(tiny, tiny_torch):
    """plain(dictionary, prompt) -> PlainRun."""

    def make(dictionary: Dictionary, prompt: Prompt) -> PlainRun:
        ids_T = tiny.tokenize([prompt.text]).ids_BxT[0].tolist()
        return PlainRun(tiny_torch, dictionary, ids_T, tiny.token_id(prompt.correct), tiny.token_id(prompt.wrong))

    return make
