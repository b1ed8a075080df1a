"""The share of each device: what it computes and holds of the programs of stages on eight devices, beside one.

Run: python -m benchmarks.bench_devices [--layers 8] [--meshes 8x1x1,4x2x1,1x8x1,1x1x8] [--order default]
The programs of preflight (capture, training from the model, fine-tuning, evaluate, ablate), the encoder of interpret,
the rows of a graph of attribute, and the search of transfer for nearest features in as many pairs of dictionaries as
devices are compiled for eight simulated devices of the processor, as member x data x model, and for one, with the same
work in all: a dictionary for each layer of a model of Qwen3-0.6B's shape. A device's FLOPs are those of the matrix
products of the compiled program, times the counts of its loops; 1.00 is an eighth of what one device alone does. Loops
over the layers, chunks and blocks of a graph, whose counts depend on the prompt, run eight times each. Bytes, in the
program that takes most, are arguments, results and temporaries by the compiler, without the language model's weights,
which have a row of their own; 1.00 is a fair share: an eighth of those of one device, and of dictionaries, with Adam's
means in training, the part that the mesh leaves to a device (``model`` splits their features, ``member`` those of a
stack). Filler rows belong to no document: of the batches of capture, on the demo's text and on made-up web texts.
Prints a table and, last, one line of JSON.
"""

import argparse
import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.bench_attribute import row_flops
from benchmarks.collectives import product_flops
from saejax.activations.documents import COLUMNS, Documents, make_documents
from saejax.activations.plan import Plan
from saejax.activations.settings import CaptureConfig
from saejax.attribution.local.rows import CHUNKS, WIDTH, SourceBank, TargetBatch, chunk_size, contributions
from saejax.attribution.local.state import FrozenModel
from saejax.config import Configs
from saejax.costs.plan import PlannedRun
from saejax.costs.programs import Program, abstract_params, whole
from saejax.evaluation.settings import EvaluateConfig
from saejax.flops import step_flops
from saejax.interpret import firings
from saejax.interventions import slopes
from saejax.interventions.settings import AblateConfig
from saejax.interventions.split_model import PROGRAM_TOKENS
from saejax.matching.match import CANDIDATES, best_rows, side_by_side
from saejax.models import source
from saejax.models.config import DecoderConfig
from saejax.models.families import read_config
from saejax.models.parameters import parameter_table
from saejax.models.settings import ModelConfig
from saejax.parallel.mesh import AXES, BY_DOCUMENT, document_devices, fitting_sharding, make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.preflight.plan import plan_run, stage_programs
from saejax.preflight.topology import compile_program, device_bytes
from saejax.runner.registry import default_configs
from saejax.stages.evaluate.plan import abstract_member
from saejax.tasks.settings import CorpusConfig
from saejax.training.settings import TrainConfig

DEVICES = 8
MODEL = Path(__file__).parents[1] / "configs/shapes/qwen3-0.6b.json"
BATCH = 8192  # tokens of a batch, on all devices together
PROMPT = 64  # tokens of a graph's prompt
ACTIVE = 64  # features that are active at each position of a layer, of eight times as many that are active somewhere
# Operations in the order that takes least memory: it shows what of a device's bytes are copies of weights. By default
# the compiler for CPUs begins with what can run at once, and copies all matrices of a layer out of the stack of layers
# before it uses the first. The compiler for TPUs copies none.
MEMORY_FIRST = dict(xla_cpu_scheduler_type="CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED")
MATRICES = "W_enc_DxF", "W_dec_FxD"
WEIGHTS = "the model's weights"
STAGES = ("capture", "train", "fine-tuning", "evaluate", "interpret", "ablate", "attribute", "transfer")


class Measured(NamedTuple):
    """A stage's programs on a mesh."""

    flops: float  # of the products of one device
    work: float  # FLOPs of all devices by formula
    bytes: int  # besides the language model's weights, of the program that takes most on a device
    weights: int  # bytes of the language model's weights on a device, in the program that has most of them
    dictionaries: int  # bytes of matrices of single dictionaries, and of Adam's means of them, in the program with most
    stacks: int  # the same of stacks, whose members ``member`` splits


