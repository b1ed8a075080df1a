"""The report on attribution graphs: what was traced, and how much of it features explain."""

from collections.abc import Callable, Sequence

from saejax.attribution.results import AttributeResults, GraphResults
from saejax.page.blocks import Block, Links, Terms, Text
from saejax.page.document import Section
from saejax.page.findings import Draw, Findings
from saejax.page.tables import Table, number, percent
from saejax.unicode import visible_token

_LONGEST = 300  # characters of a prompt
Row = tuple[str, GraphResults]  # of a table: a graph's name in the report, and what the stage says of it


def sections(findings: Findings, draw: Draw) -> list[Section]:
    """Return a section with tables of all graphs, and links to their pages; none if there are none."""
    tables: dict[str, list[Row]] = {}  # by the set that graphs were made with
    kinds, links = set[str](), list[tuple[str, str]]()
    for unit, results in findings.select(AttributeResults).items():
        kind, named = ("SAEs", results.dictionaries) if results.dictionaries else ("transcoders", [results.transcoders])
        kinds.add(kind)
        for slug, graph in results.graphs.items():
            name = f"{len(links) + 1}: {slug}"  # of several units two may have the same slug
            tables.setdefault(f"Graphs with the {kind} {', '.join(named)}", []).append((name, graph))
            address = findings.address(findings.folders[f"attribute/{unit}"] / f"{slug}.html")
            links.append((f"{name}: {_one_line(graph.prompt)}", address))
    if not links:
        return []
    rows, missed = [row for table in tables.values() for row in table], " or ".join(sorted(kinds, reverse=True))
    several = "Graphs were" if len(rows) > 1 else "The graph was"
    stays = {
        "transcoders": " while attention and norms stay as they were",
        "SAEs": f", {'with SAEs ' if len(kinds) > 1 else ''}as gradients estimate it",
    }
    intro = (
        "An attribution graph says, of one prompt, what made what: an edge's weight is what its source (a token, a "
        f"feature, or what the {missed} miss: an error) adds to its target (a feature or a logit)"
        f"{''.join(stays[kind] for kind in sorted(kinds, reverse=True))}. {several} pruned to the nodes and edges with "
        "the most influence on the answer."
    )
    empty = [Text(f"{name}: {graph.empty}", strong=True) for name, graph in rows if graph.empty]
    blocks: list[Block] = [Text(intro), *empty, *_tables(tables), _meaning()]
    blocks.append(Links("Interactive pages of the graphs, and their prompts", tuple(links)))
    return [Section("Attribution graphs", tuple(blocks), lead=_lead(rows, missed))]


def _lead(rows: Sequence[Row], missed: str) -> str:
    """Return a paragraph on all graphs for the beginning of the report."""
    prompts = "One prompt was" if len(rows) == 1 else f"{len(rows)} prompts were"
    explained = _span([graph.scores.replacement for _, graph in rows], percent)
    traced = _span([graph.traced / max(graph.active, 1) for _, graph in rows], percent)
    return (
        f"{prompts} traced into attribution graphs, which say what in all layers made the answer. With {traced} of the "
        f"active features traced, {explained} of the influence on it comes from the prompt's tokens through features; "
        f"the rest starts at what the {missed} do not explain."
    )


def _tables(tables: dict[str, list[Row]]) -> list[Table]:
    """Return a table for each set of transcoders or SAEs."""
    columns: dict[str, Callable[[str, GraphResults], str]] = {
        "Graph": lambda name, graph: name,
        "Answer": lambda name, graph: _answer([target.label for target in graph.targets]),
        "Active features": lambda name, graph: f"{graph.active:,}",
        "Traced": lambda name, graph: f"{graph.traced:,} ({percent(graph.traced / max(graph.active, 1))})",
        "Features kept": lambda name, graph: f"{graph.features:,}",
        "Errors kept": lambda name, graph: f"{graph.errors:,}",
        "Edges": lambda name, graph: f"{graph.edges:,}",
        "Replacement": lambda name, graph: number(graph.scores.replacement),
        "Completeness": lambda name, graph: number(graph.scores.completeness),
        "Untraced input": lambda name, graph: percent(graph.untraced, 1),
    }
    return [Table.of(title, rows, columns, ["Answer"], stack=False) for title, rows in tables.items()]


def _meaning() -> Terms:
    """Return what the columns of the tables are."""
    meanings = {
        "Traced": "active features that have a node, the most influential ones.",
        "Replacement": "of the influence on the answer, which starts at tokens and at errors, the share of the tokens: "
        "1 if features explain all, 0 if errors do.",
        "Completeness": "the share of the nodes' input, weighted by their influence, that no error gives. This score "
        "and the last are of the graph before pruning, and depend on the share of active features that was traced: "
        "compare sets only where it is equal.",
        "Untraced input": "what active features without a node add to targets, by size, over the targets' values.",
    }
    return Terms(tuple(meanings.items()))


def _answer(labels: Sequence[str]) -> str:
    return _one_line(labels[0]) + (f" and {len(labels) - 1} more" if labels[1:] else "")


def _span(values: Sequence[float], written: Callable[[float], str]) -> str:
    """Return the smallest and the largest value in words, once if they are equal."""
    return " to ".join(dict.fromkeys(written(value) for value in (min(values), max(values))))


def _one_line(text: str) -> str:
    """Return a text on one line, spaces at its ends left out; of a long one the beginning and the end."""
    line = visible_token(text, in_line=True).strip()
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 2 :]}"
