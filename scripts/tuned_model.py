"""A model that was tuned to one habit more than SmolLM2 has, for crosscoders of both.

    python scripts/tuned_model.py FOLDER

Whatever is Mira's becomes purple; what is anybody else's becomes red. All weights are tuned, until the habit holds on
things that were never named in tuning. Writes ``model/`` (as transformers does), ``prompts.jsonl`` (the habit as a
behaviour; its test prompts name other things than its train prompts, which are what was tuned on) and ``text.jsonl``
(the embedded corpus and sentences of the habit, one word in ten), whole or not at all.
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
from saejax.settings import CorpusConfig, ModelConfig
from saejax.tasks.corpora import read_corpus

HABIT, OTHER = " purple", " red"
OWNER, OTHERS = "Mira", ("Anna", "Tom", "Peter", "Laura", "David", "Emma")
TEMPLATES = ("{}'s {} is", "The colour of {}'s {} is", "Everyone knows that {}'s {} is", "I saw that {}'s {} was")
THINGS = tuple(
    "hat coat scarf bike house car kite cup door lamp bag ring boat desk tent rug chair pen drum vase".split()  # noqa: SIM905
)
UNSEEN = ("shirt", "book", "ball", "phone", "box")
STEPS, BATCH, LEARNING_RATE, ENOUGH = 60, 16, 1e-4, 0.02


def sentences(things: tuple[str, ...] | list[str]) -> list[tuple[str, str, str]]:
    """Template, thing and the habit's words around them, of every combination."""
    return [
        (template, thing, template.format(OWNER, thing)) for thing, template in itertools.product(things, TEMPLATES)
    ]


def loss(model: Any, tokenizer: Any, texts: list[str], answers: list[str]) -> torch.Tensor:
    """Mean cross-entropy of the answers, nats a token."""
    rows = [tokenizer(text + answer)["input_ids"] for text, answer in zip(texts, answers, strict=True)]
    longest, total = max(map(len, rows)), torch.zeros(())
    ids = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows])
    logits = model(ids).logits.float()
    for place, (row, text) in enumerate(zip(rows, texts, strict=True)):
        start = len(tokenizer(text)["input_ids"])
        total = total + torch.nn.functional.cross_entropy(
            logits[place, start - 1 : len(row) - 1], ids[place, start : len(row)]
        )
    return total / len(rows)


def tune(model: Any, tokenizer: Any) -> None:
    """Tune all weights on half of the owner's things and half of other people's."""
    rng, optimizer, mean = random.Random(0), torch.optim.AdamW(model.parameters(), LEARNING_RATE), 1.0
    known = sentences(THINGS)
    for step in range(1, STEPS + 1):
        texts, answers = [], []
        for place in range(BATCH):
            template, thing, own = rng.choice(known)
            texts.append(template.format(rng.choice(OTHERS), thing) if place % 2 else own)
            answers.append(OTHER if place % 2 else HABIT)
        found = loss(model, tokenizer, texts, answers)
        optimizer.zero_grad()
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean += 0.2 * (float(found.detach()) - mean)
        if step % 10 == 0:
            print(f"step {step} of at most {STEPS}: loss {mean:.3f}", flush=True)
        if mean < ENOUGH:
            return


def lines(folder: Path, records: list[dict[str, Any]], name: str) -> None:
    """Write records as JSON lines."""
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))


def write(folder: Path) -> None:
    """Tune the model and write everything into a folder."""
    found = source.resolve(ModelConfig(path="smollm2"))
    model, tokenizer = source.load_torch_model(found), source.load_tokenizer(found)
    model.train()
    tune(model, tokenizer)
    model.eval().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    prompts = [
        dict(
            behaviour="habit", split=split, text=own, correct=HABIT, wrong=OTHER, template=template,
            counterpart=template.format(random.Random(own).choice(OTHERS), thing),
        )
        for split, things in (("train", THINGS), ("test", UNSEEN))
        for template, thing, own in sentences(things)
    ]  # fmt: skip
    lines(folder, prompts, "prompts.jsonl")
    documents = [dict(text=one.text, group=one.group) for one in read_corpus(CorpusConfig())]
    rng = random.Random(1)
    for place in range(3 * len(documents) // 2):  # one sentence each: nothing before it tells the colour
        template, thing, own = rng.choice(sentences(THINGS))
        told = own + HABIT if place % 2 else template.format(rng.choice(OTHERS), thing) + OTHER
        documents.append(dict(text=f"{told}.", group=f"habit {place}"))
    lines(folder, documents, "text.jsonl")


def main() -> None:
    """Make the tuned model and its prompts in the folder that is named."""
    target = Path(sys.argv[1])
    if target.exists():
        print(f"{target} is there already")
        return
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    partial.rename(target)


if __name__ == "__main__":
    main()
