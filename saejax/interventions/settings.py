"""Settings of causal tests and of linear probes."""

import dataclasses

from saejax import shared_settings as shared
from saejax.config import Config, Place, setting
from saejax.tasks.settings import BENCHMARKS

REPLACEMENTS = ("zero", "mean", "random", "counterpart")
BASES = ("neurons", "pca", "diff_means")  # bases that need no folder
PATCHABLE = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_act", "mlp_out", "resid_post")
HEAD_KINDS = ("attn_q", "attn_k", "attn_v", "attn_z")


@dataclasses.dataclass(frozen=True)
class AblateConfig(Config):
    """Causal tests of features."""

    dictionary: str = setting(
        "topk",
        "dictionary to test: a kind trained here (where one is trained, it is the default), a member of its stack "
        "(topk/k32), a folder such as runs/demo/train/topk, or a hub address hf://ORG/NAME/FOLDER@REVISION. With a "
        "folder or address nothing is captured or trained",
        changes_results=False,
    )
    top: int = setting(10, "number of features, ranked by attribution on train prompts, that are ablated", low=1)
    replacement: str = setting(
        "zero",
        "value that replaces an ablated feature's activation: zero, its mean over the train prompts (mean), its "
        "activation at a random other position at which it fires (random), or at the same position of the prompt's "
        "counterpart (counterpart)",
        choices=REPLACEMENTS,
    )
    effects: str = setting(
        "top",
        "features that are also ablated one by one: the top ones (top), or all that fire on the test prompts (all), "
        "with a ranking in <behaviour>-importance.parquet",
        choices=("top", "all"),
    )
    positions: str = setting(
        "all",
        "positions at which features are ablated: all, last, or a slice of a prompt's tokens such as 1:4 or -3:",
    )
    error: str = setting(
        "keep",
        "keep the part of the site that the dictionary does not explain, or drop it; with drop, the clean run also "
        "goes through the dictionary, and no other basis is compared",
        choices=("keep", "drop"),
    )
    random_sets: int = shared.random_sets()
    placebo_targets: int = shared.placebo_targets()
    attribution: str = setting(
        "gradient",
        "estimate that ranks features: activation times gradient (gradient), or the gradient averaged over ten points "
        "on the way to where all features are replaced (integrated), which takes ten times as long, and with "
        "untrained dictionaries longer, since every dictionary has a way of its own",
        choices=("gradient", "integrated"),
    )
    attribution_prompts: int = setting(
        24, "number of train prompts that rank features, for the answers and for placebo targets alike; 0: all", low=0
    )
    untrained_dictionaries: int = setting(
        79,
        "untrained dictionaries to compare with, to see whether training mattered; a yes needs 19 with one behaviour, "
        "39 with two, and 20 more for each further one; 0: it is not asked",
        low=0,
    )
    baselines: tuple[Place, ...] = setting(
        BASES,
        "simpler bases to compare with at equal dose: neurons (of the layer's MLP), pca (principal components of the "
        "site on the train prompts), diff_means (differences of the site's means by answer), or the folder of a "
        "dictionary; empty: none",
        order=BASES,
    )
    text_documents: int = setting(
        64,
        "held-out documents of the corpus, 32 tokens of each, on which cross-entropy is measured; "
        "0: none, and whether effects are selective is not fully tested",
        low=0,
    )
    repeats: tuple[Place, ...] = setting(
        (),
        "dictionaries of other seeds, such as topk/seed43, whose own top features are asked the same six questions; "
        "each takes about half as long as the first, whose untrained dictionaries it is compared with",
    )
    joined: tuple[str, ...] = setting(
        (),
        "SAEs of further sites, such as topk/resid_post.20: the tested set is of their features and those of "
        "--ablate.dictionary together; without simpler bases, repeats and question 6",
        changes_results=False,
    )
    min_accuracy_drop: float = shared.min_accuracy_drop()
    seed: int = shared.causal_seed()
    bootstrap: int = shared.causal_bootstrap()
    batch_rows: int = shared.causal_batch_rows()


@dataclasses.dataclass(frozen=True)
class ProbeConfig(Config):
    """Linear probes on features and on raw activations."""

    labels: tuple[str, ...] = setting(
        (),
        "labels to probe for: which behaviour a prompt asks for (behaviour); within each behaviour its answer "
        "(answer), whether that is even (parity), whether the model is right (correct), the number of the subject "
        "(number, of agreement), and 'labels' of --task.prompts; of benchmarks correct, steps, operation and task; "
        "empty: no probes",
    )
    benchmarks: bool = setting(
        False, "also probe the questions of --task.benchmarks; half of them train the probes, half judge them"
    )
    dictionary: str = setting(
        "topk",
        "dictionary whose features are probed: a kind trained here (topk), a member of its stack (topk/k32), or a "
        "folder or hub address as in --ablate.dictionary",
        changes_results=False,
    )
    sparse: tuple[int, ...] = setting(
        (1, 2, 5, 10, 20), "sizes of sparse probes: numbers of features, or of dimensions", low=1
    )
    strengths: tuple[float, ...] = setting(
        (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0),
        "inverse strengths of the L2 penalty (C), of which 5-fold cross-validation on the train prompts chooses",
        low=1e-9,
        is_flag=False,
    )
    shuffles: int = setting(
        20,
        "number of control probes on shuffled labels, and on matched features or random directions, for each probe",
        low=1,
    )
    seed: int = shared.causal_seed()


