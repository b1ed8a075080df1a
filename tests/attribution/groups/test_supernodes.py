"""Supernodes: groups of nodes from files, and the stage."""

import json

import pytest
from made_graphs import make_graph
from made_transcoders import made_set

from saejax import save_transcoders
from saejax.attribution.forms.document import check_groups
from saejax.attribution.settings import GraphConfig
from saejax.errors import UserError
from saejax.runner import command
from saejax.stages.attribute import requests
from saejax.stages.attribute.requests import read_states


def test_groups_of_ids():
    graph = make_graph()
    ids = graph.ids
    groups = [["a", ids[0], ids[-1]], ["a", ids[3]]]
    check_groups(ids, groups)
    with pytest.raises(UserError, match="supernode 'b' names 'E_9_9', and no node of the graph has that id"):
        check_groups(ids, [["b", "E_9_9"]])
    with pytest.raises(UserError, match=f"node '{ids[0]}' is in the supernodes 'a' and 'b'"):
        check_groups(ids, [["a", ids[0]], ["b", ids[1], ids[0]]])
    with pytest.raises(UserError, match="once"):
        check_groups(ids, [["a", ids[0], ids[0]]])


GROUPS = [["a", "1_2_3"], ["b", "2_2_3", "E_4_0"]]
GROUPED = dict(supernodes=GROUPS)
STATE = dict(supernodes=GROUPS, pinnedIds=["1_2_3", "9_9_9"], sg_pos='{"9_9_9": [0.5, 40]}')


@pytest.mark.parametrize(
    "content,wanted",
    [
        ({"one": GROUPS}, dict(one=GROUPED, two={})),
        ({"*": GROUPS, "two": []}, dict(one=GROUPED, two=dict(supernodes=[]))),
        ({"one": STATE, "two": GROUPS}, dict(one=STATE, two=GROUPED)),
        (STATE | dict(linkType="both"), dict(one=STATE, two=STATE)),
        (dict(metadata=dict(slug="two"), qParams=STATE | dict(clickedId="a"), nodes=[]), dict(one={}, two=STATE)),
        (dict(metadata=dict(slug="two"), qParams=GROUPED, nodes=[]), dict(one={}, two=GROUPED)),
        ({"one": STATE | dict(sg_pos=3)}, "holds no supernodes"),
        (dict(pinnedIds=["1_2_3"]), "holds no supernodes"),
        ({"three": GROUPS}, "has supernodes for three: expected one, two, or [*] for all"),
        ({"one": [["a"]]}, "holds no supernodes"),
        ({"one": [["a", 3]]}, "holds no supernodes"),
        ({"one": None}, "holds no supernodes"),
        ([GROUPS], "holds no supernodes"),
        ("{", "holds no supernodes"),
    ],
)
def test_files_of_groups(tmp_path, content, wanted):
    file = tmp_path / "groups.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    config = GraphConfig(supernodes=str(file))
    if isinstance(wanted, dict):
        assert read_states(config, ["one", "two"]) == wanted
    else:
        with pytest.raises(UserError, match=wanted) as error:
            read_states(config, ["one", "two"])
        assert "\n" not in str(error.value)
    assert read_states(GraphConfig(), ["one"]) == {}


@pytest.mark.usefixtures("single_device")
def test_the_stage_writes_groups_and_takes_back_what_the_page_saves(tiny_llama, lm, tmp_path, capsys):
    save_transcoders(tmp_path / "set", made_set(lm))
    (tmp_path / "ids.jsonl").write_text('{"slug": "ids", "token_ids": [5, 17, 33, 8]}')
    flags = [f"--model.path={tiny_llama}", f"--graph.transcoders={tmp_path / 'set'}", "--graph.node_threshold=1.0"]
    flags += [f"--graph.prompts={tmp_path / 'ids.jsonl'}", f"--workdir={tmp_path / 'run'}"]

    def attribute(groups, *more):
        code = command.run(["attribute"], "", ["attribute", *flags, f"--graph.supernodes={groups}", *more])
        folder = tmp_path / "run" / "attribute" / "ids"
        if code:
            return code, capsys.readouterr().err
        return json.loads((folder / "graphs" / "ids.json").read_text())

    document = attribute("")
    features = [node["node_id"] for node in document["nodes"] if node["activation"] is not None]
    logits = [node["node_id"] for node in document["nodes"] if node["feature_type"] == "logit"]
    saved, groups = tmp_path / "ids-state.json", [["mine", *features[:2], logits[0]]]
    state = document["qParams"] | dict(supernodes=groups)
    saved.write_text(json.dumps(state))
    found = attribute(saved)
    assert found["qParams"]["supernodes"] == groups
    assert found["qParams"]["pinnedIds"] == list(dict.fromkeys([*features[:2], *logits]))
    pins = dict(pinnedIds=[*features[:2], logits[0], features[2]], sg_pos=json.dumps({features[2]: [0.25, 40]}))
    saved.write_text(json.dumps(state | pins))
    assert attribute(saved)["qParams"] == state | pins  # nothing that the reader had not pinned
    saved.write_text(json.dumps(state | pins | dict(pinnedIds=[*pins["pinnedIds"], "9_9_8"])))
    code, message = attribute(saved)
    assert code == 2 and "'9_9_8' is pinned, and no node of the graph" in message and message.count("\n") == 1
    saved.write_text(json.dumps(state))
    config = GraphConfig(transcoders=str(tmp_path / "set"), supernodes=str(saved))
    before = requests.identity(config)
    assert before != requests.identity(GraphConfig(transcoders=str(tmp_path / "set")))
    saved.write_text(json.dumps(state | dict(supernodes=[["mine", "9_9_9"]])))
    assert requests.identity(config) != before
    code, message = attribute(saved)
    assert code == 2 and "names '9_9_9'" in message and message.count("\n") == 1
    code, message = attribute(tmp_path / "none.json")
    assert code == 2 and "none.json does not exist" in message
