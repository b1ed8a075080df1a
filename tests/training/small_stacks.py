"""Small stacks for the training tests: a trainer of any kind, batches with planted directions, and runs."""

import dataclasses

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from saejax.dictionaries import DictionaryConfig
from saejax.dictionaries.kinds import by_name
from saejax.parallel.mesh import AXES
from saejax.settings import TrainConfig
from saejax.settings.kinds import settings_of_kinds
from saejax.training.members import members
from saejax.training.step import SiteScale, Trainer
from saejax.training.train import trainer_of

D, F, B, STEPS = 16, 64, 32, 50
GROUPS = dict(matryoshka=dict(groups=(16, 32, F)))


def make_config(**changes) -> TrainConfig:
    """Settings, those of the kinds among them, under their names alone."""
    usual = dict(
        sites=("resid_post.1",),
        batch=B,
        k=(4,),
        learning_rate=(3e-3,),
        l1=(0.05,),
        l0_coefficient=(0.01,),
        dead_tokens=200,
    )
    given = usual | changes
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    kinds = {}
    for name, settings in settings_of_kinds().items():
        fields = {field.name for field in dataclasses.fields(settings)}
        kinds[name] = settings(**{key: value for key, value in given.items() if key in fields})
    unknown = given.keys() - names - {field.name for kind in kinds.values() for field in dataclasses.fields(kind)}
    assert not unknown, unknown
    return TrainConfig(own=kinds, **{key: value for key, value in given.items() if key in names})


def make_trainer(kind="topk", mesh=None, scale=0.5, steps=STEPS, **changes) -> Trainer:
    """A trainer of D -> F; lists among the changes make a stack."""
    config = make_config(**changes)
    stack = members(config, kind, config.sites)
    own = config.of_kind(kind)
    each = [by_name(kind).facts(member.settings, own, config.features or F) for member in stack]
    facts = {name: max(facts[name] for facts in each) for name in each[0]} | GROUPS.get(kind, {})
    dictionary = DictionaryConfig(
        kind=kind,
        site=stack[0].site,
        target="" if config.form == "sae" else stack[0].target,
        d_in=D,
        n_features=config.features or F,
        skip=config.form == "skip_transcoder",
        centred=config.form == "sae",
        **facts,
    )
    mesh = mesh or first_device()
    return trainer_of(config, kind, stack, mesh.shape)(
        config, dictionary, stack, mesh, steps, [SiteScale(scale, scale, np.full(D, 0.7))] * len(stack)
    )


def first_device() -> Mesh:
    """A mesh of one device."""
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)


def batches(count=STEPS, seed=0) -> np.ndarray:
    """Sparse sums of 40 directions and an offset, [count, B, D]."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(40, D))
    codes = rng.exponential(size=(count, B, 40)) * (rng.random((count, B, 40)) < 0.1)
    return (codes @ directions + 0.7).astype(np.float32)


def parts(trainer: Trainer, batch: np.ndarray) -> tuple[np.ndarray, ...]:
    """A batch as the trainer takes it: the same inputs at every site; a transcoder has them reversed as targets."""
    inputs = np.stack([batch] * len(trainer.sites))
    return (inputs,) if trainer.config.form == "sae" else (inputs, np.ascontiguousarray(inputs[..., ::-1]))


def run(trainer: Trainer, data: np.ndarray, state=None):
    """The state after these batches, from the initial or another one, and the metrics [M] of the last."""
    state = trainer.initial_state() if state is None else state
    for batch in data:
        placed = tuple(jax.device_put(part, trainer.batch_sharding) for part in parts(trainer, batch))
        state, metrics = trainer.step(state, placed)
        jax.block_until_ready(metrics)  # eight devices on two cores must not queue up steps
    return state, metrics
