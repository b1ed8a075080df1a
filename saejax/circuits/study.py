"""The circuit of a behaviour.

1. Trace prompts, for the influence of features on the answer and on a placebo target.
2. Take the features that return over these prompts, and put them into groups.
3. Measure the effects of each group, and of its control sets, on other prompts.
4. Judge which effects are edges.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from saejax.attribution.forms.features import Feature, FeatureDetails
from saejax.attribution.local.dictionaries import LayerTranscoders
from saejax.attribution.local.model import LocalModel
from saejax.attribution.local.state import prompt_ids
from saejax.attribution.trace.prompt import trace_prompt
from saejax.circuits.edges import judge_edges
from saejax.circuits.groups import Group, Key, find_returning, influence_by_key, position_roles, propose_groups
from saejax.circuits.measure import PromptEffects, measure_prompt
from saejax.circuits.results import CircuitResults
from saejax.dictionaries.bos import follow_bos
from saejax.errors import UserError
from saejax.interventions.behaviour_prompts import EQUIVALENTS
from saejax.interventions.controls import token_pairs
from saejax.interventions.slopes import neutral_tokens
from saejax.models.language_model import LanguageModel
from saejax.parallel.collectives import process_count
from saejax.progress import OnProgress, silent
from saejax.tasks.answer_tokens import first_answer_ids
from saejax.tasks.behaviours import SPLITS, Prompt

MAX_GROUPS = 6  # proposed groups, the most influential ones: as many as a picture has room for
_TOP = 100  # most influential features of a traced prompt that count
_RETURNS = 0.2  # share of the traced prompts in which a feature has to count, to be in a circuit
_GROUP_SIZE = 10  # features of a proposed group, at most: a reader can look at these
_LIKELY = 40  # most probable tokens of each prompt, from which placebo targets are drawn


def find_circuit(
    model: LanguageModel,
    transcoders: LayerTranscoders,
    prompts: Sequence[Prompt],
    *,
    groups: Sequence[Group] = (),
    describe: Callable[[Sequence[Feature]], Mapping[Feature, FeatureDetails]] = lambda features: {},
    max_features: int | None = 512,
    seed: int = 0,
    on_progress: OnProgress = silent,
) -> tuple[CircuitResults, Mapping[Feature, FeatureDetails]]:
    """Find the circuit of a behaviour's prompts.

    Args:
      model: the language model.
      transcoders: a transcoder for each of its layers.
      prompts: "train" prompts choose features: each is traced. On "test" prompts, two or more, effects are measured.
      groups: groups to measure; if empty, groups are proposed.
      describe: returns the details of features that groups are made and named from.
      max_features: maximum number of features of a graph.
      seed: seed of placebo targets, control sets and the bootstrap.
      on_progress: called with the numbers of prompts done and of all prompts; may raise to stop.

    Returns:
      The circuit, and the details of the features that return or are in a group.

    Raises:
      UserError: a prompt cannot be traced, or there are fewer than two prompts to measure.
    """
    traced, measured = ([prompt for prompt in prompts if prompt.split == split] for split in SPLITS)
    if len(measured) < 2:
        count = len(measured)
        raise UserError(f"effects are measured on {count} prompts: expected 2 or more; raise --task.test_prompts")
    model = follow_bos(model, transcoders.configs)
    # 1. Trace.
    total, answers, placebo = len(traced) + len(measured), [], defaultdict[Key, float](float)
    pairs = _draw_placebo_pairs(model, traced, measured, seed)
    for number, (prompt, pair) in enumerate(zip(traced, pairs, strict=True)):
        on_progress(number, total)
        # Both targets in one graph: a second row costs little, a second graph as much as the first.
        targets = [_answer_ids(model, prompt), pair]
        # Says once more how many prompts are done, which may raise to stop: in a pool of threads, which several
        # processes would do at different places.
        ask = (lambda *rows, number=number: on_progress(number, total)) if process_count() == 1 else silent
        graph = trace_prompt(
            model, transcoders, prompt.text, targets=targets, max_features=max_features, on_progress=ask
        ).graph
        roles = _roles(model, prompt)
        answers.append(influence_by_key(graph, roles, 0))
        # Over all traced prompts: of a prompt alone, placebo features would be few.
        for key, influence in influence_by_key(graph, roles, 1).items():
            placebo[key] += influence
    # 2. Group.
    returning = find_returning(answers, _TOP, _RETURNS)
    keys = [*returning, *(key for group in groups for key in group.members)]
    details = describe(list(dict.fromkeys(key.address for key in keys)))
    n_layers = model.config.n_layers
    chosen = tuple(groups) or tuple(propose_groups(returning, n_layers, _GROUP_SIZE, MAX_GROUPS, details))
    # 3. Measure.
    diffs, effects, swapped_diffs = list[float](), list[PromptEffects](), list[float]()
    for number, prompt in enumerate(measured):
        on_progress(len(traced) + number, total)
        local = LocalModel(model, transcoders, prompt.text)
        # Activations are exchanged position by position, so both prompts need one length.
        swaps = prompt.counterpart and len(prompt_ids(model, prompt.counterpart)) == len(local.ids_P)
        counterpart = LocalModel(model, transcoders, prompt.counterpart) if swaps else None
        correct, wrong = _answer_ids(model, prompt)
        diffs.append(float(local.logits_V[correct]) - float(local.logits_V[wrong]))
        if swaps:
            swapped_diffs.append(diffs[-1])
        effects.append(
            measure_prompt(
                local, _roles(model, prompt), chosen, (correct, wrong), counterpart=counterpart, placebo=placebo,
                seed=seed + number,  # other draws of the control sets on each prompt
            )
        )  # fmt: skip
    # 4. Judge.
    templates = [prompt.template for prompt in measured]
    edges = judge_edges([group.name for group in chosen], effects, templates, seed=seed)
    results = CircuitResults(
        len(traced), len(measured), len(swapped_diffs), sum(diffs) / len(diffs), measured[0].correct.strip(), chosen,
        tuple(edges), tuple(returning), n_layers,
        sum(swapped_diffs) / len(swapped_diffs) if swapped_diffs else None,
    )  # fmt: skip
    return results, details


def _answer_ids(model: LanguageModel, prompt: Prompt) -> tuple[int, int]:
    correct, wrong = first_answer_ids(model, [prompt])[0].tolist()
    return correct, wrong


def _roles(model: LanguageModel, prompt: Prompt) -> np.ndarray:
    counterpart_P = prompt_ids(model, prompt.counterpart) if prompt.counterpart else None
    return position_roles(prompt_ids(model, prompt.text), counterpart_P)


def _draw_placebo_pairs(
    model: LanguageModel, traced: Sequence[Prompt], measured: Sequence[Prompt], seed: int
) -> list[tuple[int, int]]:
    """Return a placebo target for each traced prompt: two tokens that are likely in these contexts and no answers.

    Raises:
      UserError: the vocabulary has no two such tokens.
    """
    if not traced:
        return []
    output = model(model.tokenize([prompt.text for prompt in traced]))
    assert output.logits_BxTxV is not None
    logits_BxV = np.asarray(output.logits_BxTxV[np.arange(len(traced)), output.tokens.last_B], np.float32)
    order_BxV, most = np.argsort(-logits_BxV, axis=1), _LIKELY
    # Answers of the measured prompts too, or a placebo could be the answer of a test prompt; in any case and spacing.
    answers = {text for prompt in (*traced, *measured) for text in (prompt.correct, prompt.wrong)}
    answers |= {text for prompt in traced for text in EQUIVALENTS.get(prompt.behaviour, ())}

    def neutral() -> np.ndarray:
        # The most probable tokens of each prompt, so that a placebo is likely somewhere.
        return neutral_tokens(model.tokenizer, np.unique(order_BxV[:, :most]), answers)

    # After a sum most of them are numbers, of which each may be an answer.
    while len(pool := neutral()) < 2 and most < order_BxV.shape[1]:
        most *= 2
    if len(pool) < 2:
        raise UserError(
            f"{len(pool)} of the likely next tokens are no answers of {traced[0].behaviour}: expected 2 or more, of "
            "which placebo targets are made; raise --circuits.traced, or give other prompts"
        )
    pairs = itertools.cycle(token_pairs(pool, seed).tolist())
    return [(first, second) for _, (first, second) in zip(traced, pairs, strict=False)]
