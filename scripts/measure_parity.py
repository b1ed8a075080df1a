"""Measure how far saejax agrees with transformers, sae-lens and circuit-tracer; write docs/parity.md.

``make parity`` runs it with the folders of the tests in PYTHONPATH, whose models and comparisons it uses. Models are
random and tiny, one or more of every family. The other tools run in environments of their own, which are made in
build/. ``make parity NEW=FAMILY`` measures a family of the decoder that is new, and adds its line to the page;
``NEW=versions`` measures the other versions of transformers alone.

1. families of the JAX decoder: logits, sites, gradients, cached tokens, token ids and generated tokens;
2. other architectures, which PyTorch runs: logits and generated tokens;
3. both once more with other versions of transformers, the worst of all families;
4. dictionaries that sae-lens saved, and ours as sae-lens reads them;
5. graphs of circuit-tracer.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import known_dictionaries as known
import numpy as np
import test_circuit_tracer
import test_family_parity as families
import test_saelens_judge as saelens
import torch
from loaded_models import load_tiny, mesh_of
from reference_graphs import adjacency_of, nodes_of
from tiny_models import OTHER_FIELDS, save_tiny, save_tiny_tokenizer
from tokenizers import Tokenizer
from torch_sites import relative_error
from transformers import AutoModelForCausalLM

from benchmarks import tool_environments
from saejax import load_dictionary, load_model, save_dictionary
from saejax.models.families import FAMILIES
from saejax.models.tokens import pad

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "parity.md"
PACKAGES = ("transformers", "tokenizers", "torch", "jax", "flax")  # of constraints.txt
OTHER_VERSIONS = ("5.24.0",)  # of transformers, besides that of constraints.txt
TEXTS = ("The cat near the dogs runs.", "3 + 4 =\n\n7", "she'll see 1732, naïve καλά 数学 🙂", " two  spaces")
LENGTHS, NEW = (1, 4, 13, 33), 12  # of prompts and of what is generated
HEAD = """\
# Parity

How far saejax agrees with the tools whose models and dictionaries it reads. `make parity` wrote this page, and a test
checks that it has every family and the versions of `constraints.txt`. Models and dictionaries are random and tiny, of
unusual shapes; the tests compare the same ones. An error is the largest difference over the largest number, in float32,
and the largest of all cases of a line.

| package | version |
|---|---|
{versions}

## Families of the JAX decoder

Compared with transformers. *Sites* are all of the decoder's; *gradients* are those of a logit difference, at all sites
of a layer; *cached* are logits of prompts that are padded on the left and read four tokens at a time. *Tokens*: how
many of {texts} texts with digits, contractions, spaces and scripts have the ids of the repository's `tokenizer.json`.
*Generated*: greedy tokens of four prompts of {lengths} tokens in one batch, and of whole passes of transformers on each
prompt alone.

| family | cases | logits | sites | gradients | cached | tokens | generated |
|---|---|---|---|---|---|---|---|
{families}

## Other architectures

PyTorch runs them, through transformers itself: hooks must change nothing. *Generated* as above.

| family | logits | generated |
|---|---|---|
{others}

## Other versions of transformers

Both tables above with each of these versions: the largest error of all families, and all tokens.

| transformers | logits | sites | gradients | cached | tokens | generated | others: logits | others: generated |
|---|---|---|---|---|---|---|---|---|
{other_versions}

## sae-lens

Activations and outputs on 64 rows: of what sae-lens saved, as saejax reads it, and of what saejax saved, as sae-lens
reads it.

| saved by | dictionary | activations | output |
|---|---|---|---|
{saelens}

## circuit-tracer

Graphs of one prompt with the same random transcoders. *Edges* is the error of the adjacency matrix. Of GPT-2, columns
of tokens are left out: circuit-tracer has no node for what a position adds.

