"""The compiler's setting without which results on CPUs are wrong."""

import os
import subprocess
import sys

import pytest

from saejax.xla import FLAG, PRODUCTS

# The last of many rows: multiplied by the identity, squared and added up.
ROWS = """
import numpy as np
rows_Nx3 = np.zeros((32769, 3), np.float32)
rows_Nx3[:, 0] = np.arange(len(rows_Nx3))
square = lambda row_3: jnp.sum((jnp.eye(3) @ row_3) ** 2)
print(float(jax.jit(jax.vmap(square))(rows_Nx3)[-1]) == 32768.0**2)
"""
FIRST = "import warnings; warnings.simplefilter('error'); import saejax, jax, jax.numpy as jnp"
LAST = "import jax, jax.numpy as jnp; jnp.ones(1); import saejax"


def run(code: str, flags: str = "") -> subprocess.CompletedProcess:
    env = os.environ | dict(XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("flags", ["", "--xla_cpu_max_isa=AVX2"])
def test_sums_of_products_of_many_rows_are_right(flags):
    done = run(FIRST + ROWS + "import os; print(os.environ['XLA_FLAGS'])", flags)
    assert done.stdout.split("\n", 1) == ["True", f"{flags} {PRODUCTS}".strip() + "\n"], done.stderr


def test_a_setting_of_the_users_stays_and_a_warning_comes_where_it_is_too_late():
    mine = f"{FLAG}-reduce"
    assert run(FIRST + "; import os; print(os.environ['XLA_FLAGS'])", mine).stdout == mine + "\n"
    done = run(LAST)
    assert done.returncode == 0 and f"set XLA_FLAGS={PRODUCTS}" in done.stderr, done.stderr
    assert "warn" not in run(LAST, PRODUCTS).stderr.lower()
