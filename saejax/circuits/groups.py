"""Groups of features that return over a behaviour's prompts: found, proposed, and edited by hand.

1. A graph of each traced prompt gives the influence of its features on the answer, and on placebo targets.
2. A feature is named by its layer, its index and the *role* of its position: ``content`` where words differ between the
   prompt and its counterpart, ``last`` the last position, ``context`` all others. So a feature can return in a prompt
   of another template or length.
3. Features that are among the most influential ones of several prompts return (``find_returning``).
4. Features that share a label are a group; others are grouped by role and by third of the layers, and named after their
   most influential feature (``propose_groups``).

The proposal is written to ``groups.json``; an edited copy is read back by ``read_groups``.
"""

import dataclasses
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np

from saejax.attribution.forms.features import Feature, FeatureDetails
from saejax.attribution.graph import Graph
from saejax.attribution.graph.data import FEATURE
from saejax.attribution.graph.pruning import source_influence
from saejax.errors import UserError
from saejax.tasks.files import decode, read_bytes, shown
from saejax.unicode import has_surrogates

ANSWER = "answer"  # what groups act on besides each other
ROLE_WORDS = dict(content="differing words", context="other words", last="last position")
ROLES = tuple(ROLE_WORDS)
THIRDS = ("early", "middle", "late")  # of the layers
_LEAST = 1e-3  # of a prompt's largest influence; less may be rounding
_MEMBER = re.compile(rf"(\d+)_(\d+)_({'|'.join(ROLES)})")
_FORMAT = '{"two_hop": [["places", "3_17_content", "12_208_last"]]}: a label, then features as layer_index_role'


@dataclasses.dataclass(frozen=True, order=True)
class Key:
    """A feature at positions of a role."""

    layer: int  #: layer of the feature
    feature: int  #: index of the feature
    role: str  #: one of ``ROLES``

    def __str__(self) -> str:
        return f"{self.layer}_{self.feature}_{self.role}"

    @property
    def address(self) -> Feature:
        """Its layer and index: the feature at any position."""
        return self.layer, self.feature


@dataclasses.dataclass(frozen=True)
class Group:
    """Features that are taken to do one thing together."""

    name: str  #: as in ``groups.json``
    members: tuple[Key, ...]  #: its features, the most influential first

    @property
    def role(self) -> str:
        """The role at which most of its features stand."""
        roles = [key.role for key in self.members]
        return max(ROLES, key=roles.count)

    @property
    def layer(self) -> float:
        """The mean layer of its features."""
        return sum(key.layer for key in self.members) / len(self.members)


def position_roles(ids_P: np.ndarray, counterpart_P: np.ndarray | None) -> np.ndarray:
    """Return the role of each position of a prompt, strings [P].

    Args:
      ids_P: token ids of the prompt.
      counterpart_P: token ids of its counterpart; None: there is none, and no position is ``content``.
    """
    roles = ["context"] * len(ids_P)
    if counterpart_P is not None:
        # autojunk takes frequent tokens of long prompts for noise, and would find no common parts there.
        matcher = SequenceMatcher(None, ids_P.tolist(), counterpart_P.tolist(), autojunk=False)
        for kind, start, stop, *_ in matcher.get_opcodes():
            if kind != "equal":
                roles[start:stop] = ["content"] * (stop - start)
    # Whatever stands there: it is where the answer is read.
    roles[-1] = "last"
    return np.array(roles)


def influence_by_key(graph: Graph, roles: np.ndarray, target: int) -> dict[Key, float]:
    """Return the influence of a graph's features on one of its targets, summed over positions of a role.

    Args:
      graph: the whole graph of a prompt.
      roles: role of each position of the prompt.
      target: index of the target.
    """
    nodes = graph.nodes[graph.slice_of(FEATURE)]
    influence_F = source_influence(graph, np.eye(len(graph.labels))[target])[: len(nodes)]
    columns = nodes.layer_N.tolist(), nodes.index_N.tolist(), roles[nodes.position_N].tolist()
    by_key: dict[Key, float] = defaultdict(float)
    for key, influence in zip(map(Key, *columns), influence_F.tolist(), strict=True):
        by_key[key] += influence
    return by_key


def find_returning(prompts: Sequence[Mapping[Key, float]], top: int, share: float) -> dict[Key, float]:
    """Return the features that return, with their mean influence over all prompts, the most influential first.

    Args:
      prompts: influence of each feature, prompt by prompt.
      top: a feature counts in a prompt where it is among this number of most influential features.
      share: share of the prompts in which it has to count, and at least in two of several.
    """
    counted: dict[Key, list[float]] = defaultdict(list)
    for influences in prompts:
        least_influence = _LEAST * max(influences.values(), default=0.0)
        # Ties by the key, so that the choice does not depend on the order of the graph's nodes.
        for key in sorted(influences, key=lambda key: (-influences[key], key))[:top]:
            if influences[key] > least_influence:
                counted[key].append(influences[key])
    # In one prompt alone a feature may be about its words.
    least = max(share * len(prompts), min(2, len(prompts)))
    returning = {key: sum(values) / len(prompts) for key, values in counted.items() if len(values) >= least}
    return dict(sorted(returning.items(), key=lambda item: (-item[1], item[0])))


