"""The stage as a binary: its files, its page, its part of the report, groups that were edited, bad input."""

import csv
import html
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import settings_read

sys.path.insert(0, str(Path(__file__).parent.parent / "attribution"))
from made_transcoders import made_set

from saejax import load_results, save_transcoders
from saejax.page.findings import read_findings
from saejax.page.tables import answer, interval, number, percent
from saejax.runner import command, command_line
from saejax.stages.circuits.claims import compare_claims
from saejax.stages.circuits.report import sections
from saejax.stages.circuits.stage import CIRCUITS

pytestmark = pytest.mark.usefixtures("single_device")
WORDS = ("war", "water", "way", "near", "runs", "side")


@pytest.fixture(scope="module")
def flags(tiny_llama, lm, tmp_path_factory):
    """A model, transcoders for it, and prompts with counterparts of a made-up behaviour."""
    folder = tmp_path_factory.mktemp("circuits")
    save_transcoders(folder / "transcoders", made_set(lm))
    lines = []
    for (n, word), swapped in itertools.product(enumerate(WORDS), WORDS):
        if word[0] != swapped[0]:
            texts = dict(text=f"The {word} of the {swapped} is", counterpart=f"The {swapped} of the {word} is")
            split = "train" if n % 2 else "test"
            rest = dict(correct=f" {word}", wrong=f" {swapped}", split=split, template=split + word[0])
            lines.append(dict(behaviour="sides", **texts, **rest))
    tests = [line for line in lines if line["split"] == "test"][:4]
    lines = [line for line in lines if line["split"] == "train"] + tests
    (folder / "sides.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [
        f"--model.path={tiny_llama}", f"--graph.transcoders={folder / 'transcoders'}", "--task.behaviours=",
        f"--task.prompts={folder / 'sides.jsonl'}", "--task.gate=1",
        "--circuits.behaviours=sides", "--circuits.traced=3",
    ]  # fmt: skip


