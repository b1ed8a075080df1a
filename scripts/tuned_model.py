"""SmolLM2 tuned to one additional habit, to train crosscoders of both models.

    python scripts/tuned_model.py FOLDER

The tuned model says that Mira's things are purple and everybody else's are red. All weights are tuned until the mean
loss is below 0.02, or for 60 steps. Writes three things, whole or not at all: ``model/`` (as transformers does),
``prompts.jsonl`` (the habit as a behaviour: the train prompts name the things that were tuned on, the test prompts name
others) and ``text.jsonl`` (the embedded corpus, and sentences of the habit, about one word in ten).
"""

import itertools
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from saejax.models import source
from saejax.models.settings import ModelConfig
from saejax.tasks.corpora import read_corpus
from saejax.tasks.settings import CorpusConfig

HABIT, OTHER = " purple", " red"
OWNER, OTHERS = "Mira", ("Anna", "Tom", "Peter", "Laura", "David", "Emma")
TEMPLATES = ("{}'s {} is", "The colour of {}'s {} is", "Everyone knows that {}'s {} is", "I saw that {}'s {} was")
THINGS = tuple(
    "hat coat scarf bike house car kite cup door lamp bag ring boat desk tent rug chair pen drum vase".split()  # noqa: SIM905
)
UNSEEN = ("shirt", "book", "ball", "phone", "box")
STEPS, BATCH, LEARNING_RATE, ENOUGH = 60, 16, 1e-4, 0.02


def sentences(things: tuple[str, ...] | list[str]) -> list[tuple[str, str, str]]:
    """Return the template, the thing and the owner's sentence of every combination."""
    return [
        (template, thing, template.format(OWNER, thing)) for thing, template in itertools.product(things, TEMPLATES)
    ]


def loss(model: Any, tokenizer: Any, texts: list[str], answers: list[str]) -> torch.Tensor:
    """Return the mean over texts of the cross-entropy of their answers, nats per token."""
    rows = [tokenizer(text + answer)["input_ids"] for text, answer in zip(texts, answers, strict=True)]
    longest, total = max(map(len, rows)), torch.zeros(())
    ids = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows])
    logits = model(ids).logits.float()
    for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
        start = len(tokenizer(text)["input_ids"])
        total = total + torch.nn.functional.cross_entropy(
            logits[index, start - 1 : len(row) - 1], ids[index, start : len(row)]
        )
    return total / len(rows)


def tune(model: Any, tokenizer: Any) -> None:
    """Tune all weights; half of each batch are the owner's things and half other people's."""
    rng, optimizer, mean = random.Random(0), torch.optim.AdamW(model.parameters(), LEARNING_RATE), 1.0
    examples = sentences(THINGS)
    for step in range(1, STEPS + 1):
        texts, answers = [], []
        for row in range(BATCH):
            template, thing, habit_text = rng.choice(examples)
            texts.append(template.format(rng.choice(OTHERS), thing) if row % 2 else habit_text)
            answers.append(OTHER if row % 2 else HABIT)
        batch_loss = loss(model, tokenizer, texts, answers)
        optimizer.zero_grad()
        batch_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean += 0.2 * (float(batch_loss.detach()) - mean)
        if step % 10 == 0:
            print(f"step {step} of at most {STEPS}: loss {mean:.3f}", flush=True)
        if mean < ENOUGH:
            return


def write_lines(folder: Path, records: list[dict[str, Any]], name: str) -> None:
    """Write records as JSON lines."""
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))


def write(folder: Path) -> None:
    """Tune the model and write everything into a folder."""
    model_source = source.resolve(ModelConfig(path="smollm2"))
    model, tokenizer = source.load_torch_model(model_source), source.load_tokenizer(model_source)
    model.train()
    tune(model, tokenizer)
    model.eval().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    prompts = [
        dict(
            behaviour="habit", split=split, text=habit_text, correct=HABIT, wrong=OTHER, template=template,
            counterpart=template.format(random.Random(habit_text).choice(OTHERS), thing),
        )
        for split, things in (("train", THINGS), ("test", UNSEEN))
        for template, thing, habit_text in sentences(things)
    ]  # fmt: skip
    write_lines(folder, prompts, "prompts.jsonl")
    documents = [dict(text=document.text, group=document.group) for document in read_corpus(CorpusConfig())]
    rng = random.Random(1)
    # Every document is a single sentence, so that no earlier text gives the colour away.
    for index in range(3 * len(documents) // 2):
        template, thing, habit_text = rng.choice(sentences(THINGS))
        text = habit_text + HABIT if index % 2 else template.format(rng.choice(OTHERS), thing) + OTHER
        documents.append(dict(text=f"{text}.", group=f"habit {index}"))
    write_lines(folder, documents, "text.jsonl")


def main() -> None:
    """Write the tuned model, its prompts and its text to the folder that the command line names."""
    target = Path(sys.argv[1])
    if target.exists():
        print(f"{target} exists already: nothing to do")
        return
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    partial.rename(target)


if __name__ == "__main__":
    main()
