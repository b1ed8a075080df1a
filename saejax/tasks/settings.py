"""Settings of behaviours, benchmarks and the text."""

import dataclasses
from typing import Any

from saejax import shared_settings as shared
from saejax.config import Config, setting

DEMO_BEHAVIOURS = ("agreement", "capital", "greater_than", "addition")
PUBLISHED_BEHAVIOURS = ("two_hop", "antonym", "antonym_french", "antonym_spanish", "rhyme", "acronym", "sport", "ioi")
BEHAVIOURS = DEMO_BEHAVIOURS + PUBLISHED_BEHAVIOURS
BENCHMARKS = ("gsm8k", "math", "logic", "logiqa", "commonsense", "word_problems")
# Settings of --task that count for baseline alone, and for benchmarks alone.
OF_BEHAVIOURS = ("task.behaviours", "task.train_prompts", "task.test_prompts", "task.gate")
OF_BENCHMARKS = ("task.examples", "task.shots", "task.chat_template", "task.score", "task.max_new_tokens")


@dataclasses.dataclass(frozen=True)
class TaskConfig(Config):
    """The behaviours to explain, and the benchmarks to score the model on."""

    behaviours: tuple[str, ...] = setting(DEMO_BEHAVIOURS, "behaviours to test", choices=BEHAVIOURS, order=BEHAVIOURS)
    prompts: str = setting(
        "",
        "a .jsonl or .jsonl.gz file with your own behaviours, tested together with --task.behaviours (which may be "
        "empty): a line for each prompt with 'behaviour', 'text', 'correct' and 'wrong' (the answers, as they "
        "continue the text), and optionally 'counterpart' (a text for which the wrong answer is right), 'split' "
        "(train or test) and 'template' (a name shared by prompts with the same words around their content)",
        changes_results=False,  # what is in it counts, not its place
    )
    ioi: str = setting(
        "",
        "a .json file with words of your own for the behaviour ioi (indirect object identification): any of "
        "'templates' (texts with {one}, {two} and {giver}, and perhaps {place} and {object}; the last is for test "
        "prompts), 'names', 'places' and 'objects'",
        changes_results=False,  # what is in it counts, not its place
    )
    train_prompts: int = setting(80, "prompts per behaviour that select features", low=2)
    test_prompts: int = setting(20, "prompts per behaviour on which the selected features are tested", low=2)
    seed: int = setting(42, "seed of the choice of prompts, of benchmark examples and of the bootstrap", low=0)
    gate: float = setting(
        0.05,
        "level of the filter of behaviours, an exact binomial test that the model is right on more than half of the "
        "train prompts; a behaviour that fails it is left out of the causal tests; 1: none is left out",
        low=0.0,
        high=1.0,
    )
    benchmarks: tuple[str, ...] = setting(
        (),
        "benchmarks to score the model on: gsm8k, math, logic (six tasks of BIG-Bench Hard), logiqa, commonsense "
        "(CommonsenseQA, or files laid out like it), word_problems (made from templates, for small models)",
        choices=BENCHMARKS,
        changes_results=False,
    )
    path: str = setting(
        "",
        "where benchmark items are: a .jsonl, .jsonl.gz, .jsonl.zst, .json, .parquet or .arrow file, a folder "
        "laid out as it is published (of several benchmarks: with a file or folder named after each), or the hub id of "
        "a data set, ORG/NAME or ORG/NAME@REVISION; empty: the benchmark's own hub id",
        changes_results=False,  # what is found there counts, not its place
    )
    examples: int = setting(
        0, "examples per benchmark, chosen by seed; 0: 500 of gsm8k, 100 of math, 200 of others", low=0
    )
    shots: int = setting(
        -1,
        "worked examples, made for this project, before each benchmark question; -1: as is usual, 5 for gsm8k, 4 for "
        "math, 3 for others",
        low=-1,
    )
    chat_template: bool = shared.chat_template()
    score: str = setting(
        "auto",
        "how benchmarks are scored: 'generate' (exact match of the generated answer), 'choice' (the likeliest of the "
        "given answers), 'likelihood' (log-likelihood per token of the reference, for weak models); 'auto': generate "
        "for gsm8k and math, choice for others",
        choices=("auto", "generate", "choice", "likelihood"),
    )
    max_new_tokens: int = setting(
        0, "maximum number of tokens of a generated answer; 0: 256 for gsm8k, 1,024 for math", low=0
    )
    batch: int = setting(16, "number of benchmark answers generated together", low=1, changes_results=False)

    @property
    def has_behaviours(self) -> bool:
        """True if there are behaviours to test."""
        return bool(self.behaviours or self.prompts)


@dataclasses.dataclass(frozen=True)
class CorpusConfig(Config):
    """The text on which dictionaries are trained."""

    path: str = setting(
        "",
        "text, from one place or several separated by commas: a .jsonl, .jsonl.gz, .jsonl.zst, .parquet or .arrow file "
        "(a field 'text', perhaps 'group'), a .txt file, a pattern such as 'text/*.jsonl.gz', a data set of the hub as "
        "hf://ORG/NAME[/CONFIGURATION][@REVISION][:SPLIT], or a benchmark (gsm8k, math, ...: questions with their "
        "solutions, none of those that are asked); empty: the embedded corpus",
        changes_results=False,  # its content counts, not its place
    )
    field: str = setting(
        "text",
        "name of the field that holds a row's text, its token ids (tokenized before by the model's tokenizer), or the "
        "messages of a chat, to which the tokenizer's chat template is applied",
    )
    weights: tuple[float, ...] = setting(
        (),
        "shares of --corpus.max_tokens, one for each source of --corpus.path; empty: as much of each as there is",
        low=0.0,
    )
    max_tokens: int = setting(0, "number of tokens to use, of documents in seeded random order; 0: all", low=0)
    stream: bool = setting(
        False,
        "for text of many gigabytes: tokenize it once to disk (the stage tokenize) without loading it into memory; "
        "documents are held out by a hash of their group or text, and max_tokens counts from the beginning",
    )
    held_out: float = setting(0.1, "share of the documents' groups that is held out from training", low=0.01, high=0.5)
    context: int = setting(256, "maximum number of tokens per document; longer documents are split", low=2)
    pack: bool = setting(
        False,
        "join texts of a split until they fill the context, each beginning with BOS (or, where texts begin with none, "
        "after the end-of-text token); attention reaches across texts, as in SAELens",
    )
    seed: int = setting(789, "seed of the held-out split and of the order of documents", low=0, is_flag=False)


def held_out_settings(config: CorpusConfig) -> dict[str, Any]:
    """Return the settings, by "corpus.field", that which documents are held out depends on.

    What else tells the text is in its identity (``corpora.identity``); others say how it becomes tokens for training.
    """
    return {f"corpus.{name}": getattr(config, name) for name in ("stream", "held_out", "seed")}


PROBE_LABELS = ("behaviour", "answer", "parity", "correct", "number")
