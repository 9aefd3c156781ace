"""The lesson: its notebooks, without Jupyter, on small runs; the trace; the pictures."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import eval as evaluation
import smartbert
import train
from lesson import pictures, trace

ROOT = Path(__file__).parent.parent
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


def notebook(name: str) -> tuple[list[dict], str]:
    """Its cells of code, and its text."""
    cells = json.loads((ROOT / f"lesson/{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    return [cell for cell in cells if cell["cell_type"] == "code"], "\n".join(texts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of the toy, which is small meanwhile; its gates and heads differ from row to row."""
    path = tmp_path_factory.mktemp("lesson") / "toy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "toy", partial(data.toy, 120, 60))
        patch.setitem(train.BY_TASK, "toy", dict(epochs1=2, epochs2=1, gates_from=0.4))
        train.main(["--out", str(path), "--device", "cpu"])
        run, model = train.load_run(path, "cpu")
        with torch.no_grad():
            for gate, head in zip(model.gates, model.heads):
                gate.out.weight.mul_(30)
                head.out.weight.mul_(6)
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


@pytest.mark.parametrize("name", ["lesson", "solutions"])
def test_notebooks(folder, tmp_path, monkeypatch, name):
    """Every number with a decimal point in the text, except in code, is in a stored output (.998
    stands for 0.998). Every cell runs; what it replaces in a module, it puts back."""
    (code, text), names, shown = notebook(name), {}, []
    assert all(cell["execution_count"] and cell["outputs"] for cell in code[1:])
    outputs = [output for cell in code for output in cell["outputs"]]
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    printed = " ".join("".join(output.get("text", "")) for output in outputs)
    text = re.sub(r"```.*?```|`.*?`", "", text, flags=re.DOTALL)
    for whole, decimals in re.findall(r"(?<![\w.])(\d*)\.(\d+)", text):
        assert re.search(rf"\b{whole or 0}\.{decimals}(?!\d)", printed), f"{whole}.{decimals}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    shutil.copy(ROOT / "train.py", tmp_path)  # by which a cell knows the folder
    jupyter = SimpleNamespace(Image=Path, display=lambda *paths: shown.extend(paths))
    monkeypatch.setitem(sys.modules, "IPython.display", jupyter)
    monkeypatch.setattr(pictures, "main", pictures.main if HAS_MATPLOTLIB else print)
    before = [smartbert.Gate, evaluation.auxiliary_flops, train.phase2_loss]
    for cell in code:
        exec("".join(cell["source"]), names)
    assert [smartbert.Gate, evaluation.auxiliary_flops, train.phase2_loss] == before
    assert len(shown) == json.dumps(code).count('"image/png"')
    assert not HAS_MATPLOTLIB or all(path.is_file() for path in shown)


@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.2])
def test_trace_is_infer_one(folder, tmp_path, capsys, threshold):
    """Layer by layer; then all texts, of several lengths, as a file."""
    model, tokenizer = train.load_run(folder, "cpu")[1], data.load_tokenizer(folder)
    texts, answers, paths = [text for text, _ in data.toy()["dev"].texts[:9]], [], set()
    for text in texts:
        trace.main([str(folder), text, "--threshold", str(threshold)])
        title, *layers, heading, printed = capsys.readouterr().out.splitlines()
        split = data.encode(tokenizer, data.Split("own", [(text, None)], [0]))
        batch = data.collate(split, [0])
        logits, ran, exit = smartbert.infer_one(model, batch.ids, batch.segment_ids, threshold)
        outcome = smartbert.infer(model, *batch.inputs, threshold=threshold)
        flops = evaluation.measure(model, split, data.TASKS["toy"], outcome).flops
        answers.append(f"{'abc'[logits.argmax()]}\t{logits.softmax(1).max():.3f}\t{len(ran)}")
        assert printed == answers[-1] and str(threshold) in heading and len(layers) == 6
        for i, line in enumerate(layers, 1):
            assert ("not reached" in line) == (i > exit)
            assert ("ran" in line) == (i in ran)
            assert ("exited" in line) == (i == exit < 6)
            assert i > exit or (float(line.split()[1]) < 0.5) == (i in ran)  # the gate
        entropy = smartbert.entropy(logits).item()
        assert layers[exit - 1].split()[-4:] == [answers[-1][0], f"{logits.softmax(1).max():.0%}",
                                                 f"{entropy:.3f}", f"{flops:.1%}"]
        paths.add((tuple(ran), exit))
    assert len(paths) > 1
    (tmp_path / "texts").write_text("\n".join(texts) + "\r\n\n", encoding="utf-8")
    trace.main([str(folder), "--file", f"{tmp_path}/texts", "--threshold", str(threshold)])
    assert capsys.readouterr().out.splitlines() == answers