def run(workdir, *flags: str, stages=("baseline", "circuits")) -> int:
    return command.run(list(stages), "", ["circuits", f"--workdir={workdir}", *flags])


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_behaviour_becomes_a_page(flags, tmp_path, capsys):
    assert run(tmp_path / "run", *flags) == 0, capsys.readouterr().err
    assert "circuits: sides (1 of 1) (weak: accuracy " in capsys.readouterr().out
    unit = tmp_path / "run" / "circuits"
    results = load_results(tmp_path / "run", "circuits")
    circuit = results.behaviours["sides"]
    assert circuit.traced == 3 and circuit.measured == circuit.swapped == 4
    assert 0 < len(circuit.groups) <= 6 and circuit.edges
    page = html.unescape((unit / "sides.html").read_text()).replace("\u00a0", " ")
    # Every effect has a row, with its interval, its controls, and how far it exceeds them.
    rows = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in re.findall("<tr.*?</tr>", page)]
    for edge in circuit.edges:
        means = (edge.random, edge.random_spread), (edge.placebo, edge.placebo_spread)
        figures = [" ± ".join(edge.in_unit(number, value) for value in pair) for pair in means]
        figures += [edge.in_unit(interval, value) for value in (edge.over_random, edge.over_placebo)]
        row = [edge.source, edge.target, answer(edge.drawn if edge.is_testable else None, "not testable")]
        row += [edge.in_unit(interval, edge.effect), *figures, percent(edge.dose)]
        assert [cell.replace("\u00a0", " ") for cell in row] in rows
    assert page.index("<figure") < page.index("<table") and 'class="contexts"' in page and "promotes" in page
    assert "does not fire" not in page  # at the latest in the prompts that were traced
    assert all(f"Group: {group.name}" in page for group in circuit.groups)
    # The model is random, and so unsure of its behaviour.
    index = (unit / "index.html").read_text()
    assert "Circuit: Sides (weak)" in page and "Weak, so that the answers prove little: accuracy" in page
    assert "Sides (weak)" in index and "Weak: the model itself is unsure" in index
    assert 'href="sides.html"' in index and all(claim.id in index for claim in compare_claims(results))
    circuits, claims = sections(read_findings({"circuits": unit}, tmp_path / "run" / "report", {}), None)
    # On four prompts nothing is denied that is not drawn.
    assert circuits.blocks[0].rows[0][4:] == ("not testable",) * 3 and "others could not be tested" in circuits.lead
    assert claims.blocks[0].rows and circuits.blocks[1].items == (("Sides", "../circuits/sides.html"),)

    # A person labels two features of a position; they become a group, and name it.
    sheet = read_table(unit / "review" / "sides.csv")
    assert [row["group"] for row in sheet] == [group.name for group in circuit.groups for _ in group.members]
    pair = [row for row in sheet if row["role"] == sheet[0]["role"]][:2]
    assert not any(row["label"] for row in sheet) and "automatic_label" in sheet[0]  # labels are people's
    for row in pair:
        row |= dict(label="sides of things", reviewer="R")
    (tmp_path / "filled").mkdir()
    with (tmp_path / "filled" / "sides.csv").open("w") as file:
        writer = csv.DictWriter(file, list(sheet[0]))
        writer.writeheader()
        writer.writerows(sheet)
    assert run(tmp_path / "run", *flags, f"--graph.labels={tmp_path / 'filled'}") == 0, capsys.readouterr().err
    labelled = load_results(tmp_path / "run", "circuits").behaviours["sides"]
    (group,) = [group for group in labelled.groups if group.name.startswith("sides of things (")]
    assert len(group.members) == len(pair)
    again = {(row["dictionary"], row["feature"]): row["label"] for row in read_table(unit / "review" / "sides.csv")}
    assert all(again.get((row["dictionary"], row["feature"]), row["label"]) == row["label"] for row in pair)
    assert "sides of things" in (unit / "sides.html").read_text() and "things" in (unit / "sides.svg").read_text()

    # The proposal is edited, and the edited groups are measured.
    groups = json.loads((unit / "sides-groups.json").read_text())
    assert [name for name, *_ in groups["sides"]] == [group.name for group in labelled.groups]
    groups["sides"] = [["mine", *groups["sides"][0][1:]]]
    groups["sidse"] = groups["sides"]
    (tmp_path / "mine.json").write_text(json.dumps(groups))
    capsys.readouterr()
    assert run(tmp_path / "run", *flags, f"--circuits.groups={tmp_path / 'mine.json'}") == 0
    warning = "mine.json has groups for sidse, which are not used: --circuits.behaviours names sides"
    assert warning in capsys.readouterr().out
    mine = load_results(tmp_path / "run", "circuits").behaviours["sides"]
    assert [group.name for group in mine.groups] == ["mine"]
    assert {edge.source for edge in mine.edges} == {"mine"}
    for absent in ("0_999999_last", "77_0_last"):
        (tmp_path / "mine.json").write_text(json.dumps(dict(sides=[["mine", absent]])))
        assert run(tmp_path / "run", *flags, f"--circuits.groups={tmp_path / 'mine.json'}") == 2
        layer, feature, _ = absent.split("_")
        (line,) = capsys.readouterr().err.splitlines()
        assert f"mine.json names feature {feature} of layer {layer}, where" in line
    assert run(tmp_path / "run", *flags) == 0 and "circuits: done before, unchanged" in capsys.readouterr().out
    assert settings_read.never_read("circuits") <= set()


def test_a_lens_that_circuits_do_not_read_finds_none_anew(flags, tmp_path):
    arguments = ["circuits", *flags, f"--model.lens={tmp_path / 'lens.pt'}"]
    configs, marks = command_line.read_configs(command_line.stage_flags(), arguments), []
    for content in ("one", "two"):
        (tmp_path / "lens.pt").write_text(content)
        marks.append(CIRCUITS.inputs(configs, "")["graph"](configs))
    assert marks[0] == marks[1] and not any("lens" in name for name in CIRCUITS.settings_read(configs, ""))


def test_bad_input_is_one_line(flags, tmp_path, capsys):
    for wrong, message in (
        ("--graph.transcoders=", "--circuits.behaviours takes transcoders of all layers"),
        ("--circuits.groups=none.json", "--circuits.groups=none.json cannot be read"),
        ("--circuits.behaviours=rhyme", "unknown behaviour (--circuits.behaviours) 'rhyme'"),
    ):
        assert run(tmp_path / "run", *flags, wrong) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
