"""Dictionaries: trained on activations, scored on texts, written for other tools."""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jax.sharding import Mesh

from saejax.activations.in_memory import Activations, capture
from saejax.activations.joined import single_sites
from saejax.activations.request import check_one_tokenizer
from saejax.activations.store import INDEX, Store, shard_file
from saejax.arguments import check_classes
from saejax.dictionaries import Dictionary, load_dictionary, rescale, save_dictionary, save_transcoders
from saejax.dictionaries.bos import follow_bos
from saejax.dictionaries.cross_layer import FORMS
from saejax.dictionaries.hashes import hash_dictionaries
from saejax.dictionaries.joined import join
from saejax.dictionaries.kinds import KINDS, PRETRAINED
from saejax.dictionaries.temporal import TemporalSAE
from saejax.errors import UserError, one_of
from saejax.evaluation.loss_recovered import Losses, recovered
from saejax.evaluation.parts import target_losses
from saejax.evaluation.reconstruction import Reconstruction, reconstruct
from saejax.evaluation.temporal import evaluate_texts
from saejax.files import fingerprint, read_object, write_json
from saejax.models.language_model import LanguageModel
from saejax.models.sites import OtherSite, decoder_site
from saejax.models.tokens import tokenize_in_pieces
from saejax.parallel.mesh import check_mesh, make_mesh
from saejax.progress import show_progress
from saejax.settings_from_keywords import lists_settings, make_config
from saejax.short_reprs import has_short_repr
from saejax.training.finetune import CleanBatches, check_can_finetune, finetune_member, finetuning_stack
from saejax.training.init_from import with_unit_rows
from saejax.training.inputs import store_source
from saejax.training.loop import Listener, TrainFolders, check_state_dtype, train_stack
from saejax.training.members import Member, choose_sites, make_members
from saejax.training.scales import SiteScale
from saejax.training.settings import TrainConfig
from saejax.training.stack import TrainStack, batch_parts, check_divides
from saejax.training.state import finish_dictionary
from saejax.training.thresholds import Calibration

# Settings of the stage that say what else is trained, other tools' names of parameters, and what to do here.
_NOT_HERE = dict(
    **dict.fromkeys(("kinds", "architecture"), "give kind="),
    **dict.fromkeys(("sites", "hook_name"), "give site="),
    pretrained="use saejax.load_dictionary",
    source="it trains on the activations that it is given",
    ce_every="it has no model: use saejax.evaluate",
    kl_steps="it has no model: use saejax.finetune",
)


@lists_settings(TrainConfig, but=(*_NOT_HERE, "kl_learning_rate"))
@check_classes
def train(
    acts: Activations | Store | str | Path,
    site: str = "",
    kind: str = "topk",
    *,
    folder: str | Path | None = None,
    mesh: Mesh | None = None,
    on_progress: Callable[[str], None] | None = print,
    **settings: Any,
) -> Dictionary:
    """Train a dictionary as the stage ``train`` does.

    Args:
      acts: result of ``capture``; or a store, or its folder.
      site: the site that it reads; may be left out where ``acts`` has one site. A transcoder (form="transcoder") of
        "mlp_in.L" predicts "mlp_out.L", or another site of the layer (target="mlp_act"); both must be in ``acts``.
      kind: one of ``saejax.dictionaries.kinds.kind_names()``.
      folder: folder of checkpoints, metrics and the dictionary, from which an interrupted run resumes. None:
        nothing is kept.
      mesh: the devices, such as ``lm.mesh`` or ``saejax.parallel.mesh.make_mesh(MeshConfig(model=2))``; None: all
        devices share the tokens.
      on_progress: takes lines that say how far it is; None: nobody is told.
      **settings: other fields of ``saejax.training.settings.TrainConfig``, such as k=32, expansion=8,
        learning_rate=1e-3. A warning is logged of k or l1 where the kind does not read it.

    Raises:
      UserError: a setting is unknown, out of range or a list of several values, the site is not there, the folder
        holds training on something else, or training diverges.
    """
    with tempfile.TemporaryDirectory(prefix="saejax-train-") as temporary:
        training = _prepare_training(acts, Path(temporary), site, kind, mesh, settings)
        names = [member.name for members in training.members.values() for member in members]
        if len(names) > 1:
            raise UserError(
                f"these settings make {len(names)} dictionaries ({', '.join(names)}), and this trains one: "
                "saejax.train_all trains them together"
            )
        (dictionary,) = _train(training, Path(folder or Path(temporary) / "train"), on_progress).values()
    return dictionary