def settings(layers: int, devices: int) -> Configs:
    """Return the settings of the job, where documents are split over so many devices."""
    sites, configs = tuple(f"resid_post.{layer}" for layer in range(layers)), default_configs()
    changes = {
        ModelConfig: dict(backend="jax"),
        CaptureConfig: dict(sites=sites, batch_tokens=BATCH // devices),
        TrainConfig: dict(
            source="model", kinds=("standard",), sites=sites, expansion=(4,), batch=4096, buffer_rows=2**16, kl_steps=1
        ),
        CorpusConfig: dict(context=256),
        EvaluateConfig: dict(batch_tokens=BATCH),
        AblateConfig: dict(dictionary=f"standard/{sites[layers // 2]}"),
    }
    for group, fields in changes.items():
        configs |= dataclasses.replace(configs[group], **fields)
    return configs


def stage_of(program: Program) -> str:
    """Return the stage of a program."""
    return "fine-tuning" if program.name.endswith("fine-tuning") else program.name.partition(":")[0]


def interpret_program(plan: PlannedRun, mesh: Mesh) -> Program:
    """Return the encoder of interpret's pass over a store."""
    dictionary = plan.dictionary("ablate")
    shape = BATCH, dictionary.d_in
    x_BxD = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=firings.place_vectors(mesh, shape))
    arguments = (mesh, abstract_member(plan, dictionary, mesh), x_BxD, BATCH)
    flops = step_flops(BATCH, dictionary.d_in, dictionary.n_features) / 6
    return Program("interpret: encode", f"{BATCH} tokens", firings._encode_batch, arguments, (), flops)


def attribute_program(plan: PlannedRun, mesh: Mesh) -> Program:
    """Return what attributes a batch of targets of a graph to its sources."""
    model, places = plan.model, plan.model.n_layers + 1
    blocks = places * PROMPT * ACTIVE // WIDTH
    # As many as eight GPUs over which documents are split take, on every mesh.
    targets = CHUNKS, DEVICES * chunk_size("gpu", PROMPT, mesh) // document_devices(mesh)

    def array(shape: tuple[int, ...], dtype: str, *axes) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=fitting_sharding(mesh, shape, *axes))

    bank = SourceBank(
        array((places * 8 * ACTIVE, model.d_model), "float32", None, "model"),
        whole(mesh, (blocks, WIDTH), "int32"),
        whole(mesh, (blocks,), "int32"),
    )
    batch = TargetBatch(
        array((*targets, model.d_model), "float32", None, BY_DOCUMENT, None),
        array(targets, "int32", None, BY_DOCUMENT),
        array(targets, "int32", None, BY_DOCUMENT),
        whole(mesh, (CHUNKS,), "int32"),
    )
    frozen = FrozenModel(model, abstract_params(model, mesh, plan.dtype))
    stream_LxTxD = whole(mesh, (model.n_layers, PROMPT, model.d_model), "float32")
    ends = [whole(mesh, (count,), "int32") for count in (places + 1, places)]
    flops = float(np.prod(targets)) * row_flops(model, model.n_layers, PROMPT)
    return Program(
        "attribute: rows",
        f"{targets[1]} targets",
        contributions,
        (frozen, mesh, stream_LxTxD, bank, *ends, batch),
        (),
        flops,
    )


def transfer_program(plan: PlannedRun, mesh: Mesh) -> Program:
    """Return what finds the nearest features of a pair of dictionaries for each device."""
    dictionary, where = plan.dictionary("ablate"), NamedSharding(mesh, PartitionSpec(AXES))
    features, d_in = dictionary.n_features, dictionary.d_in
    shapes = (DEVICES, features, d_in), (DEVICES, features, d_in), (DEVICES, features)
    rows = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where) for shape in shapes]
    arguments = (mesh, side_by_side("cpu"), CANDIDATES, True, *rows)
    flops = DEVICES * step_flops(features, d_in, features) / 6
    return Program("transfer: nearest", f"{DEVICES} pairs", best_rows, arguments, (), flops)


def named_bytes(arrays: Any, names: Collection[str]) -> int:
    """Return the bytes on each device of those arrays in a tree that are parameters of these names."""
    size = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        if {*names} & {getattr(key, "key", getattr(key, "name", "")) for key in path}:
            size += leaf.dtype.itemsize * int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
    return size


def measure(
    model: DecoderConfig, layers: int, axes: tuple[int, ...], options: Mapping[str, str] | None = None
) -> dict[str, Measured]:
    """Return what a device does and holds on a mesh of member x data x model devices, by stage.

    Args:
      model: the language model.
      layers: number of its layers that have a dictionary.
      axes: sizes of the mesh.
      options: of the compiler, for the least effort. None: programs are compiled as in runs on CPUs.
    """
    member, data, tensor = axes
    mesh = make_mesh(MeshConfig(member=member, data=data, model=tensor), jax.devices()[: int(np.prod(axes))])
    # As many placebo targets' tokens at once as eight devices over which documents are split take, on every mesh.
    slopes.TARGET_TOKENS = DEVICES * PROGRAM_TOKENS // 8 // document_devices(mesh)
    plan = plan_run("model", model, settings(layers, document_devices(mesh)), mesh)
    measured: dict[str, Measured] = {}
    programs = (program_of(plan, mesh) for program_of in (interpret_program, attribute_program, transfer_program))
    for program in (*stage_programs(plan), *programs):
        if (stage := stage_of(program)) not in STAGES:
            continue
        compiled = compile_program(program, **options) if options else program.lower().compile()
        so_far = measured.get(stage, Measured(0, 0, 0, 0, 0, 0))
        flops = product_flops(compiled.as_text(), unknown=8 if stage == "attribute" else 1)
        weights = named_bytes((program.arguments, program.kept), parameter_table(model))
        size = device_bytes(program, compiled) - weights
        # Training has its stack in its arguments, or keeps it meanwhile; fine-tuning keeps it, and has one member.
        of_arguments, kept = named_bytes(program.arguments, MATRICES), named_bytes(program.kept, MATRICES)
        both = of_arguments + kept
        of_stage = {"train": (0, both), "fine-tuning": (of_arguments, kept)}
        dictionaries, stacks = of_stage.get(stage, (both, 0))
        measured[stage] = Measured(
            so_far.flops + flops,
            so_far.work + program.flops,
            max(so_far.bytes, size),
            max(so_far.weights, weights),
            max(so_far.dictionaries, dictionaries),
            max(so_far.stacks, stacks),
        )
    return measured


