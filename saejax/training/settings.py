"""Settings of training."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from saejax.config import Config, counted, nested, setting
from saejax.dictionaries.cross_layer import FORMS
from saejax.dictionaries.kinds import KINDS, PRETRAINED, settings_of_kinds, unit_names
from saejax.errors import UserError
from saejax.models.site_ranges import expand_ranges
from saejax.models.sites import ALL_KINDS

MOST_TOKENS = 2**31 - 1  # that a feature's silence is counted in
MOST_STEPS, MOST_FEATURES = 10**9, 10**9  # more would overflow where they are counted
DEAD_TOKENS = 10_000_000  # of ``dead_tokens``, see its source


@dataclasses.dataclass(frozen=True)
class TrainConfig(Config):
    """The dictionaries and how they are trained. Lists of values make a stack with a member for every combination.

    A setting of one kind alone has the kind's name, such as ``--train.jumprelu.bandwidth``. Sources of defaults:

      learning_rate: 2e-4 / sqrt(F / 2^14), the law that dictionary_learning reads off figure 3 of Gao et al. (2024)
      dead_tokens: 10 million tokens, whatever the batch (Gao et al.; dictionary_learning); of less text an epoch
      warmup: SAELens has none, Gemma Scope and dictionary_learning 1,000 steps; 100 serve runs of hundreds, too
      decay: a fifth of the steps (Conerly et al., 2024)
      b1, b2, eps: Adam's own (Kingma and Ba, 2015)
      clip: 1 (Conerly et al.; dictionary_learning)
      jumprelu.bandwidth, jumprelu.initial_threshold: as in SAELens, for inputs of mean norm sqrt(d)

    The others are choices of this package.
    """

    kinds: tuple[str, ...] = setting(
        ("topk", "standard"),
        f"kinds to train, one after the other; {PRETRAINED}: the dictionaries of --train.pretrained, which all stages "
        "take as if they had been trained here",
        choices=unit_names,
        changes_results=False,
    )
    pretrained: tuple[str, ...] = setting(
        (),
        f"published or earlier dictionaries for --train.kinds={PRETRAINED}, in any format that saejax reads: folders "
        "or hub addresses hf://ORG/NAME/FOLDER@REVISION, each with dictionaries of one layer or more",
        changes_results=False,  # what is found there counts, not its place
    )
    sites: tuple[str, ...] = setting(
        ("resid_post.15",),
        "captured sites to train on, each its own member, or layers of one kind such as mlp_in.0-29; 'all': every "
        "captured site of one kind",
    )
    form: str = setting(
        "sae",
        "sae rebuilds its site; transcoder predicts --train.target from it; cross_layer_transcoder is one "
        "dictionary of all layers, which reads mlp_in.L and whose features write to their own MLP's output and to all "
        "later ones; skip_ adds a linear path to either",
        choices=("sae", "transcoder", "skip_transcoder", *FORMS),
    )
    target: str = setting(
        "mlp_out",
        "kind of the site that a transcoder predicts, in the layer that it reads and computed after that, such as "
        "mlp_act for --train.sites=mlp_in.5; of any width",
        choices=ALL_KINDS,
    )
    expansion: tuple[int, ...] = setting(
        (8,),
        "features per dimension of the site (or a list: a stack is trained for each, one after the other)",
        low=1,
        high=MOST_FEATURES,
    )
    features: tuple[int, ...] = setting(
        (),
        "number of features, such as 16384 (or a list); empty: --train.expansion times the site's width",
        low=1,
        high=MOST_FEATURES,
    )
    k: tuple[int, ...] = setting((32,), "active features per token (or a list)", low=1, swept=True)
    l1: tuple[float, ...] = setting(
        (2.0,),
        "L1 coefficient on decoder-norm-weighted activations, inputs scaled to mean norm sqrt(d) (or a list)",
        low=0.0,
        swept=True,
    )
    l1_by_depth: tuple[float, ...] = setting(
        (),
        "L1 coefficients of early, middle and late layers (thirds of the sites' layers); replaces l1",
        low=0.0,
    )
    by_kind: Mapping[str, Config] = nested(settings_of_kinds)
    auxk: float = setting(
        0.0,
        "coefficient of the AuxK loss, in which dead features reconstruct the remaining error (Gao et al., 2024); 0: "
        "off",
        low=0.0,
    )
    auxk_features: int = setting(
        0, "number of dead features per token in the AuxK loss; 0: half the width of what is rebuilt", low=0
    )
    whiten_error: float = setting(
        0.0,
        "exponent w of error whitening: errors are multiplied by covariance^(-w/2) before they are squared; 0: off, "
        "1: directions of small variance count as much as large ones. 0.5 helps where a few directions dominate",
        low=0.0,
        high=1.0,
    )
    resample_every: int = setting(
        0,
        "steps between resamplings, in which dead features start again at tokens of high loss (Bricken et al., "
        "2023), until the learning rate falls; 0: never",
        low=0,
    )
    resample_from: str = setting(
        "inputs",
        "new direction of a resampled feature: the token's activation (inputs, as in Bricken et al.), or its "
        "reconstruction error (errors)",
        choices=("inputs", "errors"),
    )
    dead_tokens: int = setting(
        0,
        "number of tokens without firing after which a feature counts as dead; 0: as many as an epoch has, at most 10 "
        "million",
        low=0,
        high=MOST_TOKENS,
    )
    decorrelation: float = setting(
        0.0,
        "coefficient of the decorrelation loss, the mean squared covariance of pairs of features on 512 tokens of "
        "each batch; 0: off",
        low=0.0,
    )
    alignment: float = setting(
        0.0,
        "coefficient of the alignment loss of SAEs, the sum over features of 1 - the cosine of encoder column and "
        "decoder row; 0: off",
        low=0.0,
    )
    decoder_norm: str = setting(
        "unit",
        "keep decoder rows at length 1 (unit), or let them grow under the norm-weighted penalty (free)",
        choices=("unit", "free"),
    )
    freeze: str = setting(
        "none",
        "keep the decoder or encoder at its random initial weights, as a control",
        choices=("none", "decoder", "encoder"),
    )
    learning_rate: tuple[float, ...] = setting(
        (0.0,),
        "peak learning rate of Adam (or a list); 0: 2e-4 times the root of 16,384 over the number of features. Runs of "
        "up to a million tokens learn more at 1e-3 to 3e-3",
        low=0.0,
        swept=True,
    )
    b1: float = setting(0.9, "decay of Adam's mean of gradients", low=0.0, high=0.999999)
    b2: float = setting(0.999, "decay of Adam's mean of squared gradients", low=0.0, high=0.999999, is_flag=False)
    eps: float = setting(1e-8, "epsilon of Adam, added to the root of its mean of squared gradients", low=1e-30)
    mu_dtype: str = setting(
        "float32",
        "dtype of Adam's mean of gradients; bfloat16 saves 2 bytes per parameter. The mean of squared gradients "
        "stays in float32, because bfloat16 would round its small steps away",
        choices=("float32", "bfloat16"),
    )
    zero_optimizer: bool = setting(
        False,
        "split both of Adam's means over --mesh.data as well (ZeRO, Rajbhandari et al., 2020): each device updates "
        "its part of the parameters and receives the others; results are the same within rounding",
        changes_results=False,
    )
    members_at_once: int = setting(
        0,
        "maximum number of a stack's members that a device computes at the same time; the others wait and take only "
        "the memory of their state. 0: one on a CPU, elsewhere as many as have 64 million activations (tokens times "
        "features) together; results are the same within rounding",
        low=0,
        changes_results=False,
    )
    clip: float = setting(
        1.0,
        "maximum global norm of a member's gradient; 0: no clipping. The loss is a sum over dimensions, so at the "
        "default nearly every step is clipped and Adam sees gradients of one length, which trains better "
        "dictionaries than clipping outliers only",
        low=0.0,
    )
    warmup: int = setting(
        100, "number of steps over which learning rate and penalty rise from 0", low=0, high=MOST_STEPS
    )
    penalty_warmup: float = setting(
        0.0,
        "share of the steps over which the penalty rises from 0; 0: as long as --train.warmup. Published cross-layer "
        "transcoders use 1. A run with such a share cannot go on to a longer one",
        low=0.0,
        high=1.0,
    )
    decay: float = setting(
        0.2, "share of the steps, at the end, over which the learning rate falls linearly to 0", low=0.0, high=1.0
    )
    weight_decay: float = setting(
        0.0,
        "decay of the encoder's weights per step, times the learning rate; on little text about 1 helps",
        low=0.0,
    )
    batch: int = setting(1024, "tokens per step, over all devices", low=1, high=MOST_TOKENS)
    epochs: int = setting(6, "passes over the training tokens", low=1, high=MOST_STEPS)
    seed: tuple[int, ...] = setting(
        (123,),
        "seed of initialisation (or a list); the first is also that of the order of tokens",
        low=0,
        high=2**31 - 1,
        swept=True,
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
        "source of activations: a captured store, or the model itself (model), which reads the corpus's training "
        "text while the dictionaries train and stores nothing on disk",
        choices=("store", "model"),
    )
    buffer_rows: int = setting(
        262_144,
        "number of tokens that are shuffled together: of a store, as many whole shards as hold them; with "
        "--train.source=model, the tokens that the model reads at a time",
        low=1,
    )
    input: str = setting(
        "auto",
        "place of a store's activations during training: all on the devices (resident), read from disk when needed "
        "(streamed), or resident if they take at most 40 % of the free memory of a GPU or TPU (auto)",
        choices=("auto", "resident", "streamed"),
        changes_results=False,
    )
    init_from: str = setting(
        "",
        "dictionary to start from, in any format that saejax reads: a folder or hf://ORG/NAME/FOLDER@REVISION; for a "
        "stack also a train unit with members of the same names, or a circuit-tracer set. If it has fewer features, "
        "--train.widen says how the others start; empty: random dictionaries",
        changes_results=False,  # what is found there counts, not its place
    )
    widen: str = setting(
        "random",
        "start of the features that the dictionary of --train.init_from lacks: random directions (random), "
        "directions of its reconstruction errors on 65,536 tokens (errors), or the latter also in place of features "
        "that fire on none of these tokens (replace)",
        choices=("random", "errors", "replace"),
    )
    kl_steps: int = setting(
        0,
        "steps after training in which each dictionary is fine-tuned through the model, on its error and the KL "
        "divergence that it causes, in equal parts (Karvonen, 2025); the whole model is loaded. 0: none",
        low=0,
        high=MOST_STEPS,
    )
    kl_learning_rate: float = setting(
        5e-5, "learning rate of the first of --train.kl_steps, which falls linearly to 0", low=1e-30
    )
    checkpoint_every: int = setting(500, "steps between checkpoints", low=1, changes_results=False)
    score_every: int = setting(
        1000,
        "steps between scores on 8,192 held-out tokens, which progress lines and metrics show; 0: none",
        low=0,
        changes_results=False,
    )
    ce_every: int = setting(
        0,
        "every this many-th of these scores also has the cross-entropy recovered on as many held-out tokens, for which "
        "the whole model is loaded; 0: none",
        low=0,
        changes_results=False,
    )
    save_every: int = setting(
        0,
        "steps between dictionaries that are saved in steps/STEP/ while training goes on; 0: the last one alone",
        low=0,
        changes_results=False,
    )
    log_every: int = setting(20, "steps between recorded metrics", low=1, changes_results=False)
    wandb: str = setting(
        "",
        "project, or entity/project, of Weights & Biases that also gets the metrics (needs saejax[wandb]); empty: none",
        changes_results=False,
    )
    max_steps: int = setting(0, "stop after this many steps; 0: all epochs", low=0)

    def __post_init__(self):
        object.__setattr__(self, "sites", expand_ranges(self.sites))
        super().__post_init__()
        for name in ("kinds", "expansion", "features"):
            listed = ",".join(map(str, values := getattr(self, name)))
            if len(set(values)) < len(values):
                raise UserError(f"{name}={listed}: name each one once")
            if name != "kinds" and len(values) > 1 and self.form in FORMS:
                raise UserError(f"{name}={listed} makes several dictionaries: a {self.form} is one")
        if not self.expansion or (self.features and len(self.expansion) > 1):
            listed = ",".join(map(str, self.expansion))
            raise UserError(f"expansion={listed}: give one value, or a list without features")

    def features_of(self, width: int) -> int:
        """Return the number of features of a dictionary whose inputs have this width, given one of ``each_size``."""
        return self.features[0] if self.features else self.expansion[0] * width

    def with_dead_tokens(self, per_epoch: int = MOST_TOKENS) -> "TrainConfig":
        """Return the settings with ``dead_tokens`` in place of 0, given the batches of an epoch."""
        if self.dead_tokens:
            return self
        return dataclasses.replace(self, dead_tokens=min(DEAD_TOKENS, per_epoch * self.batch))

    def count_steps(self, per_epoch: int) -> int:
        """Return the number of steps of a run, given the batches of an epoch."""
        return min(per_epoch * self.epochs, self.max_steps or per_epoch * self.epochs)

    def each_size(self) -> dict[str, "TrainConfig"]:
        """Return the settings with each of several numbers of features, because a stack has one shape, by its name.

        The names are such as "expansion4" or "features512"; a single one is "".
        """
        if len(self.features) > 1:
            return {f"features{count}": dataclasses.replace(self, features=(count,)) for count in self.features}
        if len(self.expansion) > 1:
            return {f"expansion{times}": dataclasses.replace(self, expansion=(times,)) for times in self.expansion}
        return {"": self}

    def of_kind(self, kind: str) -> Any:
        """Return the settings that only this kind has."""
        return self.by_kind.get(kind) or KINDS[kind].Settings()

    def read_by(self, kind: str) -> dict[str, Any]:
        """Return the settings that training of a kind reads and results depend on, see ``counted``."""
        shared, source = KINDS[kind].reads, KINDS[kind].source
        conditions = {
            "k": "k" in shared,
            "l1": "l1" in shared,
            "l1_by_depth": "l1" in shared,
            "auxk_features": self.auxk > 0,
            "resample_from": self.resample_every > 0,
            # Kinds that keep the k largest have no penalty; a plugin's may have one.
            "penalty_warmup": "k" not in shared or bool(source),
            "expansion": not self.features,
            "kl_learning_rate": self.kl_steps > 0,
            "target": self.form != "sae",
            "batchtopk.across_layers": self.form in FORMS,  # those whose features are of all layers
        }
        values = counted(self, but=[f"train.{name}" for name, is_read in conditions.items() if not is_read])
        prefix = f"train.{kind}."  # settings of other kinds are not read
        values = {name: value for name, value in values.items() if name.count(".") == 1 or name.startswith(prefix)}
        return values | ({"train.plugin": source} if source else {})  # a changed kind is trained anew
