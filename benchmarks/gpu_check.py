"""A first run on an accelerator: is everything right, and is it as fast as the device allows?

Run: python -m benchmarks.gpu_check [--small]
Checks, in order: the devices and the version of cuBLAS; the rates of matrix products; logits of the embedded SmolLM2
against transformers; fused attention against the decoder's own;
gradients of one training step of each kind against finite differences in float64 on the CPU; then speeds of training
steps, capture, ablation and a small attribution graph, in TFLOP/s and as a share of the measured matmul rate and of the
device's peak (MFU, where the peak is known). It needs no network. ``--small`` uses shapes for two CPU cores, which is
the default where there is no accelerator. Prints a line for each check, says what fell below expectations and why that
may be, and prints one line of JSON last. Exit status 1: something is wrong; a low speed alone is 0.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saejax.runner import environment

environment.for_libraries()
environment.for_devices(deterministic=False, shares_gpu=False)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import saejax  # noqa: E402
from benchmarks.bench_attribute import graph_flops, random_transcoders  # noqa: E402
from benchmarks.train_setup import Stepper, make_stack, matmul_rate, sparse_sums  # noqa: E402
from saejax.attribution.trace.prompt import trace_prompt  # noqa: E402
from saejax.flops import pass_flops, peak_flops, step_flops  # noqa: E402
from saejax.models.attention import attend, whole_prompt_tables  # noqa: E402
from saejax.models.config import GRADIENT  # noqa: E402
from saejax.models.families import read_config  # noqa: E402
from saejax.models.fused_attention import attend_fused, find_kernel  # noqa: E402
from saejax.models.source import ModelConfig, load_torch_model, resolve  # noqa: E402
from saejax.parallel.mesh import mesh_of  # noqa: E402
from saejax.training.stack import TrainStack  # noqa: E402
from saejax.training.state import init_state  # noqa: E402
from saejax.training.step import MemberBatch, member_loss  # noqa: E402

KINDS = ("standard", "linear", "gated", "jumprelu", "topk", "batchtopk", "matryoshka")
TEXT = "The students went to the library because they had to read the books that their teacher had asked them to read. "
CUBLAS = ("nvidia-cublas", "nvidia-cublas-cu12")  # of cuda13 and cuda12
SOUND_CUBLAS = (13, 2)
BLACKWELL = ("10", "11", "12")  # major compute capabilities
ATTENTION_TOLERANCE = 0.02  # relative, of attended values and gradients in bfloat16
LOGIT_TOLERANCE = 2e-3  # of logits in float32, on any device
GRADIENT_TOLERANCE = 2e-3  # relative, of a directional derivative in float32
#: Expected shares of the measured matmul rate, and the usual reasons for less.
EXPECTED = dict(
    standard=(0.6, "small batches leave the device idle between products; raise --train.batch"),
    topk=(0.6, "selection is bound by memory; check that no other process uses the device"),
    capture=(0.4, "short texts leave the device idle; raise --capture.batch_tokens"),
)


def report(name: str, ok: bool, text: str) -> bool:
    """Print the line of one check and return whether it passed."""
    print(f"{'ok   ' if ok else 'WRONG'} {name:22} {text}", flush=True)
    return ok


def timed(run: Callable[[], Any], rounds: int = 3) -> float:
    """Return the median seconds of ``run``, after a first call that compiles."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def check_devices() -> dict[str, Any]:
    """Print and return what JAX found."""
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    size = f", {memory / 2**30:.0f} GiB each" if memory else ""
    report("devices", True, f"{len(jax.devices())} x {device.device_kind}{size}; jax {jax.__version__}")
    cublas = check_cublas(getattr(device, "compute_capability", "")) if device.platform == "gpu" else ""
    return dict(kind=device.device_kind, count=len(jax.devices()), jax=jax.__version__, cublas=cublas, memory=memory)


