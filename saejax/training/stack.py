"""A stack: dictionaries of one kind and shape that one program trains.

What members share is static and shapes the program (``TrainStack``). What differs between them is data: the site, the
seed and the hyperparameters are arrays with a leading axis over members (``Hyperparams``), so a sweep compiles once.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saejax.activations.batches import Parts
from saejax.activations.joined import single_sites
from saejax.dictionaries import Dictionary, DictionaryConfig, kinds, sparse_products
from saejax.dictionaries.cross_layer import FORM, FORMS, SKIP_FORM
from saejax.dictionaries.cross_layer import KINDS as CROSS_LAYER_KINDS
from saejax.dictionaries.kinds.base import Facts
from saejax.dictionaries.kinds.jumprelu import JumpReLUConfig
from saejax.dictionaries.kinds.topk import is_plain_topk
from saejax.dictionaries.rescale import fold_input_scaling
from saejax.errors import UserError, one_of
from saejax.models.sites import site_parts
from saejax.parallel.mesh import fitting_sharding, fitting_spec
from saejax.training.members import Member
from saejax.training.optimizer import usual_learning_rate
from saejax.training.scales import ScaledRows, SiteScale
from saejax.training.settings import TrainConfig

_AT_ONCE = 2**26  # values of tokens x features of members that are vectorised: 256 MB in float32, times a few
# Settings that a cross-layer transcoder does not support, and the values that turn them off.
_NOT_CROSS_LAYER = dict(
    target="mlp_out", decorrelation=0.0, alignment=0.0, whiten_error=0.0, resample_every=0, init_from=""
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hyperparams:
    """Hyperparameters of a step's members: arrays with a leading axis M, or without it for one member."""

    #: learning_rate and seed: as in ``Member.settings``; ``kind_params``: the other settings there,
    #: and what the kind reads at inference (``Kind.numbers``).
    learning_rate: jax.Array
    kind_params: dict[str, jax.Array]
    #: input_scale and output_scale: as in ``SiteScale``.
    input_scale: jax.Array
    output_scale: jax.Array
    site_index: jax.Array  #: index in the batch of the (input, target) pair that the member reads
    seed: jax.Array
    #: as in ``SiteScale``, of all members one for each of ``TrainStack.sites``; None if no member has one.
    metric_DxD: jax.Array | None


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStack:
    """The members to train and their devices: everything that the step's program depends on.

    Raises:
      UserError: ``products`` is not for these devices, or the members make no cross-layer transcoder.
    """

    config: TrainConfig  #: how to train
    dictionary: DictionaryConfig  #: what the members have in common; its ``k`` is the largest of theirs
    members: Sequence[Member]  #: the dictionaries; the mesh's ``member`` axis divides their number
    scales: Sequence[SiteScale]  #: each member's ``SiteScale``
    steps: int  #: length of the whole run, for the schedules
    mesh: Mesh  #: the devices
    #: form of the matrix products: "dense", or "rows" for a plain TopK (see ``sparse_products``); "auto" becomes the
    #: one that is faster.
    products: str = "auto"

    def __post_init__(self):
        # Settings at 0 that follow from sizes.
        rate = usual_learning_rate(self.dictionary.n_features)
        rates = [member.settings["learning_rate"] or rate for member in self.members]
        members = [
            dataclasses.replace(member, settings={**member.settings, "learning_rate": rate})
            for member, rate in zip(self.members, rates, strict=True)
        ]
        object.__setattr__(self, "members", members)
        object.__setattr__(self, "config", self.config.with_dead_tokens())
        if self.is_cross_layer:
            check_cross_layer(self.config, self.dictionary.kind, self.members, self.mesh.shape)
        products, sizes = "dense", (self.config.matmul, self.dictionary.n_features, self.dictionary.k)
        if is_plain_topk(self.kind):
            products = sparse_products.choose_form(self.products, self.mesh, *sizes)
        object.__setattr__(self, "products", products)

    @property
    def is_cross_layer(self) -> bool:
        """True if the members are the layers of one cross-layer transcoder."""
        return self.config.form in FORMS

    @property
    def kind(self) -> kinds.Kind:
        """The kind of all members."""
        return kinds.by_name(self.dictionary.kind)

    def facts(self, member: Member) -> Facts:
        """Return the fields of ``DictionaryConfig`` that follow from a member's settings of the kind."""
        return read_facts(self.kind, member.settings, self.config.of_kind(self.kind.name), self.dictionary.n_features)

    @property
    def platform(self) -> str:
        """Platform of the devices, such as "cpu"."""
        return self.mesh.devices.flat[0].platform

    @functools.cached_property
    def sites(self) -> list[tuple[str, str]]:
        """The distinct (input, target) pairs, in the order of a batch."""
        return list(dict.fromkeys((member.site, member.target) for member in self.members))

    @functools.cached_property
    def members_at_once(self) -> int:
        """Number of members that a device vectorises, see ``choose_members_at_once``."""
        sizes = len(self.members), self.config.batch, self.dictionary.n_features
        return choose_members_at_once(self.config.members_at_once, *sizes, self.mesh.shape, self.platform)

    @property
    def batch_sharding(self) -> NamedSharding:
        """Sharding of a batch [sites, B, D]: tokens over ``data``; sites over ``member`` if each member has its own.

        Where several of these take turns on a device, D is split over ``model``: each gets whole vectors in its turn.
        """
        # Otherwise members of one site would each need a copy of its values on their devices.
        by_member = "member" if len(self.sites) == len(self.members) else None
        width = math.gcd(self.dictionary.d_in, self.dictionary.d_out)
        in_turn = by_member and not self.is_cross_layer and len(self.members) > self.mesh.shape["member"]
        along_width = "model" if in_turn and self.mesh.shape["model"] > 1 else None
        return fitting_sharding(self.mesh, (len(self.sites), self.config.batch, width), by_member, "data", along_width)

    def rows_sharding(self, width: int) -> NamedSharding:
        """Sharding of rows that stay on the devices [sites, rows, D]: as a batch, and along D over ``model``.

        Devices of the axis ``model`` need whole vectors of a batch alone, which they send to one another.
        """
        along_width = fitting_spec(self.mesh.shape, (width,), "model")
        return NamedSharding(self.mesh, PartitionSpec(*self.batch_sharding.spec[:2], *along_width))

    def host_hyperparams(self) -> Hyperparams:
        """Return the members' hyperparameters as numpy arrays."""
        dtype, members, scales = self.config.state_dtype, self.members, self.scales

        # Also numbers that a plugin's kind derives from settings of other names, such as its k.
        settings = [
            {**member.settings, **{name: value for name, value in self.facts(member).items() if name != "groups"}}
            for member in members
        ]

        def column(name: str) -> np.ndarray:
            values = [of_member[name] for of_member in settings]
            return np.array(values, np.int32 if all(isinstance(value, int) for value in values) else dtype)

        # Once for a site, as a matrix is as large as a dictionary of D features.
        of_site = {
            (member.site, member.target): scale.metric_DxD for member, scale in zip(members, scales, strict=True)
        }
        metrics = [metric for site in self.sites if (metric := of_site[site]) is not None]
        return Hyperparams(
            learning_rate=column("learning_rate").astype(dtype),
            kind_params={name: column(name) for name in settings[0] if name not in ("learning_rate", "seed")},
            input_scale=np.array([scale.input for scale in scales], dtype),
            output_scale=np.array([scale.output for scale in scales], dtype),
            site_index=np.array([self.sites.index((member.site, member.target)) for member in members], np.int32),
            seed=column("seed"),
            metric_DxD=np.stack(metrics).astype(dtype) if metrics else None,
        )

    def _member_sharding(self, array: np.ndarray) -> NamedSharding:
        by_member = "member" if len(array) == len(self.members) else None
        return fitting_sharding(self.mesh, array.shape, by_member, *[None] * (array.ndim - 1))

    def abstract_hyperparams(self) -> Hyperparams:
        """Return shapes and shardings of the hyperparameters: members over ``member``."""
        return jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self._member_sharding(array)),
            self.host_hyperparams(),
        )

    @functools.cached_property
    def hyperparams(self) -> Hyperparams:
        """The hyperparameters, on the devices."""
        return jax.tree.map(lambda array: jax.device_put(array, self._member_sharding(array)), self.host_hyperparams())


