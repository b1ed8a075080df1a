"""The figures of a study that say which features matter for which items, and which rows share them."""

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from scipy import sparse

from saejax.interpret.feature_record import feature_words
from saejax.interventions.table import EffectsTable, PromptDefinition, load_effects
from saejax.matching.importance import FeatureMatch, ItemFeatures, match_features
from saejax.page.findings import Findings
from saejax.stages.study.measure import FEATURES_ON_ITEMS, ITEM_ATTRIBUTION
from saejax.stages.study.results import StudyResults
from saejax.studies.primitives import FeaturePrimitive, recurrence_p, recurring
from saejax.studies.results import AssociationFigures, LabelFigures, PrimitiveFigures, ProblemFigures
from saejax.studies.sheet import quoted

PROBLEMS, FEATURES = 6, 6  # problems of a benchmark that are shown; features of each
_SEED = 456  # of permutations of names


def associations(row: str, findings: Findings) -> Iterator[AssociationFigures]:
    """Yield the three answers for each tested feature."""
    for benchmark, results in findings.select(StudyResults).items():
        for association in results.associations.top if results.associations else ():
            answers = {association.associated, association.probe, association.causal}
            agree = len(answers) == 1 if answers <= {"yes", "no"} else None
            yield AssociationFigures(
                row=row,
                benchmark=benchmark,
                feature=association.feature,
                label=association.label,
                correlation=association.correlation,
                p_value=association.p_value,
                associated=association.associated,
                auc=association.auc,
                probe=association.probe,
                causal_drop=association.causal_drop,
                p_causal=association.p_causal,
                causal=association.causal,
                agree=agree,
            )


def labels(row: str, findings: Findings) -> Iterator[LabelFigures]:
    """Yield how many features go with each label."""
    for benchmark, results in findings.select(StudyResults).items():
        for label in results.associations.labels if results.associations else ():
            yield LabelFigures(
                row=row,
                benchmark=benchmark,
                label=label.label,
                items=label.items,
                features=label.features,
                associated=label.associated,
                shuffled=label.shuffled,
            )


@dataclasses.dataclass(frozen=True)
class ReadBenchmark:
    """A row's features on the items of a benchmark."""

    origin: str  #: what the items are and where they came from
    table: EffectsTable  #: its effects table
    features: ItemFeatures  #: activations on all items
    attribution_PxF: sparse.csr_array  #: attribution for the answer to each item, sparse
    #: match of this row's features with the features of each other row that was asked the same items
    matches: dict[str, FeatureMatch] = dataclasses.field(default_factory=dict)

    @property
    def prompts(self) -> list[PromptDefinition]:
        """All items, train and test."""
        return list(self.table.prompts)


def read_benchmarks(rows: Mapping[str, Findings], benchmark: str) -> dict[str, ReadBenchmark]:
    """Return the features of every row on a benchmark, matched between rows that were asked the same items.

    Args:
      rows: the findings of each row, by name.
      benchmark: its name.

    Raises:
      UserError: a file of a unit is damaged.
    """
    read: dict[str, ReadBenchmark] = {}
    for name, findings in rows.items():
        folder = findings.folders.get(f"study/{benchmark}")
        if folder is not None and all((folder / file).exists() for file in (FEATURES_ON_ITEMS, ITEM_ATTRIBUTION)):
            read[name] = ReadBenchmark(
                findings.select(StudyResults)[benchmark].origin,
                load_effects(folder),
                ItemFeatures.load(folder / FEATURES_ON_ITEMS),
                sparse.csr_array(sparse.load_npz(folder / ITEM_ATTRIBUTION)),
            )
    for first, second in itertools.combinations(read, 2):
        same = read[first].origin == read[second].origin
        if same and (match := match_features(read[first].features, read[second].features)):
            read[first].matches[second], read[second].matches[first] = match, match.back()
    return read


def words_on_items(read: ReadBenchmark, benchmark: str, features: Sequence[int]) -> tuple[str, ...]:
    """Return the words of some features together, by their activations at the tokens of the items.

    Args:
      read: the row's features.
      benchmark: its name.
      features: their indices.
    """
    texts = {prompt.id: f"{prompt.text}\n{prompt.correct}" for prompt in read.prompts}
    items, tokens = read.features, list[str]()
    act_N = abs(items.activity.f_NxF[:, np.asarray(features, np.int64)]).sum(axis=1)
    fires_A = np.flatnonzero(act_N)
    for n in fires_A.tolist():
        starts_text = n == 0 or items.text_N[n - 1] != items.text_N[n]
        text = texts[f"{benchmark}/{items.ids[items.text_N[n]]}"]
        tokens.append(text[0 if starts_text else items.end_N[n - 1] : items.end_N[n]])
    return feature_words(tokens, act_N[fires_A].tolist())