| family | transcoders | nodes | edges |
|---|---|---|---|
{graphs}
"""


def to_rows(rows: Iterable[Sequence[object]]) -> str:
    """Return lines of a table; errors are rounded up to two digits."""
    lines = []
    for row in rows:
        cells = [f"{cell:.1e}" if isinstance(cell, float) else str(cell) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measure_family(name: str) -> list[object]:
    """Return a family's line of the table."""
    cases = [case for case in families.CASES if case.partition("-")[0] == name]
    errors = defaultdict[str, float](float)
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            config, params, model = load_tiny(Path(folder), name, **families.CASES[case])
            ids_BxT = np.random.default_rng(0).integers(4, config.vocab, (3, families.LENGTH))
            check = families.check_gradients if case in families.FIRST_CASES else families.check_fp32
            measured = check(config, params, model, ids_BxT)
            measured["cached"] = families.check_cached(config, params, model, ids_BxT)
            for key, value in measured.items():
                errors[key] = max(errors[key], value)
    shown = [errors[key] for key in ("logits", "sites", "gradients", "cached")]
    return [f"`{name}`", len(cases), *shown, *measure_text(name)]


def measure_text(name: str, backend: str = "jax") -> tuple[str, str]:
    """Return how many token ids and generated tokens of a random model of a family are those of other programs."""
    with tempfile.TemporaryDirectory() as folder:
        save_tiny(Path(folder), name, vocab_size=300)
        save_tiny_tokenizer(Path(folder), 300)
        lm = load_model(folder, backend=backend, **(dict(mesh=mesh_of(1, 1, 1)) if backend == "jax" else {}))
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        same = sum(lm.encode(text) == tokenizer.encode(text).ids for text in TEXTS)
        rng = np.random.default_rng(0)
        prompts = [rng.integers(4, 257, length).tolist() for length in LENGTHS]
        generated = lm.generate(pad(prompts), NEW)
    right = total = 0
    for ids, row in zip(prompts, generated, strict=True):
        wanted: list[int] = []
        while len(wanted) < NEW:  # whole passes, which no cache can spoil
            with torch.no_grad():
                wanted.append(int(model(torch.tensor([ids + wanted]), use_cache=False).logits[0, -1].argmax()))
            if wanted[-1] == 0:  # the end of text
                wanted.pop()
                break
        right += sum(ours == theirs for ours, theirs in zip(row.ids, wanted, strict=False))
        total += max(len(wanted), len(row.ids))
    return f"{same} of {len(TEXTS)}", f"{right} of {total}"


def measure_other(name: str) -> list[object]:
    """Return the line of an architecture that PyTorch runs."""
    with tempfile.TemporaryDirectory() as folder:
        save_tiny(Path(folder), name, vocab_size=300)
        save_tiny_tokenizer(Path(folder), 300)
        lm = load_model(folder, backend="torch")
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        ids_BxT = np.random.default_rng(0).integers(4, 257, (2, 9))
        ours_BxTxV = lm(pad(ids_BxT.tolist()), capture=["resid_post.1"]).logits_BxTxV
        with torch.no_grad():
            theirs_BxTxV = model(torch.as_tensor(ids_BxT)).logits
    return [f"`{name}`", relative_error(ours_BxTxV, theirs_BxTxV), measure_text(name, "torch")[1]]


def measure_saelens(folder: Path) -> list[list[object]]:
    """Return a line for each kind of dictionary that sae-lens wrote or read."""
    x_NxD = known.activations(64)
    np.save(folder / "x.npy", x_NxD)
    (folder / "features").write_text(str(known.F))
    saelens.judge("make", folder)
    ours = {f"{kind}-{form}": known.make(kind, form) for kind, form in known.IN_SAELENS}
    for name, dictionary in ours.items():
        save_dictionary(folder / "ours" / name, dictionary, "saelens")
    saelens.judge("read", folder)
    theirs = {path.name: load_dictionary(path) for path in sorted((folder / "theirs").iterdir())}
    rows: list[list[object]] = []
    for tool, source, dictionaries in (("sae-lens", "theirs", theirs), ("saejax", "ours", ours)):
        for name, dictionary in dictionaries.items():
            read = np.load(folder / "read" / f"{source}-{name}.npz")
            errors = [known.relative(dictionary.encode(x_NxD), read["f"]), known.relative(dictionary(x_NxD), read["y"])]
            rows.append([tool, name.removesuffix("-float32"), *errors])
    return rows


