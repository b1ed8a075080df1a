"""Run the documents: the commands and the Python of README.md and docs/*.md, page by page.

``python scripts/check_docs.py [PAGE ...]``, or ``make docs-check``. Everything runs in build/docs_check, with the small
demo's outputs as runs/demo and files of a reader (text, prompts, questions). SmolLM2 and random transcoders stand in
for models and dictionaries of the hub. Commands that take minutes are read by their programs with --dry_run, targets of
make with ``make -n``, flags of benchmarks are looked up in their help, and installations are left out.

The Python of a page is one program, in which the lines have the page's numbers.
"""

import gzip
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "docs_check"
PAGES = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")))
LINKED = ("benchmarks", "configs", "docs", "experiments", "launch", "scripts", "tests", "Makefile")
LINKED += ("constraints.txt", "pyproject.toml")
PYTHON = shlex.quote(sys.executable)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:\.venv/bin/\w+|python -m|make|experiments\.\w+) [^`]+)`")
# What stands in for what a reader has to have.
STAND_INS = {
    "hf://google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82": "runs/demo/train/topk",
    "google/gemma-2-2b": "smollm2",
    "--graph.transcoders=gemma-2-2b": "--graph.transcoders=transcoders",
    "Qwen/Qwen3-0.6B": "smollm2",
    "mwhanna/qwen3-0.6b-transcoders-lowl0": "transcoders",
    "--graph.transcoders=runs/own_set/train/topk": "--graph.transcoders=transcoders",
    "--graph.transcoders=SET": "--graph.transcoders=transcoders",
    "HuggingFaceTB/SmolLM2-360M": "smollm2",
    "--model.path=BASE --model.other=TUNED": "--model.path=smollm2 --model.other=smollm2",
    "--model.path=MODEL": "--model.path=smollm2",
    "--model.dtype=bfloat16": "--model.dtype=float32",
    'dtype="bfloat16"': 'dtype="float32"',
    "--task.prompts=FILE": "--task.prompts=my_prompts.jsonl",
    "--track.prompts=FILE": "--track.prompts=configs/solution.jsonl",
    "--study.benchmarks=logic": "--study.benchmarks=word_problems",
    "=NEW": "=runs/new",
    "DIR": "runs/demo",
    "result_fields.py STAGE": "result_fields.py ablate",
    '"RUN/': f'"{FOLDER}/runs/demo/',  # Orbax takes absolute paths
    # Of a causal test, fewer prompts and controls than its defaults.
    'saejax.make_prompts(lm, "capital"))': 'saejax.make_prompts(lm, "capital", 6, 6), top=5, random_sets=19, '
    "placebo_targets=19, untrained_dictionaries=19)",
    "runs/mine,": "runs/mine/train/topk,",
    "topk,runs/mine ": "topk ",  # which the quickstart makes, a later page
    "FOLDER_WITH_BIG_BENCH_HARD_TASKS": "logic_tasks",
    '"runs/mine/capture"': '"runs/demo/capture"',
    "--export.dictionaries=jumprelu": "--export.dictionaries=jumprelu --train.form=cross_layer_transcoder "
    "--train.kinds=jumprelu --train.sites=mlp_in.0-29 --train.source=model",
    "--ablate.dictionary=batchtopk/resid_post.5+resid_post.15": "--ablate.dictionary=batchtopk --train.kinds=batchtopk "
    "--capture.sites=resid_post.5,resid_post.15 --train.sites=resid_post.5+resid_post.15",
    "--rows=FOLDER": "--rows=configs/study",
    " ...": " --workdir=runs/demo --flagfile=demo.flags",
    "configs/demo.flags": "demo.flags",
}
# Commands that run, by words in them: the reader's text is short, and the stand-ins are small.
RUN = ("capture --flagfile=mine", "train --flagfile=mine", "evaluate --flagfile=mine", "lengths --plugins")
RUN += ("baseline --workdir=runs/plural", "baseline --workdir=runs/quiz", "attribute --workdir=runs/paris")
RUN += ("algorithm --workdir=runs/sums",)
# What a page's Python takes as given.
GIVEN = {
    "docs/quickstart.md": "texts = [row.text for row in saejax_corpus()[:40]]",
    "docs/features.md": 'lm = saejax.load_model("smollm2"); '
    'sae = saejax.load_dictionary("runs/demo/train/topk"); '
    "acts = saejax.capture(lm, [row.text[:400] for row in saejax_corpus()[:60]], [sae.site])",
    "docs/studies.md": 'lm = saejax.load_model("smollm2"); '
    'dictionary = saejax.load_dictionary("runs/demo/train/topk"); '
    "problems, articles = ([row.text[:400] for row in saejax_corpus()[i::2][:8]] for i in (0, 1))",
}
PRELUDE = (
    "import saejax; from saejax.tasks.corpora import read_corpus; from saejax.tasks.settings import CorpusConfig; "
    "saejax_corpus = lambda: read_corpus(CorpusConfig()); "
)


def read_commands(text: str) -> Iterator[tuple[int, str]]:
    """Yield the commands of a page, of its blocks and in its lines, each with its line's number."""
    for block in FENCE.finditer(text):
        # A block of single flags is a flag file, which the commands after it read.
        if block[1] or re.fullmatch(r"(--\S+\n)+", block[2]):
            continue
        line = text.count("\n", 0, block.start(2)) + 1
        for command in re.findall(r"(?:.*\\\n)*.*\n", block[2]):
            if re.match(r"(\.venv/bin/|python3? |make |bash |--\w+\.\w|[A-Z]+=\S+ .*(?:sbatch|bash) )", command):
                yield line, re.sub(r"\s+#.*", "", command.replace("\\\n", " ")).strip()
            line += command.count("\n")
    for span in INLINE.finditer(FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)):
        command = re.sub(r"^experiments\.", "python -m experiments.", re.sub(r"\s+", " ", span[1]))
        yield text.count("\n", 0, span.start()) + 1, command


