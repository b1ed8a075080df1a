"""The stage ``known_circuits``: attribution graphs and causal tests on a transformer whose weights are set by hand.

Its folder is in the hub's format and its transcoders are in the project's, so that every other binary takes them, too.
"""

import itertools

from saejax.attribution.local.dictionaries import open_transcoders
from saejax.dictionaries import load_dictionary
from saejax.errors import Interrupted
from saejax.files import write_text
from saejax.ground_truth.circuits.cases import make_case
from saejax.ground_truth.circuits.dictionaries import write_sets
from saejax.ground_truth.circuits.edges import judge_edges
from saejax.ground_truth.circuits.handset import checkpoint
from saejax.ground_truth.circuits.judge import judge_features, matched_neurons
from saejax.ground_truth.hub_folder import save_model
from saejax.ground_truth.results import JudgedSet, KnownCircuitResults
from saejax.models.loading import load_model
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.runner.workspace import Run
from saejax.stages.known_circuits.settings import KnownConfig
from saejax.tasks.own_prompts import as_line


def run_known_circuits(run: Run) -> KnownCircuitResults:
    """Write the transformer ``run.name`` and its transcoders, and compare graphs and causal tests with the truth.

    Raises:
      Interrupted: asked to stop; transcoders are kept.
    """
    config = run.configs[KnownConfig]
    case = make_case(run.name, config.prompts, config.seed)
    write_text(run.folder / "prompts.jsonl", "".join(map(as_line, case.prompts)))
    # Written and loaded again, so that the tests meet it as they meet any model.
    save_model(run.folder / "model", *checkpoint(case.model, config.seed), list(case.model.words))
    mesh = make_mesh(run.configs[MeshConfig])
    model = load_model(str(run.folder / "model"), mesh=mesh)
    tests = [prompt for prompt in case.prompts if prompt.split == "test"]
    by_behaviour = itertools.groupby(tests, lambda test: test.behaviour)
    traced = [prompt for _, some in by_behaviour for prompt in [*some][: config.graphs]]
    judged = {}

    def check_stop() -> None:
        if run.stopping():
            raise Interrupted("stopped while transcoders were made or tested: run the same command again to continue")

    def say(line: str) -> None:
        check_stop()
        run.say(line)

    for name, folder in write_sets(run.folder, case, model, config.seed, mesh, say).items():
        check_stop()
        transcoders = open_transcoders(folder)
        neuron_of, recovered = matched_neurons(case, transcoders, config.seed)
        edges = judge_edges(model, transcoders, case.model, traced, neuron_of)
        feature_of = {neuron: feature for (layer, feature), neuron in neuron_of.items() if layer == case.layer}
        idle = {variable: [feature_of[neuron] for neuron in neurons] for variable, neurons in case.idle.items()}
        causal = judge_features(model, load_dictionary(folder / f"layer{case.layer}"), case, idle)
        judged[name] = JudgedSet(recovered, edges, causal)
        run.say(_line(name, judged[name]))
    return KnownCircuitResults(
        layers=len(case.model.layers), neurons=sum(len(layer.neurons) for layer in case.model.layers), sets=judged
    )


def _line(name: str, judged: JudgedSet) -> str:
    edges, causal = judged.edges, judged.causal
    return (
        f"{name}: {100 * judged.recovered:.0f} % of the neurons; edges off by {edges.error:.1e}, AUROC "
        f"{edges.auroc.mean:.3f}, precision {edges.precision.mean:.2f}, recall {edges.recall.mean:.2f}; of "
        f"{causal.behaviours} behaviours ablation has an effect on {causal.claimed}, and patching carries over "
        f"{causal.shown} of them"
    )
