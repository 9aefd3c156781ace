"""The assignment: blanks that fail, solutions that pass, wrong answers that are named; and the
lesson's exercises."""

import doctest
import inspect
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_lesson import notebook

import eval as evaluation
import smartbert
from lesson import assignment, judges

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "lesson/exercises.md").read_text(encoding="utf-8")
COPIES = "bert data smartbert train eval conftest test_exercises test_smartbert test_eval".split()


def judged(folder: Path, tests: str, expression: str) -> list[tuple]:
    """(markers, whether it passed, what was said) of each of the tests with these markers, run
    with the folder's modules, but in this process, which has already loaded torch."""
    reports = []
    def keep(report):
        if report.when == "call":
            markers = {name for name in report.keywords if name.startswith("exercise")}
            reports.append((markers, report.passed, report.longreprtext))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", os.environ["HF_HOME"])          # conftest sets another
        for name in COPIES:
            patch.delitem(sys.modules, name, raising=False)
        pytest.main(["-q", "-c", str(folder / "pyproject.toml"), "-o", "addopts=", "-p",
                     "no:cacheprovider", "-m", expression, str(folder / tests)],
                    plugins=[SimpleNamespace(pytest_runtest_logreport=keep)])
        for name in COPIES:
            sys.modules.pop(name, None)
    return reports


def test_a_blank_fails_its_own_tests_and_no_earlier_ones(tmp_path):
    """With our functions its tests pass; when all are in, the copy is the project."""
    folder = tmp_path / "mine"
    assignment.main([str(folder)])
    assert "detach" not in (folder / "smartbert.py").read_text()        # it tells exercise 2
    for number in range(1, 12):
        reports = judged(folder, "tests", f"exercise{number - 1} or exercise{number}")
        own = [each for each in reports if f"exercise{number}" in each[0]]
        assert len(own) > 0 and (len(own) < len(reports) or number == 1)
        for markers, passed, said in reports:
            assert passed == (f"exercise{number}" not in markers), said
            assert passed or f"NotImplementedError: exercise {number}: " in said
        assignment.main([str(folder), "--solve", str(number)])
    for name in ("bert", "data", "smartbert", "train", "eval"):
        assert (folder / f"{name}.py").read_bytes() == (ROOT / f"{name}.py").read_bytes()
    reports = judged(folder, "tests/test_exercises.py", "exercise11")
    assert [passed for _, passed, _ in reports] == [True]
    assert (folder / "attempts.txt").read_text().count("raise NotImplementedError") == 16


