"""The notebooks run from top to bottom, and are committed with what they print."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def shown(notebook):
    """Per code cell the text it printed and how many pictures it showed."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            text = "".join(out.text for out in cell.outputs if out.output_type == "stream" and out.name == "stdout")
            yield text, sum("image/png" in out.get("data", {}) for out in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs_and_shows_what_is_committed(path, tmp_path):
    committed = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    NotebookClient(fresh, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    before, after = list(shown(committed)), list(shown(fresh))
    assert [pictures for _, pictures in before] == [pictures for _, pictures in after]
    words = re.compile(r"[^\W\d]+")  # figures and learned answers may differ on another machine; the rest does not
    for number, ((old, _), (new, _)) in enumerate(zip(before, after, strict=True)):
        assert bool(old.strip()) == bool(new.strip()), f"cell {number}"
        if "->" not in old:
            assert set(words.findall(old)) - {"above", "below"} == set(words.findall(new)) - {"above", "below"}, number
    assert sum(pictures for _, pictures in before) >= 10
    text = "".join(old for old, _ in before)
    assert "this merge" in text
    assert str(Path.home()) not in path.read_text()
    assert "Traceback" not in path.read_text()


def test_there_is_a_first_notebook():
    assert [path.stem for path in NOTEBOOKS] == ["01_first_merge"]