def test_trace_as_a_command_reads_standard_input(folder):
    command = [sys.executable, ROOT / "lesson" / "trace.py", folder, "--file", "-"]
    done = subprocess.run(command, input="king dragon b ab\n", capture_output=True, text=True)
    assert re.fullmatch(r"[abc]\t\d\.\d{3}\t\d\n", done.stdout)
    assert done.stderr == "warning: not in the vocabulary: dragon\n"


def test_threshold(changed, capsys, tmp_path):
    """Unless it is named: the star of the run's mode, or .3."""
    rows = [dict(mode=mode, threshold=threshold, chosen=chosen) for mode, threshold, chosen in
            (("both", 0.9, False), ("exit", 0.5, True), ("both", 0.7, True))]
    for gates, kept, threshold in (True, rows, 0.7), (False, rows, 0.5), (True, rows[:1], 0.3):
        (changed(gates=gates) / "eval.json").write_text(json.dumps({"rows": kept}))
        trace.main([f"{tmp_path}/run", "king coin b"])
        assert f"(threshold: {threshold})" in capsys.readouterr().out


def test_plain_bert_asks_only_the_last_head(changed, capsys):
    """Of a pair, too."""
    trace.main([str(changed(task="mnli", gates=False, exits=False)), "king coin b", "king b"])
    _, *lines, _, answer = capsys.readouterr().out.splitlines()
    words = [line.split()[1:] for line in lines]
    assert [each[0] for each in words] == ["ran"] * 6 and words[-1][-1] == "100.0%"
    assert [len(each) for each in words] == [2, 2, 2, 2, 2, 5]
    assert answer.split("\t")[0] in data.TASKS["mnli"].labels


def test_trace_refuses(folder, changed, refused, tmp_path):
    refused(trace.main, ["nowhere", "king coin b"], "nowhere/model.pt")
    refused(trace.main, [folder, "king", "coin"], "toy takes 1 text(s)")
    refused(trace.main, [folder, "--file", "nowhere"], "No such file", "nowhere")
    for content, words in ((b"king coin b\n \n", "example 2 is ' '"), (b"\xff", "is not UTF-8")):
        (tmp_path / "texts").write_bytes(content)
        refused(trace.main, [folder, "--file", "texts"], words)
    refused(trace.main, [changed(criterion="patience"), "king"], "does not exit by entropy")
    refused(trace.main, [changed(finished=False), "king"], "is not finished")


def test_pictures(folder, changed, refused, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        refused(pictures.main, [folder], "pip install matplotlib")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: no picture is drawn")
    refused(pictures.main, ["nowhere"], "eval.json is not there")
    for run in (folder, changed(exits=False, gates=False)):
        evaluation.main([str(run), "--repeats", "0", "--device", "cpu"])
    refused(pictures.main, [run], "has no exits")
    pictures.main([str(folder)])
    for name in "score criteria layers examples training".split():
        content = (folder / f"{name}.png").read_bytes()
        assert content[:4] == b"\x89PNG" and len(content) < 60_000 and f"{name}.png" in data.OURS
