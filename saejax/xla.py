"""A setting of the compiler for CPUs, made when saejax is imported, without which results can be wrong."""

import os
import sys
import warnings

FLAG = "--xla_cpu_experimental_ynn_fusion_type="


def avoid_wrong_programs() -> None:
    """Keep XLA from handing parts of programs for CPUs to the library YNNPACK, unless the user's XLA_FLAGS say how.

    jaxlib 0.10.2 does so by default, and sums of products then come out wrong from some thousand rows on: of the
    gradients of several targets, for instance, all but the first (JAX issue 39103). Others end the process (issue
    39257). Programs without YNNPACK are as fast, and every jaxlib that saejax runs with knows the flag. XLA reads
    XLA_FLAGS once, when JAX first looks for devices; where that has happened, a warning says what to do.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if FLAG in flags:
        return
    bridge = sys.modules.get("jax._src.xla_bridge")
    # No public function of JAX tells this without starting it.
    if bridge is not None and bridge.backends_are_initialized() and bridge.default_backend() == "cpu":
        warnings.warn(
            "JAX has started before saejax was imported, and on CPUs its compiler can give wrong results. Restart "
            f"Python and import saejax before JAX is used, or set XLA_FLAGS={FLAG}",
            stacklevel=3,
        )
        return
    os.environ["XLA_FLAGS"] = f"{flags} {FLAG}".strip()
