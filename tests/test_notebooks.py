"""The notebooks of the documentation run from top to bottom and come to what they say."""

import nbformat
import pytest
from nbclient import NotebookClient


@pytest.fixture
def run(request, tmp_path, monkeypatch):
    """A notebook run anew in a kernel of its own; its printed text and Markdown."""

    def run(name) -> str:
        monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
        book = nbformat.read(request.config.rootpath / "docs" / "notebooks" / f"{name}.ipynb", as_version=4)
        NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
        outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
        return "\n".join(each.get("text") or each.data.get("text/markdown", "") for each in outputs)

    return run


def test_compare(run):
    shown = run("compare")
    assert "**Take " in shown
    assert "| test |" in shown


def test_bilevel(run):
    """The learnt penalties beat the best single one on texts that nothing was fitted to."""
    shown = run("bilevel")
    learnt, single = (
        float(line.split("test ")[1]) for line in shown.splitlines() if line.startswith(("learnt", "best single"))
    )
    assert learnt < single - 0.2
    assert "conjugate gradient, 40 steps   cosine with the exact one 1.000000" in shown
