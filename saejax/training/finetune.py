"""Fine-tuning through the model: a short phase after training, on the error and a KL divergence (Karvonen, 2025).

    loss = (error + w KL(clean || replaced)) / 2 + the kind's penalty and further terms,      w = error / KL, a constant

The KL divergence is of the model's next-token distributions: of the clean model, and with the dictionary's output in
place of its target at all tokens but attention sinks. The factor w, of each batch its own, makes both weigh alike; as
the sum is as large as the error, penalties keep their coefficients (arXiv 2503.17272, and its code). The learning rate
falls linearly to 0, Adam starts anew, and the model's weights stay as they are. AuxK, decorrelation, alignment and
resampling are left out.

A step takes whole documents of at most ``batch`` tokens, padding included: the layers below the target and the clean
model run first, then the dictionary on the tokens that it replaces, then the layers above, forwards and backwards.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.activations.joined import mean_norm
from saejax.dictionaries import DictionaryConfig
from saejax.dictionaries.kinds.base import Arrays
from saejax.errors import Interrupted, UserError
from saejax.evaluation import programs
from saejax.evaluation.loss_recovered import place_documents
from saejax.models import decoder
from saejax.models.config import TorchConfig
from saejax.models.language_model import LanguageModel
from saejax.models.lengths import even_batches, round_length
from saejax.models.sites import Site
from saejax.models.split import SplitPoint
from saejax.parallel.collectives import process_count
from saejax.parallel.mesh import BY_DOCUMENT, document_devices, fitting_sharding, sharding
from saejax.training.init_from import put_member
from saejax.training.scales import SiteScale
from saejax.training.stack import Hyperparams, TrainStack
from saejax.training.state import TrainState, apply_update, init_state, state_shardings
from saejax.training.step import MemberBatch, loss_terms

_PROGRAM = 8192  # tokens that run in the time in which the programs of another shape are compiled, roughly
_PROGRESS_SECONDS = 5.0
_LEAST_KL = 1e-8  # nats: below, rounding makes up the divergence
_ORDER = 3  # stream of random numbers that the order of documents is drawn from
# Settings that make no part of this phase.
_OFF: Mapping[str, Any] = dict(
    warmup=0, decay=1.0, penalty_warmup=0.0, auxk=0.0, decorrelation=0.0, alignment=0.0, resample_every=0
)


def finetune_members(
    stack: TrainStack,
    state: TrainState,
    lm: LanguageModel,
    documents: Sequence[np.ndarray],
    say: Callable[[str], None] = print,
    stopping: Callable[[], bool] = lambda: False,
) -> tuple[TrainState, list[list[dict[str, float]]]]:
    """Fine-tune the members of a stack, one after the other, as ``--train.kl_steps`` asks.

    Args:
      stack: what was trained.
      state: the state after training; its parameters are replaced.
      lm: the model, on the devices of the stack.
      documents: token ids of the training text.
      say: logs lines of progress.
      stopping: as for ``finetune_member``.

    Returns:
      The state, and the metrics of each member and step.

    Raises:
      UserError: as for ``finetune_member`` and ``CleanBatches``.
      Interrupted: asked to stop; nothing is kept.
    """
    records = list[list[dict[str, float]]]()
    for index, member in enumerate(stack.members):
        single = finetuning_stack(stack, index, stack.config.kl_steps, stack.config.kl_learning_rate)
        batches = CleanBatches(single, lm, documents)
        report = _Progress(f"fine-tuning {member.name}".rstrip(), single.steps, say)
        arrays = {name: array_Mx[index] for name, array_Mx in state.params.items()}
        tuned, of_member = finetune_member(single, arrays, batches, lm.params, report, stopping)
        put_member(state, index, _of_member(tuned.params))
        records.append(of_member)
    return state, records


class _Progress:
    """Lines of progress: of the first and the last step, and every few seconds."""

    def __init__(self, title: str, steps: int, say: Callable[[str], None]):
        self._title, self._steps, self._say, self._last = title, steps, say, -math.inf

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Say how far it is, if a line is due."""
        if step in (1, self._steps) or time.monotonic() - self._last > _PROGRESS_SECONDS:
            self._last = time.monotonic()
            self._say(
                f"{self._title}: step {step} of {self._steps}, KL divergence {metrics['kl']:.4f}, explained variance "
                f"{metrics['explained_variance']:.4f}"
            )