def check_cublas(capability: str) -> str:
    """Print and return the version of cuBLAS, if it is installed, and say where wrong results are reported of it.

    Args:
      capability: the GPU's compute capability, such as "10.0"; "" on other devices.
    """
    installed = {package: version for package in CUBLAS if (version := find_version(package))}
    is_suspect = any(tuple(map(int, version.split(".")[:2])) < SOUND_CUBLAS for version in installed.values())
    warning = (
        "; users of other tools report that before 13.2 it gives wrong results in silence on Blackwell GPUs, such as "
        "this one: see docs/your_model.md"
    )
    text = ", ".join(f"{package} {version}" for package, version in installed.items()) or "not installed as a package"
    is_blackwell = capability.partition(".")[0] in BLACKWELL
    report("cuBLAS", True, text + (warning if is_suspect and is_blackwell else ""))
    return text


def find_version(package: str) -> str:
    """Return the version of an installed package; "" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def check_rates(shape: tuple[int, int, int]) -> dict[str, float]:
    """Print and return the FLOP/s of matrix products by dtype."""
    rates = {}
    for dtype in ("float32", "bfloat16"):
        batch, d, features = shape
        rates[dtype] = matmul_rate(dtype, batch, d, features, repeats=10)
        peak = peak_flops(jax.devices()[0], dtype)
        share = f", {rates[dtype] / peak:.0%} of the peak" if peak else ""
        report(f"matmul {dtype}", True, f"{rates[dtype] / 1e12:.2f} TFLOP/s{share}")
    return rates


def check_logits(lm: saejax.LanguageModel) -> bool:
    """Compare the logits of a text with those of transformers on the CPU."""
    import torch

    tokens = lm.tokenize([TEXT * 2])
    with torch.inference_mode():
        model = load_torch_model(resolve(ModelConfig(path="smollm2")))
        expected = model(torch.tensor(np.asarray(tokens.ids_BxT), dtype=torch.int64)).logits.numpy()
    error = float(np.abs(np.asarray(lm(tokens).logits_BxTxV) - expected).max())
    return report("logits", error < LOGIT_TOLERANCE, f"largest difference from transformers {error:.1e}")


def check_attention() -> bool:
    """Compare fused attention, where this device has it, with the decoder's own: values and gradients in bfloat16."""
    shape = Path(__file__).parents[1] / "configs/shapes/qwen3-0.6b.json"
    config = read_config(json.loads(shape.read_text()), shape.name)
    config = dataclasses.replace(config, n_layers=2, sliding_layers=(True, False), sliding_window=100)
    rng, heads = np.random.default_rng(0), (config.n_heads, config.n_kv_heads, config.n_kv_heads)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 256, n, config.d_head)), jnp.bfloat16) for n in heads)
    kernel = find_kernel(config, GRADIENT, mesh_of(q), jnp.zeros((1, 256, config.d_model), jnp.bfloat16))
    if kernel is None:
        return report("attention", True, "this device has no fused kernel")
    tables, errors = whole_prompt_tables(config, 256), []

    @functools.partial(jax.jit, static_argnums=0)
    def run(fused: bool, layer: jax.Array, qkv: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        def loss(qkv: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            if fused:
                z = attend_fused(kernel, config, mesh_of(qkv[0]), qkv, tables, layer)
            else:
                z = attend(config, GRADIENT, qkv[0], qkv[1], qkv[2], tables.at(config, layer))
            return jnp.sum(jnp.sin(z.astype(jnp.float32))), z

        gradients, z = jax.grad(loss, has_aux=True)(qkv)
        return z, *gradients

    for layer in range(2):
        pairs = zip(*(run(fused, jnp.int32(layer), (q, k, v)) for fused in (True, False)), strict=True)
        both = [[np.asarray(array, np.float64) for array in pair] for pair in pairs]
        errors += [np.linalg.norm(fused - plain) / np.linalg.norm(plain) for fused, plain in both]
    return report("attention", max(errors) < ATTENTION_TOLERANCE, f"{kernel}, largest relative error {max(errors):.1e}")


def check_gradient(kind: str) -> bool:
    """Compare a directional derivative of one step's loss with a finite difference in float64 on the CPU.

    The direction moves encoder, decoder and the encoder's bias. Where training stops gradients on purpose they are no
    derivatives, so those parameters stay: thresholds, and of gated dictionaries the decoder, which their auxiliary loss
    freezes.
    """
    names = ("W_enc_DxF", "b_enc_F") if kind == "gated" else ("W_enc_DxF", "b_enc_F", "W_dec_FxD")
    d, features, tokens = 32, 128, 64
    x_BxD = sparse_sums(1, tokens, d, 64)[0]

    def stack_of(dtype: str) -> TrainStack:
        return make_stack(kind, d, features, tokens, 8, "float32", products="dense", auxk=0.0, state_dtype=dtype)

    def loss_of(stack: TrainStack, params: dict[str, Any]) -> jax.Array:
        hyper = jax.tree.map(lambda leaf: leaf[0], stack.hyperparams)
        x = jnp.asarray(x_BxD, params["b_dec_D"].dtype)
        return member_loss(stack, params, MemberBatch(x, x, hyper, jnp.int32(0), jnp.zeros(features, bool)))[0]

    stack = stack_of("float32")
    params = {name: leaf[0] for name, leaf in init_state(stack).params.items()}
    rng = np.random.default_rng(0)
    moved = {name: rng.standard_normal(leaf.shape) * (name in names) for name, leaf in params.items()}
    gradient = jax.jit(jax.grad(lambda params: loss_of(stack, params)))(params)
    slope = sum(float(np.sum(np.asarray(gradient[name], np.float64) * moved[name])) for name in params)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        exact = stack_of("float64")
        start = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
        value = jax.jit(lambda params: loss_of(exact, params))
        step = 1e-6  # small enough that no feature turns on or off between the two points
        ends = [value({name: start[name] + sign * step * moved[name] for name in start}) for sign in (1, -1)]
        expected = float(ends[0] - ends[1]) / (2 * step)
    error = abs(slope - expected) / abs(expected)
    return report(f"gradient {kind}", error < GRADIENT_TOLERANCE, f"relative error {error:.1e}")


def measure_training(kind: str, sizes: dict[str, int], dtype: str, rate: float) -> float:
    """Print a kind's training speed and return its share of the matmul rate."""
    stack = make_stack(kind, sizes["d"], sizes["features"], sizes["batch"], sizes["k"], dtype, products="dense")
    stepper = Stepper(stack, sparse_sums(2, sizes["batch"], sizes["d"]))
    stepper.run(3)  # compiles
    seconds = float(np.median([stepper.run(sizes["steps"]) for _ in range(3)])) / sizes["steps"]
    return report_speed(kind, step_flops(sizes["batch"], sizes["d"], sizes["features"]), seconds, rate, dtype)


def measure_capture(lm: saejax.LanguageModel, rows: int, rate: float) -> float:
    """Print the speed of a pass that captures a site in the middle, and return its share of the matmul rate."""
    tokens = lm.tokenize([TEXT * 5] * rows)
    layer = lm.config.n_layers // 2
    site = f"resid_post.{layer}"
    seconds = timed(lambda: lm(tokens, capture=[site], logits=False).sites[site])
    flops = pass_flops(lm.config, tokens.ids_BxT.size, tokens.ids_BxT.shape[1], layer + 1)
    return report_speed("capture", flops, seconds, rate, "float32")


def check_ablation(lm: saejax.LanguageModel, sae: saejax.Dictionary) -> bool:
    """Ablate features and compare the residual at the site with the sum of their decoder rows by numpy."""
    site, tokens = sae.site, lm.tokenize([TEXT])
    features = [3, 5, 8, 13, 21]
    x_TxD = np.asarray(lm(tokens, capture=[site]).sites[site][0], np.float64)
    edited_TxD = np.asarray(lm(tokens, edits=[sae.ablate(features)], capture=[site]).sites[site][0], np.float64)
    f_TxF = np.asarray(sae.encode(lm(tokens, capture=[site]).sites[site])[0], np.float64)
    change_TxD = f_TxF[:, features] @ np.asarray(sae.W_dec_FxD, np.float64)[features]
    norms_T = np.linalg.norm(x_TxD, axis=1)
    kept_T = norms_T < 10 * np.median(norms_T)  # edits do not change attention sinks
    error = float(np.abs((x_TxD - edited_TxD - change_TxD)[kept_T]).max() / norms_T[kept_T].mean())
    return report("ablation", error < 1e-5 and f_TxF[:, features].any(), f"relative error of the change {error:.1e}")


def check_graph(lm: saejax.LanguageModel, rows: int, rate: float) -> bool:
    """Trace a small graph with random transcoders; its rows must sum to what the targets received."""
    ids = lm.tokenize([TEXT]).ids_BxT[0][:11].tolist()
    transcoders = random_transcoders(lm.config)
    graph = trace_prompt(lm, transcoders, ids, max_features=rows)[0]
    start = time.perf_counter()
    trace_prompt(lm, transcoders, ids[1:] + ids[:1], max_features=rows)
    report_speed("graph", graph_flops(graph, lm.config), time.perf_counter() - start, rate, "float32")
    error = float(np.abs(graph.unexplained_R).max() / np.abs(graph.value_R).max())
    return report("graph", error < 1e-4, f"{len(graph.nodes)} nodes; rows miss {error:.1e} of the largest value")


def report_speed(name: str, flops: float, seconds: float, rate: float, dtype: str) -> float:
    """Print FLOP/s as shares of the measured rate and the peak, with a reason where it is low; return the first."""
    share, peak = flops / seconds / rate, peak_flops(jax.devices()[0], dtype)
    mfu = f", MFU {flops / seconds / peak:.0%}" if peak else ""
    expected, reason = EXPECTED.get(name, (0.0, ""))
    below = f" - below the expected {expected:.0%}: {reason}" if peak and share < expected else ""
    report(f"speed {name}", True, f"{flops / seconds / 1e12:.3f} TFLOP/s, {share:.0%} of the matmul rate{mfu}{below}")
    return round(share, 3)


def main() -> int:
    """Run all checks; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="shapes for two CPU cores")
    small = parser.parse_args().small or jax.default_backend() == "cpu"
    sizes = dict(d=2048, features=32_768, batch=8192, k=64, steps=20)
    if small:
        sizes = dict(d=128, features=1024, batch=512, k=16, steps=10)
    dtype = "float32" if small else "bfloat16"
    results: dict[str, Any] = dict(check="gpu", small=small, devices=check_devices())
    rates = check_rates((sizes["batch"], sizes["d"], sizes["features"]))
    lm = saejax.load_model("smollm2")
    passed = [check_logits(lm), check_attention(), *[check_gradient(kind) for kind in KINDS]]
    results["training"] = {kind: measure_training(kind, sizes, dtype, rates[dtype]) for kind in KINDS}
    results["capture"] = measure_capture(lm, 2 if small else 64, rates["float32"])
    passed.append(check_ablation(lm, random_sae(lm)))
    passed.append(check_graph(lm, 200 if small else 3000, rates["float32"]))
    memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    report("memory", True, f"peak {memory / 2**30:.1f} GiB" if memory else "JAX does not tell on this device")
    print(json.dumps(results | dict(rates=rates, passed=all(passed), peak_bytes=memory)))
    return 0 if all(passed) else 1


def random_sae(lm: saejax.LanguageModel) -> saejax.Dictionary:
    """Return a random TopK SAE in the middle of the model."""
    from saejax.dictionaries import DictionaryConfig

    site = f"resid_post.{lm.config.n_layers // 2}"
    described = DictionaryConfig(kind="topk", site=site, d_in=lm.config.d_model, n_features=64, k=32)
    return saejax.Dictionary.initial(described, jax.random.key(0))


if __name__ == "__main__":
    sys.exit(main())