def propose_groups(
    scores: Mapping[Key, float],
    n_layers: int,
    size: int,
    most: int,
    details: Mapping[Feature, FeatureDetails] = {},
) -> list[Group]:
    """Return groups of features that return, the most influential first.

    Args:
      scores: influence of each feature.
      n_layers: number of layers of the model.
      size: maximum number of features of a group; the most influential ones are kept.
      most: maximum number of groups; the most influential ones are kept.
      details: labels that group features of one role, and further names of a feature.
    """
    label_of = {key: details[key.address].label.strip() for key in scores if key.address in details}
    named = {key: f"{label} ({ROLE_WORDS[key.role]})" for key, label in label_of.items() if label}
    counts = Counter(named.values())
    members: dict[str, list[Key]] = defaultdict(list)
    for key in sorted(scores, key=lambda key: -scores[key]):
        place = f"{ROLE_WORDS[key.role]}, {third_of(key.layer, n_layers)} layers"
        # A label of a single feature makes no group: it goes with the others of its place.
        members[named[key] if counts[named.get(key, "")] > 1 else place].append(key)
    groups = []
    for name, keys in members.items():
        leading = details.get(keys[0].address) if name not in counts else None
        name = f"{name_feature(keys[0], leading, n_layers)} ({name})" if leading else name
        groups.append(Group(name, tuple(keys[:size])))
    return sorted(groups, key=lambda group: -sum(scores[key] for key in group.members))[:most]


def third_of(layer: float, n_layers: int) -> str:
    """Return the third of the layers that a layer is in."""
    return THIRDS[int(layer) * len(THIRDS) // n_layers]


def is_output(feature: Key | Group, n_layers: int) -> bool:
    """Return whether a feature or group may say the answer: it is late, at the position where the answer is read."""
    return feature.role == "last" and third_of(feature.layer, n_layers) == THIRDS[-1]


def name_feature(key: Key, details: FeatureDetails, n_layers: int) -> str:
    """Return the label, or else the tokens on which a feature fires; of an output the promoted tokens, if known."""
    if is_output(key, n_layers) and details.top_logits:
        details = dataclasses.replace(details, examples=())
    return details.name or f"layer {key.layer}, feature {key.feature}"


def as_json(behaviour: str, groups: Sequence[Group]) -> str:
    """Return the groups of a behaviour as a file that ``read_groups`` reads, a group on a line."""
    lines = ",\n  ".join(json.dumps([group.name, *map(str, group.members)], ensure_ascii=False) for group in groups)
    return f"{{\n {json.dumps(behaviour)}: [\n  {lines}\n ]\n}}\n"


def read_groups(file: str, behaviours: Iterable[str]) -> dict[str, list[Group]]:
    """Return the groups of a file by behaviour; none if no file is named.

    Raises:
      UserError: the file cannot be read, holds something else, has a feature in two groups of a behaviour or a name
        twice, or groups for none of the behaviours.
    """
    if not file:
        return {}
    path = Path(file)
    try:
        content = json.loads(decode(read_bytes(path, "--circuits.groups", "name a file of groups"), path))
        every = [(name, entry) for name, entries in content.items() for entry in entries]
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} holds no groups of features: expected {_FORMAT}") from None
    groups, bad = {name: list[Group]() for name in content}, list[str]()
    for name, entry in every:
        try:
            groups[name].append(_parse(*entry))
        except (ValueError, TypeError):
            bad.append(f"{shown(entry)} of {name}")
    if bad:
        raise UserError(f"{path} holds no groups of features in {', '.join(bad)}: expected {_FORMAT}")
    faults = list[str]()
    for name, some in groups.items():
        for group, count in Counter(group.name for group in some).items():
            if count > 1 or group in ("", ANSWER):
                faults.append(
                    f"{count} groups of {name} are named {group!r}: expected a different name for each, not {ANSWER!r}"
                )
        counts = Counter(key for group in some for key in group.members)
        twice = (key for key, count in counts.items() if count > 1)
        faults += [f"the feature {key} is in the groups of {name} twice: expected it in one, once" for key in twice]
    if faults:
        raise UserError(f"{path}: {'; '.join(faults)}")
    if not set(groups) & set(behaviours):
        raise UserError(f"{path} has groups for {', '.join(groups)}: expected some of {', '.join(behaviours)}")
    return groups


def _parse(name: str, *members: str) -> Group:
    """Return a group of the file; raises ``ValueError`` or ``TypeError`` where it is none."""
    parts = [_MEMBER.fullmatch(member) for member in members]
    if not isinstance(name, str) or has_surrogates(name) or not parts or not all(parts):
        raise ValueError
    return Group(name, tuple(Key(int(part[1]), int(part[2]), part[3]) for part in parts if part))