def choose_members_at_once(
    max_members: int, members: int, tokens: int, features: int, axes: Mapping[str, int], platform: str
) -> int:
    """Return how many members a device vectorises; the others wait for their turn.

    On a CPU members go one by one: batched matrix products are slower there than their parts. Accelerators take as many
    as hold ``_AT_ONCE`` values of tokens by features: small products leave them idle between launches, products of that
    size do not.

    Args:
      max_members: maximum number; 0: what is best.
      members: number of members, which ``axes["member"]`` divides.
      tokens: tokens of a step, over all devices.
      features: features of a member, over all devices.
      axes: sizes of the mesh's axes.
      platform: platform of the devices, such as "cpu".

    Returns:
      A divisor of the number of members of a device.
    """
    local = members // axes["member"]
    if not max_members:
        # Activations [tokens, features] of one member, the largest array of a step.
        values = math.ceil(tokens / axes["data"]) * math.ceil(features / axes["model"])
        max_members = 1 if platform == "cpu" else max(_AT_ONCE // values, 1)
    return max(size for size in range(1, min(max_members, local) + 1) if local % size == 0)


def batch_parts(members: Sequence[Member]) -> Parts:
    """Return the sites of each part of a batch: the inputs and, if they differ, the targets."""
    pairs = list(dict.fromkeys((member.site, member.target) for member in members))
    inputs, targets = zip(*pairs, strict=True)
    return (inputs,) if inputs == targets else (inputs, targets)


def describe_stack(config: TrainConfig, rows: ScaledRows, members: Sequence[Member]) -> DictionaryConfig:
    """Return what the members have in common, with the largest of their k and the model of the activations."""
    sites = single_sites(site for member in members for site in (member.site, member.target))
    widths = {site: rows.d(one_of(site, rows.sites, "site in this store")) for site in sites}
    return dataclasses.replace(
        stack_shape(config, members[0].kind, members, widths),
        max_norm=rows.max_norm(members[0].site),
        model=rows.model.name,
        revision=rows.model.revision,
        fingerprint=rows.model.fingerprint,
        bos=getattr(rows, "bos", "auto"),  # synthetic vectors are of no text
    )


def stack_shape(
    config: TrainConfig, kind: str, members: Sequence[Member], widths: Mapping[str, int]
) -> DictionaryConfig:
    """Return what the members have in common before there are activations.

    Args:
      config: the settings.
      kind: kind of the dictionaries.
      members: the dictionaries.
      widths: width of each of their sites, and of the parts of joined ones.

    Raises:
      UserError: their sites differ in width, or their targets do, k or the groups do not fit the features, or two
        settings exclude each other.
    """
    shape, target_shape = (
        _common_shape(sites, widths) for sites in zip(*((m.site, m.target) for m in members), strict=True)
    )
    d_in, kind_object = sum(shape), kinds.by_name(kind)
    if kind_object.rebuilds_input and (config.form != "sae" or len(shape) > 1):
        raise UserError(
            f"--train.kinds={kind} explains the one site that it reads: use --train.form=sae, and no joined site"
        )
    features = config.features_of(d_in)
    member_facts = [read_facts(kind_object, member.settings, config.of_kind(kind), features) for member in members]
    # One static k serves all members: the program selects the largest, each keeps its own.
    facts = max(member_facts, key=lambda facts: facts.get("k", 0))
    _check_settings(config, kind_object, facts.get("k", 0), features)
    dictionary = DictionaryConfig(
        kind=kind,
        site=members[0].site,
        target="" if config.form == "sae" else members[0].target,
        d_in=d_in,
        target_width=sum(target_shape),
        n_features=features,
        skip=config.form in ("skip_transcoder", SKIP_FORM),
        centred=config.form == "sae",
        widths=shape if len(shape) > 1 else (),
        **facts,
    )
    if not type(kind_object).__module__.startswith("saejax."):
        _check_inference(kind_object, dictionary, config.of_kind(kind))
    return dictionary


def _common_shape(sites: Sequence[str], widths: Mapping[str, int]) -> tuple[int, ...]:
    """Return the widths of the parts of sites, one for a site that is not joined; a ``UserError`` if sites differ."""
    shapes = {site: tuple(widths[part] for part in site_parts(site)) for site in sites}
    if len(set(shapes.values())) > 1:
        listed = {site: shape if len(shape) > 1 else shape[0] for site, shape in shapes.items()}
        raise UserError(f"the sites of a stack must have one width, but have {listed}: train them in several runs")
    return shapes[sites[0]]


def read_facts(kind: kinds.Kind, values: Mapping[str, Any], settings: Any, n_features: int) -> Facts:
    """Return ``Kind.facts`` as Python's numbers, after a check: a user's kind may return anything.

    Args:
      kind: the kind.
      values: a member's settings, see ``Kind.facts``.
      settings: the settings of the kind alone.
      n_features: number of features F.

    Raises:
      UserError: a fact is unknown, k is not from 1 to the number of features, or groups do not ascend to it.
    """
    facts: dict[str, Any] = {**kind.facts(values, settings, n_features)}
    k, groups = facts.get("k", 0), facts.get("groups", ())
    problem = ""
    if unknown := sorted(facts.keys() - Facts.__annotations__):
        problem = f"{', '.join(unknown)}: expected some of {', '.join(Facts.__annotations__)}"
    elif not all(isinstance(number, int | np.integer) for number in (k, *groups)):
        problem = f"k={k!r} and groups={groups!r}: expected whole numbers"
    elif groups and not (groups[0] > 0 and groups[-1] == n_features and (np.diff(groups) > 0).all()):
        problem = f"groups={groups}: expected numbers that ascend to the {n_features} features"
    elif "k" in kind.reads and k == values["k"]:
        pass  # compared with the number of features where its flag is named
    elif ("k" in facts or "k" in kind.numbers) and not 1 <= k <= n_features:
        problem = f"k={k}: expected a whole number from 1 to the {n_features} features"
    if problem:
        raise UserError(f"the kind {kind.name} returns as facts {problem}")
    plain = Facts(k=int(k), groups=tuple(map(int, groups)), fires_above=float(facts.get("fires_above", 0.0)))
    return typing.cast(Facts, {name: value for name, value in plain.items() if name in facts})


def _check_inference(kind: kinds.Kind, config: DictionaryConfig, settings: Any) -> None:
    """Raise a ``UserError`` unless a finished dictionary of a user's kind can encode: training would be in vain."""

    def encode() -> jax.Array:
        """Encode two documents, and the first feature alone."""
        dictionary = Dictionary.initial(config, jax.random.key(0))
        x_BxTxD = jnp.zeros((2, 3, config.d_in))
        f_BxTxF = dictionary.encode(x_BxTxD)
        first_BxTx1 = dictionary.encode_features(x_BxTxD, jnp.zeros(1, jnp.int32))
        return jnp.where(dictionary.fires(f_BxTxF), f_BxTxF, first_BxTx1)

    try:
        shape = jax.eval_shape(encode).shape
    except Exception as error:  # the user's code may raise anything
        fields, advice = ", ".join(kind.numbers) or "none", ""
        is_read = {*kind.reads, *(field.name for field in dataclasses.fields(settings))}
        if is_read & {getattr(error, "name", None), *map(str, error.args)}:  # of an attribute, or a key
            advice = (
                f". At inference `numbers` has the fields of Kind.numbers alone ({fields}), not settings of training: "
                "read those in encode_in_training, or keep what encode needs in an array of `vectors`"
            )
        raise UserError(
            f"a trained dictionary of the kind {kind.name} could not encode: {type(error).__name__}: {error}{advice}"
        ) from error
    if shape != (2, 3, config.n_features):
        raise UserError(
            f"encode of the kind {kind.name} returns {list(shape)}: expected one activation for each feature"
        )
    _check_homogeneous(kind, config, settings)


def _check_homogeneous(kind: kinds.Kind, config: DictionaryConfig, settings: Any) -> None:
    """Raise a ``UserError`` if folding the inputs' scale away at the end of training would change the activations."""
    # Narrow inputs, of which a device has room for each number of features.
    widths = tuple(min(width, 8) for width in config.widths)
    d_in = sum(widths) or min(config.d_in, 8)
    small = dataclasses.replace(config, d_in=d_in, target_width=min(config.target_width, 8), widths=widths)
    arrays = Dictionary.initial(small, jax.random.key(0)).arrays
    starts = kind.start(settings)
    # Off their initial values, which are often 0, where each scale would do.
    moved = {name: arrays[name] + starts.get(name, 0.0) + 0.1 for name in ("b_enc_F", *kind.vectors)}
    arrays = kind.constrain(arrays | moved)
    # A power of two is exact, so that comparisons stay as they are; with a large one no constant is out of reach.
    factor = 1024
    folded = fold_input_scaling(kind, arrays, 1 / factor, 1 / factor)
    x_BxD = jax.random.normal(jax.random.key(1), (16, d_in))
    dictionary = Dictionary(small, "float32", **arrays)
    f_BxF, raw_BxF = dictionary.encode(x_BxD), Dictionary(small, "float32", **folded).encode(factor * x_BxD)
    if not (jnp.isfinite(f_BxF).all() and jnp.isfinite(raw_BxF).all()):
        raise UserError(f"the kind {kind.name} gives activations of NaN or infinity for inputs that are finite")
    tolerance = 1e-3 * float(jnp.abs(f_BxF).max())
    if not jnp.allclose(factor * f_BxF, raw_BxF, rtol=0.0, atol=factor * tolerance):
        raise UserError(
            f"activations of the kind {kind.name} are not homogeneous: with inputs, biases and thresholds {factor} "
            f"times as large they are not {factor} times as large, so folding the scale of the inputs away after "
            "training would change them; name arrays that are neither biases nor thresholds in `unscaled`"
        )
    if not jnp.allclose(f_BxF[:, :1], dictionary.encode_features(x_BxD, jnp.zeros(1, jnp.int32)), atol=tolerance):
        raise UserError(
            f"the kind {kind.name} has elementwise = True, but a feature that is encoded alone has another activation "
            "than among all: leave it out"
        )


def _check_settings(config: TrainConfig, kind: kinds.Kind, k: int, features: int) -> None:
    """Raise a ``UserError`` for settings that do not fit the shape or each other."""
    if k > features:
        raise UserError(f"--train.k={k} is more than the {features} features: lower it")
    if config.auxk and config.auxk_features > features:
        raise UserError(f"--train.auxk_features={config.auxk_features} is more than the {features} features: lower it")
    settings, usual = config.of_kind(kind.name), JumpReLUConfig().target_l0
    if isinstance(settings, JumpReLUConfig) and settings.l0_penalty != "target" and settings.target_l0 != usual:
        listed = ",".join(f"{value:g}" for value in settings.target_l0)
        raise UserError(
            f"--train.{kind.name}.target_l0={listed} has no effect with "
            f"--train.{kind.name}.l0_penalty={settings.l0_penalty}: use l0_penalty=target, or leave it out"
        )
    if kind.no_free_decoder and config.decoder_norm == "free":
        raise UserError(f"--train.decoder_norm=free {kind.no_free_decoder}: use unit")
    if config.resample_every and config.freeze != "none":
        raise UserError(f"--train.resample_every replaces what --train.freeze={config.freeze} keeps: use one of them")
    if config.freeze == "encoder" and kind.rebuilds_input:
        raise UserError(f"--train.freeze=encoder: a {kind.name} dictionary has none: leave it out, or freeze decoder")
    if config.widen != "random" and (not config.init_from or config.form != "sae"):
        raise UserError(
            f"--train.widen={config.widen} looks for what the SAE of --train.init_from={config.init_from} lacks, with "
            f"--train.form={config.form}: name an SAE, or use random"
        )
    if config.alignment and config.form != "sae":
        raise UserError(
            f"--train.alignment={config.alignment} aligns encoder and decoder, which in a {config.form} are of "
            "different sites: leave it out"
        )
    if config.alignment and kind.rebuilds_input:
        raise UserError(
            f"--train.alignment={config.alignment} aligns encoder and decoder: a {kind.name} dictionary has no "
            "encoder; leave it out"
        )


def check_divides(config: TrainConfig, n_features: int, members: int, axes: Mapping[str, int]) -> None:
    """Raise a ``UserError`` unless the mesh divides the batch, each member's ``n_features`` and the ``members``."""
    if config.batch % axes["data"]:
        raise UserError(f"--train.batch={config.batch} is not divisible by the {axes['data']} devices on the data axis")
    if n_features % axes["model"]:
        raise UserError(f"{n_features} features are not divisible by --mesh.model={axes['model']}")
    if members % axes["member"]:
        devices = math.prod(axes.values())
        fitting = [n for n in range(1, devices + 1) if members % n == 0 and devices % n == 0]
        raise UserError(
            f"--mesh.member={axes['member']} does not divide the stack's {members} members: with {devices} devices it "
            f"can be {', '.join(map(str, fitting))}"
        )


def check_cross_layer(config: TrainConfig, kind: str, members: Sequence[Member], axes: Mapping[str, int]) -> None:
    """Raise a ``UserError`` unless the members make a cross-layer transcoder that a mesh of these axes can train."""
    if kind not in CROSS_LAYER_KINDS:
        allowed = ", ".join(CROSS_LAYER_KINDS)
        raise UserError(f"--train.kinds={kind}: a {FORM} is one of {allowed}, which circuit-tracer can read")
    sites, expected = [member.site for member in members], [f"mlp_in.{layer}" for layer in range(len(members))]
    if sites != expected:
        flags = f"--train.sites=mlp_in.0-{max(len({*sites}) - 1, 1)}, and one value of each setting"
        raise UserError(f"a {FORM} has one encoder of every layer from 0, in order: give {flags}")
    if len(members) < 2:
        raise UserError(f"a {FORM} of one layer is a transcoder: use --train.form=transcoder, or name more sites")
    used = [f"--train.{name}={getattr(config, name)}" for name, off in _NOT_CROSS_LAYER.items()
            if getattr(config, name) != off]  # fmt: skip
    if nested := getattr(config.of_kind(kind), "nested", ()):
        used.append(f"--train.{kind}.nested={','.join(f'{share:g}' for share in nested)}")
    if used:
        raise UserError(f"{', '.join(used)}: not for a {FORM}: leave it out")
    if axes["member"] > 1:
        raise UserError(f"--mesh.member={axes['member']}: the layers of a {FORM} are one dictionary: use --mesh.model")
