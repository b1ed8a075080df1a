"""The report's sections on the synthetic world, by what dictionaries recover of it, and on trained algorithms."""

from collections.abc import Callable, Iterator, Sequence

from saejax.ground_truth.algorithms.features import RANDOM, TRAINED
from saejax.ground_truth.results import AlgorithmResults, JudgedDictionary, TruthResults, VariableFeature
from saejax.ground_truth.scores import FREQUENT
from saejax.ground_truth.settings import CONTROLS
from saejax.page.blocks import Block, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import Table, interval, number, percent

ENOUGH = 0.9  # share of the frequent directions that the best kind must recover

_COLUMNS: tuple[tuple[str, str, int, float], ...] = (
    ("Recovered, %", "recovered", 1, 100),
    ("MCC", "mcc", 3, 1),
    ("F1", "f1", 3, 1),
    ("F1 of latents", "f1_features", 3, 1),
    ("Split, %", "split", 1, 100),
    ("Merged, %", "merged", 1, 100),
    ("Absorbed, %", "absorbed", 1, 100),
    ("Invented, %", "invented", 1, 100),
    ("L0", "l0", 1, 1),
    ("Dead, %", "dead", 1, 100),
    ("Explained variance", "explained_variance", 3, 1),
)
_NOTE = (
    "Recovered: share of the frequent true features whose matched latent has an absolute cosine above 0.9 with them. "
    "MCC: mean absolute cosine of features and latents matched one to one. F1: of a true feature being active and its "
    "matched latent firing; F1 of latents: the same of each latent and its nearest true feature, as in SynthSAEBench. "
    "Split: several latents share a true feature. Merged: several true features share a latent. Absorbed: the parent "
    "latent is absorbed by a child latent. Invented: share of live latents that are close to no true feature. Best "
    "possible: the largest true activations, as many as the dictionary above has, decoded by the true directions."
)
_VARIABLES: dict[str, Callable[[VariableFeature], str]] = {
    "Variable": lambda match: f"{match.variable}: {match.value}",
    "Test prompts": lambda match: f"{match.prompts}",
    "Feature": lambda match: f"{match.feature}",
    "AUC": lambda match: number(match.auc),
    "p": lambda match: number(match.p_holm, 3),
    "Logits lost; random direction": lambda match: f"{number(match.drop)}; {number(match.random_drop)}",
}
_VARIABLES_NOTE = (
    "For each value of a variable the feature that goes with it most on train prompts, where the answer is predicted. "
    "AUC: how well its activation tells test prompts with the value from others (1: always, 0.5: by chance); p is "
    "corrected over all values. Logits lost: fall of the logit difference on test prompts with the value when the "
    "feature is ablated, and along a random direction."
)
_ABLATED_NOTE = (
    "Live features fire on a test prompt. Change an answer: share of them with which an answer becomes right or wrong. "
    "Effect: absolute change of the logit difference on prompts on which a feature fires. Random directions: the same "
    "activations along random directions, with the mean, covariance and lengths of the features' directions. Intervals "
    "are Wilson's, and t intervals over features for the effect."
)


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return a section on what dictionaries recovered of the synthetic world, and controls; none if there is none."""
    units = findings.select(TruthResults)
    if CONTROLS not in units:
        return []
    some = units[CONTROLS]
    world = some.world
    judged = [(name, dictionary) for unit in units.values() for name, dictionary in _named(unit)]
    seeds = len(judged[0][1].seeds)
    spread = f"with 95 % t intervals over {seeds} seeds" if seeds > 1 else "one seed each, so without intervals"
    intro = (
        f"This world is synthetic: its vectors, of {world.dimensions:,} dimensions, are sums of {world.features:,} "
        f"known directions, of which {number(world.l0, 1)} are active in a vector on average. Dictionaries of "
        f"{some.features:,} latents were trained on {some.samples:,} vectors by the code that trains on a model's "
        f"activations, and scored on {some.held_out:,} others. {world.frequent:,} features are active in more than "
        f"{percent(FREQUENT, 2)} of the vectors, and these must be recovered."
    )
    verdict = line(judged)
    columns = ("Dictionary", *(heading for heading, *_ in _COLUMNS))
    rows = tuple(row for name, dictionary in judged for row in _rows(name, dictionary))
    table = Table(
        f"True features and what dictionaries recover of them, {spread}", columns, rows, stack=False, note=_NOTE
    )
    blocks: tuple[Block, ...] = (Text(verdict, strong=True), Text(intro), table)
    return [Section("Known features", blocks, lead=verdict)]


def line(judged: Sequence[tuple[str, JudgedDictionary]]) -> str:
    """Return the verdict in a sentence or two."""
    learned = [(name, dictionary) for name, dictionary in judged if not dictionary.control]
    name, best = max(learned, key=lambda pair: pair[1].scores.recovered.mean)
    share = best.scores.recovered
    above = max((dictionary.scores.recovered.mean for _, dictionary in judged if dictionary.control), default=0.0)
    answer = "YES" if share.mean >= ENOUGH and share.mean > above else "NO"
    recovered = interval(share, 1, 100) if share.low < share.high else number(100 * share.mean, 1)  # of one seed
    return (
        f"Does training recover known features? {answer}: of the synthetic world's frequent features {name} recovers "
        f"{recovered} % ({percent(ENOUGH)} are required), the best control {percent(above, 1)}."
    )


def _named(results: TruthResults) -> Iterator[tuple[str, JudgedDictionary]]:
    for dictionary in results.dictionaries:
        member = f"{results.kind}/{dictionary.name}" if dictionary.name else results.kind
        yield f"random decoder ({member})" if dictionary.control else member, dictionary


def _rows(name: str, judged: JudgedDictionary) -> Iterator[tuple[str, ...]]:
    """Yield the row of a dictionary's scores and the row of the best possible scores with as many activations."""

    def cell(field: str, digits: int, scale: float) -> str:
        value = getattr(judged.scores, field)
        return interval(value, digits, scale) if len(judged.seeds) > 1 else number(value.mean * scale, digits)

    yield name, *(cell(field, digits, scale) for _, field, digits, scale in _COLUMNS)
    if not judged.control:
        best = dict(f1="best_f1", explained_variance="best_explained_variance")
        blank = ("100.0", "1.000")
        yield (
            "  best possible",
            *(
                cell(best[field], digits, scale) if field in best else (blank[i] if i < 2 else "")
                for i, (_, field, digits, scale) in enumerate(_COLUMNS)
            ),
        )


