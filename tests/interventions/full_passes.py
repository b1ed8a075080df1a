"""Prompts under edits by full forward passes in PyTorch, fp64, and sets of features ablated by the engine."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from saejax.dictionaries import Dictionary
from saejax.interventions import engine
from saejax.interventions.edits import ZERO, ActivationReplacement, mask
from saejax.interventions.rows import EditedRun, gather
from saejax.interventions.slopes import attribution
from saejax.interventions.split_model import CleanRun, SplitModel
from saejax.tasks.behaviours import Prompt


@dataclasses.dataclass(frozen=True)
class Ablated:
    """Logit differences without an edit and with each of S edits."""

    clean_P: np.ndarray
    ablated_SxP: np.ndarray
    rows: int  # pairs of an edit and a prompt that were run, the clean ones counted once

    @property
    def drop_SxP(self) -> np.ndarray:
        return self.clean_P - self.ablated_SxP


def ablate_sets(
    split: SplitModel,
    runs: Sequence,
    sets: Sequence[Sequence[int]],
    batch_rows: int = engine.BATCH_ROWS,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    source: ActivationReplacement = ZERO,
) -> Ablated:
    """Ablate each set of features on the prompts of clean runs; options as those of ``run_edits``."""
    seen, batches_of = [], engine.batches_of

    def count_rows(first_SxP, *rest):
        batches = batches_of(first_SxP, *rest)
        seen.extend(len(shard.set_N) for batch in batches for shard in batch.shards)  # clean rows, too
        return batches

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "batches_of", count_rows)
        edits = mask(split.dictionary, sets, replacement=source)
        clean_P, *edited = engine.run_edits(split, runs, edits, batch_rows, on_progress)["logit_diff"]
    return Ablated(clean_P, np.array(edited), sum(seen))


def attribution_of_each(split: SplitModel, prompts: Sequence[Prompt], **options: Any) -> np.ndarray:
    """Return the attribution of every feature on each prompt alone, [P, F]; options as those of ``attribution``."""
    counterparts = options.get("source", ZERO).kind == "counterpart"
    length = split.common_length(prompts)  # so that they share programs
    runs_of = [split.run([prompt], counterparts, length) for prompt in prompts]
    return np.stack([attribution(split, runs, **options) for runs in runs_of])


def draw_falls(split: SplitModel, run: CleanRun, source: ActivationReplacement, features_K: np.ndarray) -> np.ndarray:
    """Return by how much activations of a clean run's prompts fall when they are replaced by draws, [P, T, K]."""
    edited = EditedRun(run, source)
    fall_BxTxK, _ = gather(split.point, split.dictionary, *edited.arrays, features_K, len(run.index_P))
    return np.asarray(fall_BxTxK, np.float64)[: len(run.index_P)]


@dataclasses.dataclass(frozen=True)
class PlainRun:
    """One prompt, the plain way: a hook in the HF model, all of it run, in fp64 (its norms in fp32)."""

    model: Any
    dictionary: Dictionary
    ids_T: list[int]
    correct: int
    wrong: int

    @functools.cached_property
    def W_dec_FxD(self) -> np.ndarray:
        return np.asarray(self.dictionary.W_dec_FxD[...], np.float64)

    def features(self, x_TxD: np.ndarray) -> np.ndarray:
        """f_TxF in fp64; 0 at sinks."""
        arrays = (np.asarray(getattr(self.dictionary, n)[...], np.float64) for n in ("W_enc_DxF", "b_enc_F", "b_dec_D"))
        W_enc_DxF, b_enc_F, b_dec_D = arrays
        centred_TxD = x_TxD - b_dec_D if self.dictionary.config.centred else x_TxD
        return np.maximum(centred_TxD @ W_enc_DxF + b_enc_F, 0.0) * self.is_usable(x_TxD)[:, None]

    def is_usable(self, x_TxD: np.ndarray) -> np.ndarray:
        """Return where there is no attention sink, [T]."""
        return np.linalg.norm(x_TxD, axis=1) <= self.dictionary.config.max_norm

    def logits(self, change: Callable[[np.ndarray], np.ndarray], site: str = "") -> np.ndarray:
        """The last logits, [V], when the value [T, D] that the features write to, or that of a site, is changed."""
        with torch.no_grad():
            return self.run(lambda x_1xTxD: torch.from_numpy(change(x_1xTxD[0].numpy()))[None], site)[-1].numpy()

    def diff(self, change: Callable[[np.ndarray], np.ndarray], site: str = "") -> float:
        """The logit difference, likewise."""
        logits_V = self.logits(change, site)
        return float(logits_V[self.correct] - logits_V[self.wrong])

    def ablated(self, features: Sequence[int], fraction: float = 1.0) -> float:
        """The logit difference without a fraction of these features."""
        some = list(features)
        return self.diff(lambda x_TxD: x_TxD - fraction * self.features(x_TxD)[:, some] @ self.W_dec_FxD[some])

    def value(self, site: str = "") -> np.ndarray:
        """The value [T, D] that the dictionary reads, or that of a site, without an edit."""
        kept: list[np.ndarray] = []
        self.logits(lambda x_TxD: kept.append(x_TxD) or x_TxD, site or self.dictionary.site)
        return kept[0]

    def attribution(self, counterpart: "PlainRun | None" = None) -> np.ndarray:
        """Activation x gradient of every feature, [F].

        With a counterpart of as many tokens, its activations stand in their place.
        """
        x_TxD = self.value()
        f_TxF = self.features(x_TxD)
        if counterpart is not None:
            f_TxF = (f_TxF - counterpart.features(counterpart.value())) * self.is_usable(x_TxD)[:, None]
        return (f_TxF * (self.slopes() @ self.W_dec_FxD.T)).sum(axis=0)

    def slopes(self) -> np.ndarray:
        """The gradient of the logit difference with respect to the site's value, [T, D]."""
        kept = []

        def change(x_1xTxD):
            kept.append(x_1xTxD.detach().requires_grad_())
            return kept[0]

        logits_V = self.run(change)[-1]
        (logits_V[self.correct] - logits_V[self.wrong]).backward()
        return kept[0].grad[0].numpy()

    def run(self, change: Callable[[torch.Tensor], torch.Tensor], site: str = "") -> torch.Tensor:
        """The logits at every token, [T, V], when the value [1, T, D] becomes ``change(value)``."""
        kind, _, layer = (site or self.dictionary.config.target or self.dictionary.site).partition(".")
        block = self.model.model.layers[int(layer)]
        attention = block.self_attn
        modules = dict(
            mlp_in=block.mlp,
            mlp_act=block.mlp.down_proj,
            mlp_out=block.mlp,
            attn_out=attention,
            attn_z=attention.o_proj,
        )
        modules |= dict(attn_q=attention.q_proj, attn_k=attention.k_proj, attn_v=attention.v_proj)
        module = modules.get(kind, block)

        def swap(value):
            return (change(value[0]), *value[1:]) if isinstance(value, tuple) else change(value)

        if kind in ("resid_pre", "mlp_in", "mlp_act", "attn_z"):
            hook = module.register_forward_pre_hook(lambda module, inputs: swap(inputs))
        else:
            hook = module.register_forward_hook(lambda module, inputs, output: swap(output))
        try:
            return self.model(torch.tensor([self.ids_T])).logits[0]
        finally:
            hook.remove()

    @contextlib.contextmanager
    def relevance_rules(self):
        """Has the model's backward pass go by the rules of relevance patching."""

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
