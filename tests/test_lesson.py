"""The lesson: its notebook, without Jupyter, on small runs; the trace; the pictures."""

import base64
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

import data
import eval as evaluation
import train
from lesson import pictures, trace
from smartbert import entropy, hard_weight, infer, infer_one

ROOT = Path(__file__).parent.parent
CELLS = json.loads((ROOT / "lesson" / "lesson.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
TEXT = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown"]
OUTPUTS = [output for cell in CODE for output in cell["outputs"]]
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of a small toy, whose gates and heads differ from example to example. While it is
    there, the toy is small: 120 and 60 examples, 3 epochs."""
    path = tmp_path_factory.mktemp("lesson") / "toy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "toy", partial(data.toy, 120, 60))
        patch.setitem(train.BY_TASK, "toy", dict(epochs1=2, epochs2=1, gates_from=0.4))
        train.main(["--out", str(path), "--device", "cpu"])
        run, model = train.load_run(path, "cpu")
        with torch.no_grad():
            for gate, head in zip(model.gates, model.heads):
                gate.out.weight.mul_(30)
                gate.out.bias.zero_()
                head.out.weight.mul_(3)
        train.save_run(run, model)
        yield path


@pytest.fixture
def changed(folder, tmp_path):
    """changed(exits=False, ...): a copy of the run with other values of train.Run's fields."""

    def copy(task="toy", **fields):
        run, model = train.load_run(folder, "cpu")
        run.settings.task = task
        vars(run).update(fields, folder=tmp_path / "run")
        train.save_run(run, model)
        shutil.copy(folder / "tokenizer.json", run.folder)
        return run.folder

    return copy


def test_every_cell_runs(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the runs of the repository stay as they are
    monkeypatch.setattr(sys, "path", sys.path[:])
    shutil.copy(ROOT / "train.py", tmp_path)  # by which a cell knows the folder
    shown, jupyter = [], ModuleType("IPython.display")
    jupyter.Image, jupyter.display = Path, lambda *paths: shown.extend(paths)
    monkeypatch.setitem(sys.modules, "IPython.display", jupyter)
    monkeypatch.setattr(pictures, "main", pictures.main if HAS_MATPLOTLIB else print)
    names = {}
    for cell in CODE:
        exec("".join(cell["source"]), names)
    assert len(shown) == sum("image/png" in output.get("data", {}) for output in OUTPUTS)
    assert not HAS_MATPLOTLIB or all(path.is_file() for path in shown)
    trained = sorted(path.name.removeprefix("toy-") for path in Path("runs").iterdir())
    assert trained == "bert berxit deebert fastbert pabee soft toy".split()


def test_the_stored_outputs_are_there():
    """It can be read without running, and every number with a decimal point in the text, except in
    code, is in an output; .998 stands for 0.998."""
    assert all(cell["execution_count"] and cell["outputs"] for cell in CODE[1:])
    for output in OUTPUTS:
        assert output["output_type"] == "display_data" or output["name"] == "stdout"
        assert len(base64.b64decode(output.get("data", {}).get("image/png", ""))) < 60_000
    printed = " ".join("".join(output.get("text", "")) for output in OUTPUTS)
    for text in TEXT:
        text = re.sub(r"```.*?```|`.*?`", "", text, flags=re.DOTALL)
        for whole, decimals in re.findall(r"(?<![\w.])(\d*)\.(\d+)", text):
            assert re.search(rf"\b{whole or 0}\.{decimals}\b", printed), f"{whole}.{decimals}"


@pytest.mark.parametrize("answer, right", [("hard_weight(g)", True), ("...", False), ("g", False),
    ("(g >= 0.5).float()", False), ("(g > 0.5).float() + g - g.detach()", False)])  # fmt: skip
def test_the_blank(answer, right):
    (blank,) = re.findall(r"```python\n(.*?)```", "".join(TEXT), re.DOTALL)
    with nullcontext() if right else pytest.raises((AssertionError, RuntimeError, TypeError)):
        exec(blank.replace("return ...", f"return {answer}"), dict(globals()))


def brute_force(folder, text, threshold):
    """The answer of infer_one for a text, as trace prints it; its path; entropy, FLOPs."""
    model = train.load_run(folder, "cpu")[1]
    split = data.encode(data.load_tokenizer(folder), data.Split("own", [(text, None)], [0]))
    batch = data.collate(split, [0])
    logits, ran, exit = infer_one(model, batch.ids, batch.segment_ids, threshold)
    outcome = infer(model, *batch.inputs, threshold=threshold)
    flops = evaluation.measure(model, split, data.TASKS["toy"], outcome).flops
    answer = f"{'abc'[logits.argmax()]}\t{logits.softmax(1).max():.3f}\t{len(ran)}"
    return answer, ran, exit, f"{entropy(logits).item():.3f}", f"{flops:.1%}"


@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.2])
def test_trace_is_infer_one(folder, capsys, threshold):
    paths = set()
    for text, _ in data.toy()["dev"].texts[:8]:
        trace.main([str(folder), text, "--threshold", str(threshold)])
        title, *layers, heading, printed = capsys.readouterr().out.splitlines()
        answer, ran, exit, *last = brute_force(folder, text, threshold)
        assert printed == answer and str(threshold) in heading and len(layers) == 6
        for i, line in enumerate(layers, 1):
            assert ("not reached" in line) == (i > exit)
            assert ("ran" in line) == (i in ran)
            assert ("exited" in line) == (i == exit < 6)
            assert i > exit or (float(line.split()[1]) < 0.5) == (i in ran)  # the gate
        assert layers[exit - 1].split()[-2:] == last
        paths.add((tuple(ran), exit))
    assert len(paths) > 1


def test_file_answers_line_by_line(folder, tmp_path, capsys):
    texts = [text for text, _ in data.toy()["dev"].texts[:9]]  # of several lengths
    (tmp_path / "texts").write_text("\n".join(texts) + "\r\n\n", encoding="utf-8")
    trace.main([str(folder), "--file", str(tmp_path / "texts"), "--threshold", "0.6"])
    printed = capsys.readouterr().out.splitlines()
    assert printed == [brute_force(folder, text, 0.6)[0] for text in texts]
    # As a command, from standard input.
    command = [sys.executable, ROOT / "lesson" / "trace.py", folder, "--file", "-"]
    done = subprocess.run(command, input="king dragon b ab\n", capture_output=True, text=True)
    assert re.fullmatch(r"[abc]\t\d\.\d{3}\t\d\n", done.stdout)
    assert done.stderr == "warning: not in the vocabulary: dragon\n"


@pytest.mark.parametrize("gates, star", [(True, "0.7"), (False, "0.5")])
def test_threshold(changed, capsys, gates, star):
    """Unless it is named: the star of the run's mode, or .3."""
    folder = changed(gates=gates)
    rows = [{"mode": "both", "threshold": 0.9, "chosen": False},
            {"mode": "exit", "threshold": 0.5, "chosen": True},
            {"mode": "both", "threshold": 0.7, "chosen": True}]  # fmt: skip
    for kept, threshold in ((rows, star), (rows[:1], "0.3")):
        (folder / "eval.json").write_text(json.dumps({"rows": kept}))
        trace.main([str(folder), "king coin b"])
        assert f"(threshold: {threshold})" in capsys.readouterr().out


def test_plain_bert_asks_only_the_last_head(changed, capsys):
    trace.main([str(changed(gates=False, exits=False)), "king coin b"])
    layers = [line.split() for line in capsys.readouterr().out.splitlines()[1:7]]
    assert [words[1] for words in layers] == ["ran"] * 6
    assert [len(words) for words in layers] == [3] * 5 + [6] and layers[-1][-1] == "100.0%"


def test_a_task_of_pairs(changed, capsys, refused):
    folder = changed(task="mnli")  # three classes as well
    trace.main([str(folder), "king coin b ab", "king coin b"])
    assert capsys.readouterr().out.splitlines()[-1].split("\t")[0] in data.TASKS["mnli"].labels
    refused(trace.main, [folder, "king coin b"], "'king coin b': mnli takes 2 text(s)")


def test_trace_refuses(folder, changed, refused, tmp_path):
    refused(trace.main, ["nowhere", "king coin b"], "nowhere/model.pt")
    refused(trace.main, [folder, "king", "coin"], "toy takes 1 text(s)")
    refused(trace.main, [folder, "--file", "nowhere"], "No such file", "nowhere")
    refused(trace.main, [folder, "king", "--threshold", "much"], "--threshold")
    for content, words in ((b"king coin b\n \n", "example 2 is ' '"), (b"\xff", "is not UTF-8")):
        (tmp_path / "texts").write_bytes(content)
        refused(trace.main, [folder, "--file", tmp_path / "texts"], words)
    refused(trace.main, [changed(criterion="patience"), "king"], "does not exit by entropy")
    refused(trace.main, [changed(finished=False), "king"], "is not finished")


def test_pictures(folder, changed, refused, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        refused(pictures.main, [folder], "pip install matplotlib")
    if not HAS_MATPLOTLIB:
        pytest.skip("matplotlib is not installed: no picture is drawn, only a refusal is tested")
    refused(pictures.main, ["nowhere"], "eval.json is not there")
    for run in (folder, changed(exits=False, gates=False)):
        evaluation.main([str(run), "--repeats", "0", "--device", "cpu"])
    refused(pictures.main, [run], "has no exits")
    pictures.main([str(folder)])
    for name in "score criteria layers examples training".split():
        content = (folder / f"{name}.png").read_bytes()
        assert content[:4] == b"\x89PNG" and len(content) < 60_000 and f"{name}.png" in data.OURS