class CleanBatch(NamedTuple):
    """Documents in the clean model, and the tokens at which a dictionary's output replaces its target."""

    stream_BxTxX: jax.Array  #: the stream entering the layers above, see ``SplitPoint.run_prefix``
    #: x_BxTxD and y_BxTxO: raw values of the site that the dictionary reads, and of its target.
    x_BxTxD: jax.Array
    y_BxTxO: jax.Array
    left_BxTxX: jax.Array  #: the clean model's stream leaving the last layer
    #: ids_BxT and lengths_B: token ids of the documents, and their number of tokens.
    ids_BxT: jax.Array
    lengths_B: jax.Array
    predicted: jax.Array  #: number of predicted tokens
    replaced: jax.Array  #: number of replaced tokens
    index_N: jax.Array  #: the replaced tokens, as indices among the B T tokens, filled up by ``_fill_up``
    place_BxT: jax.Array  #: the place of each token among the replaced ones; -1: it keeps its value


def check_can_finetune(lm: LanguageModel, config: DictionaryConfig) -> None:
    """Raise a ``UserError`` unless dictionaries of this configuration can be fine-tuned through the model."""
    reason = ""
    if isinstance(lm.config, TorchConfig):
        reason = f"{lm.source.name} runs in PyTorch, through which this loss has no gradient: use a model in JAX"
    elif config.widths:
        reason = f"the crosscoder of {config.site} replaces several sites: give a dictionary of one"
    elif config.input_norm:
        reason = f"the dictionary normalises each token (input_norm={config.input_norm}): give one that does not"
    elif process_count() > 1:
        reason = "it runs in one process, and there are several"
    if reason:
        raise UserError(f"no fine-tuning through the model: {reason}")
    for site, expected in ((config.site, config.d_in), (config.target or config.site, config.d_out)):
        width = Site.parse(site).check(lm.config).width(lm.config)
        if width != expected:
            raise UserError(
                f"the dictionary has the width {expected}, but {site} of {lm.source.name} has {width}: give one of "
                "this model"
            )


def finetuning_stack(stack: TrainStack, index: int, steps: int, learning_rate: float) -> TrainStack:
    """Return what is fine-tuned, as a stack of its own.

    Args:
      stack: what was trained.
      index: index of the member.
      steps: number of steps.
      learning_rate: learning rate of the first one, above 0.
    """
    member = stack.members[index]
    return dataclasses.replace(
        stack,
        config=dataclasses.replace(stack.config, **_OFF),
        members=[dataclasses.replace(member, settings={**member.settings, "learning_rate": learning_rate})],
        scales=[stack.scales[index]],
        steps=steps,
        products="dense",  # the other form leaves out activations below 0, which a signed dictionary has
    )


