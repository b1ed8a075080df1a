"""Small whole runs for tests: a tiny random model that reads real prompts, flags, and processes."""

import contextlib
import dataclasses
import errno
import functools
import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from forked import ForkedProcess
from tiny_models import save_tiny_llama

from saejax.config import Configs
from saejax.dictionaries.results import TrainedMember
from saejax.files import write_json
from saejax.results import to_json
from saejax.runner.registry import default_configs
from saejax.runner.workspace import Run

ROOT = Path(__file__).parent.parent


def make_configs(**changes) -> Configs:
    """Every group with its defaults, but for changes such as train__k=(3,)."""
    configs = default_configs()
    for key, value in changes.items():
        group, field = key.split("__")
        configs |= dataclasses.replace(configs.named(group), **{field: value})
    return configs


def changed(run: Run, **settings) -> Run:
    """The run with other settings of its own stage."""
    return dataclasses.replace(run, configs=run.configs | dataclasses.replace(run.configs.named(run.stage), **settings))


def save_model(folder: Path, **changes) -> Path:
    """A random two-layer Llama with ``small_tokenizer``."""
    sizes = dict(vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    save_tiny_llama(folder, **sizes | dict(max_position_embeddings=256) | changes)
    small_tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def small_tokenizer():
    """SmolLM2's tokenizer learned anew from the behaviours' prompts and the corpus: a 48th of its tokens and logits.

    Most answers are one token there, as in SmolLM2's own, and some are several.
    """
    from transformers import AutoTokenizer

    from saejax.models import source
    from saejax.models.settings import ModelConfig
    from saejax.tasks.draw import make_prompts
    from saejax.tasks.settings import DEMO_BEHAVIOURS

    whole = AutoTokenizer.from_pretrained(source.resolve(ModelConfig()).folder)
    prompts = [prompt for name in DEMO_BEHAVIOURS for prompt in make_prompts(name, 100, 100, 42, whole).prompts]
    texts = [prompt.text + answer for prompt in prompts for answer in (prompt.correct, prompt.wrong)]
    return whole.train_new_from_iterator([*texts, *map(_document, range(40))], 1024, show_progress=False)


def save_corpus(path: Path, documents: int = 40) -> Path:
    """Documents of a few sentences, each of a group of its own."""
    with gzip.open(path, "wt") as file:
        file.write("\n".join(json.dumps(dict(text=_document(i), group=f"g/{i}")) for i in range(documents)))
    return path


def _document(i: int) -> str:
    nouns = ["river", "teacher", "garden", "engine", "winter", "letter", "market", "window", "doctor", "village"]
    verbs = ["follows", "carries", "finds", "remembers", "changes"]
    places = [((i + j) % 10, i * j % 5, (3 * i + j) % 10) for j in range(4 + i % 5)]
    return " ".join(f"The {nouns[subject]} {verbs[verb]} the {nouns[noun]}." for subject, verb, noun in places)


def small_flags(model: Path, corpus: Path, workdir: Path, **changes) -> list[str]:
    """Flags of a run of seconds, in a file: a stage ignores others' flags there; ``changes`` such as train__k=3 win."""
    values = {"workdir": workdir, "model.path": model, "corpus.path": corpus, "corpus.held_out": 0.3}
    # A random model has no behaviour.
    values |= {"task.train_prompts": 4, "task.test_prompts": 3, "task.gate": 1}
    values |= {"capture.sites": "resid_post.0", "capture.shard_rows": 300, "capture.max_sink_share": 0.5}
    values |= {"capture.store_dtype": "float32", "train.sites": "resid_post.0", "train.expansion": 4, "train.k": 8}
    # A checkpoint takes as long as dozens of steps.
    values |= {"train.batch": 64, "train.epochs": 6, "train.checkpoint_every": 50, "train.l1": 0.05}
    values |= {"train.warmup": 4, "train.learning_rate": 1e-3, "train.dead_tokens": 100_000}
    values |= {"evaluate.ce_documents": 3, "ablate.top": 2, "ablate.text_documents": 4}
    values |= {"causal.random_sets": 6, "causal.placebo_targets": 4}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    flags = (f"--{key}={value}" for key, value in values.items() if key != "workdir")
    return [f"--workdir={workdir}", flag_file(flags, Path(corpus).parent)]


def flag_file(flags: Iterable[str], folder: Path) -> str:
    """Return a flag that names a new file of flags, in a folder."""
    with tempfile.NamedTemporaryFile("w", suffix=".flags", dir=folder, delete=False) as file:
        file.write("\n".join(flags))
    return f"--flagfile={file.name}"


def write_half(file: Path | IO[bytes]) -> None:
    """Writes the first bytes of a file, named or open, as on a disk that is full then."""
    with contextlib.nullcontext(file) if hasattr(file, "write") else open(file, "wb") as opened:
        opened.write(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def start(binary: str, flags: list[str], **environment: str) -> subprocess.Popen | ForkedProcess:
    """Starts ``python -m experiments.<binary>``, or a program given as text, on one CPU device."""
    variables = os.environ | dict(JAX_NUM_CPU_DEVICES="1", JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1") | environment
    if not os.environ.get("SAEJAX_FULL_COMPILER"):  # `make test-slow` starts each by itself, as users do
        return ForkedProcess(binary, flags, variables)
    program = ["-c", binary] if "\n" in binary else ["-m", f"experiments.{binary}"]
    options = dict(cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([sys.executable, *program, *flags], **options)


def slurm_step() -> dict:
    """The variables of a SLURM job step of one task on this host, and the address of its coordinator."""
    step = dict(SLURM_JOB_ID="77", SLURM_STEP_NODELIST="localhost", SLURM_NTASKS="1", SLURM_STEP_NUM_TASKS="1")
    step |= dict(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_STEP_TASKS_PER_NODE="1")
    return dict(environment=step, coordinator=f"localhost:{free_port()}")


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start_pair(
    binary: str, flags: list[str], last: list[str] = (), count: int = 2, **environment: str
) -> list[subprocess.Popen]:
    """Two or more processes of one run, of which the last has further flags."""
    flags = [*flags, f"--mesh.processes={count}", f"--mesh.coordinator=localhost:{free_port()}"]
    more = [[f"--mesh.process_id={i}"] for i in range(count)]
    more[-1] += last
    return [start(binary, [*flags, *each], **environment) for each in more]


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """Waits (a process that never ends fails by the test's time limit), checks the exit status, gives the output."""
    output, _ = process.communicate()
    assert process.returncode == status, (process.returncode, output)
    return output


def captured_only(whole: Path, folder: Path) -> None:
    """A new run that has its activations and no more."""
    copy_units(whole, folder, "baseline", "capture")


def copy_run(workdir: Path, folder: Path) -> Path:
    """Copies a workdir; links to units stay links."""
    return shutil.copytree(workdir, folder, symlinks=True, dirs_exist_ok=True)


def copy_units(workdir: Path, folder: Path, *stages: str) -> None:
    """Copies the units of some stages into another workdir."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        for path in (workdir / stage, *workdir.glob(f"{stage}-*")):
            if path.is_symlink():
                os.symlink(os.readlink(path), folder / path.name)
            else:  # a unit's folder, or a folder of units
                shutil.copytree(path, folder / path.name, symlinks=True)


def checksums(workdir: Path) -> dict:
    """The dictionaries' and the store's checksums."""
    store = json.loads((workdir / "capture" / "manifest.json").read_text())["files"]
    return dictionary_checksums(workdir) | dict(store=store)


def dictionary_checksums(workdir: Path) -> dict:
    """The checksums of every dictionary's arrays, by its folder."""
    arrays = {}
    for unit in sorted(path for path in (workdir / "train").iterdir() if path.is_symlink()):
        for path in sorted([*unit.glob("dictionary/dictionary.json"), *unit.glob("*/dictionary/dictionary.json")]):
            member = path.parent.parent.relative_to(workdir / "train")
            arrays[str(member)] = json.loads(path.read_text())["arrays"]
    return arrays


def write_members(unit, *members):
    """The summary of a train unit with members of these names, or (name, site, target)."""
    rest = dict(settings={}, input_scale=1.0, output_scale=1.0, dead_fraction=0.0, final={})
    whole = [TrainedMember(*((m, "", "") if isinstance(m, str) else m), **rest) for m in members]
    write_json(unit / "done.json", dict(results=dict(members=to_json(whole))))
