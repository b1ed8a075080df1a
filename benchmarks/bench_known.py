"""Of transformers that are set by hand: whether graphs have the right edges, and labels name neurons.

Run: python -m benchmarks.bench_known [--circuits logic,induction] [--sets exact,trained,random]
Transformers and transcoders are those of `experiments.known_circuits`. Edges of graphs are judged by the weights; then
labels are searched on texts, as `experiments.interpret` does, for the feature that stands for each neuron by its
decoder, and judged by the neuron: F1 of where the label says and where the neuron itself fires, on texts that the
search did not see, beside the label of another neuron that fires about as often. Prints both tables with 95 %
intervals (over prompts; over neurons) and, last, one line of JSON. Some minutes of processors; what is in the folder
is not trained again.
"""

import argparse
import dataclasses
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from saejax import load_model
from saejax.activations.in_memory import capture
from saejax.activations.store import Store
from saejax.attribution.local.dictionaries import LayerTranscoders, open_transcoders
from saejax.dictionaries import Dictionary
from saejax.ground_truth.circuits.cases import Case, make_case
from saejax.ground_truth.circuits.dictionaries import EXACT, TRAINED, untrained_sets, write_sets
from saejax.ground_truth.circuits.edges import judge_edges
from saejax.ground_truth.circuits.handset import checkpoint
from saejax.ground_truth.circuits.judge import matched_neurons
from saejax.ground_truth.hub_folder import save_model
from saejax.interpret.detectors import Detector, best_detectors, make_scorer
from saejax.interpret.firings import Block, blocks, record
from saejax.interpret.labels import partners
from saejax.interpret.neighbours import output_tokens
from saejax.interpret.text import FAMILIES, CodeCounts, CodedText
from saejax.models.language_model import LanguageModel
from saejax.results import Interval
from saejax.statistics.intervals import bootstrap_mean

ROOT = Path(__file__).parent.parent
PROMPTS, TRACED, OUTPUT = 20, 6, 10
TEXTS, SEED = 4000, 1  # half of the texts are searched; the seed differs from that of training


def make_circuit(folder: Path, name: str, sets: list[str]) -> tuple[Case, LanguageModel, dict[str, LayerTranscoders]]:
    """Return a transformer of the catalogue, and its transcoders, as the stage `known_circuits` makes them."""
    case = make_case(name, PROMPTS, 0)
    save_model(folder / "model", *checkpoint(case.model, 0), list(case.model.words))
    model = load_model(str(folder / "model"))
    if TRAINED in sets:
        sets_of = write_sets(folder, case, model, 0, say=lambda line: None)
        return case, model, {kind: open_transcoders(path) for kind, path in sets_of.items()}
    layers = [untrained_sets(case, model, layer, 0) for layer in range(len(case.model.layers))]
    return case, model, {kind: LayerTranscoders.of([layer[kind] for layer in layers]) for kind in (EXACT, *sets)}


