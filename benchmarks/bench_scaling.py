"""Bounds on the speed of large jobs: their programs compiled for 8 to 256 devices that are not there.

Run: python -m benchmarks.bench_scaling [--jobs h100,nodes,v5e,wide] [--tiny]
h100: one node of eight H100; nodes: four of them, and weak scaling up to 256 devices; v5e: TPU slices up to 8x8 (where
libtpu is installed); wide: one dictionary of a million features over the model axis. Each job but the last reads all 36
layers of Qwen3-4B and trains a TopK dictionary for each (F 20,480, k 64, 4,096 tokens of each layer a step on every
eight devices); "zero" stands behind those whose optimizer is split over tokens too. For each mesh: memory of a device
by the compiler, what it sends in one step, and the tokens per second that products (of the dense form, at full
bfloat16 rate) and links allow, each by itself: floors, not forecasts. H100s are stood in for by devices of the
processor and compiled with float32 products: its compiler gathers whole matrices for bfloat16 ones, which those of
accelerators do not. Last comes one line of JSON.
"""

import argparse
import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks.collectives import sent_bytes
from saejax.flops import pass_flops
from saejax.models.families import read_config
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.preflight.plan import plan_run
from saejax.preflight.topology import compile_for, compile_program, find_slice
from saejax.runner.registry import default_configs
from saejax.stages.train.plan import train_programs
from saejax.training.settings import TrainConfig

MODEL = Path(__file__).parents[1] / "configs/shapes/qwen3-4b.json"
LAYERS, EXPANSION, K = 36, 8, 64
TOKENS = 1e9


class Hardware(NamedTuple):
    """A device's speeds by its maker: bfloat16 FLOP/s without sparsity, and bytes/s to nearby devices and other nodes.

    In one direction; of a TPU along one axis of its torus.
    """

    flops: float
    near: float
    far: float


_OF_NODE = 8  # GPUs of a node; all chips of a TPU slice are near each other
HARDWARE = {"h100": Hardware(989e12, 450e9, 50e9), "v5e": Hardware(197e12, 90e9, 90e9)}


class Job(NamedTuple):
    """A mesh of named devices."""

    topology: str
    mesh: MeshConfig
    batch: int  # tokens of each site a step
    sites: int = LAYERS
    expansion: int = EXPANSION
    zero: bool = False  # --train.zero_optimizer


def jobs(wanted: list[str]) -> Iterator[Job]:
    """Yield the jobs whose train step is compiled."""
    if "h100" in wanted:
        yield from (Job("h100:8", MeshConfig(member=m, model=n), 4096) for m, n in ((4, 1), (2, 1), (1, 1), (1, 8)))
        yield from (Job("h100:8", MeshConfig(member=m), 4096, zero=True) for m in (4, 2, 1))
    if "nodes" in wanted:
        for nodes in (2, 4, 8, 16, 32):
            yield Job(f"h100:{nodes}x8", MeshConfig(member=4), 4096 * nodes)
    if "v5e" in wanted and importlib.util.find_spec("libtpu"):
        for layout, devices in (("2x4", 8), ("4x4", 16), ("4x8", 32), ("8x8", 64)):
            yield Job(f"v5e:{layout}", MeshConfig(member=4, model=2), 512 * devices)
        yield Job("v5e:8x8", MeshConfig(member=4, model=16), 32_768)
        yield Job("v5e:2x4", MeshConfig(member=4), 4096)
        yield from (Job("v5e:2x4", MeshConfig(member=m, model=n), 4096, zero=True) for m, n in ((4, 1), (2, 2)))
    if "wide" in wanted:
        for layout in ("2x4", "4x4") if importlib.util.find_spec("libtpu") else ():
            yield Job(f"v5e:{layout}", MeshConfig(model=8), 4096, 1, 410)  # 1,049,600 features
        yield Job("h100:8", MeshConfig(model=8), 4096, 1, 410)


def plan_of(job: Job, tiny: bool) -> Any:
    """Return the plan of a job, and the devices it is planned for."""
    target_slice = find_slice(job.topology)
    mesh = make_mesh(job.mesh, target_slice.devices)
    sites = tuple(f"resid_post.{layer}" for layer in range(job.sites)) if job.sites > 1 else ("resid_post.18",)
    changes = dict(
        model=dict(dtype="bfloat16", backend="jax"),
        capture=dict(sites=sites, dtype="bfloat16", batch_tokens=2048),
        train=dict(sites=sites, kinds=("topk",), source="model", k=(8 if tiny else K,), expansion=(job.expansion,)),
    )
    changes["train"] |= dict(
        batch=job.batch // (64 if tiny else 1),
        matmul="bfloat16" if "v5e" in job.topology else "float32",
        zero_optimizer=job.zero,
    )
    configs = default_configs()
    for group, fields in changes.items():
        configs |= dataclasses.replace(configs.named(group), **fields)
    fields = json.loads(MODEL.read_text())
    if tiny:
        fields |= dict(hidden_size=64, intermediate_size=128, vocab_size=512, head_dim=16)
    model = read_config(fields, str(MODEL))
    return plan_run("qwen3-4b", model, configs, mesh), target_slice


def measure(job: Job, tiny: bool) -> dict[str, Any]:
    """Print and return a row of the table."""
    plan, target_slice = plan_of(job, tiny)
    *_, step = train_programs(plan, plan.mesh)
    compiled = compile_for(step, target_slice.limit)
    kind = job.topology.partition(":")[0]
    device, tokens, devices = HARDWARE[kind], plan.configs[TrainConfig].batch, len(target_slice.devices)
    reading = pass_flops(plan.model, tokens, 256, 1 + max(site.layer for site in plan.sites))
    of_node = min(_OF_NODE, devices) if kind == "h100" else devices
    sends = sent_bytes(compile_program(step).as_text(), devices, of_node) if compiled.fits else {}
    far = sum(count for kind, count in sends.items() if kind.endswith("nodes"))
    near = sum(sends.values()) - far
    rates = dict(
        products=tokens * devices * device.flops / (step.flops + reading),
        links=tokens / (near / device.near + far / device.far) if sends else float("inf"),
    )
    hours = TOKENS / min(rates.values()) / 3600
    axes = " x ".join(str(size) for size in plan.mesh.shape.values())
    print(
        f"{job.topology:10} {axes:>12} {'zero' if job.zero else '':4} {tokens:9,} tokens  "
        f"{compiled.memory / 2**30:6.2f} GiB "
        f"{'fits' if compiled.fits else 'DOES NOT FIT'}  sends {near / 2**20:8.1f} MiB near {far / 2**20:8.1f} far  "
        f"at most {rates['products']:12,.0f} tokens/s by products, {rates['links']:14,.0f} by links  {hours:6.2f} h",
        flush=True,
    )
    row = dict(topology=job.topology, axes=axes, zero=job.zero, sites=job.sites, batch=tokens, memory=compiled.memory)
    return row | dict(fits=compiled.fits, sends=sends, rates=rates, hours=hours)


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=lambda text: text.split(","), default=["h100", "nodes", "v5e", "wide"])
    parser.add_argument("--tiny", action="store_true", help="a narrow model and few tokens")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 256)
    print("devices, mesh (member x data x model), tokens a step; hours for a billion tokens at the smaller rate")
    print(json.dumps([measure(job, args.tiny) for job in jobs(args.jobs)]))


if __name__ == "__main__":
    main()
