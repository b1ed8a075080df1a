"""The stage ``circuits``: the circuit of each behaviour, and a page of each.

Files of the unit: ``index.html`` lists the behaviours and published claims. For each behaviour, ``<behaviour>.html``
opens with the circuit, ``<behaviour>-edges.csv`` has every measured effect with its controls and intervals,
``<behaviour>-groups.json`` the groups, to be edited and given to ``--circuits.groups``, and ``review/<behaviour>.csv``
a line for each feature of the groups, where a person fills in labels, to be given to ``--graph.labels``.
"""

import csv
import dataclasses
import io
import time
from collections.abc import Mapping, Sequence
from typing import Any

from saejax.attribution.forms.features import Feature, FeatureDetails
from saejax.attribution.forms.outputs import details_of_features
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.attribution.requests import read_given_labels, read_labels
from saejax.attribution.run import open_parts
from saejax.circuits.contexts import FeatureSearch
from saejax.circuits.edges import Edge
from saejax.circuits.groups import Group, as_json, read_groups
from saejax.circuits.report import write_index, write_page
from saejax.circuits.results import CircuitResults, CircuitsResults, GroupResults
from saejax.circuits.study import BehaviourCircuit, find_circuit, words_by_role
from saejax.dictionaries.labels import names_of_layers
from saejax.errors import UserError
from saejax.files import write_text
from saejax.page.tables import visible
from saejax.parallel.collectives import is_first_process
from saejax.results import Interval
from saejax.runner.parts import Measure, Measured, OnProgress, each_part, part_file
from saejax.runner.workspace import Run
from saejax.settings import CorpusConfig, GraphConfig
from saejax.stages.circuits import CircuitsConfig
from saejax.tasks.behaviours import Prompt, read_logit_diffs, read_prompts
from saejax.tasks.corpora import read_corpus
from saejax.tasks.gate import read_tested

_DOCUMENTS = 40  # of the embedded corpus, in which contexts of features without files of their own are looked for


def run_circuits(run: Run) -> CircuitsResults:
    """Find the circuit of each behaviour that the model has.

    Raises:
      UserError: a behaviour is unknown, the model has none of them, or the transcoders do not fit the model.
    """
    config, graph_config = run.configs[CircuitsConfig], run.configs[GraphConfig]
    baseline = run.inputs["baseline"]
    tested = read_tested(baseline, config.behaviours, "--circuits.behaviours")
    for name, why in tested.left_out.items():
        run.say(f"circuits: {name} is left out: {why}")
    given_groups = read_groups(config.groups, config.behaviours)
    files = baseline / "prompts.jsonl"
    # strict: the baseline writes logit differences in the order of its prompts.
    diff_of = {p: diff for p, diff in zip(read_prompts(files), read_logit_diffs(files), strict=True)}

    def begin() -> Measure:
        model, transcoders = open_parts(run)
        if not isinstance(transcoders, LayerTranscoders):
            raise UserError("circuits take transcoders of all layers (--graph.transcoders), not SAEs")
        labels, by_hand = read_labels(graph_config), read_given_labels(graph_config)
        # Before anything is traced, which takes minutes.
        transcoders.check_features(labels, graph_config.labels or "its workdir")
        in_groups = [key[:2] for groups in given_groups.values() for group in groups for key in group.members]
        transcoders.check_features(in_groups, config.groups)
        search = FeatureSearch(model, transcoders, _texts(config, tested.prompts))

        def describe(features: Sequence[Feature]) -> dict[Feature, FeatureDetails]:
            details = search.complete(features, details_of_features(graph_config, features))
            return {
                feature: dataclasses.replace(feature_details, label=labels.get(feature, feature_details.label))
                for feature, feature_details in details.items()
            }

        def measure(name: str, on_progress: OnProgress) -> Measured:
            start = time.monotonic()
            train, test = (
                [p for p in tested.prompts[name] if p.split == split][:most]
                for split, most in (("train", config.traced), ("test", config.measured))
            )
            circuit = find_circuit(
                model, transcoders, train, test, groups=given_groups.get(name, ()), describe=describe,
                max_features=graph_config.max_features or None, resamples=config.bootstrap, seed=config.seed,
                on_progress=on_progress,
            )  # fmt: skip
            results = CircuitResults(
                traced=len(train),
                measured=len(test),
                swapped=sum(bool((effect.dose_ExGxS[-1] >= 0).all()) for effect in circuit.effects),
                logit_diff=sum(diff_of[p] for p in test) / len(test),
                answer=test[0].correct.strip(),
                example=words_by_role(model, test[0]),
                groups=tuple(_group_results(group) for group in circuit.groups),
                proposed=not given_groups.get(name),
                edges=circuit.edges,
                returning={str(key): value for key, value in circuit.returning.items()},
                layers=model.config.n_layers,
                seconds=round(time.monotonic() - start, 1),
            )
            if is_first_process():
                write_text(part_file(run, name, "-groups.json"), as_json(name, circuit.groups))
                write_text(part_file(run, name, "-edges.csv"), edges_csv(circuit.edges))
                write_page(part_file(run, name, ".html"), name, results, circuit.details, test)
                review = run.folder / "review" / f"{name}.csv"
                review.parent.mkdir(exist_ok=True)
                write_text(review, review_sheet(graph_config.transcoders, circuit, by_hand))
            return Measured(results, _message(results))

        return measure

    behaviours = each_part(run, list(tested.prompts), begin, CircuitResults, "prompts")
    results = CircuitsResults(graph_config.transcoders, behaviours, tested.left_out)
    if is_first_process():
        write_index(run.folder, results)
    return results