def judge_set(case: Case, model: LanguageModel, name: str, transcoders: LayerTranscoders) -> dict[str, float]:
    """Print how well graphs with a set of transcoders recover the edges of the weights, and return the AUROC."""
    tests = [prompt for prompt in case.prompts if prompt.split == "test"]
    neuron_of, _ = matched_neurons(case, transcoders, 0)
    edges = judge_edges(model, transcoders, case.model, tests[:: len(tests) // TRACED], neuron_of)
    shown = (f"{score} {with_interval(getattr(edges, score))}" for score in ("auroc", "precision", "recall"))
    print(f"  {name:<10} edges: {', '.join(shown)}", flush=True)
    return dict(auroc=round(edges.auroc.mean, 3))


def with_interval(value: Interval) -> str:
    """Return a mean with its interval."""
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


def of_layer(transcoders: LayerTranscoders, layer: int) -> Dictionary:
    """Return the transcoder of a layer, which knows its sites; graphs have no need of them."""
    dictionary = transcoders.load(layer)
    dictionary.config = dataclasses.replace(dictionary.config, site=f"mlp_in.{layer}", target=f"mlp_out.{layer}")
    return dictionary


class Labels:
    """Labels of the features that stand for the neurons of one layer, judged by where the neurons fire.

    Args:
      lm: the transformer.
      case: what is known of it.
      layer: whose neurons.
      exact: their own transcoder.
    """

    def __init__(self, lm: LanguageModel, case: Case, layer: int, exact: Dictionary):
        texts = list(dict.fromkeys(case.texts(TEXTS, SEED)))
        half = len(texts) // 2
        self._lm, self._scratch = lm, Path(tempfile.mkdtemp())
        self._stores = [
            capture(lm, part, [f"mlp_in.{layer}"]).save(self._scratch / f"store{number}")
            for number, part in enumerate((texts[:half], texts[half:]))
        ]
        self._exact = exact
        self._search = self._coded(self._stores[0], exact)
        self._judge = self._coded(self._stores[1], exact)

    def _coded(self, store: Store, dictionary: Dictionary) -> tuple[Block, CodedText, Mapping[str, CodeCounts]]:
        """Return the firings of a dictionary on a store, its text, and how often each code stands there."""
        folder = self._scratch / "firings"
        place = record(store, "train", {folder: dictionary}, self._lm.mesh, 4096)
        (block,) = blocks(folder, dictionary.config.n_features)
        text = CodedText(store.documents, self._lm.tokenizer.convert_ids_to_tokens(range(self._lm.config.vocab)))
        return block, text, {family: CodeCounts(text.code(family, place)) for family in FAMILIES}

    def chosen(self, dictionary: Dictionary) -> list[Detector | None]:
        """Return the label of each feature: the detector with the best F1 on the texts that are searched."""
        block, text, bases = self._coded(self._stores[0], dictionary)
        output = output_tokens(self._lm, dictionary.W_dec_FxD[...], OUTPUT).raised()
        return best_detectors(block, text, bases, output)

    def judged(self, label_of: Mapping[int, Detector | None]) -> dict[int, float]:
        """Return the F1 of labels of the exact transcoder's features on the texts that were not searched."""
        score = make_scorer(*self._judge)
        return {feature: score(feature, label).mean if label else 0.0 for feature, label in label_of.items()}

    def similar_features(self) -> np.ndarray:
        """Return for every feature of the exact transcoder another that fires about as often."""
        counts_F = self._search[0].counts
        return partners(counts_F / max(counts_F.sum(), 1), [count > 0 for count in counts_F])


def score_labels(
    lm: LanguageModel, case: Case, transcoders: Mapping[str, LayerTranscoders], sets: list[str]
) -> dict[str, dict[str, float]]:
    """Print and return mean F1 of labels by sort of neuron: of each set's features, and of another neuron's label."""
    features = {kind: matched_neurons(case, transcoders[kind], 0)[0] for kind in dict.fromkeys([EXACT, *sets])}
    means_of: dict[str, dict[str, float]] = {}
    for layer, spec in enumerate(case.model.layers):
        judge = Labels(lm, case, layer, of_layer(transcoders[EXACT], layer))
        exact_feature = {neuron: feature for (at, feature), neuron in features[EXACT].items() if at == layer}
        f1: dict[str, dict[int, float]] = {}
        for name in sets:
            chosen = judge.chosen(of_layer(transcoders[name], layer))
            of = {
                exact_feature[neuron]: chosen[feature]
                for (at, feature), neuron in features[name].items()
                if at == layer
            }
            f1[name] = judge.judged({feature: of.get(feature) for feature in exact_feature.values()})
            if name == EXACT:
                other_F = judge.similar_features()
                f1["another's"] = judge.judged(
                    {feature: chosen[other_F[feature]] for feature in exact_feature.values() if other_F[feature] >= 0}
                )
        sorts: dict[str, list[int]] = {}
        for number, neuron in enumerate(spec.neurons):
            sorts.setdefault(re.sub(r"\b([a-h]|\d+(?! back))\b", "*", neuron.name), []).append(exact_feature[number])
        for sort, places in sorts.items():
            shares = {name: [f1_of[feature] for feature in places if feature in f1_of] for name, f1_of in f1.items()}
            means = {name: bootstrap_mean(np.array(f1_N), 789, 2000) for name, f1_N in shares.items() if f1_N}
            cells = "".join(f"{name + ' ' + with_interval(mean):>34}" for name, mean in means.items())
            print(f"  layer {layer} {sort:<16}{len(places):>4}{cells}", flush=True)
            means_of[f"{layer} {sort}"] = {name: round(mean.mean, 3) for name, mean in means.items()}
    return means_of


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--circuits", default="logic,induction", help="which transformers")
    parser.add_argument("--sets", default="exact,trained,random", help="which transcoders")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench_known")
    args = parser.parse_args()
    sets = args.sets.split(",")
    line: dict[str, dict] = {}
    for name in args.circuits.split(","):
        case, model, transcoders = make_circuit(args.folder.absolute() / name, name, sets)
        scored = {kind: judge_set(case, model, kind, transcoders[kind]) for kind in sets}
        print(f"{name}: F1 of labels, by sort of neuron", flush=True)
        line[name] = dict(edges=scored, labels=score_labels(model, case, transcoders, sets))
    print(json.dumps(dict(bench="known", circuits=line)))


if __name__ == "__main__":
    main()
