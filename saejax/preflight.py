"""The preflight stage: what will run, whether it fits, and roughly how long it takes, before hours are spent."""

import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import psutil

from saejax.dictionaries import stacks
from saejax.errors import UserError, one_of
from saejax.models import source
from saejax.models.config import DecoderConfig
from saejax.models.decoder import parameter_table
from saejax.models.families import read_config
from saejax.models.sites import Site
from saejax.parallel import describe, make_mesh
from saejax.settings import CaptureConfig, TrainConfig
from saejax.tasks.corpora import read_corpus
from saejax.training.members import Member, members
from saejax.training.train import chosen_sites
from saejax.workspace import Run, read_json

_CHARACTERS_PER_TOKEN = 4.2  # English text under a vocabulary of about 50,000
_EFFICIENCY = dict(baseline=0.4, capture=0.35, train=0.5, evaluate=0.4, ablate=0.3)  # of the measured matmul rate


def run_preflight(run: Run) -> dict:
    """Checks model, sites, corpus, memory and disk; prints a table of stages.

    Raises:
      UserError: something is missing or does not fit; the message says what to change.
    """
    configs = run.configs
    mesh = make_mesh(configs["mesh"])
    found = source.resolve(configs["model"])
    config_file = found.folder / "config.json"
    model = read_config(read_json(config_file), str(config_file))
    for site in (*configs["capture"].sites, *(site for site in configs["train"].sites if site != "all")):
        Site.parse(site).check(model)
    trained = _stacks(configs["train"], configs["capture"])
    _check_tested(configs["ablate"].dictionary, trained)
    documents = read_corpus(configs["corpus"])
    tokens = round(sum(len(document.text) for document in documents) / _CHARACTERS_PER_TOKEN)
    tokens = min(tokens, configs["corpus"].max_tokens or tokens)
    memory, disk = (
        memory_bytes(model, configs["train"], max(map(len, trained.values()))),
        disk_bytes(model, configs["capture"], configs["train"], tokens, sum(map(len, trained.values()))),
    )
    rate = matmul_rate()
    seconds = {stage: flops / rate for stage, flops in stage_flops(model, configs, tokens, trained).items()}
    results = dict(
        model=dict(
            name=found.name, family=model.family, layers=model.n_layers, d=model.d_model, parameters=parameters(model)
        ),
        mesh=describe(mesh),
        documents=len(documents),
        tokens=tokens,
        members={kind: len(stack) for kind, stack in trained.items()},
        memory_bytes=memory,
        memory_free_bytes=psutil.virtual_memory().available,
        disk_bytes=disk,
        disk_free_bytes=psutil.disk_usage(str(run.folder)).free,
        matmul_flops_per_second=rate,
        seconds=seconds,
    )
    for line in _lines(results):
        run.say(line)
    if configs["train"].form != "sae":
        run.say("ablate will refuse: it tests SAEs, and --train.form makes transcoders; the stages before it run")
    _check_fits(results, run.folder)
    return results


def _stacks(train: TrainConfig, capture: CaptureConfig) -> dict[str, list[Member]]:
    """The members of each kind that will be trained; a ``UserError`` if a site that they need is not captured."""
    sites = chosen_sites(train, capture.sites if train.sites == ("all",) else train.sites)
    trained = {kind: members(train, kind, sites) for kind in train.kinds}
    needed = dict.fromkeys(
        site for stack in trained.values() for member in stack for site in (member.site, member.target)
    )
    missing = [site for site in needed if site not in capture.sites]
    if missing:
        raise UserError(
            f"{', '.join(missing)} of --train.sites={','.join(train.sites)} is not captured: add it to "
            f"--capture.sites={','.join(capture.sites)}"
        )
    return trained


def _check_tested(dictionary: str, trained: dict[str, list[Member]]) -> None:
    """A ``UserError`` if ``--ablate.dictionary`` names none of the dictionaries, for which hours would be lost."""
    kind, _ = stacks.kind_and_member(dictionary)
    one_of(kind, trained, "dictionary for ablate (--train.kinds)")
    stacks.check_member(dictionary, [member.name for member in trained[kind]], "--ablate.dictionary")


def parameters(model: DecoderConfig) -> int:
    """Number of parameters of the decoder."""
    return sum(math.prod(shape) for shape, _ in parameter_table(model).values())