def read_python(text: str) -> tuple[str, dict[str, str]]:
    """Return the Python of a page, its lines at their numbers there, and the files that it has the reader write."""
    program, files = "", {}
    for block in FENCE.finditer(text):
        if block[1] != "python":
            continue
        if name := re.match(r"# (\S+\.py)\n", block[2]):
            files[name[1]] = block[2]
            continue
        program += "\n" * (text.count("\n", 0, block.start(2)) - program.count("\n")) + block[2]
    return program, files


def substitute(text: str) -> str:
    """Return a command or program with what stands in for the reader's and the hub's files."""
    for name, stand_in in STAND_INS.items():
        text = text.replace(name, stand_in)
    return text


def to_shell(command: str) -> str:
    """Return the line that checks a command; "": nothing does here."""
    command = re.sub(r"^(?:\.venv/bin/)?python3? ", f"{PYTHON} ", substitute(command))
    command = re.sub(r"^\.venv/bin/saejax ", f"{PYTHON} -m saejax.cli ", command)
    if re.search(r"pip install|-m venv", command):
        return ""
    if command.startswith("make "):
        return re.sub("^make ", "make -n ", command)
    if launched := re.match(r"(.*?)(?:sbatch(?: --[\w-]+=\S+)*|bash) (launch/\S+)(.*)", command):
        return f"{launched[1]}bash {launched[2]} --dry-run{launched[3]}"
    if command.startswith("--"):
        program = (
            "train" if "--train." in command and "--ablate." not in command else "pipeline"
        )  # the demo's causal test is of topk
        return f"{PYTHON} -m experiments.{program} --workdir=runs/demo --flagfile=demo.flags {command} --dry_run"
    if benchmark := re.search(r"-m benchmarks\.\w+", command):
        flags = re.findall(r" (--\w+)", command.partition(" -- ")[0])
        looked_up = [f"grep -q -e {flag} help.txt" for flag in flags]
        return " && ".join([f"{PYTHON} {benchmark[0]} --help > help.txt", *looked_up])
    if "-m pytest" in command:
        return f"cd {shlex.quote(str(ROOT))} && {command} --collect-only -q"
    # Those have no --dry_run, and these models are not here: tests read the flags.
    if re.search(r"experiments\.(study_run|serve)|configs/large", command):
        return f"{command} --help"
    if not re.search(r"-m (experiments|saejax\.cli)", command) or " runs " in command:
        return command
    command += "" if re.search("--(workdir|flagfile)", command) else " --workdir=runs/demo --flagfile=demo.flags"
    return command if any(words in command for words in RUN) else f"{command} --dry_run"


def run(line: str, about: str) -> bool:
    """Run a command; print how it went, and its last lines if it failed."""
    start = time.monotonic()
    environment = os.environ | dict(PYTHONPATH=str(ROOT), BROWSER="true", MPLBACKEND="agg")
    done = subprocess.run(line, shell=True, cwd=FOLDER, env=environment, capture_output=True, text=True)
    print(f"{'ok    ' if not done.returncode else 'FAILED'} {time.monotonic() - start:6.1f} s  {about}", flush=True)
    if done.returncode:
        print(f"$ {line}\n" + "\n".join((done.stdout + done.stderr).splitlines()[-15:]), flush=True)
    return not done.returncode