def _group_results(group: Group) -> GroupResults:
    layers = [key.layer for key in group.members]
    return GroupResults(group.name, tuple(map(str, group.members)), sum(layers) / len(layers))


def _texts(config: CircuitsConfig, prompts: Mapping[str, Sequence[Prompt]]) -> list[str]:
    """Return the texts in which contexts are looked for: of the embedded corpus, and the prompts that are traced.

    Features of a circuit fire on the latter, if on nothing else.
    """
    documents = [document.text for document in read_corpus(CorpusConfig())[:_DOCUMENTS]]
    train = [[prompt.text for prompt in some if prompt.split == "train"][: config.traced] for some in prompts.values()]
    return [*documents, *(text for some in train for text in some)]


def review_sheet(transcoders: str, circuit: BehaviourCircuit, by_hand: Mapping[Feature, str]) -> str:
    """Return a CSV sheet of the features in a circuit's groups, to be filled in with labels; see ``labels_of_sheets``.

    Args:
      transcoders: name of the set of transcoders.
      circuit: circuit whose features are listed.
      by_hand: labels that people have given; automatic labels are in another column.
    """
    names = names_of_layers([transcoders], {key.layer for group in circuit.groups for key in group.members})
    rows = []
    for group in circuit.groups:
        for key in group.members:
            feature_details, label = circuit.details[key[:2]], by_hand.get(key[:2], "")
            rows.append(
                dict(
                    feature=key.feature, label=label, note="", reviewer="", dictionary=names[key.layer],
                    automatic_label="" if label else feature_details.label, group=group.name, role=key.role,
                    influence=f"{circuit.returning.get(key, 0.0):.4f}",
                    promotes=visible(" ".join(feature_details.top_logits)),
                    contexts=" | ".join(map(_one_line, feature_details.examples)),
                )
            )  # fmt: skip
    return _as_csv(rows)


def _one_line(context: Mapping[str, list]) -> str:
    """Return a context on one line, its strongest token in double brackets."""
    peak = max(range(len(context["tokens"])), key=context["activations"].__getitem__)
    pieces = [f"[[{token}]]" if n == peak else token for n, token in enumerate(context["tokens"])]
    return visible("".join(pieces))


def edges_csv(edges: Sequence[Edge]) -> str:
    """Return every measured effect as a table: its fields, of intervals the mean and both ends."""
    rows = []
    for edge in edges:
        rows.append(dict[str, Any]())
        for name, value in vars(edge).items():
            parts = vars(value).items() if isinstance(value, Interval) else ()
            rows[-1] |= {f"{name}_{part}": f"{number:.6g}" for part, number in parts} or {name: value}
    return _as_csv(rows)


def _as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else ["source", "target", "edit"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _message(results: CircuitResults) -> str:
    """Return a circuit's results in a line."""
    drawn = [edge for edge in results.edges if edge.drawn]
    by_edit = {edit: sum(edge.edit == edit for edge in drawn) for edit in ("direct", "total", "swap")}
    return (
        f"{len(results.returning)} features return over {results.traced} prompts; {len(results.groups)} groups, "
        f"{by_edit['direct']} edges drawn of {sum(edge.edit == 'direct' for edge in results.edges)} measured; "
        f"{by_edit['total']} groups are needed for the answer, {by_edit['swap']} carry which one it is; "
        f"{results.seconds:.0f} s"
    )
