"""Small tokenizers in the formats of the families that saejax reads, trained on the behaviours' own words.

Each has its family's true normalizer, pre-tokenizer, decoder and special tokens; only the merges are few. What
SentencePiece does in training (pieces hold no two words, no digit beside another character) the trainer here is told
by a pre-tokenizer of its own, which the finished tokenizer does not have.
"""

import functools
import json
from importlib import resources

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_3 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
KINDS = ("gpt2", "pythia", "gemma", "phi2", "llama3", "mistral", "qwen3")
_PIECES = r"▁?\p{L}+|\p{N}|▁?[^▁\p{L}\p{N}\s]+|▁+|\s"


@functools.cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of 3,000 ids or fewer, as transformers loads it."""
    made = _sentencepiece(prefix=kind == "mistral") if kind in ("gemma", "mistral") else _byte_level(kind)
    first = dict(gemma="<bos>", mistral="<s>", llama3="<|begin_of_text|>").get(kind)
    if first:
        made.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, made.token_to_id(first))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=first, clean_up_tokenization_spaces=False)


def _text() -> list[str]:
    """Words as they stand in prompts, and numbers of one to four digits, of which vocabularies make tokens."""
    words = json.loads((resources.files("saejax.tasks") / "data" / "behaviours.json").read_text("utf-8"))
    nouns = [form for pair in words["nouns"].items() for form in pair]
    lines = [f"Everyone knows that the {noun} near the {noun} is what they are." for noun in nouns]
    lines += [f"The capital of {place} is the city of {city}, {city}." for place, city in words["places"].items()]
    years = [(event, i % 90 + 10, i % 80 + 19) for i, event in enumerate(words["events"] * 4)]
    lines += [f"The {event} lasted from '{start} to '{end}." for event, start, end in years]
    lines += [f"{a} + {b} = {a + b}, and {b} + {a} = {b + a}" for a in range(10) for b in range(10)]
    pairs = [(a, b) for a in range(100) for b in range(3, 99, 7)]
    return lines + [f"{a}+{b}={a + b}, from {1000 + 9 * a} to {1000 + 9 * b}" for a, b in pairs]


def _byte_level(kind: str) -> Tokenizer:
    made = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    pattern = dict(llama3=LLAMA_3, qwen3=QWEN_3).get(kind)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence([*split, level]), decoders.ByteLevel()
    if kind in ("pythia", "qwen3"):
        made.normalizer = normalizers.NFC()
    special = ["<|begin_of_text|>"] if kind == "llama3" else ["<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(_text(), _trainer(special, initial_alphabet=alphabet))
    if kind in ("pythia", "phi2"):  # both have tokens for runs of spaces
        made.add_tokens([AddedToken(" " * n, normalized=kind == "pythia") for n in range(24, 1, -1)])
    return made


def _sentencepiece(prefix: bool) -> Tokenizer:
    """Byte-pair pieces with byte fallback, as in Gemma; with a marker before the first word, as in Mistral."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    special = ["<unk>", "<s>" if prefix else "<bos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(_text(), _trainer(special))
    end = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        made.normalizer = None
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        end.append(decoders.Strip(" ", 1, 0))
    else:
        made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence(end)
    return made


def _trainer(special: list[str], **more) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(vocab_size=3000, special_tokens=special, show_progress=False, **more)