class CleanBatches:
    """The batches of fine-tuning, by step: documents of like length, each epoch's batches in another random order.

    Args:
      stack: result of ``finetuning_stack``.
      lm: the model.
      documents: token ids.

    Raises:
      UserError: no document has two tokens.
    """

    def __init__(self, stack: TrainStack, lm: LanguageModel, documents: Sequence[np.ndarray]):
        self._lm, self._seed = lm, stack.config.seed[0]
        self._documents = [document for document in documents if len(document) > 1]
        if not self._documents:
            raise UserError("no text for fine-tuning has two tokens, of which one predicts the other: give longer ones")
        (member,), (scale,) = stack.members, stack.scales
        target, reads = (Site.parse(site).check(lm.config) for site in (member.target, member.site))
        self.point = SplitPoint(lm.config, target, reads, lm.mesh)
        limits = [scale.max_norm, scale.max_norm if member.target == member.site else scale.target_max_norm]
        self._limits = jax.device_put([np.float32(limit) for limit in limits], sharding(lm.mesh))
        lengths_N = np.array([round_length(len(document)) for document in self._documents], np.int64)
        # As for one device, so that a step has the same documents on any.
        self._plan = even_batches(lengths_N, stack.config.batch, 1, _PROGRAM)
        self.per_epoch = len(self._plan)

    def clean(self, step: int) -> CleanBatch:
        """Return the batch of a step.

        Raises:
          UserError: all its tokens are attention sinks.
        """
        epoch, place = divmod(step, self.per_epoch)
        rng = np.random.default_rng([self._seed, _ORDER, epoch])
        chosen, rows, length = self._plan[rng.permutation(self.per_epoch)[place]]
        devices = document_devices(self._lm.mesh)
        rows = -(-rows // devices) * devices
        documents = [self._documents[index] for index in chosen]
        ids_BxT, lengths_B, predicted = place_documents(self._lm, documents, rows, length)
        params = self._lm.params
        stream_BxTxX, x_BxTxD, y_BxTxO, inside_BxT = programs.head(self.point, params, ids_BxT, *self._limits)
        left_BxTxX = programs.tail(self.point, params, stream_BxTxX, y_BxTxO)
        # Rows that fill up a batch are no documents.
        is_text_BxT = np.arange(length)[None] < np.asarray(lengths_B)[:, None]
        is_text_BxT[len(documents) :] = False
        replaced_N = np.flatnonzero(np.asarray(inside_BxT) & is_text_BxT)
        place_BxT = np.full((rows, length), -1, np.int32)
        place_BxT.flat[replaced_N] = np.arange(len(replaced_N))
        data = np.float32(predicted), np.float32(len(replaced_N)), _fill_up(replaced_N), place_BxT
        placed = jax.device_put(data, sharding(self._lm.mesh))
        return CleanBatch(stream_BxTxX, x_BxTxD, y_BxTxO, left_BxTxX, ids_BxT, lengths_B, *placed)

    def batch(self, step: int) -> tuple[jax.Array, ...]:
        """Return the inputs [1, N, D] of a step, and for a transcoder the targets, as ``Calibration`` reads them."""
        clean = self.clean(step)
        values = [clean.x_BxTxD, clean.y_BxTxO] if self.point.reads != self.point.site else [clean.x_BxTxD]
        return tuple(_rows(value_BxTxD, clean.index_N)[None] for value_BxTxD in values)

    def scale(self, raw: SiteScale) -> SiteScale:
        """Return a scale with factors that bring the values of the first batch to a mean norm of sqrt(d)."""
        values = [np.asarray(value_1xNxD[0], np.float64) for value_1xNxD in self.batch(0)]
        sites = [self.point.reads, self.point.site]
        factors = [
            math.sqrt(value_NxD.shape[1]) / mean_norm(str(site), value_NxD)
            for site, value_NxD in zip(sites, values, strict=False)
        ]
        return dataclasses.replace(raw, input=factors[0], output=factors[-1])


def finetune_member(
    stack: TrainStack,
    arrays: Arrays,
    batches: CleanBatches,
    params: decoder.Params,
    on_step: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None,
    stopping: Callable[[], bool] = lambda: False,
) -> tuple[TrainState, list[dict[str, float]]]:
    """Fine-tune one dictionary through the model.

    Args:
      stack: result of ``finetuning_stack``.
      arrays: the parameters of training to start from, in scaled units.
      batches: the batches.
      params: parameters of the decoder.
      on_step: called after each step with the number of steps done and its metrics.
      stopping: returns whether the process was asked to stop.

    Returns:
      The state, with an axis over its one member, and the metrics of each step: those of training, ``kl`` in nats, and
      ``tokens``, the number of tokens that were replaced.

    Raises:
      UserError: a loss or a gradient is not finite.
      Interrupted: asked to stop; nothing is kept.
    """
    # Adam's means of training are of another loss.
    state = init_state(stack)
    put_member(state, 0, arrays)
    step_fn = compile_finetune_step(stack, batches.point)
    hyper, records = _of_member(stack.hyperparams), list[dict[str, float]]()
    for step in range(stack.steps):
        if stopping():
            raise Interrupted(
                f"stopped at step {step} of {stack.steps} of fine-tuning; what was trained before is saved: run the "
                "same command to begin it again"
            )
        state, values = step_fn(state, hyper, params, batches.clean(step))
        # Read at once: the next batch waits for the device anyway, to learn which of its tokens are sinks.
        records.append({name: float(value) for name, value in values.items()})
        for name, value in records[-1].items():
            if not np.isfinite(value):
                rate = stack.members[0].settings["learning_rate"]
                raise UserError(
                    f"{name} is {value} at step {step + 1} of fine-tuning: lower its learning rate of {rate:g}"
                )
        on_step(step + 1, records[-1])
    return state, records


def compile_finetune_step(stack: TrainStack, point: SplitPoint) -> Callable[..., tuple[TrainState, Arrays]]:
    """Return ``finetune_step`` of a stack of one member, jitted; the state is donated."""
    placed = state_shardings(stack), sharding(stack.mesh)
    return jax.jit(functools.partial(finetune_step, stack, point), donate_argnums=0, out_shardings=placed)


def finetune_step(
    stack: TrainStack,
    point: SplitPoint,
    state: TrainState,
    hyper: Hyperparams,
    params: decoder.Params,
    batch: CleanBatch,
) -> tuple[TrainState, Arrays]:
    """Do one step; to be traced.

    Args:
      stack: result of ``finetuning_stack``.
      point: the dictionary's target, where the model is split.
      state: the state before the step, with an axis over the one member.
      hyper: the member's hyperparameters, without that axis.
      params: parameters of the decoder.
      batch: the documents.

    Returns:
      The next state, and metrics, scalars.
    """
    member = _of_member(state)
    loss = functools.partial(finetune_loss, stack, point, hyper=hyper, lm_params=params, batch=batch)
    grads, (metrics, fired_F) = jax.grad(loss, has_aux=True)(member.params)
    tokens = len(batch.index_N)
    after, of_update = apply_update(stack, member, grads, fired_F, hyper.learning_rate, tokens)
    return jax.tree.map(lambda leaf: leaf[None], after), metrics | of_update


def finetune_loss(
    stack: TrainStack,
    point: SplitPoint,
    params: Arrays,
    hyper: Hyperparams,
    lm_params: decoder.Params,
    batch: CleanBatch,
) -> tuple[jax.Array, tuple[Arrays, jax.Array]]:
    """Return the loss, and (metrics, whether each feature fired on any token); see ``finetune_step``.

    Args:
      stack: result of ``finetuning_stack``.
      point: the dictionary's target, where the model is split.
      params: the dictionary's parameters, in scaled units.
      hyper: its hyperparameters.
      lm_params: parameters of the decoder.
      batch: the documents.
    """
    dtype, dead_F = stack.config.state_dtype, jnp.zeros(stack.dictionary.n_features, bool)
    x_NxD, y_NxO = (_rows(value_BxTxD, batch.index_N).astype(dtype) for value_BxTxD in (batch.x_BxTxD, batch.y_BxTxO))
    by_token = fitting_sharding(stack.mesh, x_NxD.shape, BY_DOCUMENT, None)
    x_NxD, y_NxO = lax.with_sharding_constraint((x_NxD * hyper.input_scale, y_NxO * hyper.output_scale), by_token)
    parts = loss_terms(stack, params, MemberBatch(x_NxD, y_NxO, hyper, jnp.int32(0), dead_F))
    y_hat_NxO = (y_NxO - parts.residual_BxO) / hyper.output_scale
    # Where a token keeps its value, its place is -1: the first reconstruction is read, and not used.
    value_BxTxO = jnp.where(
        batch.place_BxT[..., None] >= 0,
        y_hat_NxO[jnp.maximum(batch.place_BxT, 0)].astype(batch.y_BxTxO.dtype),
        batch.y_BxTxO,
    )
    left_BxTxX = point.run_suffix(lm_params, batch.stream_BxTxX, value_BxTxO)
    streams_ExBxTxX = jnp.stack([batch.left_BxTxX, left_BxTxX])
    _, kl_CxExB = programs.compare(point.config, lm_params, streams_ExBxTxX, batch.ids_BxT, batch.lengths_B)
    kl, error = jnp.sum(kl_CxExB[:, 1]) / batch.predicted, parts.terms["error"]
    # A constant: with its gradient the sum would be twice the error, and the divergence would have no part in it.
    weight = lax.stop_gradient(error / jnp.maximum(kl, _LEAST_KL))
    rest = [term for name, term in parts.terms.items() if name != "error"]
    loss = (error + weight.astype(error.dtype) * kl) / 2 + sum(rest, jnp.zeros((), error.dtype))
    return loss, (parts.metrics(loss, y_NxO) | dict(kl=kl, tokens=batch.replaced), parts.firings_F > 0)


def _rows(value_BxTxD: jax.Array, index_N: jax.Array) -> jax.Array:
    """Return the values [N, D] of some tokens."""
    return value_BxTxD.reshape(-1, value_BxTxD.shape[-1])[index_N]


def _of_member(tree: Any) -> Any:
    """Return arrays of one member without their axis over members."""
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _fill_up(replaced_N: np.ndarray) -> np.ndarray:
    """Return the replaced tokens and, after them, at most a 32nd of them again, which count twice in the error.

    Their number is a size of the program, of which there should be few.
    """
    if not len(replaced_N):
        raise UserError("all tokens of a batch of fine-tuning are attention sinks: give longer texts")
    step = 2 ** max(len(replaced_N).bit_length() - 6, 0)
    return np.resize(replaced_N, -(-len(replaced_N) // step) * step).astype(np.int32)
