"""The lesson's cells run in order, without Jupyter, on small runs."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import train

ROOT = Path(__file__).parent.parent
NOTEBOOK = json.loads((ROOT / "lesson" / "lesson.ipynb").read_text(encoding="utf-8"))
TINY = "--limit 120 --epochs1 2 --batch-size 16 --device cpu".split()
SMALL = [*TINY, "--epochs2", "1"]


def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    """In a folder of its own, so that the runs of the repository stay as they are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    shutil.copy(ROOT / "train.py", tmp_path)                # by which a cell knows the folder
    train.main([*SMALL, "--out", "runs/toy"])
    train.main([*SMALL, "--out", "runs/toy-soft", "--soft-gates"])
    for method in "bert deebert fastbert pabee berxit layerdrop".split():
        two = ["--epochs2", "1"] if method in ("deebert", "fastbert") else []
        train.main([*TINY, *two, "--method", method])       # in runs/toy-METHOD
    shown = []
    python = ModuleType("IPython")
    python.get_ipython, python.version_info = lambda: None, (8, 24)
    python.display = ModuleType("IPython.display")
    python.display.Image = lambda path, width=None: Path(path).read_bytes()
    python.display.display = lambda *pictures: shown.extend(pictures)
    monkeypatch.setitem(sys.modules, "IPython", python)
    monkeypatch.setitem(sys.modules, "IPython.display", python.display)
    names, printed = {"__name__": "lesson"}, []
    for number, cell in enumerate(NOTEBOOK["cells"]):
        if cell["cell_type"] == "code":
            capsys.readouterr()
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
            printed.append(capsys.readouterr().out)
    assert "layers [" in printed[1] and "layers run; both at threshold 0.2" in printed[2]
    assert all(picture.startswith(b"\x89PNG") for picture in shown)
    assert len(shown) == (3 if names["PICTURES"] else 0)


def test_the_stored_outputs_are_there():
    """It can be read without running: each cell that prints has its output, and three pictures."""
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    for cell in cells:
        assert cell["execution_count"]
        assert cell["outputs"] or "print" not in "".join(cell["source"])
    assert not any(output["output_type"] == "error" for output in outputs)
