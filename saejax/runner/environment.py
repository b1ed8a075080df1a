"""Settings of a process before its libraries start: environment variables, the compile cache, freed memory."""

import contextlib
import ctypes
import glob
import hashlib
import importlib.util
import os
import platform
import sys
import types
from pathlib import Path


def for_libraries() -> None:
    """Set the environment variables that libraries read when they are first imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not _may_have_tpu():  # or libtpu, installed for preflight, would report that they are missing
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    keep_freed_memory()


def for_terminal() -> None:
    """Let any text be printed, also where standard output is closed, and Ctrl-C during imports end in one line."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed: the next file that is opened would take its number, and what libraries print
            number, mode = os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(number, mode, errors="backslashreplace"))
        elif getattr(stream, "errors", "") == "strict" and name != "stdin":  # its encoding may be ASCII
            stream.reconfigure(errors="backslashreplace")

    def report(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):  # Python gives the exit status
            print("stopped before anything ran", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = report


def for_devices(deterministic: bool, shares_gpu: bool) -> None:
    """Set the environment variables that JAX reads when it first looks for devices.

    Args:
      deterministic: whether results on a GPU must be the same bits at every run.
      shares_gpu: whether a model may run in PyTorch; if that can use the GPU, JAX takes memory as it needs it, not most
        of it at once.
    """
    if shares_gpu and _has_cuda_torch():
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    flags = os.environ.get("XLA_FLAGS", "")
    if deterministic:
        flags += " --xla_gpu_deterministic_ops=true"
    # XLA tries dozens of kernels made by Triton for every matrix product. On an H100 that took 47 s for 15 layers of a
    # model in fp32, which compile in 5 s without and run as fast; bfloat16 training loses 7 %.
    if may_have_accelerators() and "xla_gpu_enable_triton_gemm" not in flags:
        flags += " --xla_gpu_enable_triton_gemm=false"
    if flags:
        os.environ["XLA_FLAGS"] = flags.strip()


def _has_cuda_torch() -> bool:
    """Return whether the installed PyTorch has CUDA, without importing it, which takes seconds."""
    spec = importlib.util.find_spec("torch")
    return spec is not None and (Path(spec.origin or "").parent / "lib" / "libtorch_cuda.so").exists()


def keep_programs(folder: Path) -> None:
    """Make JAX cache in a run's ``folder`` the programs that took long to compile, so that a later run has them.

    Programs for a CPU run on one model of processor alone: each has its own folder. The variable
    JAX_COMPILATION_CACHE_DIR names another folder, as ``study_run`` does for its rows.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache, seconds = folder.absolute() / ".compile_cache", 1.0
    if not may_have_accelerators():
        cache, seconds = cache / _name_processor(), 0.1  # a stage has a hundred programs of less than a second
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(seconds)
    if "jax" in sys.modules:  # by a plugin, or in a notebook: it has read its variables
        sys.modules["jax"].config.update("jax_compilation_cache_dir", str(cache))
        sys.modules["jax"].config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def _name_processor() -> str:
    """Return a short name of the model of processor on which this process runs."""
    description = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        lines = dict.fromkeys(Path("/proc/cpuinfo").read_text().splitlines())  # those of the cores are the same
        description += [
            line for line in lines if line.split(":")[0].strip() in ("vendor_id", "model name", "flags", "Features")
        ]
    return hashlib.sha256("\n".join(description).encode()).hexdigest()[:16]


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for reuse; call this before JAX starts. Other C libraries are left alone.

    Nothing is done where there may be accelerators. The many threads in which XLA compiles for a GPU wait for the one
    heap: on a host of an H100 with 16 cores, programs took twice as long to compile.

    XLA on a CPU allocates a step's temporary arrays anew at each step. glibc gives such large blocks back to the system
    at once, so that all pages are faulted in again: up to a third of the time of a training step. Blocks up to 2 GB now
    come from one heap, which threads have to share because their own heaps cannot hold them.
    """
    if may_have_accelerators():
        return
    arena_max, mmap_threshold, trim_threshold, top_pad = -8, -3, -1, -2  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(arena_max, 1)
        mallopt(mmap_threshold, 2**31 - 1)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**30)


def may_have_accelerators() -> bool:
    """Return whether JAX may run on devices other than CPUs."""
    return os.environ.get("JAX_PLATFORMS") != "cpu" and (bool(glob.glob("/dev/nvidia[0-9]*")) or _may_have_tpu())


def _may_have_tpu() -> bool:
    """Return whether a Google device is on the PCI bus."""
    with contextlib.suppress(OSError):
        vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
        return any(vendor.read_text().strip() == "0x1ae0" for vendor in vendors)
    return True