@lists_settings(TrainConfig, but=(*_NOT_HERE, "kl_learning_rate"))
@check_classes
def train_all(
    acts: Activations | Store | str | Path,
    site: str | Sequence[str] = "",
    kind: str = "topk",
    *,
    folder: str | Path | None = None,
    mesh: Mesh | None = None,
    on_progress: Callable[[str], None] | None = print,
    **settings: Any,
) -> dict[str, Dictionary]:
    """Train a stack as the stage ``train`` does: the dictionaries of all values of settings in one program.

    Args:
      acts: as for ``train``.
      site: or several sites of one width.
      kind: as for ``train``.
      folder: as for ``train``.
      mesh: as for ``train``.
      on_progress: as for ``train``.
      **settings: as for ``train``; k, seed, learning_rate, expansion and others may be lists, such as seed=(1, 2, 3).

    Returns:
      The dictionaries by their names, such as "k16-seed1" or "resid_post.3-k16"; "" where there is one. Their features
      are split over the axis ``model`` of the mesh, as while they were trained.

    Raises:
      UserError: as for ``train``.
    """
    with tempfile.TemporaryDirectory(prefix="saejax-train-") as temporary:
        training = _prepare_training(acts, Path(temporary), site, kind, mesh, settings)
        return _train(training, Path(folder or Path(temporary) / "train"), on_progress)


@dataclasses.dataclass(frozen=True)
class _Training:
    """The dictionaries that ``train`` and ``train_all`` train, and the activations that they read."""

    store: Store
    #: settings and members, by the names of ``TrainConfig.each_size``.
    configs: Mapping[str, TrainConfig]
    members: Mapping[str, Sequence[Member]]
    mesh: Mesh


def _prepare_training(
    acts: Activations | Store | str | Path,
    temporary: Path,
    site: str | Sequence[str],
    kind: str,
    mesh: Mesh | None,
    settings: dict[str, Any],
) -> _Training:
    """Return the members that settings make; arrays are saved in a temporary folder. See ``train``."""
    mesh = mesh or make_mesh()
    check_mesh(mesh)
    settings |= dict(pretrained=kind) if kind == PRETRAINED else {}
    for name in _NOT_HERE.keys() & settings.keys():
        if settings[name] != "store":  # the one source that there is here
            raise UserError(f"saejax.train takes no {name}: {_NOT_HERE[name]}")
    form = settings.get("form", "sae")
    if form in FORMS:
        raise UserError(
            f"a {form} is no dictionary of one layer, which saejax.train returns: train it with the command saejax "
            f"train --train.form={form}, and open it with saejax.open_transcoders"
        )
    if isinstance(acts, Activations):
        store = acts.save(temporary / "capture")
    else:
        store = acts if isinstance(acts, Store) else Store.open(acts)
    if not site:
        # A transcoder's target is there, too.
        target = "" if form == "sae" else settings.get("target", TrainConfig.target)
        readable = [stored for stored in store.sites if stored.partition(".")[0] != target]
        if len(readable) > 1:
            raise UserError(f"there are activations of {', '.join(store.sites)}: name the site")
        site = next(iter(readable or store.sites))
    config = make_config(TrainConfig, kind, kinds=kind, sites=site, **settings)
    shared = {name for other in KINDS.values() for name in other.reads}
    for name in sorted(shared.intersection(settings).difference(KINDS[kind].reads)):
        logging.warning("%s=%s has no effect: dictionaries of the kind %s do not read it", name, settings[name], kind)
    sites, configs = choose_sites(config, list(store.sites)), config.each_size()
    members = {size: make_members(of_size, kind, sites, size) for size, of_size in configs.items()}
    check_state_dtype(config)
    return _Training(store, configs, members, mesh)


def _train(training: _Training, folder: Path, on_progress: Callable[[str], None] | None) -> dict[str, Dictionary]:
    """Return the dictionaries by their names, trained in a folder; see ``train_all``."""
    listener = Listener(on_progress or (lambda line: None))
    for size, members in training.members.items():
        config = training.configs[size]
        folders = dataclasses.replace(TrainFolders.inside(folder, members), size=size)
        folders.logs.mkdir(parents=True, exist_ok=True)
        _check_or_record_inputs(folders.logs, training.store, members, config.init_from)
        source = store_source(config, training.store, batch_parts(members), listener.say)
        train_stack(config, members, source, training.mesh, folders, listener)
    names = [member.name for members in training.members.values() for member in members]
    # What ``model`` splits may be larger than a device's memory; anything else may go where its next user has it.
    mesh = training.mesh if training.mesh.shape["model"] > 1 else None
    return {name: load_dictionary(folder / name, mesh=mesh) for name in names}


