"""Run the notebooks of docs/ and keep what their cells print.

``python scripts/run_notebooks.py [NAME ...]``, or ``make notebooks``, which installs JupyterLab. Each takes some
minutes. Progress bars are left out.
"""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("tour", "graphs")


def run(name: str) -> None:
    """Run a notebook in a folder beside a link to runs/, as in docs/, and write it with its outputs."""
    path = ROOT / "docs" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        (ROOT / "runs").mkdir(exist_ok=True)
        (Path(folder) / "runs").symlink_to(ROOT / "runs")
        (Path(folder) / "docs").mkdir()
        resources = dict(metadata=dict(path=str(Path(folder) / "docs")))
        NotebookClient(notebook, timeout=1800, record_timing=False, resources=resources).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            cell.metadata.pop("execution", None)
    # The kernel writes its version, which changes nothing.
    notebook.metadata["language_info"] = dict(name="python")
    path.write_text(nbformat.writes(notebook, indent=1) + "\n", "utf-8")
    print(f"ran {path.relative_to(ROOT)}", flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        run(name)
