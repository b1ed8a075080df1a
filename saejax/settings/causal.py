"""What is changed in the model, and how the effect is judged."""

import dataclasses

from saejax.config import Config, setting

REPLACEMENTS = ("zero", "mean", "random", "counterpart")
ESTIMATES = ("gradient", "integrated", "relp")
PATCHABLE = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")


@dataclasses.dataclass(frozen=True)
class AblateConfig(Config):
    """Causal tests of features."""

    dictionary: str = setting(
        "topk", "which trained dictionary to test: topk, or a member of a stack as in topk/k32", changes_results=False
    )
    top: int = setting(20, "features, ranked on train prompts, that are ablated one by one and together", low=1)
    estimate: str = setting(
        "gradient",
        "what ranks the features on train prompts: activation x gradient (gradient), x the mean gradient on the way to "
        "no feature at all (integrated, ten times the work), or x the slope by the rules of relevance patching (relp)",
        choices=ESTIMATES,
    )
    replacement: str = setting(
        "zero",
        "what stands in place of a removed feature's activation: nothing (zero), its mean over the train prompts "
        "(mean), its activation at a random other position at which it fires (random), or at the same position of the "
        "prompt's counterpart (counterpart)",
        choices=REPLACEMENTS,
    )
    effects: str = setting(
        "top",
        "which features are removed one by one: the top ones and some controls (top), or every feature that fires on "
        "the test prompts (all), with p- and q-values in <behaviour>-importance.parquet",
        choices=("top", "all"),
    )
    draws: int = setting(100, "draws of as many matched random features", low=2)
    matches: int = setting(
        10, "how many nearest features by firing rate and activation size each control is drawn from", low=1
    )
    seed: int = setting(
        456, "seed of the control draws, the bootstrap, the permutations and random replacements", low=0
    )
    bootstrap: int = setting(10_000, "bootstrap resamples for 95 % intervals", low=100)
    min_accuracy_drop: float = setting(
        0.05, "verdict: joint ablation must cost more than this share of test accuracy", low=0.0, high=1.0
    )
    batch_rows: int = setting(64, "edited prompts per batch of the tail program", low=1, changes_results=False)


@dataclasses.dataclass(frozen=True)
class PatchConfig(Config):
    """Activation patching between the test prompts and their counterparts."""

    kinds: tuple[str, ...] = setting(
        (),
        f"kinds of site to patch, each at every layer and position: {', '.join(PATCHABLE)}; empty: none",
        choices=PATCHABLE,
        changes_results=False,
    )
    dictionary: str = setting(
        "",
        "which trained dictionary's features to patch: topk, or a member of a stack as in topk/k32; empty: none",
        changes_results=False,
    )
    behaviours: tuple[str, ...] = setting((), "behaviours to patch; empty: all that the baseline measured")
    top: int = setting(20, "features, ranked on train prompts, that are patched one by one and together", low=1)
    estimate: str = setting("gradient", "what ranks the features; see --ablate.estimate", choices=ESTIMATES)
    draws: int = setting(20, "draws of as many matched random features", low=2)
    matches: int = setting(
        10, "how many nearest features by firing rate and activation size each control is drawn from", low=1
    )
    seed: int = setting(456, "seed of the control draws and the bootstrap", low=0)
    bootstrap: int = setting(10_000, "bootstrap resamples for 95 % intervals", low=100)
    batch_rows: int = setting(64, "patched prompts per batch", low=1, changes_results=False)