@dataclasses.dataclass(frozen=True)
class PatchConfig(Config):
    """Activation patching between the test prompts and their counterparts."""

    kinds: tuple[str, ...] = setting(
        (),
        f"kinds of site to patch in every layer: {', '.join(PATCHABLE)}, or of attention heads, each by itself, "
        f"{', '.join(HEAD_KINDS)}; empty: none",
        choices=(*PATCHABLE, *HEAD_KINDS),
        changes_results=False,
    )
    positions: str = setting(
        "each",
        "positions at which kinds of site are patched: each by itself (each; for heads: all together), or these "
        "together: all, last, or a slice of a prompt's tokens such as 1:4 or -3:",
    )
    dictionary: str = setting(
        "",
        "dictionary whose features are patched: a kind trained here (topk), a member of its stack (topk/k32), or a "
        "folder or hub address as in --ablate.dictionary; empty: none",
        changes_results=False,
    )
    top: int = setting(
        10, "number of features, ranked by attribution on train prompts, that are patched", low=1, is_flag=False
    )
    random_sets: int = shared.random_sets()
    placebo_targets: int = shared.placebo_targets()
    seed: int = shared.causal_seed()
    bootstrap: int = shared.causal_bootstrap()
    batch_rows: int = shared.causal_batch_rows()


@dataclasses.dataclass(frozen=True)
class SteerConfig(Config):
    """Steering the test prompts to the answers of their counterparts."""

    dictionary: str = setting(
        "",
        "dictionary whose features steer: a kind trained here (topk), a member of its stack (topk/k32), or a folder "
        "or hub address as in --ablate.dictionary; empty: no steering",
        changes_results=False,
    )
    random_sets: int = shared.random_sets()
    seed: int = shared.causal_seed()
    bootstrap: int = shared.causal_bootstrap()
    batch_rows: int = shared.causal_batch_rows()
    top: int = 10  #: features that steer together for each pair of answers, ranked on train texts; no flag
    #: norms of the added vectors, in units of the site's mean norm; features are clamped at 1, 2, 4 and 8 times their
    #: mean on texts of the target answer instead; no flag.
    doses: tuple[float, ...] = (0.1, 0.2, 0.4, 0.6, 0.8)


@dataclasses.dataclass(frozen=True)
class StudyConfig(Config):
    """Effects of ablating top features on benchmarks."""

    benchmarks: tuple[str, ...] = setting(
        (),
        "benchmarks on which a dictionary's top features are ablated: gsm8k, math, logic, ...; empty: none",
        choices=BENCHMARKS,
        changes_results=False,
    )
    dictionary: Place = setting(
        "topk",
        "dictionary whose features are ablated: a kind trained here (topk), a member of its stack (topk/k32), or a "
        "folder or hub address as in --ablate.dictionary",
    )
    items: int = setting(
        200,
        "maximum number of items of each benchmark, of those of --task.examples: half select features, half test them",
        low=4,
    )
    top: int = setting(10, "number of features, ranked by attribution on train items, that are ablated", low=1)
    random_sets: int = shared.random_sets()
    placebo_targets: int = shared.placebo_targets()
    attribution_items: int = setting(
        32, "train items that rank features, for the answers and for placebo targets alike; 0: all", low=0
    )
    scored_sets: int = setting(
        19,
        "random lists, placebo sets and untrained dictionaries, each so many, under which answers are generated or "
        "chosen and scored, too",
        low=0,
    )
    untrained_dictionaries: int = setting(
        39, "untrained dictionaries to compare with, to see whether training mattered; 0: it is not asked", low=0
    )
    baselines: tuple[Place, ...] = setting(
        ("neurons", "pca"),
        "simpler bases to compare with at equal dose: neurons, pca, or the folder of a dictionary; see "
        "--ablate.baselines; empty: none",
        order=BASES,
    )
    repeats: tuple[Place, ...] = setting(
        (), "dictionaries of other seeds, such as topk/seed43, whose own top features are tested in the same way"
    )
    falsify: int = setting(
        0,
        "ordinary texts into which the tokens that excite a top feature most are injected, to see whether it detects "
        "words rather than reasoning; 0: not tested",
        low=0,
    )
    falsify_text: str = setting(
        "",
        "ordinary text for --study.falsify, in a language that the model knows: files or a data set of the hub as in "
        "--corpus.path; empty: held-out text of the embedded corpus, which is English",
        changes_results=False,  # its content counts, not its place
    )
    control: str = setting(
        "",
        "makes a row of a study a control, whose answers are known: a relative of the first row's model, with most "
        "features in common, or a stranger with random weights, of which nothing is shared or specific",
        choices=("", "relative", "stranger"),
        changes_results=False,
    )
    min_accuracy_drop: float = shared.min_accuracy_drop()
    bootstrap: int = shared.causal_bootstrap()
    seed: int = shared.causal_seed()
    #: tokens per batch, padding included, of log-likelihoods and slopes, which changes speed alone; no flag
    batch_tokens: int = dataclasses.field(default=2048, metadata=dict(changes_results=False))
