"""Settings that several groups have in common: each is one flag, which sets the field in all of them."""

from typing import Any

from saejax.config import setting


def causal_seed() -> Any:
    """Return the field ``seed`` of a causal test."""
    return setting(
        456,
        "seed of causal tests: of splits, random sets, placebo targets, controls, random replacements and bootstrap",
        low=0,
        shared="causal",
    )


def causal_bootstrap() -> Any:
    """Return the field ``bootstrap`` of a causal test."""
    return setting(10_000, "bootstrap resamples for 95 % intervals of causal tests", low=100, is_flag=False)


def causal_batch_rows() -> Any:
    """Return the field ``batch_rows`` of a causal test."""
    return setting(64, "edited prompts per batch of the program", low=1, changes_results=False, shared="causal")


def random_sets() -> Any:
    """Return the field ``random_sets`` of a causal test."""
    return setting(
        79,
        "random lists of features, or of steering random directions, of the same dose that the top ones are compared "
        "with; a yes needs 19 with one behaviour, 39 with two, and 20 more for each further one",
        low=1,
        shared="causal",
    )


def placebo_targets() -> Any:
    """Return the field ``placebo_targets`` of a causal test."""
    return setting(
        79,
        "pairs of likely tokens that are no answers, of benchmarks corrupted final answers, whose top features, at the "
        "same dose, they are compared with",
        low=0,
        shared="causal",
    )


def min_accuracy_drop() -> Any:
    """Return the field ``min_accuracy_drop`` of a causal test."""
    return setting(
        0.05, "smallest drop of accuracy that counts as an effect, as a share", low=0.0, high=1.0, shared="causal"
    )


def chat_template() -> Any:
    """Return the field ``chat_template`` of prompts that are texts."""
    return setting(
        False,
        "put prompts into the tokenizer's chat template: questions of benchmarks with an instruction and without "
        "thinking, texts whose graphs are traced as a user's message",
        shared="model",
    )


def lens() -> Any:
    """Return the field ``lens`` of stages that read streams or directions as tokens."""
    return setting(
        "",
        "file of a fitted Jacobian lens, also hf://ORG/NAME/FILE, which the tracker reads streams with in place of the "
        "logit lens, and a graph's page the tokens that each feature raises and lowers most; layers that it lacks are "
        "read as they are",
        shared="model",
    )


def source_set() -> Any:
    """Return the field ``source_set`` of what is written for Neuronpedia."""
    return setting(
        "",
        "name of the set of dictionaries at Neuronpedia, such as gemmascope-transcoder-16k: graphs are then written "
        "for Neuronpedia, which takes files of at most 100 MB; empty: for circuit-tracer's viewer, and exports for "
        "Neuronpedia are named after site and kind, such as res-topk",
        shared="neuronpedia",
    )


def analysis_batch_tokens() -> Any:
    """Return the field ``batch_tokens`` of an analysis of features."""
    return setting(
        4096, "tokens per batch when dictionaries are analysed", low=32, changes_results=False, shared="analysis"
    )
