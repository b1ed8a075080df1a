"""The stage ``circuits``: the circuit of each behaviour, and a page of each; ``report`` lists the files."""

import dataclasses
import functools
from collections.abc import Collection, Mapping

import jax.numpy as jnp
import numpy as np

from saejax.attribution.forms.features import Feature, FeatureDetails
from saejax.attribution.local.contexts import ContextSearch
from saejax.attribution.local.dictionaries import LayerTranscoders
from saejax.attribution.settings import GraphConfig
from saejax.circuits.groups import read_groups
from saejax.circuits.results import CircuitResults, CircuitsResults
from saejax.circuits.study import find_circuit
from saejax.errors import UserError
from saejax.interpret.neighbours import output_tokens
from saejax.models.tokens import token_text
from saejax.parallel.collectives import is_first_process
from saejax.progress import OnProgress
from saejax.runner.labels import labels_of_folders
from saejax.runner.parts import Measure, Measured, each_part
from saejax.runner.workspace import Run
from saejax.stages.attribute.outputs import details_of_features
from saejax.stages.attribute.requests import read_given_labels
from saejax.stages.attribute.run import open_parts
from saejax.stages.circuits.report import write_behaviour, write_index
from saejax.stages.circuits.settings import CircuitsConfig
from saejax.tasks.corpora import read_corpus
from saejax.tasks.gate import read_tested
from saejax.tasks.settings import CorpusConfig
from saejax.wording import counted

_DOCUMENTS = 40  # of the embedded corpus, in which contexts of features without files of their own are looked for
_PROMOTED = 5  # tokens that a page shows


def run_circuits(run: Run) -> CircuitsResults:
    """Find the circuit of each behaviour that the model has.

    Raises:
      UserError: a behaviour is unknown, the model has none of them, or the transcoders do not fit the model.
    """
    config, graph_config = run.configs[CircuitsConfig], run.configs[GraphConfig]
    tested = read_tested(run.inputs["baseline"], config.behaviours, "--circuits.behaviours")
    for name, why in tested.left_out.items():
        run.say(f"{name} is left out: {why}")
    given_groups = read_groups(config.groups, config.behaviours)
    if unused := [name for name in given_groups if name not in config.behaviours]:
        run.say(
            f"warning: {config.groups} has groups for {', '.join(unused)}, which are not used: --circuits.behaviours "
            f"names {', '.join(config.behaviours)}"
        )
    traced, measured = (
        {name: [prompt for prompt in some if prompt.split == split][:most] for name, some in tested.prompts.items()}
        for split, most in (("train", config.traced), ("test", config.measured))
    )

    def begin() -> Measure:
        model, transcoders = open_parts(run)
        if not isinstance(transcoders, LayerTranscoders):
            raise UserError("circuits take transcoders of all layers (--graph.transcoders), not SAEs")
        by_hand = read_given_labels(graph_config)
        labels = labels_of_folders([graph_config.transcoders]) | by_hand
        # Before anything is traced, which takes minutes.
        transcoders.check_features(labels, graph_config.labels or "its workdir")
        in_groups = [key.address for groups in given_groups.values() for group in groups for key in group.members]
        transcoders.check_features(in_groups, config.groups)
        # Features of a circuit fire on the traced prompts, if on no document of the corpus.
        texts = [document.text for document in read_corpus(CorpusConfig())[:_DOCUMENTS]]
        texts += [prompt.text for some in traced.values() for prompt in some]
        describe = functools.partial(describe_features, ContextSearch(model, transcoders, texts), graph_config, labels)

        def measure(name: str, on_progress: OnProgress) -> Measured:
            results, details = find_circuit(
                model,
                transcoders,
                [*traced[name], *measured[name]],
                groups=given_groups.get(name, ()),
                describe=describe,
                max_features=graph_config.max_features or None,
                seed=config.seed,
                on_progress=on_progress,
            )
            if is_first_process():
                weak, prompt = tested.weak.get(name, ""), measured[name][0]
                write_behaviour(run.folder, name, results, details, prompt, graph_config.transcoders, by_hand, weak)
            total, swap = len(results.drawn("total")), len(results.drawn("swap"))
            message = (
                f"returning over {counted(results.traced, 'prompt')}: {counted(len(results.returning), 'feature')}, in "
                f"{counted(len(results.groups), 'group')}; {counted(len(results.drawn()), 'edge')} drawn; needed for "
                f"the answer: {counted(total, 'group')}, carrying which one it is: {swap}"
            )
            return Measured(results, message)

        return measure

    behaviours = each_part(run, list(tested.prompts), begin, CircuitResults, "prompts", tested.mark)
    results = CircuitsResults(behaviours, tested.left_out, tested.weak)
    if is_first_process():
        write_index(run.folder, results)
    return results


def describe_features(
    search: ContextSearch, config: GraphConfig, labels: Mapping[Feature, str], features: Collection[Feature]
) -> dict[Feature, FeatureDetails]:
    """Return the contexts, promoted tokens and labels of features.

    Files of the set or of the user go first. A feature that they do not describe is searched in texts, and the tokens
    that it promotes come from its decoder row, read by the model's unembedding.

    Args:
      search: finds contexts.
      config: names the set and files of its features.
      labels: go before those in the files.
      features: layers and indices.
    """
    details = dict.fromkeys(features, FeatureDetails()) | details_of_features(config, list(features))
    # Only what the files do not say is searched for, as it takes a pass of the model for each text.
    firings = search.firings([feature for feature in features if not details[feature].examples])
    promoted, as_text = dict[Feature, tuple[str, ...]](), token_text(search.model.tokenizer)
    if unread := [feature for feature in features if not details[feature].top_logits]:
        rows_FxD = search.transcoders.rows_of("W_dec", *np.array(unread).T)
        raised = output_tokens(search.model, jnp.asarray(rows_FxD), _PROMOTED).raised()
        promoted = {feature: tuple(map(as_text, ids)) for feature, ids in zip(unread, raised, strict=True)}
    return {
        feature: dataclasses.replace(
            value,
            examples=value.examples or firings[feature].contexts,
            top_logits=value.top_logits or promoted[feature],
            label=labels.get(feature, value.label),
        )
        for feature, value in details.items()
    }