WRONG = [   # function, what stands in it, a typical mistake, what the judge says of it
    ("entropy", ".sum(-1)", ".mean(-1)", "not their mean"),
    ("entropy", "* log_p)", "* log_p / 0.6931472)", "in bits"),
    ("entropy", "-(", "(", "its sign is wrong"),
    ("entropy", "logits.log_softmax(-1)", "logits.softmax(-1).log()", "certain answer is nan"),
    ("hard_weight", ">=", ">", "at g = 1/2 the layer is skipped"),
    ("hard_weight", ">=", "<", "1 means skip and 0 run"),
    ("hard_weight", "hard + (g - g.detach())", "hard", "the gates never learn"),
    ("hard_weight", "hard + (g - g.detach())", "g", "still soft"),
    ("hard_weight", "hard + (g - g.detach())", "hard + g - g.detach()", "not exactly 0 or 1"),
    ("hard_weight", "(g - g.detach())", "(g.detach() - g)", "its sign is wrong"),
    ("ClsAttention.forward", "torch.tanh(self.inner(h))", "self.inner(h)", "tanh is missing"),
    ("ClsAttention.forward", "heads, mask,", "heads, None,", "padding: pass the mask"),
    ("ClsAttention.forward", "self.training", "True", "random in eval mode"),
    ("ClsAttention.forward", "self.dropout,", "0.0,", "in training attention has dropout"),
    ("Gate.forward", "torch.sigmoid(self.out(a))", "self.out(a)", "the sigmoid is missing"),
    ("Gate.forward", ".squeeze(1)", "", r"not \(B, 1\)"),
    ("Gate.forward", ".squeeze(1)", ".squeeze()", r"squeeze\(1\)"),
    ("ClsAttention.forward", ".squeeze(1)", ".squeeze()", r"squeeze\(1\)"),
    ("ClsAttention.forward", "z[:, :1]", "z[:, 0]", r"only \[CLS\] asks"),
    ("ClsAttention.forward", "z[:, :1]", "z", r"only \[CLS\] asks"),
    ("ClsAttention.forward", "k, v = ", "v, k = ", "the keys first, then the values"),
    ("infer_one", ">= 0.5", "> 0.5", "at g = 1/2 the layer is skipped"),
    ("infer_one", ">= 0.5", "< 0.5", "all layers run .*'g2 reads 0' where .*'l1 reads 0'"),
    ("infer_one", "entropy(logits) <", "entropy(logits) <=", "below the threshold, not equal"),
    ("infer_one", "continue", "layer = lambda h, mask: h", "no head is asked after it"),
    ("infer_one", "if i < L:", "if True:", "the last head answers"),
    ("infer_one", "heads[-1]", "heads[ran[-1] - 1]", "even if the last layer was"),
    ("infer_one", "if skip and gate", "if gate", "skip=False asks no gate"),
    ("infer_one", "ran.append(i)", "ran.append(i - 1)", "counted from 1"),
    ("contrast", "log_s.logsumexp(dim=-1)", "(log_s.exp().sum(-1) - log_s.diagonal(dim1=1, "
     "dim2=2).exp()).log()", "positive is missing from the denominator"),
    ("contrast", "~mask[:, None, :]", "~mask[:, None, :] & False", "padding is no negative"),
    ("contrast", "logsumexp(dim=-1)", "logsumexp(dim=1)", "t' of v, not of u"),
    ("contrast", "/ tau", "* tau", "tau divides the cosine"),
    ("contrast", "F.normalize(u, dim=-1) @ F.normalize(v, dim=-1)", "u @ v", "dot products"),
    ("contrast", "losses[mask]", "losses", "not finite, .* average losses"),
    ("contrast", "~mask[:, None, :]", "mask[:, None, :]", "not finite, .* ~mask"),
    ("contrast", "losses[mask]", "losses.where(mask, 0)", "padding does not count"),
    ("contrast", "= log_s.log", "= 0 * (0 * u.sum(-1)).sqrt() + log_s.log", "as 0 / 0 is"),
    ("skip_penalty", "g_soft.mean(0)", "g_used.mean(0)", "takes the soft gates"),
    ("skip_penalty", "lam / g_soft.mean(0)", "lam * g_soft.mean(0)", "lambda over the sum"),
    ("skip_penalty", "g_soft.mean(0)", "g_soft", "a mean over the batch"),
    ("skip_penalty", "* F.relu(", "* (", "a budget that is met costs"),
    ("skip_penalty", "* F.relu(", "* (lambda x: max(0.0, x.item()))(", "a tensor"),
    ("skip_penalty", "1 - g_used", "1 - g_soft", "takes the gates as used"),
    ("gated_forward", "(1 - g) * output + g * h", "g * output + (1 - g) * h", "g weighs"),
    ("gated_forward", "if hard:", "if not hard:", "hard gates mix if hard"),
    ("gated_forward", "used.append(g)", "used.append(g.detach())", "gates learn the budget"),
    ("gated_forward", "torch.rand(len(ids), ", "torch.rand(1, ", "draw for each row"),
    ("gated_forward", "outputs.append(output)", "outputs.append(h)", "what left the layer"),
    ("phase1_loss", "gated.last", "gated.outputs[-1]", "the last head reads h_L"),
    ("phase1_loss", "gated.inputs", "gated.outputs", "compares what enters the layers"),
    ("phase1_loss", "loss = ", "eta1 = 1 - eta1\n    loss = ", "eta1 weighs the contrast"),
    ("phase1_loss", "full_share=full_share", "full_share=0.0", "pass full_share on"),
    ("phase1_loss", "1 - gated.g_used", "1 - gated.g_soft", "takes the gates as used"),
    ("phase2_loss", "hard=True", "hard=False", "follow the hard gates"),
    ("phase2_loss", "gated.outputs", "[*gated.inputs[1:], gated.last]", "not the mixture h_i"),
    ("phase2_loss", "stack(pairs).mean()", "stack(pairs).sum()", "the mean over the pairs"),
    ("phase2_loss", "torch.no_grad()", "torch.enable_grad()", "gets a gradient"),
    ("phase2_loss", "full_share=full_share", "full_share=0.0", "pass full_share on"),
    ("phase2_loss", "loss = ", "eta2 = 1 - eta2\n    loss = ", "eta2 weighs the contrast"),
    ("layer_flops", "+ 4 * tokens**2 * H", "", "attention's own products"),
    ("auxiliary_flops", "+ 2 * W * W +", "+ 2 * tokens * W * W +", r"only \[CLS\] has a query"),
    ("flops", "* outcome.ran", "+ 0 * outcome.ran", "skipped layers cost nothing"),
    ("flops", "* outcome.gate_asked", "* 0", "the gates are missing"),
    ("apply_exits", "leaves & asked", "leaves", "the first head that was asked"),
    ("apply_exits", "<= exits", "< exits", "nothing after the exit"),
    ("apply_exits", "= full.head_asked", "= full.head_asked.logical_not_()", "changes the full"),
    ("choose", "< baseline.flops", "< 2", "saves nothing"),
    ("choose", ".flops)", ".flops, reverse=True)", "the cheapest that loses at most half a"),
    ("choose", "points[:1]", "[]", "where none reaches the speed-up"),
    ("infer", "full_batches(ran[:, i]", "full_batches(alive", "compute no skipped layer"),
    ("infer", "(ran[:, i], mask, batch_tokens)", "(ran[:, i], mask, 1)", "but .* full batches do"),
    ("infer", "alive = alive & ~leaves", "pass", "in the pool"),
]


