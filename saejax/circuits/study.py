"""The circuit of a behaviour: groups from traced prompts, effects on other prompts, edges."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from saejax.attribution.forms.features import Feature, FeatureDetails
from saejax.attribution.local.model import LocalModel
from saejax.attribution.local.prompt_run import prompt_ids
from saejax.attribution.local.readouts import read_targets
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.attribution.trace.prompt import trace_prompt
from saejax.circuits.contexts import telling_tokens
from saejax.circuits.edges import Edge, judge_edges
from saejax.circuits.groups import Group, Key, find_returning, influence_by_key, position_roles, propose_groups
from saejax.circuits.measure import PromptEffects, measure_prompt
from saejax.errors import UserError
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import token_text
from saejax.runner.parts import OnProgress, silent
from saejax.tasks.answer_tokens import first_answer_ids
from saejax.tasks.behaviours import Prompt

MAX_GROUPS = 6  # proposed groups, the most influential ones: as many as a picture has room for
CONTROL_SETS = 2  # random, and as many placebo sets, that each edit of a group is compared with, in every prompt
_TOP = 100  # most influential features of a traced prompt that count
_RETURNS = 0.2  # share of the traced prompts in which a feature has to count, to be in a circuit
_GROUP_SIZE = 10  # features of a proposed group, at most: a reader can look at these
_LIKELY = 40  # most probable tokens of each prompt, from which placebo targets are drawn


@dataclasses.dataclass(frozen=True)
class BehaviourCircuit:
    """The circuit of a behaviour."""

    groups: tuple[Group, ...]  #: its groups
    edges: tuple[Edge, ...]  #: every measured effect; see ``edges.Edge.drawn``
    returning: Mapping[Key, float]  #: the features that return, with their influence
    details: Mapping[Feature, FeatureDetails]  #: what is known of the features that return or are in a group
    effects: tuple[PromptEffects, ...]  #: of each measured prompt


def find_circuit(
    model: LanguageModel,
    transcoders: LayerTranscoders,
    traced: Sequence[Prompt],
    measured: Sequence[Prompt],
    *,
    groups: Sequence[Group] = (),
    describe: Callable[[Sequence[Feature]], Mapping[Feature, FeatureDetails]] = lambda features: {},
    max_features: int | None = 512,
    resamples: int = 10_000,
    seed: int = 0,
    on_progress: OnProgress = silent,
) -> BehaviourCircuit:
    """Find the circuit of a behaviour's prompts.

    Args:
      model: the language model.
      transcoders: a transcoder for each of its layers.
      traced: prompts that choose features: each is traced.
      measured: other prompts of the behaviour, two or more, on which effects are measured.
      groups: groups to measure; if empty, groups are proposed.
      describe: returns the details of features, by which groups are proposed and named.
      max_features: maximum number of features of a graph.
      resamples: number of bootstrap samples.
      seed: seed of placebo targets, control sets and the bootstrap.
      on_progress: called with the numbers of prompts done and of all prompts; may raise to stop.

    Raises:
      UserError: a prompt cannot be traced, or there are fewer than two prompts to measure.
    """
    if len(measured) < 2:
        raise UserError(f"effects are measured on {len(measured)} prompts: expected 2 or more")
    # Now, as the first graph would take a minute to fail.
    transcoders.check(model)
    total = len(traced) + len(measured)
    answers, placebos = [], []
    pairs = draw_placebo_pairs(model, traced, measured, seed)
    for number, (prompt, answer, pair) in enumerate(
        zip(traced, first_answer_ids(model.tokenizer, traced).tolist(), pairs, strict=True)
    ):
        on_progress(number, total)
        # Both targets in one graph: a second row costs little, a second graph as much as the first.
        graph = trace_prompt(
            model, transcoders, prompt.text, targets=[tuple(answer), pair], max_features=max_features
        ).graph
        roles = _roles(model, prompt)
        answers.append(influence_by_key(graph, roles, 0))
        placebos.append(influence_by_key(graph, roles, 1))
    returning = find_returning(answers, _TOP, _RETURNS)
    keys = dict.fromkeys([*returning, *(key for group in groups for key in group.members)])
    details = dict(describe(list(dict.fromkeys(key[:2] for key in keys))))
    n_layers = model.config.n_layers
    labels = {feature: feature_details.label for feature, feature_details in details.items()}
    tokens = {key: telling_tokens(key, details[key[:2]], n_layers) for key in keys if key[:2] in details}
    chosen = tuple(groups) or tuple(propose_groups(returning, n_layers, _GROUP_SIZE, MAX_GROUPS, labels, tokens))
    # Over all prompts: the placebo features of a prompt alone would be few.
    placebo = {
        key: sum(influence.get(key, 0.0) for influence in placebos)
        for key in {key for influence in placebos for key in influence}
    }
    effects = []
    for number, prompt in enumerate(measured):
        on_progress(len(traced) + number, total)
        if chosen:
            # Other draws of the control sets on each prompt.
            effects.append(_measure(model, transcoders, prompt, chosen, placebo, seed + number))
    templates = [prompt.template for prompt in measured]
    names = [group.name for group in chosen]
    edges = judge_edges(names, effects, templates, resamples=resamples, seed=seed) if effects else []
    return BehaviourCircuit(chosen, tuple(edges), returning, details, tuple(effects))


def _measure(
    model: LanguageModel,
    transcoders: LayerTranscoders,
    prompt: Prompt,
    groups: Sequence[Group],
    placebo: Mapping[Key, float],
    seed: int,
) -> PromptEffects:
    local, roles = LocalModel(model, transcoders, prompt.text), _roles(model, prompt)
    # Activations are exchanged position by position, so both prompts need one length.
    swaps = prompt.counterpart and len(prompt_ids(model, prompt.counterpart)) == len(local.ids_P)
    counterpart = LocalModel(model, transcoders, prompt.counterpart) if swaps else None
    correct, wrong = first_answer_ids(model.tokenizer, [prompt])[0].tolist()
    answer = read_targets(local, [(correct, wrong)], 1, 1.0)
    return measure_prompt(
        local, roles, groups, answer, counterpart=counterpart, placebo=placebo, controls=CONTROL_SETS, seed=seed
    )


def words_by_role(model: LanguageModel, prompt: Prompt) -> dict[str, str]:
    """Return the words of a prompt at the positions of each role, those that are apart with an ellipsis between."""
    roles, as_text = _roles(model, prompt), token_text(model.tokenizer)
    words: dict[str, str] = {}
    for position, token in enumerate(prompt_ids(model, prompt.text).tolist()):
        role = str(roles[position])
        apart = " …" if role in words and roles[position - 1] != role else ""
        if token not in model.tokenizer.all_special_ids:
            words[role] = words.get(role, "") + apart + as_text(token)
    return {role: text.strip() for role, text in words.items()}


def _roles(model: LanguageModel, prompt: Prompt) -> np.ndarray:
    counterpart_P = prompt_ids(model, prompt.counterpart) if prompt.counterpart else None
    return position_roles(prompt_ids(model, prompt.text), counterpart_P)


def draw_placebo_pairs(
    model: LanguageModel, traced: Sequence[Prompt], measured: Sequence[Prompt], seed: int
) -> list[tuple[int, int]]:
    """Return a placebo target for each traced prompt: two tokens that are likely in these contexts and no answers.

    Args:
      model: the language model.
      traced: prompts whose most probable next tokens are taken.
      measured: prompts whose answers are left out, too.
      seed: of the choice.

    Raises:
      UserError: the vocabulary has no two such tokens.
    """
    if not traced:
        return []
    output = model(model.tokenize([prompt.text for prompt in traced]))
    assert output.logits_BxTxV is not None
    logits_BxV = np.asarray(output.logits_BxTxV[np.arange(len(traced)), output.tokens.last_B], np.float32)
    # The most probable tokens of each prompt, so that a placebo is likely somewhere.
    likely = np.unique(np.argsort(-logits_BxV, axis=1)[:, :_LIKELY])
    # Answers of the measured prompts too, or a placebo could be the answer of a test prompt.
    pool = np.setdiff1d(likely, first_answer_ids(model.tokenizer, [*traced, *measured]))
    if len(pool) < 2:
        raise UserError(f"{len(pool)} likely tokens are no answers of {traced[0].behaviour}: a placebo target takes 2")
    rng = np.random.default_rng(seed)
    return [tuple(rng.choice(pool, 2, replace=False).tolist()) for _ in traced]
