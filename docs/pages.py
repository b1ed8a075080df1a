"""Sources of the site: guides where they stand in the repository, the notebook, a reference page a package.

``python docs/pages.py FOLDER``; `make docs` then has Sphinx build the site from that folder.
"""

import json
import shutil
import sys
from pathlib import Path

import result_fields

ROOT = Path(__file__).resolve().parent.parent
# Guides that are there become pages at the same place, so that links work on the site as in the repository.
GUIDES = (
    "README.md",
    "docs/quickstart.md",
    "docs/tour.ipynb",
    "docs/recipes.md",
    "docs/your_model.md",
    "docs/running.md",
    "docs/dictionaries.md",
    "docs/causal_claims.md",
    "docs/edits.md",
    "docs/features.md",
    "docs/graphs.md",
    "docs/graphs.ipynb",
    "docs/studies.md",
    "docs/ground_truth.md",
    "docs/scaling.md",
    "docs/artifacts.md",
    "docs/artifacts_causal.md",
    "docs/artifacts_features.md",
    "docs/parity.md",
    "docs/corrections.md",
    "docs/extending.md",
    "docs/troubleshooting.md",
    "WORKSPACE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
)
INDEX = """\
# saejax

```{{toctree}}
:caption: Guides
:maxdepth: 1

{guides}
```

```{{toctree}}
:caption: Reference
:maxdepth: 1

{reference}
```
"""


def main(target: Path) -> None:
    """Write all sources into a folder, from which what was there is removed."""
    shutil.rmtree(target, ignore_errors=True)
    (target / "docs").mkdir(parents=True)
    (target / "reference").mkdir()
    guides, filled = [name for name in GUIDES if (ROOT / name).exists()], result_fields.fill_pages()
    for name in guides:
        if name.endswith(".ipynb"):
            (target / page_of(name)).write_text(from_notebook(ROOT / name))
        else:
            text = filled.get(ROOT / name) or (ROOT / name).read_text("utf-8")
            for notebook in (guide for guide in guides if guide.endswith(".ipynb")):
                text = text.replace(f"{Path(notebook).name})", f"{Path(page_of(notebook)).name})")
            (target / name).write_text(text)
    for image in (ROOT / "docs").glob("*.png"):
        shutil.copy(image, target / "docs")
    pages = reference()
    for name, text in pages.items():
        (target / "reference" / f"{name}.rst").write_text(text)
    names = dict(
        guides="\n".join(page_of(name).removesuffix(".md") for name in guides),
        reference="\n".join(f"reference/{name}" for name in pages),
    )
    (target / "index.md").write_text(INDEX.format(**names))


def page_of(name: str) -> str:
    """Return the page that a guide becomes; a notebook's has another name than the guide that it goes with."""
    stem = name.removesuffix(".ipynb")
    return f"{stem}-notebook.md" if name != stem and f"{stem}.md" in GUIDES else f"{stem.removesuffix('.md')}.md"


def from_notebook(path: Path) -> str:
    """Return a notebook's cells and what they printed, as Markdown."""
    parts = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
        parts += ["```text\n" + "".join(output["text"]).rstrip() + "\n```" for output in cell.get("outputs", [])]
    return "\n\n".join(parts) + "\n"


def reference() -> dict[str, str]:
    """Return the text of each page by its name: the names of ``saejax`` itself, then its packages and modules."""
    import saejax

    package = ROOT / "saejax"
    pages = {"saejax": _titled("saejax") + ".. automodule:: saejax\n   :no-members:\n\n"}
    directives = {name: "autoclass" if name[0].isupper() else "autofunction" for name in saejax.__all__}
    pages["saejax"] += "".join(f".. {directive}:: saejax.{name}\n\n" for name, directive in directives.items())
    for path in sorted(package.iterdir()):
        if path.name.startswith("_") or not (path.suffix == ".py" or (path / "__init__.py").exists()):
            continue
        modules = [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))
        names = [".".join(module.relative_to(ROOT).with_suffix("").parts) for module in modules]
        names = [name.removesuffix(".__init__") for name in names]
        pages[path.stem] = _titled(names[0]) + "\n".join(
            (_titled(name, "-") if name != names[0] else "") + f".. automodule:: {name}\n" for name in names
        )
    return pages


def _titled(name: str, line: str = "=") -> str:
    return f"{name}\n{line * len(name)}\n\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
