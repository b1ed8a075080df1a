"""The check of a first run on an accelerator: it must notice a wrong gradient."""

import jax
import pytest

from benchmarks import gpu_check
from saejax.dictionaries.kinds import by_name


@pytest.mark.parametrize("kind", ["jumprelu", "batchtopk"])
def test_gradients_agree_with_finite_differences(kind):
    assert gpu_check.check_gradient(kind)


@pytest.mark.usefixtures("cold_programs")
def test_a_broken_gradient_is_noticed(monkeypatch, capsys):
    """The forward pass is right, and a fifth is lost on the way back."""

    @jax.custom_vjp
    def broken(pre_BxF):
        return jax.nn.relu(pre_BxF)

    broken.defvjp(lambda pre: (jax.nn.relu(pre), pre > 0), lambda positive, ct: (0.8 * ct * positive,))
    standard = type(by_name("standard"))
    encode = lambda self, member, pre, projected, numbers, settings: (broken(pre), pre.min())  # noqa: E731
    monkeypatch.setattr(standard, "encode_in_training", encode)
    assert not gpu_check.check_gradient("standard")
    assert "WRONG gradient standard" in capsys.readouterr().out
