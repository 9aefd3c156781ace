"""An assignment: a working copy of the project with blanks, and tests that judge each of them.

    python lesson/assignment.py FOLDER              # a new or empty folder
    python lesson/assignment.py FOLDER --solve 5    # put our solution of exercise 5 in

lesson/exercises.md tells what to do; it becomes FOLDER/README.md. An exercise needs only those
before it. In FOLDER, `python -m pytest -q -m exercise5` judges exercise 5.
"""

import argparse
import ast
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Title, minutes, the functions to write, the tests that judge them (those with words first).
EXERCISES = (
    ("the entropy", 5, "smartbert.entropy", "test_exercises.test_entropy"),
    ("the hard weight", 10, "smartbert.hard_weight", """test_exercises.test_hard_weight
        test_smartbert.test_hard_weight_is_exact_forward_and_soft_backward"""),
    ("the gate", 20, "smartbert.ClsAttention.forward smartbert.Gate.forward",
     "test_exercises.test_gate test_smartbert.test_a_new_gate_says_what_its_bias_says"),
    ("inference for one example", 20, "smartbert.infer_one", "test_exercises.test_infer_one"),
    ("the contrast", 20, "smartbert.contrast", """test_exercises.test_contrast
        test_smartbert.test_contrast_by_brute_force"""),
    ("the skip penalty", 10, "smartbert.skip_penalty", "test_exercises.test_skip_penalty"),
    ("phase 1", 40, "smartbert.gated_forward smartbert.phase1_loss",
     """test_exercises.test_gated_forward test_exercises.test_full_share
        test_exercises.test_phase1_loss test_smartbert.test_phase1_loss_by_hand
        test_smartbert.test_rows_in_full_run_every_layer
        test_smartbert.test_phase1_as_in_the_release"""),
    ("phase 2", 30, "smartbert.phase2_loss", """test_exercises.test_phase2_loss
        test_smartbert.test_phase2_loss_by_hand test_smartbert.test_phase2_as_in_the_release
        test_smartbert.test_phase2s_contrast_differs_only_where_we_say"""),
    ("the cost", 30, "eval.layer_flops eval.auxiliary_flops eval.flops",
     "test_exercises.test_flops test_eval.test_cost_of_bert_base"),
    ("the threshold", 40, "eval.apply_exits eval.choose", """test_exercises.test_apply_exits
        test_exercises.test_choose test_eval.test_choice"""),
    ("inference in batches", 60, "smartbert.infer", """test_exercises.test_infer
        test_smartbert.test_both_ways_of_inference_go_as_by_hand test_smartbert.test_on_the_edge
        test_smartbert.test_many_pools_in_the_order_of_the_split
        test_smartbert.test_inference_as_in_the_release test_eval.test_a_result_by_hand"""),
)
COPIED = """bert.py data.py smartbert.py train.py eval.py requirements.txt LICENSE
    tests/conftest.py tests/test_smartbert.py tests/test_eval.py tests/fixtures/release.npz"""
PYTEST = """[tool.pytest.ini_options]
testpaths = ["tests/test_exercises.py", "tests/test_smartbert.py", "tests/test_eval.py"]
pythonpath = [".", "tests"]
addopts = "-x --tb=short"
markers = {}"""


def find(folder, name):
    """Of a function (file.function or file.Class.function): the path and the lines of its file,
    the positions of its first line, of the line after its docstring, of the line after its end."""
    file, *parts = name.split(".")
    path = folder / f"{file}.py"
    text = path.read_text(encoding="utf-8")
    body = ast.parse(text, path).body
    for part in parts:
        found = [each for each in body if getattr(each, "name", None) == part]
        if len(found) != 1:
            raise ValueError(f"{path} must have exactly one {name}")
        [node] = found
        body = node.body
    return path, text.split("\n"), node.lineno - 1, body[0].end_lineno, node.end_lineno


def replace(folder, name, new):
    """Put new lines where a function stands; return the old ones."""
    path, lines, first, _, end = find(folder, name)
    path.write_text("\n".join(lines[:first] + new + lines[end:]), encoding="utf-8")
    return lines[first:end]


def make(folder):
    """Write the assignment."""
    (folder / "tests/fixtures").mkdir(parents=True)
    for name in COPIED.split():
        shutil.copy(ROOT / name, folder / name)
    shutil.copy(ROOT / "lesson/judges.py", folder / "tests/test_exercises.py")
    shutil.copy(ROOT / "lesson/exercises.md", folder / "README.md")
    markers = []
    for number, (title, _, functions, tests) in enumerate(EXERCISES, start=1):
        markers.append(f"exercise{number}: {title}")
        for name in functions.split():
            _, lines, first, body, _ = find(folder, name)
            head = "\n".join(lines[first:body]).split("\n\n    Straight-through")[0]  # tells it
            indent = " " * (lines[first].index("def") + 4)
            raises = f'{indent}raise NotImplementedError("exercise {number}: {title}")'
            replace(folder, name, [head.removesuffix('"""') + '"""', raises])
        for name in tests.split():
            _, lines, first, _, end = find(folder / "tests", name)
            replace(folder / "tests", name, [f"@pytest.mark.exercise{number}", *lines[first:end]])
    (folder / "pyproject.toml").write_text(PYTEST.format(markers), encoding="utf-8")


def solve(folder, number):
    """Put our functions in. What stood there is kept in attempts.txt."""
    with open(folder / "attempts.txt", "a", encoding="utf-8") as attempts:
        for name in EXERCISES[number - 1][2].split():
            _, lines, first, _, end = find(ROOT, name)
            old = replace(folder, name, lines[first:end])
            print(*old, sep="\n", end="\n\n", file=attempts)


def main(arguments=sys.argv[1:]):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the assignment is, or will be")
    parser.add_argument("--solve", type=int, choices=range(1, 12), metavar="N", help="put ours in")
    folder, number = vars(parser.parse_args(arguments)).values()
    if number is None:
        if folder.is_file() or list(folder.glob("*")):
            parser.error(f"{folder} is not a new or empty folder: name another, or use --solve N")
        make(folder)
        print(f"now: cd {folder}, and read README.md")
    else:
        if not (folder / "tests/test_exercises.py").is_file():
            parser.error(f"{folder} holds no assignment: make it first, without --solve")
        try:
            solve(folder, number)
        except (SyntaxError, ValueError, OSError) as error:
            parser.error(f"fix this first, so that the file can be read: {error}")
        print(f"exercise {number} is solved; what stood there is in {folder}/attempts.txt")


if __name__ == "__main__":
    main()
