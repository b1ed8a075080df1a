"""What is compiled for a prompt serves the prompts after it."""

import logging

import jax
import numpy as np
from graph_checks import double
from made_transcoders import made_set

from saejax.attribution.heads.query_key import split_scores
from saejax.attribution.local.dictionaries import LayerTranscoders
from saejax.attribution.trace.prompt import trace_prompt


def graph_and_checks(lm, transcoders, tokens: int, seed: int, logits: int):
    """Traces a random prompt, splits scores of a head, and runs it; the graph."""
    prompt = np.random.default_rng(seed).integers(1, lm.config.vocab, tokens)
    graph, local, readouts = trace_prompt(lm, transcoders, prompt, max_features=100, max_logits=logits, logit_mass=1.0)
    split_scores(local, 1, 1, -1)
    double(local, graph, readouts, 16)
    return graph


def test_a_second_prompt_compiles_nothing(lm, caplog):
    """Of as many tokens to a multiple of four, with other features, fewer nodes or more, and other targets."""
    transcoders = LayerTranscoders.of(made_set(lm, 92))  # as no other test has, so that nothing is compiled yet
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):

        def compiled(tokens: int, seed: int, logits: int) -> tuple[list[str], int]:
            caplog.clear()
            graph = graph_and_checks(lm, transcoders, tokens, seed, logits)
            names = [record.getMessage().split(" with ")[0] for record in caplog.records]
            return [name for name in names if name.startswith("Compiling")], graph.settings["active_features"]

        first, active = compiled(11, 0, 5)
        assert len(first) > 15  # so the log tells
        counts = {active}
        for tokens, seed, logits in ((12, 1, 3), (9, 2, 7), (11, 3, 1)):
            names, active = compiled(tokens, seed, logits)
            assert not names, f"{tokens} tokens, {active} active features: {names}"
            counts.add(active)
    assert len(counts) == 4