@pytest.mark.parametrize("name, found, put, words", WRONG)
def test_a_typical_mistake_is_named(monkeypatch, name, found, put, words):
    """In one line, by the first judge of the exercise that fails."""
    [tests] = [tests for _, _, functions, tests in assignment.EXERCISES
               if name in re.findall(r"\.(\S+)", functions)]
    module = smartbert if hasattr(smartbert, name.split(".")[0]) else evaluation
    *parts, function = name.split(".")
    owner = getattr(module, parts[0]) if parts else module
    source, made = textwrap.dedent(inspect.getsource(getattr(owner, function))), {}
    assert found in source
    exec(source.replace(found, put), vars(module), made)
    monkeypatch.setattr(owner, function, made[function])
    with pytest.raises(pytest.fail.Exception, match=words) as failure:
        for test in re.findall(r"test_exercises\.(\S+)", tests):
            getattr(judges, test)()
    assert "\n" not in str(failure.value)


def test_its_text():
    """Titles, minutes, functions and commands are the table's; the numbers in it are right."""
    sections = re.split(r"\n## (?=\d)", TEXT)[1:]
    exercises = enumerate(assignment.EXERCISES, start=1)
    for section, (number, (title, minutes, functions, _)) in zip(sections, exercises, strict=True):
        heading = section.splitlines()[0].lower()
        assert heading.startswith(f"{number}. {title} ({minutes} minutes"), heading
        assert f"`python -m pytest -q -m exercise{number}`" in section
        for name in functions.split():
            file, *parts = name.split(".")
            assert all(part in section for part in (file, *parts))
    test = doctest.DocTestParser().get_doctest(TEXT, {}, "exercises", None, 0)
    assert len(test.examples) > 20
    assert doctest.DocTestRunner().run(test, out=lambda text: None).failed == 0


def test_what_a_student_sees(tmp_path):
    """In the end one line; and our solution, with the student's own kept."""
    assignment.main([str(tmp_path)])                                # an empty folder will do
    for number in (3, 5):
        assignment.main([str(tmp_path), "--solve", str(number)])
    path = tmp_path / "smartbert.py"
    ours = path.read_text()
    path.write_text(ours.replace("losses = log_s.logsumexp", "losses = -log_s.logsumexp"))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "exercise5"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert done.returncode == 1 and len(failed) == 1 and "the contrast is" in failed[0]
    assert len(done.stdout.splitlines()) < 12, done.stdout
    assignment.main([str(tmp_path), "--solve", "5"])
    assert path.read_text() == ours
    assert "losses = -log_s.logsumexp" in (tmp_path / "attempts.txt").read_text()


def test_what_is_refused(tmp_path, refused):
    """Writing over files, and solving where nothing is to be solved."""
    refused(assignment.main, ["new", "--solve", 5], "new holds no assignment")
    (tmp_path / "notes.txt").write_text("mine")
    refused(assignment.main, [tmp_path], f"{tmp_path} is not a new or empty folder")
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_every_exercise_has_a_solution():
    lesson, solutions = (re.split(r"^## (?=\d)", notebook(name)[1], flags=re.MULTILINE)[1:]
                         for name in ("lesson", "solutions"))
    for asked, solved in zip(lesson, solutions, strict=True):
        assert asked.splitlines()[0] == solved.splitlines()[0]
        numbers = re.findall(r"^(\d)\. ", asked.split("**Exercise", 1)[-1], re.MULTILINE)
        assert re.findall(r"^\*\*(\d)\.", solved, re.MULTILINE) == numbers


def test_the_blank():
    [blank] = re.findall(r"```python\n(.*?)```", notebook("lesson")[1], re.DOTALL)
    def answer(words):
        exec(blank.replace("return ...", f"return {words}"), vars(smartbert).copy())
    answer("hard_weight(g)")
    for wrong in "...", "g", "(g >= 0.5).float()", "(g > 0.5).float() + g - g.detach()":
        with pytest.raises((AssertionError, RuntimeError, TypeError)):
            answer(wrong)
