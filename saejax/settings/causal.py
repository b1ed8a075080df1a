"""Settings of causal tests and of linear probes."""

import dataclasses

from saejax.runner.config import Config, setting
from saejax.settings.tasks import BENCHMARKS

REPLACEMENTS = ("zero", "mean", "random", "counterpart")
ESTIMATES = ("gradient", "integrated", "relp")
BASES = ("neurons", "pca", "diff_means", "untrained")  # those that need no folder
PROBE_LABELS = ("behaviour", "answer", "parity", "correct", "number")
_MATCHES = (
    "how many features, the nearest by firing rate, activation size, decoder norm and the position at which they fire, "
    "each control is drawn from"
)
PATCHABLE = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
HEADS = "heads"


@dataclasses.dataclass(frozen=True)
class AblateConfig(Config):
    """Causal tests of features."""

    dictionary: str = setting(
        "topk",
        "which trained dictionary to test: topk, a member of a stack as in topk/k32, or the folder of one, such as "
        "runs/demo/train/topk or, on the hub, hf://ORG/NAME/FOLDER@REVISION; then nothing is captured or trained",
        changes_results=False,
    )
    top: int = setting(10, "number of features, ranked by attribution on train prompts, that are ablated", low=1)
    replacement: str = setting(
        "zero",
        "what replaces an ablated feature's activation: zero, its mean over the train prompts (mean), its activation "
        "at a random other position at which it fires (random), or at the same position of the prompt's counterpart "
        "(counterpart)",
        choices=REPLACEMENTS,
    )
    effects: str = setting(
        "top",
        "which features are also ablated one by one: the top ones (top), or every feature that fires on the test "
        "prompts (all), with a ranking in <behaviour>-importance.parquet",
        choices=("top", "all"),
    )
    positions: str = setting(
        "all",
        "where features are ablated: all, last, or a slice of a prompt's tokens such as 1:4 or -3:",
    )
    error: str = setting(
        "keep",
        "whether the part of the site that the dictionary does not explain is kept, or dropped; then the clean run "
        "goes through the dictionary, too, and no other basis is compared",
        choices=("keep", "drop"),
    )
    random_sets: int = setting(
        199, "maximum number of disjoint random sets of features that the top ones are compared with", low=1
    )
    placebo_targets: int = setting(
        199, "pairs of likely tokens that are no answers, whose top features the top ones are compared with", low=0
    )
    attribution_prompts: int = setting(
        0, "train prompts that rank features, for the answers and for placebo targets alike; 0: all", low=0
    )
    untrained: bool = setting(True, "answer all questions for an untrained dictionary, too")
    baselines: tuple[str, ...] = setting(
        BASES,
        "simpler bases to compare with at equal dose: neurons (of the layer's MLP), pca (principal components of the "
        "site on the train prompts), diff_means (differences of the site's means by answer), untrained (a dictionary "
        "of random directions), or the folder of a dictionary; empty: none",
    )
    text_documents: int = setting(
        64,
        "held-out documents of the corpus, 32 tokens of each, on which cross-entropy and KL divergence are measured; "
        "0: none, and whether effects are selective is not fully tested",
        low=0,
    )
    repeats: tuple[str, ...] = setting(
        (),
        "dictionaries of other seeds, such as topk/seed43, whose own top features are tested in the same way; each "
        "takes about as long as the first",
    )
    min_accuracy_drop: float = setting(0.05, "share of accuracy whose loss counts as an effect", low=0.0, high=1.0)
    max_ce_rise: float = setting(
        0.05, "rise of cross-entropy on held-out text, nats per token, below which an effect is selective", low=0.0
    )
    seed: int = setting(
        456, "seed of the random sets, the placebo targets, the bootstrap and random replacements", low=0
    )
    bootstrap: int = setting(10_000, "bootstrap resamples for 95 % intervals", low=100)
    batch_rows: int = setting(64, "edited prompts per batch of the program", low=1, changes_results=False)


@dataclasses.dataclass(frozen=True)
class ProbeConfig(Config):
    """Linear probes on features and on raw activations."""

    labels: tuple[str, ...] = setting(
        (),
        "labels to probe for: which behaviour a prompt asks for (behaviour), and within each behaviour its answer "
        "(answer), whether that is even (parity), whether the model is right (correct), the number of the subject "
        "(number, of agreement), and what 'labels' of --task.prompts say; empty: no probes",
    )
    dictionary: str = setting(
        "topk",
        "whose features to probe: topk, a member of a stack as in topk/k32, or the folder of a dictionary",
        changes_results=False,
    )
    pool: str = setting(
        "last",
        "positions of a prompt that a probe sees: the last (last), or the maximum (max) or mean (mean) over all "
        "positions that the dictionary reads",
        choices=("last", "max", "mean"),
    )
    sparse: tuple[int, ...] = setting(
        (1, 2, 5, 10, 20), "sizes of sparse probes: numbers of features, or of dimensions", low=1
    )
    ranking: str = setting(
        "mean_difference",
        "what ranks the inputs of sparse probes on the train prompts: the difference of their class means "
        "(mean_difference, as sae-probes do), or F, its square in units of the variance within classes (f_statistic)",
        choices=("mean_difference", "f_statistic"),
    )
    strengths: tuple[float, ...] = setting(
        (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0),
        "inverse strengths of the L2 penalty (C), of which cross-validation on the train prompts chooses",
        low=1e-9,
    )
    folds: int = setting(5, "number of folds of that cross-validation", low=2, high=5)
    shuffles: int = setting(
        20, "number of control probes on shuffled labels, and on random features, for each probe", low=1
    )
    permutations: int = setting(10_000, "permutations of the test labels for a p-value", low=100)
    seed: int = setting(567, "seed of the folds, the shuffled labels, the random features and the permutations", low=0)


