"""The stage ``algorithm``: a transformer is trained on an algorithm, and judged on questions that it has never seen.

Its folder is in the hub's format, and ``prompts.jsonl`` is for ``--task.prompts``: capture, train, ablate, patch, probe
and all others take it like any model, and probes have the algorithm's variables for labels.
"""

import time
from collections.abc import Callable

import numpy as np

from saejax.errors import Interrupted, UserError
from saejax.files import write_lines, write_text
from saejax.ground_truth.algorithms import planted, transformer
from saejax.ground_truth.algorithms.addition import Addition
from saejax.ground_truth.algorithms.paths import Paths
from saejax.ground_truth.algorithms.plant_judge import judge
from saejax.ground_truth.algorithms.planted import LAYERS, Planted
from saejax.ground_truth.algorithms.questions import Algorithm, Questions
from saejax.ground_truth.algorithms.results import AlgorithmResults
from saejax.ground_truth.hub_folder import save_model
from saejax.models.config import DecoderConfig
from saejax.models.loading import load_model
from saejax.parallel.mesh import make_mesh
from saejax.runner.workspace import Run
from saejax.settings import MeshConfig
from saejax.stages.algorithm import AlgorithmConfig
from saejax.tasks.own_prompts import as_line
from saejax.tasks.scoring import wilson

_LOOK_EVERY, _SAY_EVERY = 250, 10.0  # steps; seconds
_LOOK, _FRESH, _TEXTS = (
    1000,
    5000,
    4000,
)  # questions of each sort at a look, and at the end; texts to learn features from
_CONTEXT = 64
_TRAIN, _WATCH, _JUDGE, _PROMPT, _TEXT = range(5)  # what draws are for


def run_algorithm(run: Run) -> AlgorithmResults:
    """Trains the transformer ``run.name`` until it answers fresh questions, and writes it.

    Raises:
      UserError: there are no such questions.
      Interrupted: asked to stop; training starts anew.
    """
    config = run.configs[AlgorithmConfig]
    algorithm = _algorithm(run.name, config)

    def rng(use: int, *more: int) -> np.random.Generator:
        return np.random.default_rng([config.seed, *run.name.encode(), use, *more])

    fields = transformer.describe(len(algorithm.words), _CONTEXT, config.layers, config.width)
    model, start = transformer.read(fields), time.monotonic()
    params, steps = _train(run, algorithm, model, rng)
    seconds = time.monotonic() - start
    found = {
        sort: wilson(_right(algorithm, model, params, sort, algorithm.fresh(sort, _FRESH, rng(_JUDGE))))
        for sort in algorithm.wanted
    }
    save_model(run.folder / "model", fields, transformer.tensors(model, params), algorithm.words)
    prompts = algorithm.prompts(config.prompts, rng(_PROMPT))
    write_text(run.folder / "prompts.jsonl", "".join(as_line(prompt) for prompt in prompts))
    texts = _write_corpus(run, algorithm, rng(_TEXT))
    for sort, share in found.items():
        run.say(f"{sort}: {100 * share.mean:.2f} % [{100 * share.low:.2f}, {100 * share.high:.2f}] of fresh questions")
    labels = tuple(dict.fromkeys(name for prompt in prompts for name, _ in prompt.labels))
    scores = None
    if isinstance(algorithm, Planted):
        made = load_model(str(run.folder / "model"), mesh=make_mesh(run.configs[MeshConfig]))
        scores = judge(run, made, texts, prompts, config.seed)
    return AlgorithmResults(
        steps, steps * config.batch, round(seconds, 1), _FRESH, found, dict(algorithm.wanted), labels, scores
    )


def _algorithm(name: str, config: AlgorithmConfig) -> Algorithm:
    if name == "planted":
        if config.layers != LAYERS:
            raise UserError(f"--algorithm.layers={config.layers}: the planted circuit has {LAYERS} layers")
        return Planted()
    return Addition(config.digits) if name == "addition" else Paths(config.nodes, config.edges)


def _right(
    algorithm: Algorithm, model: DecoderConfig, params: transformer.Params, sort: str, some: Questions
) -> np.ndarray:
    """Which questions of a sort are answered right [B]; of a planted circuit sorts are tests."""
    if isinstance(algorithm, Planted):
        return transformer.right(model, params, some, tests=planted.tests, test=sort)
    return transformer.right(model, params, some)


def _train(
    run: Run, algorithm: Algorithm, model: DecoderConfig, rng: Callable[..., np.random.Generator]
) -> tuple[transformer.Params, int]:
    """The parameters, and after how many steps fresh questions were answered, or all steps were made."""
    config = run.configs[AlgorithmConfig]
    schedule = transformer.Schedule(config.steps, config.learning_rate)
    params = transformer.initial(model, config.seed)
    tests = planted.tests if isinstance(algorithm, Planted) else transformer.plain
    state, step = schedule.optimizer().init(params), transformer.trainer(model, schedule, tests)
    watched = {sort: algorithm.fresh(sort, _LOOK, rng(_WATCH)) for sort in algorithm.wanted}
    start = said = time.monotonic()
    for number in range(1, config.steps + 1):
        if run.stopping():
            raise Interrupted(f"{run.name}: stopped; training starts anew")
        params, state, loss = step(params, state, algorithm.batch(config.batch, rng(_TRAIN, number)))
        now, looks = time.monotonic(), number % _LOOK_EVERY == 0 or number == config.steps
        if not looks and now - said < _SAY_EVERY:
            continue
        line, said = f"step {number:,} of {config.steps:,} at most, loss {float(loss):.3f}", now
        if looks:
            shares = {sort: _right(algorithm, model, params, sort, some).mean() for sort, some in watched.items()}
            line += "".join(f", {sort} {100 * share:.1f} %" for sort, share in shares.items())
            # Half of the faults that are allowed: chance must not decide what the judging questions say.
            if all(share > (1 + algorithm.wanted[sort]) / 2 for sort, share in shares.items()):
                run.say(line)
                return params, number
        run.say(f"{line}, {(now - start) / number * (config.steps - number):.0f} s to go at most")
    return params, config.steps


def _write_corpus(run: Run, algorithm: Algorithm, rng: np.random.Generator) -> list[str]:
    """Writes texts for ``--corpus.path``, questions with their answers."""
    questions = algorithm.batch(_TEXTS, rng)
    texts = []
    for ids_T, place_N, right_NxV in zip(questions.ids_BxT, questions.place_BxN, questions.right_BxNxV, strict=True):
        last = int(place_N[-1])
        words = [algorithm.words[word] for word in (*ids_T[1 : last + 1], right_NxV[-1].argmax())]
        texts.append(" ".join(words))
    write_lines(run.folder / "corpus.jsonl", (dict(text=text) for text in texts))
    return texts
