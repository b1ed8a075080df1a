"""The stage ``known_circuits``: attribution graphs and causal stages on a transformer whose weights are set by hand.

Its folder is in the hub's format and its transcoders are in the project's, so that every other binary takes them, too.
"""

import numpy as np

from saejax.attribution.local.transcoders import LayerTranscoders, open_transcoders
from saejax.errors import Interrupted
from saejax.ground_truth.circuits.cases import Case, make_case
from saejax.ground_truth.circuits.causal import KnownStages
from saejax.ground_truth.circuits.dictionaries import write_sets
from saejax.ground_truth.circuits.edges import circuit, known_edges
from saejax.ground_truth.circuits.graphs import SHARE, judge_edges
from saejax.ground_truth.circuits.handset import run as run_known
from saejax.ground_truth.circuits.results import JudgedSet, KnownCircuitResults
from saejax.ground_truth.circuits.weights import checkpoint, frame, neuron_arrays
from saejax.ground_truth.hub_folder import save_model
from saejax.ground_truth.matching import Matching
from saejax.ground_truth.scores import RECOVERED
from saejax.models.language_model import LanguageModel
from saejax.models.loading import load_model
from saejax.parallel.mesh import make_mesh
from saejax.runner.workspace import Run
from saejax.settings import MeshConfig
from saejax.stages.known_circuits import KnownConfig
from saejax.tasks.behaviours import Prompt


def run_known_circuits(run: Run) -> KnownCircuitResults:
    """Write the transformer ``run.name`` and its transcoders, and compare graphs and causal tests with the truth.

    Raises:
      Interrupted: asked to stop; transcoders and finished stages are kept.
    """
    config = run.configs[KnownConfig]
    case = make_case(run.name, config.prompts, config.seed)
    # Written and loaded again, so that the stages meet it as they meet any model.
    save_model(run.folder / "model", *checkpoint(case.model, config.seed), list(case.model.words))
    model = load_model(str(run.folder / "model"), mesh=make_mesh(run.configs[MeshConfig]))
    sets = write_sets(run, case, model, config.seed)
    stages, traced = KnownStages(run, case, model), _traced(case, config.graphs)
    judged = {}
    for name, folder in sets.items():
        if run.stopping():
            raise Interrupted("stopped while transcoders were tested: run the same command again to continue")
        transcoders = open_transcoders(folder)
        neuron_of, recovered = matched_neurons(case, transcoders, config.seed)
        edges = judge_edges(model, transcoders, case.model, traced, neuron_of)
        causal = None
        if case.layer is not None:
            feature_of = {neuron: feature for (layer, feature), neuron in neuron_of.items() if layer == case.layer}
            idle = {variable: [feature_of[neuron] for neuron in neurons] for variable, neurons in case.idle.items()}
            causal = stages.judge(name, folder / f"layer{case.layer}", idle)
        judged[name] = JudgedSet(recovered, edges, causal)
        run.say(_line(name, judged[name]))
    circuits = [
        circuit(known_edges(case.model, prompt.text, prompt.correct.strip(), prompt.wrong.strip()), SHARE)
        for prompt in traced
    ]
    right = [behaviour.test.accuracy.mean for behaviour in stages.baseline.behaviours.values()]
    return KnownCircuitResults(
        layers=len(case.model.layers),
        neurons=sum(len(layer.neurons) for layer in case.model.layers),
        accuracy=float(np.mean(right)),
        logit_error=_logit_error(case, model, traced),
        circuit=float(np.mean([len(edges) for edges in circuits])),
        sets=judged,
    )


def _traced(case: Case, count: int) -> list[Prompt]:
    """Return the first test prompts of each behaviour."""
    tests = [prompt for prompt in case.prompts if prompt.split == "test"]
    behaviours = dict.fromkeys(prompt.behaviour for prompt in tests)
    return [
        prompt for name in behaviours for prompt in [prompt for prompt in tests if prompt.behaviour == name][:count]
    ]


def matched_neurons(case: Case, transcoders: LayerTranscoders, seed: int) -> tuple[dict[tuple[int, int], int], float]:
    """Return (layer, feature) -> the neuron with the matching decoder, and the share of neurons that are recovered.

    Args:
      case: the case.
      transcoders: the transcoders to match.
      seed: seed of the transformer's weights.
    """
    matched: dict[tuple[int, int], int] = {}
    cosines: list[np.ndarray] = []
    for layer, spec in enumerate(case.model.layers):
        count = len(spec.neurons)
        neurons = neuron_arrays(case.model, layer, frame(case.model, seed))
        W_dec_FxD = np.asarray(transcoders.load(layer).arrays["W_dec_FxD"], np.float64)
        # Without the neurons that only fill up a layer: they write nothing, and any feature would match them.
        matching = Matching.of(W_dec_FxD, neurons["W_dec_FxD"][:count])
        matched |= {(layer, int(feature)): neuron for neuron, feature in enumerate(matching.feature_J) if feature >= 0}
        cosines.append(matching.matched_J)
    return matched, float((np.concatenate(cosines) > RECOVERED).mean())


def _logit_error(case: Case, model: LanguageModel, prompts: list[Prompt]) -> float:
    """Return the largest difference of the transformer's logits from its description's, relative to the largest."""
    output = model(model.tokenize([prompt.text for prompt in prompts]))
    assert output.logits_BxTxV is not None
    logits_BxV = np.asarray(output.logits_BxTxV)[np.arange(len(prompts)), output.tokens.last_B]
    known_BxV = np.stack([run_known(case.model, prompt.text).logits_V for prompt in prompts])
    return float(np.abs(logits_BxV - known_BxV).max() / np.abs(known_BxV).max())


def _line(name: str, judged: JudgedSet) -> str:
    edges, causal = judged.edges, judged.causal
    text = (
        f"{name}: {100 * judged.recovered:.0f} % of the neurons; edges off by {edges.error:.1e}, AUROC "
        f"{edges.auroc.mean:.3f}, precision {edges.precision.mean:.2f}, recall {edges.recall.mean:.2f}"
    )
    if causal and causal.interchange:
        text += f"; answers carried over {100 * causal.interchange.mean:.0f} %"
    if causal:
        text += f"; of {causal.behaviours} claimed {causal.claimed}, also carried over {causal.shown}"
    return text
