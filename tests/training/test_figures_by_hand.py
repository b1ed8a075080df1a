"""Every figure that training reports, on four tokens of two dimensions, against values computed by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_stacks import first_device, make_config

from saejax.dictionaries import DictionaryConfig
from saejax.training.members import make_members
from saejax.training.scales import SiteScale
from saejax.training.stack import TrainStack
from saejax.training.state import init_state
from saejax.training.step import compile_step, member_loss

X = np.array([[2, 0], [0, 4], [-2, 0], [0, -4]], np.float32)
PARAMS = dict(
    W_enc_DxF=np.array([[1, 0, 0], [0, 1, 0]], np.float32),
    b_enc_F=np.array([0, 0, -1], np.float32),  # the third feature is dead
    W_dec_FxD=np.array([[1, 0], [0, 0.5], [1, 0]], np.float32),
    b_dec_D=np.zeros(2, np.float32),
)
# Activations (2, 0), (0, 4) and twice none; reconstructions (2, 0), (0, 2), 0, 0; squared errors 0, 4, 4, 16.
BY_HAND = dict(
    error=6.0,  # 24 / 4
    mse=6.0,
    sparsity=0.5,  # 0.5 x (2 x 1 + 4 x 0.5) / 4, weighted by the decoder's norms
    loss=6.5,
    l0=0.5,  # two firings on four tokens
    explained_variance=0.4,  # 1 - 24 / 40
)


def make_stack(**changes) -> TrainStack:
    config = make_config(batch=4, warmup=0.0, decay=0.0, l1=(0.5,), decoder_norm="free", **changes)
    dictionary = DictionaryConfig(kind="standard", site="resid_post.1", d_in=2, n_features=3, centred=True)
    members = make_members(config, "standard", config.sites)
    return TrainStack(config, dictionary, members, [SiteScale(1.0, 1.0, np.zeros(2))], 10, first_device())


def test_the_metrics_of_a_loss():
    stack = make_stack()
    hyper = jax.tree.map(lambda leaf: leaf[0], stack.hyperparams)
    params, dead_F = jax.tree.map(jnp.asarray, PARAMS), jnp.zeros(3, bool)
    x_BxD = jnp.asarray(X)
    loss, (metrics, fired_F, _) = member_loss(stack, params, x_BxD, x_BxD, hyper, jnp.int32(5), dead_F)
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(BY_HAND)
    assert float(loss) == pytest.approx(6.5) and fired_F.tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("name", "coefficient", "value"),
    [
        ("auxk", 0.1, 0.1 * 24 / 4),  # one dead feature, whose decoder row is 0, rebuilds nothing of the error
        ("decorrelation", 3.0, 3 * 2 * (2 / 3) ** 2 / 6),  # of six pairs, two have the covariance -2 / 3
        ("alignment", 0.1, 0.1 * (0 + 0 + 1)),  # cosines 1, 1 and, of a zero column, 0
    ],
)
def test_further_terms(name, coefficient, value):
    stack = make_stack(**{name: coefficient})
    hyper = jax.tree.map(lambda leaf: leaf[0], stack.hyperparams)
    params, dead_F = jax.tree.map(jnp.asarray, PARAMS), jnp.array([False, False, True])
    if name == "auxk":
        params |= dict(b_enc_F=jnp.array([0.0, 0, 1]), W_dec_FxD=params["W_dec_FxD"].at[2].set(0.0))
    _, (metrics, *_) = member_loss(stack, params, jnp.asarray(X), jnp.asarray(X), hyper, jnp.int32(5), dead_F)
    assert float(metrics[name]) == pytest.approx(value, rel=1e-5)


def test_the_metrics_of_an_update():
    """Share of dead features, learning rate, and the norm of a gradient that is written out."""
    stack = make_stack(dead_tokens=8, learning_rate=(0.25,))
    state = init_state(stack)
    state = dataclasses.replace(
        state,
        params={name: jnp.asarray(array)[None] for name, array in PARAMS.items()},
        silent_MxF=jnp.array([[0, 4, 8]], jnp.int32),
    )
    after, metrics = compile_step(stack)(state, stack.hyperparams, (jnp.asarray(X)[None],))
    assert float(metrics["dead"][0]) == pytest.approx(1 / 3) and float(metrics["learning_rate"][0]) == 0.25
    assert after.silent_MxF.tolist() == [[0, 0, 12]]
    # Errors y_hat - y: (0, 0), (0, -2), (2, 0), (0, 4). To activations: error x W_dec x 2 / 4 + 0.5 x |W_dec| / 4.
    to_f1, to_f2 = 0 + 0.125, -2 * 0.5 / 2 + 0.0625
    grads = [
        [to_f1 * 2, to_f2 * 4],  # W_enc: x times those, where features fire
        [to_f1, to_f2],  # b_enc
        [0.5 * 2 / 4, -2 * 4 / 2 + 0.5 * 4 / 4],  # W_dec: the penalty's part alone, and with f times the error
        [0 + 2 / 2 - to_f1, (-2 + 4) / 2 - to_f2],  # b_dec: errors, less what goes to the centred input
    ]
    assert float(metrics["gradient_norm"][0]) == pytest.approx(np.linalg.norm(grads), rel=1e-5)