def _check_or_record_inputs(folder: Path, store: Store, members: Sequence[Member], init_from: str) -> None:
    """Check that a folder's training is on these activations and from this dictionary; record both if it is new.

    Its checkpoints tell with which settings they were made. A stage's folder has a hash of these inputs in its name.

    Raises:
      UserError: it is of others, whose dictionary would be returned.
    """
    shards = [store.folder / shard_file(INDEX, "record", shard) for shard in range(store.manifest.shards)]
    tokens = fingerprint([read_object(path, "checksums")["checksums"] for path in shards])
    read = dict.fromkeys(site for member in members for site in single_sites((member.site, member.target)))
    means = {site: store.mean(site).tolist() for site in read}
    inputs = dict(tokens=tokens, means=means, init_from=hash_dictionaries(init_from) if init_from else "")
    path = folder / "inputs.json"
    recorded: dict[str, Any] = read_object(path, *inputs) if path.exists() else inputs
    # Captured again, the same activations may differ by rounding.
    are_near = recorded["means"].keys() == means.keys() and all(
        np.linalg.norm(np.subtract(mean_D, recorded["means"][site])) <= 0.01 * np.linalg.norm(mean_D)
        for site, mean_D in means.items()
    )
    different = [] if are_near and recorded["tokens"] == tokens else ["activations"]
    different += ["init_from"] if recorded["init_from"] != inputs["init_from"] else []
    if different:
        raise UserError(
            f"{folder} holds training with other {' and '.join(different)}: name another folder, or delete it to "
            "train anew"
        )
    write_json(path, recorded)


@has_short_repr
@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores of a dictionary on some texts."""

    reconstruction: Reconstruction  #: explained variance, L0 and each feature's firing
    losses: Losses  #: cross-entropy and KL divergence with the dictionary's output in place of the site

    @property
    def explained_variance(self) -> float:
        """1 - sum |y - y_hat|^2 / sum |y - mean|^2."""
        return self.reconstruction.explained_variance

    @property
    def l0(self) -> float:
        """Mean number of features that fire on a token."""
        return self.reconstruction.l0

    @property
    def ce_recovered(self) -> float | None:
        """Share of cross-entropy recovered against the site's mean; None where that floor does no harm."""
        return recovered(self.losses.ce, "mean_ablated")


@check_classes
def evaluate(
    lm: LanguageModel,
    dictionary: Dictionary | TemporalSAE,
    texts: Sequence[str],
    *,
    mean_D: np.ndarray | None = None,
    other: LanguageModel | None = None,
) -> Evaluation:
    """Score a dictionary as the stage ``evaluate`` does, on texts that it was not trained on.

    Args:
      lm: the model that it was trained on.
      dictionary: an SAE, a transcoder, or a crosscoder, whose sites in ``lm`` are all replaced together; or a temporal
        SAE (``load_temporal``), which reads whole texts.
      texts: texts that are longer than the model's context are split.
      mean_D: mean of the target over training tokens, the floor of ``ce_recovered``. None: its mean over these texts.
      other: the second model (``--model.other``) of a crosscoder that reads sites of two; it reads the same tokens.

    Raises:
      UserError: the dictionary, or the mean, has another width than the model's site, the mean is not finite, or a
        second model is missing, not needed or reads other tokens.
    """
    lm = follow_bos(lm, [dictionary.config])
    config, site = dictionary.config, dictionary.site
    target = config.target or site
    acts = _capture_both(lm, other, texts, single_sites((site, target)))
    if max(map(len, acts.texts)) < 2:
        raise UserError("each text is one token, and losses are of the tokens that are predicted: give longer texts")
    if isinstance(dictionary, TemporalSAE):
        _check_widths(lm, dictionary.site, acts.values[site].shape[1], config.d_in, mean_D)
        return Evaluation(*evaluate_texts(lm, dictionary, acts.texts, mean_D))
    read = {name: join(config, acts.values) if config.widths else acts.values[name] for name in (site, target)}
    _check_widths(lm, site, read[site].shape[1], config.d_in, None)
    _check_widths(lm, target, read[target].shape[1], config.d_out, mean_D)

    # The model's rule, whoever trained the dictionary: as in the stage.
    def sink_norm(part: str) -> float:
        return other.sink_norm(str(decoder_site(part))) if other and OtherSite.names(part) else lm.sink_norm(part)

    dictionary = dictionary.with_sink_norms(sink_norm, replace=True)
    inside_N = np.asarray(dictionary.is_not_sink(read[site], read[target]))
    parts = [np.asarray(value_NxD)[inside_N] for value_NxD in read.values()]
    mean_D = parts[-1].astype(np.float64).mean(axis=0) if mean_D is None else mean_D
    (score,) = reconstruct([dictionary], [parts], lm.mesh)
    with show_progress("evaluate") as on_progress:
        (losses,) = target_losses(lm, [dictionary], acts.texts, mean_D, on_progress, other)
    return Evaluation(score, losses)


