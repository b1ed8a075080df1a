"""The stage ``algorithm``: trains a transformer on an algorithm and measures it on questions kept from training.

The folder is in the hub's format and ``prompts.jsonl`` is meant for ``--task.prompts``: capture, train, ablate, patch,
probe and all other stages take it like any model, and probes can predict the algorithm's variables.
"""

import time
from collections.abc import Callable

import numpy as np

from saejax.errors import Interrupted
from saejax.files import write_lines, write_text
from saejax.ground_truth.algorithms import transformer
from saejax.ground_truth.algorithms.addition import Addition
from saejax.ground_truth.algorithms.paths import Paths
from saejax.ground_truth.algorithms.questions import Algorithm
from saejax.ground_truth.hub_folder import save_model
from saejax.ground_truth.results import AlgorithmResults
from saejax.models.config import DecoderConfig
from saejax.models.families import read_config
from saejax.runner.workspace import Run
from saejax.stages.algorithm import AlgorithmConfig
from saejax.tasks.own_prompts import as_line
from saejax.tasks.scoring import wilson

_CHECK_EVERY = 250  # steps
_CHECK, _FRESH, _TEXTS = 1000, 5000, 4000  # questions of each kind at a check and at the end; texts of the corpus
_CONTEXT = 64
_PROMPTS = 100  # of each behaviour that select features, and as many that test them
_NODES, _EDGES = 6, 8  # of a graph; more take longer to learn and show nothing else
# The smallest transformer that learns both algorithms in a few minutes on two cores, and how it does.
_LAYERS, _WIDTH, _BATCH, _LEARNING_RATE = 2, 96, 256, 2e-3
_TRAIN, _WATCH, _JUDGE, _PROMPT, _TEXT = range(5)  # purposes of random numbers

RngOf = Callable[..., np.random.Generator]  # (purpose, further numbers) -> generator


def run_algorithm(run: Run) -> AlgorithmResults:
    """Train the transformer ``run.name`` until it answers questions kept from training, and write it.

    Raises:
      UserError: the settings allow no such questions.
      Interrupted: asked to stop; training restarts from the beginning.
    """
    config = run.configs[AlgorithmConfig]
    algorithm = Addition(config.digits) if run.name == "addition" else Paths(_NODES, _EDGES)

    def rng_of(purpose: int, *more: int) -> np.random.Generator:
        # A stream for each purpose: longer training does not change what is judged, nor the prompts.
        return np.random.default_rng([config.seed, *run.name.encode(), purpose, *more])

    fields = transformer.describe(len(algorithm.words), _CONTEXT, _LAYERS, _WIDTH)
    model = read_config(fields, "config.json")
    params, steps = _train(run, algorithm, model, rng_of)
    accuracy = {
        kind: wilson(transformer.correct(model, params, algorithm.fresh(kind, _FRESH, rng_of(_JUDGE))))
        for kind in algorithm.required
    }
    save_model(run.folder / "model", fields, transformer.tensors(model, params), algorithm.words)
    prompts = algorithm.prompts(_PROMPTS, rng_of(_PROMPT))
    write_text(run.folder / "prompts.jsonl", "".join(as_line(prompt) for prompt in prompts))
    _write_corpus(run, algorithm, rng_of(_TEXT))
    for kind, share in accuracy.items():
        run.say(f"{kind}: {100 * share.mean:.2f} % [{100 * share.low:.2f}, {100 * share.high:.2f}] of fresh questions")
    labels = tuple(dict.fromkeys(name for prompt in prompts for name, _ in prompt.labels))
    return AlgorithmResults(steps, _FRESH, accuracy, dict(algorithm.required), labels)


def _train(run: Run, algorithm: Algorithm, model: DecoderConfig, rng_of: RngOf) -> tuple[transformer.Params, int]:
    """Return the parameters and the number of steps after which fresh questions were answered, or of all steps."""
    config = run.configs[AlgorithmConfig]
    optimizer = transformer.make_optimizer(config.steps, _LEARNING_RATE)
    params = transformer.initial(model, config.seed)
    state, step = optimizer.init(params), transformer.trainer(model, optimizer)
    # The same questions at each check, so that shares differ by the training alone.
    watched = {kind: algorithm.fresh(kind, _CHECK, rng_of(_WATCH)) for kind in algorithm.required}
    start = time.monotonic()
    for number in range(1, config.steps + 1):
        if run.stopping():
            raise Interrupted(f"{run.name}: stopped; training restarts from the beginning")
        params, state, loss = step(params, state, algorithm.batch(_BATCH, rng_of(_TRAIN, number)))
        if number % _CHECK_EVERY and number < config.steps:
            continue
        shares = {kind: transformer.correct(model, params, some).mean() for kind, some in watched.items()}
        left = (time.monotonic() - start) / number * (config.steps - number)
        run.say(
            f"step {number:,} of at most {config.steps:,}, loss {float(loss):.3f}"
            + "".join(f", {kind} {100 * share:.1f} %" for kind, share in shares.items())
            + f", at most {left:.0f} s left"
        )
        # Half of the allowed errors, so that sampling error does not decide what the final questions say.
        if all(share > (1 + algorithm.required[kind]) / 2 for kind, share in shares.items()):
            break
    return params, number


def _write_corpus(run: Run, algorithm: Algorithm, rng: np.random.Generator) -> None:
    """Write texts for ``--corpus.path``: questions with their answers."""
    questions = algorithm.batch(_TEXTS, rng)
    lines = []
    for ids_T, place_N, right_NxV in zip(questions.ids_BxT, questions.place_BxN, questions.right_BxNxV, strict=True):
        words = [algorithm.words[word] for word in (*ids_T[1 : int(place_N[-1]) + 1], right_NxV[-1].argmax())]
        lines.append(dict(text=" ".join(words)))
    write_lines(run.folder / "corpus.jsonl", lines)
