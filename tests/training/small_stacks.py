"""Small stacks for the training tests: a stack of any kind, batches with planted directions, and runs."""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from saejax.dictionaries import DictionaryConfig
from saejax.dictionaries.kinds import by_name, settings_of_kinds
from saejax.parallel.mesh import AXES
from saejax.training.members import make_members
from saejax.training.scales import SiteScale
from saejax.training.settings import TrainConfig
from saejax.training.stack import TrainStack
from saejax.training.state import init_state
from saejax.training.step import compile_step

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
        warmup=2,
        features=F,
    )
    values = usual | changes
    values["features"] = (values["features"],)
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    kinds = {}
    for name, settings in settings_of_kinds().items():
        fields = {field.name for field in dataclasses.fields(settings)}
        kinds[name] = settings(**{key: value for key, value in values.items() if key in fields})
    unknown = values.keys() - names - {field.name for kind in kinds.values() for field in dataclasses.fields(kind)}
    assert not unknown, unknown
    return TrainConfig(by_kind=kinds, **{key: value for key, value in values.items() if key in names})


def make_stack(kind="topk", mesh=None, scale=0.5, steps=STEPS, products="auto", d_out=D, **changes) -> TrainStack:
    """Dictionaries of D -> F -> D; lists among the changes make several members."""
    config = make_config(**changes)
    members = make_members(config, kind, config.sites)
    own = config.of_kind(kind)
    each = [by_name(kind).facts(member.settings, own, config.features_of(D)) for member in members]
    facts = {name: max(facts[name] for facts in each) for name in each[0]} | GROUPS.get(kind, {})
    dictionary = DictionaryConfig(
        kind=kind,
        site=members[0].site,
        target="" if config.form == "sae" else members[0].target,
        d_in=D,
        target_width=d_out,
        n_features=config.features_of(D),
        skip=config.form.startswith("skip_"),
        centred=config.form == "sae",
        **facts,
    )
    scales = [SiteScale(scale, scale, np.full(d_out, 0.7))] * len(members)
    return TrainStack(config, dictionary, members, scales, steps, mesh or first_device(), products)


def first_device() -> Mesh:
    """A mesh of one device."""
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)


def batches(count=STEPS, seed=0) -> np.ndarray:
    """Sparse sums of 40 directions and an offset, [count, B, D]."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(40, D))
    codes = rng.exponential(size=(count, B, 40)) * (rng.random((count, B, 40)) < 0.1)
    return (codes @ directions + 0.7).astype(np.float32)


def parts(stack: TrainStack, batch: np.ndarray) -> tuple[np.ndarray, ...]:
    """A batch as a step takes it: the same inputs at every site; a transcoder has them reversed as targets."""
    inputs = np.stack([batch] * len(stack.sites))
    return (inputs,) if stack.config.form == "sae" else (inputs, np.ascontiguousarray(inputs[..., ::-1]))


compiled = functools.cache(compile_step)  # of one stack once, for the tests of a file


def step(stack: TrainStack, state, batch, like: TrainStack | None = None):
    """One step on a batch of ``parts``, by the program of a stack that differs in hyperparameters alone."""
    placed = tuple(jax.device_put(part, stack.batch_sharding) for part in batch)
    return compiled(like or stack)(state, stack.hyperparams, placed)


def train(stack: TrainStack, data, state=None, like: TrainStack | None = None):
    """The state after these batches of parts, from the initial or another one, and the metrics [M] of the last."""
    state = init_state(stack) if state is None else state
    for batch in data:
        state, metrics = step(stack, state, batch, like)
        jax.block_until_ready(metrics)  # eight devices on two cores must not queue up steps
    return state, metrics


def run(stack: TrainStack, data: np.ndarray, state=None, like: TrainStack | None = None):
    """The same after the ``parts`` of these batches."""
    return train(stack, (parts(stack, batch) for batch in data), state, like)