def _capture_both(
    lm: LanguageModel, other: LanguageModel | None, texts: Sequence[str], sites: Sequence[str]
) -> Activations:
    """Return activations at sites of a model and, where they are named so, of a second one on the same tokens."""
    of_second = [site for site in sites if OtherSite.names(site)]
    if of_second and other is None:
        raise UserError(f"the crosscoder reads {of_second[0]} of a second model: give that model as other=")
    if other is None:
        return capture(lm, texts, sites)
    if not of_second:
        raise UserError(f"other is given, but the dictionary reads {', '.join(sites)} of one model: leave other out")
    check_one_tokenizer(lm.source, other.source)
    context = min(lm.config.context, other.config.context)
    acts = capture(lm, texts, [site for site in sites if site not in of_second], context=context)
    second = capture(other.with_bos(lm.bos), texts, [str(decoder_site(site)) for site in of_second], context=context)
    if not all(map(np.array_equal, acts.texts, second.texts)):
        raise UserError(f"{lm.source.name} and {other.source.name} put different tokens in front of texts")
    values = {site: second[str(decoder_site(site))] for site in of_second}
    return dataclasses.replace(acts, values={**acts.values, **values})


def _check_widths(lm: LanguageModel, site: str, d: int, width: int, mean_D: np.ndarray | None) -> None:
    """Raise a ``UserError`` unless a dictionary's ``width`` there, and the mean, are the width d of a site."""
    mean_shape = (d,) if mean_D is None else np.shape(mean_D)
    for what, shape in {"the dictionary": (width,), "mean_D": mean_shape}.items():
        if shape != (d,):
            has = f"width {shape[0]}" if len(shape) == 1 else f"shape {shape}"
            raise UserError(f"{what} has the {has}, but {site} of {lm.source.name} has {d}: give one of this model")
    if mean_D is not None and not np.isfinite(mean_D).all():
        raise UserError("mean_D is NaN or infinite: expected finite numbers")


@has_short_repr
@dataclasses.dataclass(frozen=True)
class Finetuning:
    """A dictionary that was fine-tuned through the model, and the metrics of its steps."""

    dictionary: Dictionary  #: the fine-tuned dictionary
    kl_S: np.ndarray  #: KL(clean || replaced) of each step's text before the step, nats per token
    explained_variance_S: np.ndarray  #: explained variance on each step's text before the step