def prepare() -> bool:
    """Make the folder: the repository's files, the small demo, transcoders, and the reader's files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in (*FOLDER.iterdir(), *FOLDER.glob("runs/*")):  # the small demo stays: the pipeline does what is missing
        if path.name not in ("runs", "demo"):
            path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)
    for name in LINKED:
        (FOLDER / name).symlink_to(ROOT / name)
    tiny = (ROOT / "configs/demo_tiny.flags").read_text("utf-8").replace("topk,standard", "topk")
    (FOLDER / "demo.flags").write_text(tiny, "utf-8")
    mine = (ROOT / "docs/quickstart.md").read_text("utf-8")
    (FOLDER / "mine.flags").write_text(re.search(r"^```\n((?:--.*\n)+)```$", mine, re.MULTILINE)[1], "utf-8")
    if not run(f"{PYTHON} -m experiments.pipeline --workdir=runs/demo --flagfile=demo.flags", "the small demo"):
        return False
    write_readers_files()
    return True


def write_readers_files() -> None:
    """Write text, prompts, questions, and transcoders of all layers with random weights."""
    import jax

    import saejax
    from saejax.dictionaries import Dictionary, DictionaryConfig
    from saejax.tasks.benchmark_definitions import LOGIC_TASKS
    from saejax.tasks.corpora import read_corpus
    from saejax.tasks.settings import CorpusConfig

    def to_lines(rows: list[dict]) -> bytes:
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    texts = [dict(text=row.text) for row in read_corpus(CorpusConfig())[:60]]
    (FOLDER / "my_text.jsonl").write_bytes(to_lines(texts))
    (FOLDER / "my_text.jsonl.gz").write_bytes(gzip.compress(to_lines(texts)))
    nouns = ("cat", "dog", "bird", "book", "lamp", "hat", "ball", "cup", "coin", "ring")
    places = ("sofa", "table", "chair", "bed", "floor", "roof", "bench", "shelf", "desk", "stage")
    prompts = [
        dict(behaviour="plural", text=f"By the {noun} on the {place} lay two", correct=f" {noun}s", wrong=f" {noun}")
        | dict(counterpart=f"By the {noun} on the {place} lay one")
        for place, noun in itertools.product(places, nouns)  # 100: by default 80 choose features, and 20 test them
    ]
    (FOLDER / "my_prompts.jsonl").write_bytes(to_lines(prompts))
    questions = [dict(question=f"What is {i} plus 3?", options=[str(i + 2), str(i + 3)], answer=1) for i in range(40)]
    (FOLDER / "my_questions.jsonl").write_bytes(to_lines(questions))
    (FOLDER / "logic_tasks").mkdir()
    for task in LOGIC_TASKS:
        rows = [dict(input=f"{n} of {task}?\n(A) x\n(B) y\n(C) z", target=f"({'ABC'[n % 3]})") for n in range(50)]
        if task in ("boolean_expressions", "web_of_lies"):
            target = "True" if task[0] == "b" else "No"
            rows = [dict(input=f"{task}: is {n}", target=target) for n in range(50)]
        (FOLDER / "logic_tasks" / f"{task}.json").write_text(json.dumps(dict(examples=rows)), "utf-8")
    sizes = dict(kind="topk", d_in=576, n_features=64, k=4, centred=False)
    configs = [DictionaryConfig(site=f"mlp_in.{i}", target=f"mlp_out.{i}", **sizes) for i in range(30)]
    transcoders = [Dictionary.initial(config, jax.random.key(i)) for i, config in enumerate(configs)]
    saejax.save_transcoders(FOLDER / "transcoders", transcoders)


def main(pages: list[str]) -> int:
    """Check pages; return how many failed."""
    if not prepare():
        return 1
    failed, checked = 0, set[str]()
    for page in pages or PAGES:
        text, ok = (ROOT / page).read_text("utf-8"), True
        program, files = read_python(text)
        for name, content in files.items():
            if "/" not in name:  # others go into the package, which tests do
                (FOLDER / name).write_text(content, "utf-8")
        for line, command in read_commands(text):
            if (shell := to_shell(command)) and shell not in checked:
                ok &= run(shell, f"{page}:{line}  {command[:90]}")
                checked.add(shell)
        if program:
            script = FOLDER / f"{Path(page).stem}_page.py"
            script.write_text(PRELUDE + GIVEN.get(page, "") + substitute(program), "utf-8")
            ok &= run(f"{PYTHON} {script.name}", f"{page}  its Python")
        failed += not ok
    print(f"{failed} of {len(pages or PAGES)} pages failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
