"""The stage ``circuits``: the circuit of each behaviour, and a page of each.

Files of the unit: ``index.html`` lists the behaviours and published claims. For each behaviour, ``<behaviour>.html``
opens with the circuit, ``<behaviour>-groups.json`` has the groups, to be edited and given to ``--circuits.groups``, and
``review/<behaviour>.csv`` a line for each feature of the groups, where a person fills in labels, to be given to
``--graph.labels``.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saejax.attribution.forms.features import Feature, FeatureDetails
from saejax.attribution.local.contexts import ContextSearch
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.attribution.requests import read_given_labels, read_labels
from saejax.attribution.run import open_parts
from saejax.circuits.contexts import FeatureSearch
from saejax.circuits.groups import Group, as_json, read_groups
from saejax.circuits.report import write_index, write_page
from saejax.circuits.results import CircuitResults, CircuitsResults
from saejax.circuits.study import find_circuit
from saejax.dictionaries.labels import names_of_layers
from saejax.errors import UserError
from saejax.files import write_text
from saejax.page.tables import visible
from saejax.parallel.collectives import is_first_process
from saejax.runner.parts import Measure, Measured, OnProgress, each_part, part_file
from saejax.runner.workspace import Run
from saejax.settings import CorpusConfig, GraphConfig
from saejax.stages.circuits import CircuitsConfig
from saejax.tasks.corpora import read_corpus
from saejax.tasks.gate import read_tested

_DOCUMENTS = 40  # of the embedded corpus, in which contexts of features without files of their own are looked for


def run_circuits(run: Run) -> CircuitsResults:
    """Find the circuit of each behaviour that the model has.

    Raises:
      UserError: a behaviour is unknown, the model has none of them, or the transcoders do not fit the model.
    """
    config, graph_config = run.configs[CircuitsConfig], run.configs[GraphConfig]
    tested = read_tested(run.inputs["baseline"], config.behaviours, "--circuits.behaviours")
    for name, why in tested.left_out.items():
        run.say(f"circuits: {name} is left out: {why}")
    given_groups = read_groups(config.groups, config.behaviours)
    traced = {
        name: [prompt for prompt in some if prompt.split == "train"][: config.traced]
        for name, some in tested.prompts.items()
    }

    def begin() -> Measure:
        model, transcoders = open_parts(run)
        if not isinstance(transcoders, LayerTranscoders):
            raise UserError("circuits take transcoders of all layers (--graph.transcoders), not SAEs")
        labels, by_hand = read_labels(graph_config), read_given_labels(graph_config)
        # Before anything is traced, which takes minutes.
        transcoders.check_features(labels, graph_config.labels or "its workdir")
        in_groups = [key.address for groups in given_groups.values() for group in groups for key in group.members]
        transcoders.check_features(in_groups, config.groups)
        # Features of a circuit fire on the traced prompts, if on no document of the corpus.
        texts = [document.text for document in read_corpus(CorpusConfig())[:_DOCUMENTS]]
        texts += [prompt.text for some in traced.values() for prompt in some]
        search = FeatureSearch(ContextSearch(model, transcoders, texts), graph_config, labels)

        def measure(name: str, on_progress: OnProgress) -> Measured:
            test = [prompt for prompt in tested.prompts[name] if prompt.split == "test"][: config.measured]
            results, details = find_circuit(
                model, transcoders, traced[name], test, groups=given_groups.get(name, ()), describe=search.describe,
                max_features=graph_config.max_features or None, resamples=config.bootstrap, seed=config.seed,
                on_progress=on_progress,
            )  # fmt: skip
            if is_first_process():
                write_text(part_file(run, name, "-groups.json"), as_json(name, results.groups))
                write_page(part_file(run, name, ".html"), name, results, details, test[0])
                review = run.folder / "review" / f"{name}.csv"
                review.parent.mkdir(exist_ok=True)
                write_sheet(review, graph_config.transcoders, results.groups, details, by_hand)
            return Measured(results, _message(results))

        return measure

    behaviours = each_part(run, list(tested.prompts), begin, CircuitResults, "prompts")
    results = CircuitsResults(graph_config.transcoders, behaviours, tested.left_out)
    if is_first_process():
        write_index(run.folder, results)
    return results


def write_sheet(
    path: Path,
    transcoders: str,
    groups: Sequence[Group],
    details: Mapping[Feature, FeatureDetails],
    by_hand: Mapping[Feature, str],
) -> None:
    """Write a CSV sheet of the features in groups, to be filled in with labels; see ``labels_of_sheets``.

    Args:
      path: of the sheet.
      transcoders: name of the set of transcoders.
      groups: the groups of a circuit.
      details: labels and contexts of their features.
      by_hand: labels that people have given; automatic labels are in another column.
    """
    names = names_of_layers([transcoders], {key.layer for group in groups for key in group.members})
    rows: list[dict[str, Any]] = []
    for group in groups:
        for key in group.members:
            feature_details, label = details[key.address], by_hand.get(key.address, "")
            rows.append(
                dict(
                    feature=key.feature, label=label, note="", reviewer="", dictionary=names[key.layer],
                    automatic_label="" if label else feature_details.label, group=group.name, role=key.role,
                    promotes=visible(" ".join(feature_details.top_logits)),
                    contexts=" | ".join(map(_one_line, feature_details.examples)),
                )
            )  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["feature", "label"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _one_line(context: Mapping[str, list]) -> str:
    """Return a context on one line, its strongest token in double brackets."""
    peak = max(range(len(context["tokens"])), key=context["activations"].__getitem__)
    pieces = [f"[[{token}]]" if n == peak else token for n, token in enumerate(context["tokens"])]
    return visible("".join(pieces))


def _message(results: CircuitResults) -> str:
    """Return a circuit's results in a line."""
    return (
        f"{len(results.returning)} features return over {results.traced} prompts; {len(results.groups)} groups, "
        f"{len(results.drawn())} edges drawn of {sum(edge.edit == 'direct' for edge in results.edges)} measured; "
        f"{len(results.drawn('total'))} groups are needed for the answer, {len(results.drawn('swap'))} carry which one "
        "it is"
    )
