"""Memory that text of any size takes: tokenised as a stream, trained on from the model, evaluated, interpreted.

Run: python -m benchmarks.bench_text [--bytes 1e8,4e8] [--steps 200] [--stages tokenize]
The text is the embedded corpus, over and over, each document with a mark of its own, in one file. A random Llama with a
vocabulary of whole words reads it. Each size runs in a process of its own, which prints for each stage the most memory
that it held at once: what it allocated, and that with the pages of files that it read, which the system takes back when
it needs them, and its seconds, also those of processors. Training ends after so many steps; 0: all of the text once.
Last, one line of JSON.
"""

import argparse
import gzip
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.bench_stream import VOCABULARY, random_model
from saejax.runner import command
from saejax.tasks.text_sources import EMBEDDED

CONTEXT = 128  # tokens
STAGES = ("tokenize", "train", "capture", "evaluate", "interpret")
FLAGS = {
    "corpus.stream": True,
    "corpus.context": CONTEXT,
    "capture.sites": "resid_post.0",
    "capture.tokens": 50_000,
    "train.source": "model",
    "train.sites": "resid_post.0",
    "train.kinds": "topk",
    "train.k": 8,
    "train.buffer_rows": 65_536,
    "train.batch": 4096,
    "train.epochs": 1,
    "evaluate.ce_documents": 8,
    "interpret.dictionaries": "topk",
}


def write_text(path: Path, size: int) -> None:
    """Write distinct documents of at least ``size`` bytes together."""
    with gzip.open(EMBEDDED, "rt") as file:
        texts = [json.loads(line)["text"] for line in file]
    written = number = 0
    with open(path, "w") as file:
        while written < size:
            written += file.write(json.dumps(dict(text=f"{texts[number % len(texts)]} Copy {number}.")) + "\n")
            number += 1


def write_model(folder: Path) -> None:
    """Write a small random model whose vocabulary is the corpus's most frequent words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    random_model(folder, layers=2, width=32, length=CONTEXT)
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with gzip.open(EMBEDDED, "rt") as file:
        trainer = trainers.WordLevelTrainer(vocab_size=VOCABULARY, special_tokens=["[UNK]"], show_progress=False)
        words.train_from_iterator((json.loads(line)["text"] for line in file), trainer)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)


def held(field: str) -> int:
    """Return the bytes of memory in a field of ``/proc/self/status``; 0 if it is absent."""
    match = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def peak_of(stage: str, argv: list[str]) -> dict[str, float]:
    """Run a stage; the most that it allocated at once, and that it held together with pages of files."""
    peak, done = [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], held("RssAnon"))

    sampler, start, began = threading.Thread(target=sample), time.perf_counter(), time.process_time()
    sampler.start()
    status = command.run([stage], "", argv)
    done.set()
    sampler.join()
    assert status == 0, stage
    summary = next(Path(argv[1].partition("=")[2]).glob(f"{stage}/**/done.json"))
    with_files = json.loads(summary.read_text())["peak_host_bytes"]
    seconds = time.perf_counter() - start
    return dict(
        allocated_gb=round(peak[0] / 1e9, 3),
        with_files_gb=round(with_files / 1e9, 3),
        seconds=round(seconds),
        processor_seconds=round(time.process_time() - began, 1),
    )


def run(size: int, steps: int, stages: list[str]) -> None:
    """Run stages on text of one size in this process, and print their peaks of memory."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model")
        write_text(Path(folder) / "text.jsonl", size)
        overrides = {"corpus.path": f"{folder}/text.jsonl", "model.path": f"{folder}/model", "train.max_steps": steps}
        lines = [f"--{name}={value}" for name, value in {**FLAGS, **overrides}.items()]
        (Path(folder) / "run.flags").write_text("\n".join(lines))  # in a file, where a stage ignores others' flags
        argv = ["program", f"--workdir={folder}/run", f"--flagfile={folder}/run.flags"]
        peaks = {stage: peak_of(stage, argv) for stage in stages}
        text = json.loads((Path(folder) / "run" / "tokenize" / "done.json").read_text())["results"]
    print(json.dumps(dict(bytes=size, tokens=sum(text["tokens"].values()), stages=peaks)))


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", default="1e8,4e8", help="sizes of text, with commas between")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--stages", default=",".join(STAGES), help="the first of these, with commas between")
    parser.add_argument("--here", action="store_true", help="run the one size in this process")
    args = parser.parse_args()
    sizes = [int(float(size)) for size in args.bytes.split(",")]
    if args.here:
        return run(sizes[0], args.steps, args.stages.split(","))
    measured = []
    for size in sizes:
        flags = [f"--bytes={size}", f"--steps={args.steps}", f"--stages={args.stages}", "--here"]
        command = [sys.executable, "-m", "benchmarks.bench_text", *flags]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        measured.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{size / 1e9:.3f} GB of text, {measured[-1]['tokens']:,} tokens")
        for stage, peak in measured[-1]["stages"].items():
            template = "  {:10s} {:.2f} GB allocated, {:.2f} GB with pages of files, {} s, {:.1f} s of processors"
            print(template.format(stage, *peak.values()), flush=True)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