def measure_graphs(folder: Path) -> list[list[object]]:
    """Return a line for each case of the test that compares graphs."""
    rows: list[list[object]] = []
    for number, case in enumerate(test_circuit_tracer.CASES):
        family, kind, skip, cross_layer = case
        (folder / str(number)).mkdir()
        graph, judged, layers, columns = test_circuit_tracer.trace_twice(*case, folder / str(number), mesh_of(1, 1, 1))
        wanted_RxS = adjacency_of(judged, layers)[:, :columns]
        error = relative_error(graph.adjacency_RxS[:, : wanted_RxS.shape[1]], wanted_RxS)
        form = "cross-layer " * cross_layer + kind + ", skip" * skip
        rows.append([f"`{family}`", form, len(nodes_of(judged, layers)), error])
    return rows


def summarize(rows: Sequence[Sequence[object]]) -> list[object]:
    """Return the worst error of each column of lines, or the sum of its "n of m"; names and numbers of cases go."""
    columns = []
    for cells in zip(*rows, strict=True):
        if isinstance(cells[0], float):
            columns.append(max(cells))
        elif " of " in str(cells[0]):
            counts = [map(int, str(cell).split(" of ")) for cell in cells]
            columns.append("{} of {}".format(*map(sum, zip(*counts, strict=True))))
    return columns


def summarize_families() -> list[object]:
    """Measure all families and other architectures with the transformers at hand; return one line without its name."""
    return summarize(log_each(FAMILIES, measure_family)) + summarize(log_each(OTHER_FIELDS, measure_other))


def measure_version(version: str) -> list[object]:
    """Return the line of another version of transformers, measured in a process that has it."""
    paths = os.pathsep.join([tool_environments.transformers_folder(version), *sys.path[1:]])
    command = [sys.executable, __file__, "--summary", version]
    done = subprocess.run(command, env=os.environ | dict(PYTHONPATH=paths), check=True, stdout=subprocess.PIPE)
    return [version, *json.loads(done.stdout.splitlines()[-1])]


def version_in(python: str, package: str) -> str:
    """Return the version of a package in another environment."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def log_each(names: Iterable[str], measure: Callable[[str], list[object]]) -> list[list[object]]:
    """Return the lines of some families, each printed as it is measured."""
    rows = []
    for name in names:
        rows.append(measure(name))
        print(to_rows(rows[-1:]), flush=True)
    return rows


def add_family(name: str) -> None:
    """Measure a family of the decoder, and put its line in the page, behind those of the others."""
    lines = [line for line in PAGE.read_text("utf-8").splitlines() if not line.startswith(f"| `{name}` | ")]
    last = max(number for number, line in enumerate(lines) if line.count("|") == 9)  # of the families' eight columns
    lines.insert(last + 1, to_rows([measure_family(name)]))
    PAGE.write_text("\n".join(lines) + "\n", "utf-8")


def replace_versions() -> None:
    """Measure the other versions of transformers, and put their lines in place of the page's."""
    lines = PAGE.read_text("utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| transformers | logits")) + 2
    last = lines.index("", first)
    lines[first:last] = to_rows(log_each(OTHER_VERSIONS, measure_version)).splitlines()
    PAGE.write_text("\n".join(lines) + "\n", "utf-8")


def main() -> None:
    """Measure all, and write the page."""
    saelens.PYTHON = tool_environments.saelens_python()
    versions = [[package, re.sub(r"\+.*", "", version(package))] for package in PACKAGES]
    versions.append(["sae-lens", version_in(saelens.PYTHON, "sae-lens")])
    versions.append(["circuit-tracer", version_in(tool_environments.circuit_tracer_python(), "circuit-tracer")])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "graphs").mkdir()
        page = HEAD.format(
            versions=to_rows(versions),
            texts=len(TEXTS),
            lengths=", ".join(map(str, LENGTHS)),
            families=to_rows(log_each(FAMILIES, measure_family)),
            others=to_rows(log_each(OTHER_FIELDS, measure_other)),
            other_versions=to_rows(log_each(OTHER_VERSIONS, measure_version)),
            saelens=to_rows(measure_saelens(Path(folder))),
            graphs=to_rows(measure_graphs(Path(folder) / "graphs")),
        )
    PAGE.write_text(page, "utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--summary"]:
        assert version("transformers") == sys.argv[2]
        print(json.dumps(summarize_families()))
    elif sys.argv[1:] == ["versions"]:
        replace_versions()
    else:
        add_family(sys.argv[1]) if sys.argv[1:] else main()
