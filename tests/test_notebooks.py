"""The notebooks run from top to bottom, and hold no outputs."""

import json

import pytest

from tests.support import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    cells = [x for x in json.loads(path.read_text())["cells"] if x["cell_type"] == "code"]
    assert cells and not any(x["outputs"] or x["execution_count"] for x in cells)
    names = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    if path.stem == "plain_loop":
        assert names["losses"][-1] < 0.9 * names["losses"][0]
    else:
        shown = names["result"]._repr_html_()
        assert "Text 2" in shown and (tmp_path / "lenses" / "inspect.html").exists()
