"""The stage ``algorithm``: a transformer trained on an algorithm, and which of its features change its answers.

1. Train the transformer, ask it questions kept from training, and write it.
2. Train a dictionary on its residual stream between the two layers.
3. Ablate each feature alone on test prompts: does an answer change, and by how much does the logit difference?
4. Do the same with a control: the same activations along random directions, which change the stream by as much at the
   same positions.
5. For each value of the algorithm's variables, as the labels of the prompts know them, choose the feature that goes
   with it most on train prompts, and judge it on test prompts.

The folder is in the hub's format and ``prompts.jsonl`` is meant for ``--task.prompts``: capture, train, ablate, patch,
probe and all other stages take it like any model, and probes can predict the algorithm's variables.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from saejax.activations.in_memory import capture
from saejax.dictionaries import Dictionary
from saejax.errors import Interrupted
from saejax.files import write_lines, write_text
from saejax.ground_truth.algorithms import transformer
from saejax.ground_truth.algorithms.addition import Addition
from saejax.ground_truth.algorithms.features import RANDOM, TRAINED, ablate_each, compare, match_variables
from saejax.ground_truth.algorithms.paths import Paths
from saejax.ground_truth.algorithms.questions import Algorithm
from saejax.ground_truth.hub_folder import save_model
from saejax.ground_truth.results import AlgorithmResults
from saejax.matching.rows import independent_rows
from saejax.models.config import DecoderConfig
from saejax.models.families import read_config
from saejax.models.language_model import LanguageModel
from saejax.models.loading import load_model
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.runner.workspace import Run
from saejax.stages.algorithm.settings import AlgorithmConfig
from saejax.statistics.intervals import wilson
from saejax.tasks.own_prompts import as_line
from saejax.training.in_memory import train

_LOG_EVERY = 200  # steps
_FRESH, _TEXTS = 5000, 4000  # questions of each kind that are kept from training; texts of the corpus
_CONTEXT = 64
_PROMPTS = 100  # of each behaviour that select features, and as many that test them
_NODES, _EDGES = 5, 6  # of a graph; more take longer to learn and show nothing else
# The smallest transformer that learns both algorithms in a few minutes on two cores, and how it does.
_LAYERS, _WIDTH, _BATCH, _LEARNING_RATE = 2, 96, 256, 2e-3
_SITE = "resid_post.0"
_DICTIONARY: Mapping[str, Any] = dict(
    kind="topk", k=4, expansion=8, batch=512, epochs=8, learning_rate=1e-3, warmup=40, log_every=500
)
_TRAIN, _JUDGE, _PROMPT, _TEXT = range(4)  # purposes of random numbers

RngOf = Callable[..., np.random.Generator]  # (purpose, further numbers) -> generator


def run_algorithm(run: Run) -> AlgorithmResults:
    """Train the transformer ``run.name``, write it, and ablate its features.

    Raises:
      Interrupted: asked to stop; training restarts from the beginning.
    """
    config = run.configs[AlgorithmConfig]
    algorithm = Addition(config.digits) if run.name == "addition" else Paths(_NODES, _EDGES)

    def rng_of(purpose: int, *more: int) -> np.random.Generator:
        # A stream for each purpose: longer training does not change what is judged, nor the prompts.
        return np.random.default_rng([config.seed, *run.name.encode(), purpose, *more])

    fields = transformer.describe(len(algorithm.words), _CONTEXT, _LAYERS, _WIDTH)
    model = read_config(fields, "config.json")
    params = _train(run, algorithm, model, rng_of)
    accuracy = {
        kind: wilson(transformer.correct(model, params, algorithm.fresh(kind, _FRESH, rng_of(_JUDGE))))
        for kind in algorithm.required
    }
    save_model(run.folder / "model", fields, transformer.tensors(model, params), algorithm.words)
    prompts = algorithm.prompts(_PROMPTS, rng_of(_PROMPT))
    write_text(run.folder / "prompts.jsonl", "".join(as_line(prompt) for prompt in prompts))
    texts = _texts(algorithm, rng_of(_TEXT))
    write_lines(run.folder / "corpus.jsonl", [dict(text=text) for text in texts])
    for kind, share in accuracy.items():
        run.say(f"{kind}: {100 * share.mean:.2f} % [{100 * share.low:.2f}, {100 * share.high:.2f}] of fresh questions")
    lm = load_model(str(run.folder / "model"), mesh=make_mesh(run.configs[MeshConfig]))
    dictionaries = _dictionaries(run, lm, texts, config.seed)
    tests = [prompt for prompt in prompts if prompt.split == "test"]
    ablated = {}
    for name, dictionary in dictionaries.items():
        _check_stop(run)
        ablated[name] = ablate_each(lm, dictionary, tests)
    features = compare(ablated)
    for name, changed in features.items():
        run.say(f"{name}: {100 * changed.changing.mean:.1f} % of {changed.live} features change an answer")
    variables = match_variables(lm, dictionaries, prompts)
    for match in variables:
        about = f"feature {match.feature}, AUC {match.auc:.2f}, p {match.p_holm:.3f}"
        run.say(f"{match.variable} {match.value}: {about}")
    return AlgorithmResults(accuracy, dict(algorithm.required), len(tests), features, variables)


def _train(run: Run, algorithm: Algorithm, model: DecoderConfig, rng_of: RngOf) -> transformer.Params:
    """Return the trained parameters."""
    config = run.configs[AlgorithmConfig]
    optimizer = transformer.make_optimizer(config.steps, _LEARNING_RATE)
    params = transformer.initial(model, config.seed)
    state, step = optimizer.init(params), transformer.trainer(model, optimizer)
    for number in range(1, config.steps + 1):
        _check_stop(run)
        params, state, loss = step(params, state, algorithm.batch(_BATCH, rng_of(_TRAIN, number)))
        if number % _LOG_EVERY == 0:
            run.say(f"step {number:,} of {config.steps:,}, loss {float(loss):.3f}")
    return params


def _check_stop(run: Run) -> None:
    if run.stopping():
        raise Interrupted(f"{run.name}: stopped; training restarts from the beginning")


def _texts(algorithm: Algorithm, rng: np.random.Generator) -> list[str]:
    """Return questions with their answers."""
    questions = algorithm.batch(_TEXTS, rng)
    return [
        " ".join(algorithm.words[word] for word in (*ids_T[1 : int(place_N[-1]) + 1], right_NxV[-1].argmax()))
        for ids_T, place_N, right_NxV in zip(questions.ids_BxT, questions.place_BxN, questions.right_BxNxV, strict=True)
    ]


def _dictionaries(run: Run, lm: LanguageModel, texts: Sequence[str], seed: int) -> dict[str, Dictionary]:
    """Return a dictionary trained on the texts, and the control."""

    def say(line: str) -> None:
        _check_stop(run)
        run.say(line)

    acts = capture(lm, texts, _SITE)
    trained = train(acts, folder=run.folder / "train", mesh=lm.mesh, on_progress=say, seed=seed, **_DICTIONARY)
    random_FxD = independent_rows(np.asarray(trained.W_dec_FxD[...]), [seed])
    control = Dictionary(trained.config, **trained.arrays | dict(W_dec_FxD=jnp.asarray(random_FxD)))
    return {TRAINED: trained, RANDOM: control}