@lists_settings(TrainConfig, but=(*_NOT_HERE, "form", "target", "features", "expansion", "kl_learning_rate"))
@check_classes
def finetune(
    lm: LanguageModel,
    dictionary: Dictionary,
    texts: Sequence[str],
    *,
    steps: int | None = None,
    learning_rate: float = 5e-5,
    **settings: Any,
) -> Finetuning:
    """Fine-tune a trained dictionary through the model, on its error and the KL divergence that it causes.

    The last phase of training in Karvonen (2025, arXiv 2503.17272), there of 25 million tokens after 500 million; see
    ``saejax.training.finetune``. BatchTopK's threshold is calibrated anew. The devices are the model's.

    Args:
      lm: the model that it was trained on, in JAX.
      dictionary: an SAE or a transcoder.
      texts: training texts; texts that are longer than the model's context are split.
      steps: number of steps; None: one pass over the texts.
      learning_rate: learning rate of the first step, which falls linearly to 0; the default is the paper's.
      **settings: other fields of ``saejax.training.settings.TrainConfig`` that the loss reads, such as batch=4096
        (most tokens of a step, padding included), and the coefficients of kinds with a penalty, such as l1=2.0, which
        must be given.

    Raises:
      UserError: the dictionary cannot be fine-tuned, a setting is unknown, out of range or missing, or a loss is not
        finite.
    """
    lm = follow_bos(lm, [dictionary.config])
    check_can_finetune(lm, dictionary.config)
    if steps is not None and steps < 1:
        raise UserError(f"steps is {steps}: expected 1 or more, or None for one pass over the texts")
    if not 0 < learning_rate < np.inf:
        raise UserError(f"learning_rate is {learning_rate}: expected a number above 0")
    tokens, _ = tokenize_in_pieces(lm.tokenizer, texts, lm.config.context, lm.bos)
    documents = [ids_T[:length] for ids_T, length in zip(tokens.ids_BxT, tokens.lengths_B, strict=True)]
    config = _finetuning_config(dictionary, settings)
    check_divides(config, dictionary.config.n_features, 1, lm.mesh.shape)
    dictionary = with_unit_rows(dictionary.with_sink_norms(lm.sink_norm), "the dictionary").on_mesh(lm.mesh)
    described = dictionary.config
    (member,) = make_members(config, described.kind, [described.site])
    member = dataclasses.replace(member, target=described.target or described.site)
    raw = SiteScale(1.0, 1.0, np.zeros(described.d_out), described.max_norm, described.target_max_norm)
    stack = TrainStack(config, described, [member], [raw], 1, lm.mesh)
    batches = CleanBatches(finetuning_stack(stack, 0, 1, learning_rate), lm, documents)
    scale = batches.scale(raw)
    stack = dataclasses.replace(stack, scales=[scale])
    stack = finetuning_stack(stack, 0, batches.per_epoch if steps is None else steps, learning_rate)
    start = rescale.scale_for_training(dictionary, scale.input, scale.output, config.state_dtype)
    with show_progress("finetune") as on_progress:
        state, records = finetune_member(
            stack, start.arrays, batches, lm.params, lambda step, metrics: on_progress(step, stack.steps)
        )
    finished = finish_dictionary(stack, state, 0, Calibration(stack)(state, batches, stack.steps))
    kl_S, explained_S = (np.array([record[name] for record in records]) for name in ("kl", "explained_variance"))
    return Finetuning(Dictionary(described, dictionary.matmul_dtype, **finished.arrays), kl_S, explained_S)


def _finetuning_config(dictionary: Dictionary, settings: dict[str, Any]) -> TrainConfig:
    """Return the settings of fine-tuning: a dictionary's own, and those that are given.

    Raises:
      UserError: a setting is unknown, out of range, given though the dictionary has it, or missing.
    """
    config, kind = dictionary.config, dictionary.kind
    fixed: dict[str, Any] = dict(kinds=config.kind, sites=config.site, features=config.n_features)
    if config.target:
        form = "skip_transcoder" if config.skip else "transcoder"
        fixed |= dict(form=form, target=config.target.partition(".")[0])
    of_kind = {field.name for field in dataclasses.fields(kind.Settings)}
    fixed |= dict(k=config.k) if config.k and "k" in kind.reads else {}
    # Shares of the features, as the settings of kinds with nested groups have them.
    shares = tuple(count / config.n_features for count in config.groups)
    fixed |= {name: shares for name in ("groups", "nested") if shares and name in of_kind}
    if both := sorted(settings.keys() & {*fixed, "learning_rate", "form"}):
        raise UserError(f"saejax.finetune takes no {', '.join(both)} among its settings: the dictionary has them")
    needed = [name for name in ("k", "l1") if name in kind.reads] + [*{"l0_coefficient"} & of_kind]
    if missing := [name for name in needed if name not in {*fixed, *settings}]:
        raise UserError(
            f"a {config.kind} dictionary does not say with which {' and '.join(missing)} it was trained: give "
            f"{', '.join(f'{name}=' for name in missing)}, which keeps its features as sparse as they are"
        )
    return make_config(TrainConfig, config.kind, **fixed, **settings)


@check_classes
def export(folder: str | Path, dictionaries: Dictionary | Sequence[Dictionary], format: str = "saelens") -> None:
    """Write a dictionary, or transcoders of all layers, for another tool.

    Args:
      folder: where to; made if missing.
      dictionaries: one; for "circuit_tracer" a transcoder of every layer from 0.
      format: "saelens", "circuit_tracer", or "saejax", our own.

    Raises:
      UserError: the folder holds such files already, or the format has nothing like these.
    """
    if format == "circuit_tracer":
        save_transcoders(folder, [dictionaries] if isinstance(dictionaries, Dictionary) else dictionaries)
    elif isinstance(dictionaries, Dictionary):
        save_dictionary(folder, dictionaries, format)
    else:
        one_of(format, ("saejax", "saelens"), "format of a dictionary")
        raise UserError(f"the format {format} has one dictionary in a folder: export them one by one")