@dataclasses.dataclass(frozen=True)
class PatchConfig(Config):
    """Activation patching between the test prompts and their counterparts."""

    kinds: tuple[str, ...] = setting(
        (),
        f"kinds of site to patch, each at every layer and position: {', '.join(PATCHABLE)}; {HEADS}: queries, keys, "
        "values and outputs of attention heads at every position, estimated by AtP and AtP*, and some of them patched; "
        "empty: none",
        choices=(*PATCHABLE, HEADS),
        changes_results=False,
    )
    paths: int = setting(
        0,
        "for heads: number of top queries, keys and values by AtP* to which, like to the logits, the direct path from "
        "every earlier head and MLP is patched; 0: none",
        low=0,
    )
    dictionary: str = setting(
        "",
        "which trained dictionary's features to patch: topk, a member of a stack as in topk/k32, or the folder of one; "
        "empty: none",
        changes_results=False,
    )
    behaviours: tuple[str, ...] = setting((), "behaviours to patch; empty: all that the baseline measured")
    top: int = setting(
        20,
        "number of features, ranked on train prompts, that are patched one by one and together; for heads, number of "
        "nodes by each estimate",
        low=1,
    )
    estimate: str = setting(
        "gradient",
        "what ranks the features: change of activation between a prompt and its counterpart x a slope, as for "
        "--ablate.estimate",
        choices=ESTIMATES,
    )
    draws: int = setting(20, "number of control sets of as many matched random features", low=2)
    matches: int = setting(10, _MATCHES, low=1)
    seed: int = setting(456, "seed of the control draws and the bootstrap", low=0)
    bootstrap: int = setting(10_000, "bootstrap resamples for 95 % intervals", low=100)
    das: int = setting(
        0,
        "for features: dimensions of a subspace learned on train prompts (DAS), with which cause and isolate scores "
        "are compared; 0: no subspace",
        low=0,
    )
    das_steps: int = setting(100, "steps of learning the DAS subspace, with 16 pairs each", low=1)
    batch_rows: int = setting(64, "patched prompts per batch", low=1, changes_results=False)


@dataclasses.dataclass(frozen=True)
class SteerConfig(Config):
    """Steering the test prompts to the answers of their counterparts."""

    dictionary: str = setting(
        "",
        "which trained dictionary's features to steer with: topk, a member of a stack as in topk/k32, or the folder of "
        "one; empty: no steering",
        changes_results=False,
    )
    top: int = setting(20, "features of each pair of answers, ranked on train texts, that steer together", low=1)
    doses: tuple[float, ...] = setting(
        (0.1, 0.2, 0.4, 0.6, 0.8),
        "norms of the added vectors, in units of the site's mean norm; features are clamped at 1, 2, 4 and 8 times "
        "their mean on texts of the target instead",
        low=1e-6,
    )
    positions: str = setting(
        "all", "positions of a prompt that are steered; in held-out text all are", choices=("all", "last")
    )
    max_ce_rise: float = setting(
        1.0,
        "largest rise of cross-entropy on held-out text, nats per token; of the strengths within it, the one that "
        "turns most train prompts is judged on test prompts",
        low=0.0,
    )
    text_documents: int = setting(
        16, "number of held-out documents, 64 tokens each, on which that rise is measured; 0: none", low=0
    )
    draws: int = setting(
        320,
        "number of random directions at the same dose; a positive verdict needs 20 per behaviour and method, minus "
        "one; fewer are run if no further one could change a negative verdict",
        low=2,
    )
    draw_prompts: int = setting(
        20, "number of test prompts on which random directions are tried, spread evenly over templates; 0: all", low=0
    )
    seed: int = setting(456, "seed of the random directions, the examples, the continuations and the bootstrap", low=0)
    bootstrap: int = setting(10_000, "bootstrap resamples for 95 % intervals", low=100)
    batch_rows: int = setting(64, "steered prompts per batch", low=1, changes_results=False)


@dataclasses.dataclass(frozen=True)
class StudyConfig(Config):
    """Benchmark scores with top features ablated."""

    benchmarks: tuple[str, ...] = setting(
        (),
        "benchmarks on which a dictionary's top features are ablated: gsm8k, math, logic; empty: none",
        choices=BENCHMARKS,
        changes_results=False,
    )
    dictionary: str = setting(
        "topk", "whose features: topk, a member of a stack as in topk/k32, or the folder of a dictionary"
    )
    items: int = setting(
        200,
        "items of each benchmark at most, of those of --task.examples: half choose features, half judge them",
        low=2,
    )
    top: int = setting(20, "number of features, ranked on train items, that are ablated together", low=1)
    draws: int = setting(
        20,
        "number of control sets of matched random features; a positive verdict needs 19 with one benchmark, 39 with "
        "two, 59 with three",
        low=2,
    )
    matches: int = setting(10, _MATCHES, low=1)
    single: bool = setting(True, "also zero each top feature and each control feature by itself")
    min_drop: float = setting(
        0.05, "smallest drop of accuracy, as a share, that counts as an effect", low=0.0, high=1.0
    )
    even_at_chance: bool = setting(False, "measure ablations even where the unedited model is no better than chance")
    bootstrap: int = setting(10_000, "bootstrap resamples for 95 % intervals", low=100)
    seed: int = setting(
        42, "seed of the split of items, the control draws, random replacements and the bootstrap", low=0
    )
    batch_tokens: int = setting(
        2048, "tokens per batch, padding included, while features are chosen", low=1, changes_results=False
    )