def web_documents(count: int = 4000) -> Documents:
    """Return documents of the lengths of web texts in pieces of at most 1,024 tokens: lognormal, median 400."""
    lengths_N = np.minimum(np.random.default_rng(0).lognormal(6, 1, count).astype(int) + 1, 1024)
    ids_T = np.ones(lengths_N.sum(), np.int32)
    return Documents.contiguous(ids_T, lengths_N, np.zeros((count, len(COLUMNS)), np.int32), ("web",))


def demo_documents() -> Documents:
    """Return the documents of the demo's text."""
    corpus = CorpusConfig()
    return make_documents(corpus, source.load_tokenizer(source.resolve(ModelConfig(path="smollm2"))), corpus.context)


def filler_share(documents: Documents, devices: int) -> float:
    """Return the share of rows that belong to no document, of all batches of capture on so many devices."""
    config = CaptureConfig()
    plan = Plan(documents, config.shard_rows, config.batch_tokens, last=0, seed=0, devices=devices)
    batches = [batch for shard in range(plan.shards) for batch in plan.batches(shard)]
    rows = sum(batch.shape[0] for batch in batches)
    return 1 - sum(len(batch.ids_BxT) for batch in batches) / rows


def ratios(
    model: DecoderConfig, layers: int, meshes: list[str], options: Mapping[str, str] | None = None
) -> Iterator[tuple[str, str, float, float]]:
    """Yield mesh, stage, and a device's FLOPs and bytes over its fair share of those of one device alone."""
    alone = measure(model, layers, (1, 1, 1), options)
    for name in meshes:
        axes = tuple(map(int, name.split("x")))
        for stage, on_mesh in measure(model, layers, axes, options).items():
            whole = alone[stage]
            flops = DEVICES * on_mesh.flops / on_mesh.work / (whole.flops / whole.work)
            rest = whole.bytes - whole.dictionaries - whole.stacks
            fair = whole.dictionaries / axes[2] + whole.stacks / (axes[0] * axes[2]) + rest / DEVICES
            yield name, stage, flops, on_mesh.bytes / fair
            if stage == "ablate":  # which has the whole model
                yield name, WEIGHTS, 1.0, DEVICES * on_mesh.weights / whole.weights


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument(
        "--meshes", default="8x1x1,4x2x1,1x8x1,1x1x8", help="member x data x model, with commas between"
    )
    parser.add_argument(
        "--order", choices=("memory", "default"), default="default", help="of operations; default: as in runs on CPUs"
    )
    args = parser.parse_args()
    options = MEMORY_FIRST if args.order == "memory" else None
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    model = dataclasses.replace(read_config(json.loads(MODEL.read_text()), MODEL.stem), n_layers=args.layers)
    meshes, summary = args.meshes.split(","), {}
    print("| stage, FLOPs / bytes of a device | " + " | ".join(meshes) + " |\n|---|" + "---|" * len(meshes))
    measured = ratios(model, args.layers, meshes, options)
    figures = {(mesh, stage): (flops, size) for mesh, stage, flops, size in measured}
    for stage in STAGES:
        pairs = [figures[mesh, stage] for mesh in meshes]
        print(f"| {stage} | " + " | ".join(f"{flops:.2f} / {size:.2f}" for flops, size in pairs) + " |")
        summary[stage] = [round(flops, 3) for flops, _ in pairs]
    print(f"| {WEIGHTS} | " + " | ".join(f"{figures[mesh, WEIGHTS][1]:.2f}" for mesh in meshes) + " |")
    for name, documents in (("the demo's text", demo_documents()), ("web texts", web_documents())):
        shares = {devices: filler_share(documents, devices) for devices in (1, DEVICES)}
        print(f"filler rows of {name}: {shares[DEVICES]:.1%} on {DEVICES} devices, {shares[1]:.1%} on one")
        summary[name] = round(shares[DEVICES], 3)
    print(json.dumps(dict(bench="devices", meshes=meshes, **summary)))


if __name__ == "__main__":
    main()