def memory_bytes(model: DecoderConfig, train: TrainConfig, members: int) -> int:
    """Host memory of the largest stage: the model twice in fp32 (torch, JAX), or the training state and its batch.

    The state is the parameters and two moments of each of the ``members`` of a stack; gradients and activations are of
    one member at a time on a CPU, of all on an accelerator.
    """
    features = train.expansion * model.d_model
    at_once = 1 if jax.default_backend() == "cpu" else members
    state = 2 * features * model.d_model
    training = 4 * (3 * members * state + at_once * (state + 6 * train.batch * features))
    return max(2 * 4 * parameters(model), training)


def disk_bytes(model: DecoderConfig, capture: CaptureConfig, train: TrainConfig, tokens: int, dictionaries: int) -> int:
    """What the run writes: the store, and for each of the dictionaries two checkpoints and the arrays."""
    width = 2 if capture.store_dtype == "bfloat16" else 4
    store = tokens * len(capture.sites) * (model.d_model * width + 16)
    dictionary = 4 * 2 * train.expansion * model.d_model**2
    return store + dictionaries * 7 * dictionary


def stage_flops(model: DecoderConfig, configs: Any, tokens: int, trained: dict[str, list[Member]]) -> dict[str, float]:
    """Floating-point operations of the main stages, divided by the share of the matmul rate they usually reach."""
    task, train, ablate = configs["task"], configs["train"], configs["ablate"]
    per_token, prompt = 2.0 * parameters(model), 24
    deepest = max(Site.parse(site).layer for site in configs["capture"].sites) + 1
    prompts = len(task.behaviours) * (task.train_prompts + task.test_prompts)
    rows = len(task.behaviours) * task.test_prompts * (ablate.draws + 4 * ablate.top + 1)
    stack = [member for stack in trained.values() for member in stack]
    tails = {member.site: 1 - Site.parse(member.target).layer / model.n_layers for member in stack}
    scored = sum(tails[member.site] for member in stack)  # beside the clean model and two floors of every site and kind
    floors = sum(1 + 2 * tails[site] for own in trained.values() for site in {member.site for member in own})
    steps = min(train.epochs * tokens, train.max_steps * train.batch or train.epochs * tokens)
    flops = dict(
        baseline=prompts * prompt * per_token,
        capture=tokens * per_token * deepest / model.n_layers,
        train=len(stack) * steps * 12.0 * model.d_model * train.expansion * model.d_model,
        evaluate=configs["evaluate"].ce_documents * 200 * per_token * (floors + scored),
        ablate=rows * prompt * per_token * max(tails.values()),
    )
    return {stage: value / _EFFICIENCY[stage] for stage, value in flops.items()}


def matmul_rate(size: int = 1536, repeats: int = 4) -> float:
    """Measured rate of a fp32 matrix product of this size on one device, FLOP/s times the number of devices."""
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    start = time.perf_counter()
    for _ in range(repeats):
        product(a, a).block_until_ready()
    rate = repeats * 2 * size**3 / (time.perf_counter() - start)
    return rate * (1 if jax.devices()[0].platform == "cpu" else jax.device_count())


def _lines(results: dict) -> list[str]:
    model, mesh = results["model"], results["mesh"]
    gib = 2**30
    lines = [
        f"model {model['name']}: {model['family']}, {model['parameters'] / 1e6:,.0f} M parameters, "
        f"{model['layers']} layers, width {model['d']}",
        f"devices: {mesh['devices']} x {', '.join(mesh['kinds'])}, "
        f"mesh {' x '.join(f'{axis} {size}' for axis, size in mesh['axes'].items())}, "
        f"{results['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s in fp32",
        f"dictionaries: {', '.join(f'{number} {kind}' for kind, number in results['members'].items())}",
        f"text: {results['documents']:,} documents, about {results['tokens']:,} tokens",
        f"memory: about {results['memory_bytes'] / gib:.1f} GiB needed, {results['memory_free_bytes'] / gib:.1f} free; "
        f"disk: about {results['disk_bytes'] / gib:.1f} GiB needed, {results['disk_free_bytes'] / gib:.1f} free",
    ]
    times = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in results["seconds"].items())
    lines.append(f"roughly {sum(results['seconds'].values()) / 60:.0f} minutes if nothing is done yet: {times}")
    return lines


def _check_fits(results: dict, folder: Path) -> None:
    gib = 2**30
    for kind, change in (
        ("memory", "use a smaller --train.batch or model"),
        ("disk", "use another --workdir or a smaller --corpus.max_tokens"),
    ):
        needed, free = results[f"{kind}_bytes"], results[f"{kind}_free_bytes"]
        if needed > free:
            raise UserError(
                f"the run needs about {needed / gib:.1f} GiB of {kind}, but {free / gib:.1f} are free for {folder}: "
                f"{change}"
            )