def algorithm_sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return a section on the trained transformers and their features; none if none was trained."""
    units = findings.select(AlgorithmResults)
    if not units:
        return []
    rows = [(results, kind, share) for results in units.values() for kind, share in results.accuracy.items()]
    short = [kind for results, kind, share in rows if share.mean < results.required[kind]]
    learned = (
        f"Not learned to the required accuracy: {', '.join(short)}."
        if short
        else "Every algorithm was learned to the required accuracy, on questions kept from training."
    )
    verdict = " ".join([learned, *(_features_line(name, results) for name, results in units.items())])
    columns = {
        "Questions": lambda results, kind, share: kind,
        "Correct, %": lambda results, kind, share: interval(share, 2, 100),
        "Required": lambda results, kind, share: percent(results.required[kind]),
    }
    table = Table.of("Transformers trained on algorithms, with 95 % Wilson intervals", rows, columns)
    blocks: list[Block] = [Text(verdict, strong=True), table]
    ablated = {
        "Dictionary": lambda name, features: name,
        "Live features": lambda name, features: f"{features.live:,}",
        "Change an answer, %": lambda name, features: interval(features.changing, 1, 100),
        "Above 95 % of random, %": lambda name, features: interval(features.above, 1, 100),
        "Effect, logits": lambda name, features: interval(features.effect, 3),
    }
    for name, results in units.items():
        caption = f"{name}: features ablated one at a time on {results.prompts} test prompts"
        blocks.append(Table.of(caption, results.features.items(), ablated, note=_ABLATED_NOTE))
        if results.variables:
            rows_of_variables = [(variable,) for variable in results.variables]
            caption = f"{name}: the algorithm's variables and the features that go with them"
            blocks.append(Table.of(caption, rows_of_variables, _VARIABLES, note=_VARIABLES_NOTE))
    return [Section("Trained algorithms", tuple(blocks), lead=verdict)]


def _features_line(name: str, results: AlgorithmResults) -> str:
    """Return in a sentence or two what single features do, beside the same activations along random directions."""
    trained, random = results.features[TRAINED], results.features[RANDOM]
    # The level is an estimate from as many random directions: their own share is as uncertain as the features'.
    answer = "YES" if trained.above.low > random.above.high else "NO"
    return (
        f"Do single features of the {name} transformer change its output more than random directions? {answer}: "
        f"ablated alone, {percent(trained.above.mean)} of {trained.live:,} features have a larger effect than 95 % of "
        f"the random directions. {percent(trained.changing.mean)} of the features change an answer, and so do "
        f"{percent(random.changing.mean)} of the random directions."
    )
