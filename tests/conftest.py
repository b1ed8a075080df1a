"""Eight CPU devices for every test, strict broadcasting, and the models that many tests share."""

import atexit
import collections
import contextlib
import functools
import gc
import itertools
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

if sys.dont_write_bytecode:
    # Dozens of processes import the same libraries, and compiling them is half of the work of one that reads a model:
    # where the environment forbids that Python keeps what it compiled beside the sources, it is kept in build/.
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(Path(__file__).parent.parent / "build" / "pycache")
    os.environ |= dict(PYTHONDONTWRITEBYTECODE="", PYTHONPYCACHEPREFIX=sys.pycache_prefix)

os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_PLATFORMS"] = "cpu"
# Eight devices' threads meet on few cores: a loaded machine must not make XLA give up on them (after 40 s).
# Of flags that are given, the processor to compile for is kept: XLA_FLAGS=--xla_cpu_max_isa=AVX2 tests as on another.
os.environ["XLA_FLAGS"] = " ".join(
    ["--xla_cpu_collective_call_terminate_timeout_seconds=600"]
    + [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag.startswith("--xla_cpu_max_isa=")]
)
# Tests compile thousands of programs that run for moments: with least effort each takes a third of the time. Set
# SAEJAX_FULL_COMPILER=1 for the programs that users run; the demos and benchmarks run these anyway.
if not os.environ.get("SAEJAX_FULL_COMPILER"):
    os.environ["XLA_FLAGS"] += (
        " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
        "--xla_cpu_parallel_codegen_split_count=1"
    )
    if version("jaxlib").startswith("0.10."):  # XLA ends the process for a flag that it does not have any more
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Half of the time goes into compiling, often of what another file, process or worker has compiled before: programs are
# kept for as long as the tests run, in a folder that all of them share.
if "PYTEST_XDIST_WORKER" not in os.environ:
    for left in Path(tempfile.gettempdir()).glob("saejax-programs-*"):  # by tests that were killed
        process = left.name.split("-")[2]
        if process.isdecimal() and not Path("/proc", process).exists():  # other names are those of older versions
            shutil.rmtree(left, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix=f"saejax-programs-{os.getpid()}-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Programs need not know which lines of Python they come from.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
# Threads of PyTorch wait for each other in loops: on models this small, beside other work, most of their time.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import shapes

if os.environ.get("SAEJAX_CHECK_SHAPES") != "off":
    shapes.install()

import jax
import numpy as np
import pytest
import runs
import settings_read
from jax.sharding import AxisType, Mesh
from tiny_models import save_identity_llama, save_tiny_llama, save_tiny_tokenizer

from saejax.parallel.mesh import AXES

settings_read.install()


def share_compiler_contexts() -> None:
    """Let JAX lower a hundred programs in one context of its compiler: a new one for each takes 7 % of the time."""
    from jax._src.interpreters import mlir

    made = functools.lru_cache(maxsize=1)(lambda _hundred, make=mlir.make_ir_context: make())
    calls = itertools.count()
    mlir.make_ir_context = lambda: made(next(calls) // 100)


if version("jax").startswith("0.10."):  # no public function does this
    share_compiler_contexts()

jax.config.update("jax_numpy_rank_promotion", "raise")
# Programs of child processes are kept, which later children run again. Of those of this process only the large ones
# are, since other files have models and stacks of the same shapes; to keep the small ones, too, would take a tenth of
# the time.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.15)

LONGEST = (
    "processes readouts_and_sites report slopes ablation_measurements finetune torch_model steering library "
    "crosscoder_stages stack_members step null_and_power meshes configs_run finetune_stage objective "
    "split_dictionaries algorithms widths kinds model_input cross_layer_training benchmark interpret_stages "
    "attention_patterns known_circuits generation transfer_stage library_calls study_run circuits_stage "
    "planted_circuit track track_stage initial sinks loop expansions stages preflight_stage attribute_stage "
    "new_behaviour baseline gate detectors cluster_stage killed_processes world reuse precision collectives "
    "planted_crosscoders cross_layer_scores pretrained decoder effects local_model docs serve_saes evaluate "
    "family_parity probing answer_tokens"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no process works on one alone at the end."""
    order = {name: place for place, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: order.get(item.path.stem.removeprefix("test_"), len(order)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say at the end which tests were skipped and why, so that one for want of a library or reference is not missed."""
    tests_of = collections.defaultdict(list)
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        tests_of[reason.removeprefix("Skipped: ")].append(report.nodeid.partition("[")[0])
    if tests_of:
        terminalreporter.section("skipped, and why")
    for reason, tests in sorted(tests_of.items()):
        terminalreporter.line(f"{len(tests)} skipped: {reason}")
        for test in sorted(set(tests)):
            terminalreporter.line(f"    {test}" + f" ({tests.count(test)} cases)" * (tests.count(test) > 1))


def pytest_collection_finish() -> None:
    """Collect garbage less often, and never look again at what was imported: that took a twentieth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


# Linux gives a process 65,530 memory maps; each program takes about a dozen, and one file of tests 10,000 at most.
_MOST_MAPS = 40_000


@pytest.fixture(scope="module", autouse=True)
def drop_programs():
    """Forget compiled programs where they leave few memory maps; until then other files run them, too."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def small_products():
    """Preflight measures how fast this machine multiplies matrices: small ones, once, not for seconds in each test."""
    from saejax.preflight import rates

    measure = functools.cache(functools.partial(rates.matmul_rates, size=256, repeats=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "matmul_rates", measure)
        yield


@pytest.fixture(scope="session")
def one_device() -> Mesh:
    """A mesh of the first device alone."""
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)


@contextlib.contextmanager
def show_devices(count: int):
    """Let stages that run in this process find so many devices, not eight."""
    devices = jax.devices()[:count]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("devices", "local_devices"):
            patch.setattr(jax, name, lambda *of, **more: devices)
        for name in ("device_count", "local_device_count"):
            patch.setattr(jax, name, lambda *of, **more: count)
        yield


@pytest.fixture(scope="module")
def two_devices():
    """A mesh of several devices, for a quarter of the work that eight make."""
    with show_devices(2):
        yield


@pytest.fixture(scope="module")
def single_device():
    """For stages of which other tests show that a mesh changes nothing: their programs compile in half the time."""
    with show_devices(1):
        yield


@pytest.fixture(scope="session")
def smollm2(one_device):
    """The real SmolLM2 in fp32 on one device, a ``LanguageModel``."""
    from saejax import load_model

    return load_model("smollm2", mesh=one_device)


@pytest.fixture(scope="session")
def smollm2_torch(smollm2):
    """The same weights in PyTorch, a transformers model in fp32."""
    from saejax.models import source

    return source.load_torch_model(smollm2.source, "float32")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A folder in the hub's format: a random Llama (4 layers, d 64, context 128) with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    save_tiny_llama(folder)
    save_tiny_tokenizer(folder, 384)
    return folder


@pytest.fixture(scope="session")
def lm(tiny_llama, one_device):
    """The tiny Llama in fp32 on one device, a ``LanguageModel``."""
    from saejax import load_model

    return load_model(str(tiny_llama), mesh=one_device)


@pytest.fixture(scope="session")
def identity_llama(tiny_llama, tmp_path_factory, one_device):
    """The tiny Llama without what its layers add: the stream carries the embedding to the last norm, unchanged."""
    from saejax import load_model

    folder = tmp_path_factory.mktemp("identity_llama")
    save_identity_llama(tiny_llama, folder)
    return load_model(str(folder), mesh=one_device)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    """What a small whole run reads: a tiny model with SmolLM2's tokenizer, and a corpus."""
    folder = tmp_path_factory.mktemp("inputs")
    return runs.save_model(folder / "model"), runs.save_corpus(folder / "corpus.jsonl.gz")


@pytest.fixture
def quick_compiler():
    """Compiles for TPUs with the least effort: a fifth of the time, about as much memory."""
    before = jax.config.values["jax_optimization_level"]
    jax.config.update("jax_optimization_level", "O0")
    yield
    jax.config.update("jax_optimization_level", before)
