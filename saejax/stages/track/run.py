"""The stage ``track``: texts followed through the layers, one after the other, and the page that shows them.

A text is a part in the sense of ``runner.parts``: its results are in ``<slug>.json``, what the page shows of it in
``<slug>-cells.json``. ``index.html`` and ``track.txt`` have all texts.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from saejax.dictionaries.bos import follow_bos
from saejax.files import read_json, write_json, write_text
from saejax.interpret.jacobian_lens import load_jacobian_lens
from saejax.matching.track.firings import follow, step_features
from saejax.matching.track.links import find_links
from saejax.matching.track.measured import measure_chains
from saejax.matching.track.results import LensLayers, TrackedText, TrackResults
from saejax.matching.track.settings import TrackConfig
from saejax.matching.track.stack import Stack
from saejax.matching.track.tested import StepTester, ablate_steps
from saejax.matching.track.texts import EncodedText, encode, read_problems, write_solution
from saejax.models.language_model import LanguageModel
from saejax.models.settings import ModelConfig
from saejax.models.tokens import pad, token_text
from saejax.progress import OnProgress
from saejax.runner.parts import Measure, Measured, each_part, part_file
from saejax.runner.workspace import Run
from saejax.stages.inputs import load_run_model
from saejax.stages.track.page import ShownText, shown_text, summary, text_lines, write_page
from saejax.stages.track.stack import open_stack

_CELLS = "-cells.json"  # ending of the file with what the page shows of a text
_SHOWN = 12  # strongest features kept of each layer and position, as many as a column of the page holds
_STEP_FEATURES = 6  # features of a step, in each layer, which are removed together
_LENS_TOP = 3  # tokens that a lens gives of each place


def run_track(run: Run) -> TrackResults:
    """Follow each text, test the features of its steps, and write the page.

    Raises:
      UserError: texts, dictionaries and model do not go together.
    """
    config = run.configs[TrackConfig]
    problems = {problem.slug: problem for problem in read_problems(config)}

    def begin() -> Measure:
        lm = load_run_model(run)
        stack = open_stack(config.dictionaries, run.inputs, run.folder.parent.parent, lm)
        jacobians = load_jacobian_lens(lm, config.lens).jacobians if config.lens else None
        lm = follow_bos(lm, [layer.config for layer in stack], run.say)
        # All, before the first is followed: what is wrong with one is said at once.
        texts = {slug: encode(lm, write_solution(lm, problem, config.generate)) for slug, problem in problems.items()}

        def measure(slug: str, on_progress: OnProgress) -> Measured:
            tracked, cells = follow_text(lm, stack, texts[slug], config, on_progress, jacobians)
            write_json(part_file(run, slug, _CELLS), cells)
            return Measured(tracked, summary(tracked))

        return measure

    texts = each_part(run, list(problems), begin, TrackedText, unit="steps")
    results = TrackResults(texts)
    cells = {slug: read_json(part_file(run, slug, _CELLS)) for slug in texts}
    write_page(run.folder / "index.html", results, cells, run.configs[ModelConfig].path)
    written = "\n".join(text_lines(slug, results.texts[slug], cells[slug]) for slug in texts)
    write_text(run.folder / "track.txt", written)
    run.say(written)
    run.say(f"open {run.folder / 'index.html'}")
    return results


def follow_text(
    lm: LanguageModel,
    stack: Stack,
    text: EncodedText,
    config: TrackConfig,
    on_progress: OnProgress,
    jacobians: Mapping[int, np.ndarray] | None = None,
) -> tuple[TrackedText, ShownText]:
    """Follow one text.

    Args:
      lm: the language model.
      stack: its dictionaries.
      text: the tokens and steps.
      config: of the stage.
      on_progress: called with the tests of steps done and of all; may raise to stop.
      jacobians: of a fitted Jacobian lens; None: the logit lens reads.

    Returns:
      The results, and what the page shows.
    """
    firings = follow(lm, stack, text.ids_T)
    shown = [layer_firings.strongest(_SHOWN) for layer_firings in firings]
    tokens, answer = pad([text.ids_T.tolist()]), text.answer
    if answer is None:
        # The lens needs the answer beforehand: a first pass reads it off the last layer.
        answer = int(lm.lens(tokens, top=1, seed=config.seed).ids_LxBxTxC[-1, 0, text.position, 0])
    reading = lm.lens(tokens, answers=[answer], top=_LENS_TOP, seed=config.seed, jacobians=jacobians)
    read_T = text.ids_T[: text.position + 1]
    on_progress(0, 0)  # asks whether to stop
    links = find_links(stack, shown)
    chosen = [step_features(layer_firings, text.segment_T, _STEP_FEATURES) for layer_firings in firings]
    # The dictionary in the middle: to test all of them would take as many times as long.
    middle = len(stack) // 2
    numbers = [[feature.feature for feature in part] for part in chosen[middle]]
    tests, untested = ablate_steps(StepTester(lm, stack[middle], text, config), text, numbers, on_progress)
    on_progress(0, 0)
    as_text = token_text(lm.tokenizer)
    chains, left_out = measure_chains(lm, stack, read_T, answer, links, firings, as_text, config.seed)
    results = TrackedText(
        tokens=len(text.ids_T),
        answer=as_text(answer),
        position=text.position,
        sites=tuple(str(layer.reads) for layer in stack),
        tested=str(stack[middle].reads),
        steps=tuple(
            dataclasses.replace(part, test=tests.get(number), untested=untested.get(number, ""))
            for number, part in enumerate(text.segments)
        ),
        lens=LensLayers(
            answer=tuple(np.exp(reading.answer_logp_LxBxTxN[:, 0, text.position, 0]).tolist()),
            rank=tuple(reading.answer_rank_LxBxTxN[:, 0, text.position, 0].tolist()),
            control=tuple(np.exp(reading.control.answer_logp_LxBxTxN[:, 0, text.position, 0]).tolist()),
        ),
        links=len(links),
        chains=chains,
        chains_left_out=left_out,
        output=text.problem.output,
    )
    lens = "Jacobian lens" if jacobians else "logit lens"
    return results, shown_text(stack, text, shown, links, chosen, reading, as_text, firings, lens)
