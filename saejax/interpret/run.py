"""The stage ``interpret``: records and labels of all features of the members of a train unit.

Records and the search for labels use training text; held-out text only scores labels. Firings are written to the
unit's folder while a member is interpreted, and deleted afterwards.
"""

import dataclasses
import functools
from collections.abc import Sequence

from jax.sharding import Mesh

from saejax.activations.store import Store
from saejax.dictionaries import load_dictionary, stacks
from saejax.dictionaries.results import TrainedMember
from saejax.errors import Interrupted
from saejax.files import read_json, write_json
from saejax.interpret.interpreter import IN_STREAM, Interpreter
from saejax.interpret.results import InterpretedDictionary, InterpretResults
from saejax.interpret.text import CodedText
from saejax.models.language_model import LanguageModel
from saejax.models.loading import load_configured_model
from saejax.models.sites import Site
from saejax.models.tokens import token_text
from saejax.parallel.mesh import make_mesh
from saejax.results import from_json, to_json
from saejax.runner.workspace import Run, member_folder
from saejax.settings import MeshConfig, ModelConfig

DONE = "interpreted.json"


def run_interpret(run: Run) -> InterpretResults:
    """Interpret the dictionaries of the train unit ``run.name``; those finished in an earlier run are kept.

    This writes for each member, in a folder of its name if there are several: ``features/00000.json`` and so on, up
    to 512 features each, ``labels.json`` with the labels, and ``heatmaps.json``.

    Raises:
      UserError: the store belongs to another model, or a split has no text.
      Interrupted: asked to stop.
    """
    trained = run.inputs[f"train/{run.name}"]
    stack, store = stacks.members(trained), Store.open(run.inputs["capture"])
    path = {member.name: run.member_folder(member.name) / DONE for member in stack}

    # Read only if a dictionary is left to do: a finished unit needs no model.
    @functools.cache
    def read() -> tuple[LanguageModel, Mesh, CodedText]:
        model, mesh = run.configs[ModelConfig], make_mesh(run.configs[MeshConfig])
        lm = load_configured_model(model, mesh)
        store.check_model(lm.source)
        as_text = token_text(lm.tokenizer)
        return lm, mesh, CodedText(store.documents, [as_text(token) for token in range(lm.config.vocab)])

    def interpret(member: TrainedMember) -> None:
        if run.stopping():
            raise Interrupted("stopped; finished dictionaries are kept: run the same command again to continue")
        lm, mesh, text = read()
        dictionary = load_dictionary(member_folder(trained, member.name))
        layers = {site: member_folder(trained, name) for site, name in other_layers(member, stack).items()}
        results = Interpreter(run, store, text, lm, mesh, member.name, dictionary, layers).interpret()
        write_json(path[member.name], to_json(dataclasses.replace(results, name="")))  # as of a run of it alone
        run.say(line(results))

    run.each(stack, lambda member: path[member.name], interpret)
    interpreted = {name: from_json(InterpretedDictionary, read_json(done), done) for name, done in path.items()}
    for name in run.stack.missing if run.stack else ():
        run.finish_member(name, InterpretResults(run.name, (interpreted[name],)))
    named = tuple(dataclasses.replace(dictionary, name=name) for name, dictionary in interpreted.items())
    return InterpretResults(run.name, named)


def other_layers(
    member: TrainedMember | InterpretedDictionary, stack: Sequence[TrainedMember | InterpretedDictionary]
) -> dict[str, str]:
    """Return the members of a stack that differ from one only in the layer: site -> name, in the order of layers.

    Empty if they do not write to the residual stream, where directions of all layers are comparable.
    """

    def but_layer(candidate: TrainedMember | InterpretedDictionary) -> tuple[str, str, str]:
        kinds = (Site.parse(candidate.site).kind, Site.parse(candidate.target).kind)
        return (*kinds, candidate.name.removeprefix(candidate.site).removeprefix("-"))

    if Site.parse(member.target).kind not in IN_STREAM:
        return {}
    like = [
        candidate for candidate in stack if candidate.name != member.name and but_layer(candidate) == but_layer(member)
    ]
    like.sort(key=lambda candidate: Site.parse(candidate.site).layer)
    return {candidate.site: candidate.name for candidate in like}


def line(interpreted: InterpretedDictionary) -> str:
    """Return the figures of a dictionary as a log line."""
    name = f"{interpreted.name}: " if interpreted.name else ""
    labels = interpreted.labels
    controls = [("random directions", interpreted.random), ("a frozen-random dictionary", interpreted.frozen.labels)]
    return (
        f"{name}{labels.labelled:,} of {labels.features:,} features that fire have a label "
        f"({labels.share:.1%}; {', '.join(f'{counts.share:.1%} of {of}' for of, counts in controls)}); mean F1 "
        f"{labels.mean_f1:.3f}, {', '.join(f'of {of} {counts.mean_f1:.3f}' for of, counts in controls)}, "
        f"of another feature's label {interpreted.shuffled_f1:.3f}"
    )
