"""A setting of the compiler for CPUs, made when saejax is imported, without which results can be wrong."""

import os
import sys
import warnings

FLAG = "--xla_cpu_experimental_ynn_fusion_type="
PRODUCTS = FLAG + "individual_dot"


def avoid_wrong_programs() -> None:
    """Let XLA give the library YNNPACK products of matrices alone, unless the user's XLA_FLAGS say what.

    On CPUs jaxlib 0.10.2 gives it sums, too, and sums of products then come out wrong from some thousand rows on: of
    the gradients of several targets, for instance, all but the first (JAX issue 39103). Other programs end the process
    (issue 39257). Products are right, and in bfloat16 2.4 times as fast as without YNNPACK. jaxlib 0.10.0 to 0.11.2
    know the flag; XLA ends the process for one that it does not know. It reads XLA_FLAGS once, when JAX first looks for
    devices; where that has happened, a warning says what to do.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if FLAG in flags:
        return
    bridge = sys.modules.get("jax._src.xla_bridge")
    # No public function of JAX tells this without starting it.
    if bridge is not None and bridge.backends_are_initialized() and bridge.default_backend() == "cpu":
        warnings.warn(
            "JAX has started before saejax was imported, and on CPUs its compiler can give wrong results. Restart "
            f"Python and import saejax before JAX is used, or set XLA_FLAGS={PRODUCTS}",
            stacklevel=3,
        )
        return
    os.environ["XLA_FLAGS"] = f"{flags} {PRODUCTS}".strip()