def primitives(
    rows: Mapping[str, Findings], benchmark: str, read: Mapping[str, ReadBenchmark]
) -> Iterator[PrimitiveFigures]:
    """Yield the primitives of a benchmark, row by row.

    Args:
      rows: the findings of each row, by name.
      benchmark: its name.
      read: the features of the rows that saved them.
    """
    every = {
        name: results.primitives
        for name, findings in rows.items()
        if (results := findings.select(StudyResults).get(benchmark)) and results.primitives
    }
    shared = _shared_categories(rows, benchmark, read, [*every])
    for row, some in every.items():
        elsewhere = [_named_in(shared, others.primitives) for name, others in every.items() if name != row]
        p_rows = recurrence_p(_named_in(shared, some.primitives), elsewhere, shared, _SEED)
        recurs_in = {
            name: recurring(some.primitives, others.primitives) for name, others in every.items() if name != row
        }
        effects = {effect.group: effect for effect in some.effects}
        for number, primitive in enumerate(some.primitives):
            effect, here = effects.get(number), read.get(row)
            yield PrimitiveFigures(
                row=row,
                benchmark=benchmark,
                name=primitive.name,
                features=primitive.features,
                words=words_on_items(here, benchmark, primitive.features) if here else (),
                overlap=primitive.overlap,
                p_recurs=some.p_recurs,
                p_value=primitive.p_value,
                seeds=len(some.seeds),
                recurs=sum(same[number] for same in some.seeds.values()),
                rows=tuple(name for name, same in recurs_in.items() if same[number]),
                p_rows=p_rows,
                partners=_partners(here, primitive.features) if here else (),
                items=effect.items if effect else None,
                effect=effect.effect if effect else None,
                elsewhere=effect.elsewhere if effect else None,
                random=effect.random if effect else None,
                placebo=effect.placebo if effect else None,
                sets=effect.sets if effect else None,
                needed=effect.needed if effect else None,
                more=effect.answer if effect else "not testable",
            )


def _shared_categories(
    rows: Mapping[str, Findings], benchmark: str, read: Mapping[str, ReadBenchmark], names: Sequence[str]
) -> list[str]:
    """Return the categories that items of every one of these rows have, of those that chose features where it is known.

    Only these can name groups of two rows alike.
    """
    of_rows = []
    for name in names:
        categories = rows[name].select(StudyResults)[benchmark].categories
        chose = {prompt.id for prompt in read[name].prompts if prompt.split == "train"} if name in read else set()
        items = [item for item in categories if not chose or f"{benchmark}/{item}" in chose]
        of_rows.append({category for item in items for category in categories[item]})
    return sorted(set.intersection(*of_rows)) if of_rows else []


def _named_in(categories: Collection[str], groups: Sequence[FeaturePrimitive]) -> list[FeaturePrimitive]:
    return [group for group in groups if group.name in categories]


def _partners(here: ReadBenchmark, features: Sequence[int]) -> tuple[str, ...]:
    return tuple(
        f"{name}: {sum(feature in match.partner for feature in features)} of {len(features)} "
        f"(by chance {match.shared_null * len(features):.1f})"
        for name, match in here.matches.items()
    )


def problems(
    rows: Mapping[str, Findings], benchmark: str, read: Mapping[str, ReadBenchmark]
) -> Iterator[ProblemFigures]:
    """Yield problems, one of each category, in every row, with the features that matter most for the right answer.

    A row is left out where the name is another problem's, or the problem chose features. Features are only divided into
    shared and specific ones in a row that could be compared with every other.

    Args:
      rows: the findings of each row, by name.
      benchmark: its name.
      read: the features of the rows that saved them.
    """
    if not read:
        return
    first = next(iter(read.values()))
    tests = {prompt.id for prompt in first.prompts if prompt.split == "test"}
    results = rows[next(iter(read))].select(StudyResults)[benchmark]
    chosen = choose_problems(
        [item for item in first.features.ids if f"{benchmark}/{item}" in tests], results.categories
    )
    for item in chosen:
        for row, here in read.items():
            prompts = {prompt.id: prompt for prompt in here.prompts if prompt.split == "test"}
            prompt = prompts.get(f"{benchmark}/{item}")
            if prompt is None or here.origin != first.origin:
                continue
            right = float(here.table.clean_values([prompt], "accuracy")[0])
            is_compared = len(here.matches) == len(read) - 1
            marks = _important(here, benchmark, here.features.ids.index(item)) if is_compared else []
            yield ProblemFigures(
                benchmark=benchmark,
                item=item,
                category=", ".join(results.categories.get(item, ())),
                question=prompt.text,
                answer=prompt.correct,
                row=row,
                right=None if np.isnan(right) else right > 0,
                log_likelihood=float(here.table.clean_values([prompt], "answer_log_prob")[0]),
                universal=tuple(text for text, count in marks if count and count == len(here.matches)),
                shared=tuple(text for text, count in marks if 0 < count < len(here.matches)),
                specific=tuple(text for text, count in marks if not count),
            )


def choose_problems(items: Sequence[str], categories: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return the first item of each first category, and then others, at most ``PROBLEMS``."""
    first = list({categories.get(item, ())[:1]: item for item in reversed(items)}.values())[::-1]
    return [*first, *(item for item in items if item not in first)][: max(PROBLEMS, 1)] if first else []


def _important(here: ReadBenchmark, benchmark: str, place: int) -> list[tuple[str, int]]:
    """Return the most important features of an item, in words, and in how many rows each has a partner."""
    row_F = here.attribution_PxF[[place]].toarray()[0]
    named = []
    for feature in np.argsort(-row_F, kind="stable")[:FEATURES].tolist():
        if row_F[feature] > 0:
            words = words_on_items(here, benchmark, [feature])
            text = f"{feature} ({quoted(words)}; {row_F[feature]:.2f})"
            named.append((text, sum(feature in match.partner for match in here.matches.values())))
    return named
