"""The stage ``known_circuits``: attribution graphs and causal stages on a transformer whose weights are set by hand.

Its folder is in the hub's format and its transcoders are in the project's, so that every other binary takes them, too.
The causal stages run unchanged, each in its own folder with its usual files, with the features of one layer.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from saejax.attribution.local.transcoders import LayerTranscoders, open_transcoders
from saejax.dictionaries import load_dictionary
from saejax.errors import Interrupted, UserError
from saejax.files import write_text
from saejax.ground_truth.circuits.cases import Case, make_case
from saejax.ground_truth.circuits.dictionaries import write_sets
from saejax.ground_truth.circuits.edges import SHARE, circuit, judge_edges, known_edges
from saejax.ground_truth.circuits.handset import checkpoint, frame, neuron_arrays
from saejax.ground_truth.circuits.handset import run as run_known
from saejax.ground_truth.hub_folder import save_model
from saejax.ground_truth.results import CausalScores, JudgedSet, KnownCircuitResults
from saejax.ground_truth.scores import RECOVERED, Matching
from saejax.interventions.ablate_run import run_ablate
from saejax.interventions.answers import AblateResults, BehaviourVerdict
from saejax.interventions.patch_run import FeaturePatchResults, PatchResults, run_patch
from saejax.interventions.probe_run import ProbeResults, run_probe
from saejax.interventions.table import TESTED, EffectsTable, load_effects
from saejax.library.causal import ablate
from saejax.models.language_model import LanguageModel
from saejax.models.loading import load_model
from saejax.parallel.mesh import make_mesh
from saejax.results import Interval
from saejax.runner.config import Config
from saejax.runner.workspace import Run
from saejax.settings import AblateConfig, MeshConfig, ModelConfig, PatchConfig, ProbeConfig, TaskConfig
from saejax.stages.known_circuits import KnownConfig
from saejax.tasks.baseline import run_baseline
from saejax.tasks.behaviours import Prompt
from saejax.tasks.own_prompts import as_line
from saejax.tasks.results import BaselineResults
from saejax.tasks.scoring import wilson_of

T = TypeVar("T")
_BOOTSTRAP = 1000


class KnownStages:
    """The causal stages on one transformer.

    Args:
      run: the run of the stage ``known_circuits``; the transformer is in its folder.
      case: the case.
      model: the transformer.
    """

    def __init__(self, run: Run, case: Case, model: LanguageModel):
        self._run, self._case, self._model = run, case, model
        path = run.folder / "prompts.jsonl"
        write_text(path, "".join(map(as_line, case.prompts)))
        task = TaskConfig(behaviours=(), prompts=str(path))
        self._configs = run.configs | ModelConfig(path=str(run.folder / "model")) | task
        self.baseline: BaselineResults = self._stage("baseline", "", run_baseline, task)

    def judge(self, name: str, transcoder: Path, features: Mapping[str, list[int]]) -> CausalScores:
        """Return the results of the stages with a transcoder's features.

        Args:
          name: name of its set, for the stages' folders.
          transcoder: its folder.
          features: idle variable -> the features that represent it.
        """
        count = max(map(len, self._case.causes.values()))
        settings: dict[str, Any] = dict(dictionary=str(transcoder), top=count)
        # The vocabulary is small and mostly answers, so there are no placebo targets.
        quick: dict[str, Any] = dict(baselines=(), text_documents=0, placebo_targets=0, untrained=False)
        refused: list[str] = []

        def tried(stage: str, run_stage: Callable[[Run], T], config: Config) -> T | None:
            try:
                return self._stage(stage, name, run_stage, config)
            except UserError as error:
                refused.append(f"{stage}: {error}")
                return None

        ablated = tried("ablate", run_ablate, AblateConfig(**settings, bootstrap=_BOOTSTRAP, **quick))
        patched = tried("patch", run_patch, PatchConfig(**settings, bootstrap=_BOOTSTRAP, placebo_targets=0))
        labels: dict[str, Any] = dict(labels=self._case.labels, sparse=(), shuffles=2, strengths=(10.0,))
        probed = tried("probe", run_probe, ProbeConfig(dictionary=str(transcoder), **labels))
        options = dict(bootstrap=_BOOTSTRAP, **quick)
        claimed = self._idle(transcoder, features, options, refused)
        interchange, interchange_random = _interchange(patched) if patched else (None, None)
        table = load_effects(self._run.folder / "ablate" / name) if ablated else None
        harm, harm_others = _harm(ablated, table) if ablated and table else (None, None)
        probe, probe_shuffled = _probes(probed) if probed else (None, None)
        harmed, carried = _harmed(ablated) if ablated else None, _carried(patched) if patched else None
        return CausalScores(
            behaviours=len(self._case.causes),
            interchange=interchange,
            interchange_random=interchange_random,
            harm=harm,
            harm_others=harm_others,
            claimed=None if harmed is None else len(harmed),
            idle=len(features),
            idle_claimed=claimed,
            probe=probe,
            probe_shuffled=probe_shuffled,
            refused=tuple(refused),
            carried=None if carried is None else len(carried),
            shown=None if harmed is None or carried is None else len(harmed & carried),
        )

    def _stage(self, stage: str, name: str, run_stage: Callable[[Run], T], config: Config) -> T:
        """Run a stage in its own folder with these settings."""
        folder = self._run.folder / stage / name
        folder.mkdir(parents=True, exist_ok=True)
        inputs = dict(baseline=self._run.folder / "baseline")
        overrides: dict[str, Any] = dict(
            stage=stage, name=name, folder=folder, configs=self._configs | config, inputs=inputs
        )
        say = lambda line: self._run.say(f"{name}: {line}" if name else line)  # noqa: E731
        return run_stage(dataclasses.replace(self._run, say=say, **overrides))

    def _idle(
        self, transcoder: Path, features: Mapping[str, list[int]], options: Mapping[str, Any], refused: list[str]
    ) -> int | None:
        """Return the number of idle variables whose features have an effect on a behaviour when ablated."""
        dictionary, claimed = load_dictionary(transcoder), 0
        behaviour = next(iter(self._case.causes))
        prompts = [prompt for prompt in self._case.prompts if prompt.behaviour == behaviour]
        for variable, indices in features.items():
            try:
                results = ablate(self._model, dictionary, prompts, features=indices, **options)
            except UserError as error:
                refused.append(f"ablate of {variable}: {error}")
                return None
            claimed += _has_effect(results.verdict.dictionaries[TESTED][behaviour])
        return claimed


def _interchange(results: PatchResults) -> tuple[Interval | None, float | None]:
    """Return the interchange accuracy of the top features and of random ones, pooled over behaviours."""
    assert isinstance(results, FeaturePatchResults)
    shares = [behaviour.interchange for behaviour in results.behaviours.values() if behaviour.interchange]
    if not shares:
        return None, None
    # Counts again, so that behaviours are pooled by their prompts.
    flipped = sum(round(share.top.mean * share.prompts) for share in shares)
    prompts = sum(share.prompts for share in shares)
    random = [share.random for share in shares if share.random is not None]
    return wilson_of(flipped / prompts, prompts), float(np.mean(random)) if random else None


def _carried(results: PatchResults) -> set[str]:
    """Return the behaviours most of whose answers the top features carry over: the interval is above one half.

    A layer's few features leave too few random sets to compare with.
    """
    assert isinstance(results, FeaturePatchResults)
    shares = {name: behaviour.interchange for name, behaviour in results.behaviours.items() if behaviour.interchange}
    return {name for name, share in shares.items() if share.top.low > 0.5}


def _harm(ablated: AblateResults, table: EffectsTable) -> tuple[float, float | None]:
    """Return the two-way accuracy lost, and the largest loss of another behaviour."""
    results = ablated.verdict.dictionaries[TESTED].values()
    effects = [result.ablation["two_way"].effect for result in results]
    lost = [effect.mean for effect in effects if effect]
    lost_elsewhere = []
    for name in table.behaviours:
        for measured in set(table.behaviours) - {name}:
            # The last of the edits of the top features is their whole ablation.
            prompts, whole = table.select_prompts(measured), table.select_edits(name, "top")[-1:]
            # Another behaviour should lose nothing: its answers do not depend on these neurons.
            clean_P, ablated_1xP = table.clean_values(prompts, "logit_diff"), table.values(whole, prompts, "logit_diff")
            lost_elsewhere.append(float((clean_P > 0).mean() - (ablated_1xP > 0).mean()))
    return float(np.mean(lost)), max(lost_elsewhere, default=None)


def _harmed(ablated: AblateResults) -> set[str]:
    """Return the behaviours on whose two-way accuracy ablating the top features has an effect."""
    return {name for name, result in ablated.verdict.dictionaries[TESTED].items() if _has_effect(result)}


def _has_effect(result: BehaviourVerdict) -> bool:
    """Return whether two-way accuracy falls. A layer's few features leave too few random sets to compare with."""
    return result.ablation["two_way"].answer == "yes"


def _probes(results: ProbeResults) -> tuple[Interval, float]:
    """Return the accuracy of probes of all features, pooled over labels and behaviours, and with shuffled labels."""
    fits = [
        (probe, sum(counts["test"] for counts in label.classes.values()))
        for label in results.labels
        for probe in label.probes
        if probe.input == "features" and probe.k is None
    ]
    right, tested = sum(round(probe.accuracy.mean * count) for probe, count in fits), sum(count for _, count in fits)
    shuffled = float(np.mean([probe.shuffled.mean for probe, _ in fits]))
    return wilson_of(right / tested, tested), shuffled


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
    """Return (layer, feature) -> the neuron with the matching decoder, and the share of neurons that are recovered."""
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
