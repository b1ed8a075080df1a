"""The compiler's setting without which results on CPUs are wrong."""

import os
import re
import subprocess
import sys
import warnings

import jax
import pytest

from saejax.xla import FLAG, PRODUCTS, avoid_wrong_programs

# The last of many rows: multiplied by the identity, squared and added up.
ROWS = """
import numpy as np
rows_Nx3 = np.zeros((32769, 3), np.float32)
rows_Nx3[:, 0] = np.arange(len(rows_Nx3))
square = lambda row_3: jnp.sum((jnp.eye(3) @ row_3) ** 2)
print(float(jax.jit(jax.vmap(square))(rows_Nx3)[-1]) == 32768.0**2)
"""
FIRST = "import warnings; warnings.simplefilter('error'); import saejax, jax, jax.numpy as jnp"


def run(code: str, flags: str = "") -> subprocess.CompletedProcess:
    env = os.environ | dict(XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("flags", ["", "--xla_cpu_max_isa=AVX2"])
def test_sums_of_products_of_many_rows_are_right(flags):
    done = run(FIRST + ROWS + "import os; print(os.environ['XLA_FLAGS'])", flags)
    assert done.stdout.split("\n", 1) == ["True", f"{flags} {PRODUCTS}".strip() + "\n"], done.stderr


def test_a_setting_of_the_users_stays_and_a_warning_comes_where_it_is_too_late(monkeypatch):
    """By what an import calls, here where JAX has started."""
    assert len(jax.devices()) == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mine in (f"{FLAG}-reduce", PRODUCTS):
            monkeypatch.setenv("XLA_FLAGS", mine)
            avoid_wrong_programs()
            assert os.environ["XLA_FLAGS"] == mine
    monkeypatch.setenv("XLA_FLAGS", "")
    with pytest.warns(UserWarning, match=f"set XLA_FLAGS={re.escape(PRODUCTS)}$"):
        avoid_wrong_programs()
    assert os.environ["XLA_FLAGS"] == ""
