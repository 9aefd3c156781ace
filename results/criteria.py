"""Other criteria of an early exit, on the heads of a trained run, without gates.

    python results/criteria.py runs/toy                               # scores at equal FLOPs
    python results/criteria.py runs/toy-pabee --criterion patience    # PABEE's table, eval.json

The first command compares the entropy with other criteria on the dev set. The second does what
eval.py does, but by patience: it chooses the patience on held-out data and writes eval.json (no
seconds: `infer` itself exits by entropy alone).

Each criterion makes `leaves` (N, L) bool from a full pass: at which heads a row would exit. N
examples, L layers, C classes.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from data import (TASKS, UserError, encode, hold_out, load_task, load_tokenizer, one_line_errors,
                  pools)
from eval import NOTHING, Point, apply_exits, choose, measure, report
from smartbert import Outcome, entropy, infer_pools
from study import at_cost
from train import DEVICES, autocast, check_data, load_run


# --- The criteria -------------------------------------------------------------------------------

def entropy_below(full: Outcome, threshold: float) -> Tensor:
    """SmartBERT's and DeeBERT's (Xin et al. 2020): the entropy is below the threshold."""
    return entropy(full.history) < threshold                                # (N, L)


def probability_above(full: Outcome, threshold: float) -> Tensor:
    """The highest probability is above the threshold (Schwartz et al. 2020)."""
    return full.history.softmax(-1).amax(-1) > threshold                    # (N, L)


def patience(full: Outcome, times: int) -> Tensor:
    """`times` heads in a row agree with the head before them (PABEE, Zhou et al. 2020). Heads of
    skipped layers do not count."""
    leaves = torch.zeros_like(full.head_asked)                              # (N, L)
    before = torch.full_like(full.exit, -1)                 # (N,): the last head's answer
    agreed = torch.zeros_like(full.exit)                    # (N,): how many times in a row
    for i in range(leaves.shape[1]):
        asked, answer = full.head_asked[:, i], full.history[:, i].argmax(-1)    # (N,), (N,)
        again = torch.where(answer == before, agreed + 1, 0)
        agreed = torch.where(asked, again, agreed)
        before = torch.where(asked, answer, before)
        leaves[:, i] = agreed >= times
    return leaves


def fixed_layer(full: Outcome, layer: int) -> Tensor:
    """Head `layer` (from 1) answers, or the next one if that layer was skipped."""
    N, L = full.ran.shape
    return (torch.arange(1, L + 1) >= layer).expand(N, L)


def first_correct(full: Outcome, labels: Tensor) -> Tensor:
    """The oracle: the head is right. It reads the labels (N,), so it is not a method but an upper
    bound: no criterion on these heads has a higher accuracy. It is no bound on cost, because a row
    without a correct head runs to the end."""
    return full.history.argmax(-1) == labels[:, None]                       # (N, L)


# --- All of them, compared ----------------------------------------------------------------------

def compare(model, split, task, full):
    """Every criterion over a sweep of its number; last the oracle. full: the full pass without
    gates. Returns dicts: criterion, its number (threshold), what was measured."""
    L, C = full.ran.shape[1], len(task.labels)
    shares = np.linspace(0.01, 0.99, 50)            # of the way from certainty to a guess
    sweeps = [
        (entropy_below, "entropy", shares * math.log(C)),
        (probability_above, "probability", 1 - shares * (1 - 1 / C)),
        (patience, "patience", range(1, L)),
        (fixed_layer, "layer", range(1, L + 1)),
    ]
    rows = []
    for criterion, name, numbers in sweeps:
        for number in numbers:
            outcome = apply_exits(full, criterion(full, number))
            if criterion is fixed_layer:            # such a shallow BERT has no earlier heads
                outcome.head_asked[:, :number - 1] = False
            result = measure(model, split, task, outcome)
            rows.append({"criterion": name, "threshold": number} | vars(result))
    leaves = first_correct(full, torch.tensor(split.labels))
    result = measure(model, split, task, apply_exits(full, leaves))
    return rows + [{"criterion": "oracle", "threshold": None} | vars(result)]


def comparison_table(rows):
    """The score of every criterion at the same cost; the oracle has only one."""
    *others, oracle = rows
    costs = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
    lines = ["score at FLOPs" + "".join(f"{cost:>8}" for cost in costs) + "  (no gates)"]
    for name in dict.fromkeys(row["criterion"] for row in others):
        points = [(row["flops"], row["score"]) for row in others if row["criterion"] == name]
        cells = "".join(f"{at_cost(points, cost):>8.3f}" for cost in costs)
        lines.append(f"{name:<14}" + cells.replace("nan", "  -"))
    lines.append(f"oracle: {oracle['score']:.3f} at {oracle['flops']:.3f} (no criterion scores "
                 f"higher)")
    return "\n".join(lines)


# --- A run --------------------------------------------------------------------------------------

def full_pass(run, model, split):
    """The encoded split, and its full pass without gates: every head is asked, nobody exits."""
    split = encode(load_tokenizer(run.folder), split, run.settings.max_length)
    batches = pools(split, run.settings.device)
    return split, infer_pools(model, batches, skip=False, all_heads=True)


def compare_on_dev(run, model, splits):
    """Print the comparison on each dev set."""
    task = TASKS[run.settings.task]
    for name in task.devs:
        split, full = full_pass(run, model, splits[name])
        print(f"{task.name} {name}: {len(split)} examples")
        print(comparison_table(compare(model, split, task, full)))


def measure_patience(model, split, task, full, points):
    """Point -> Result: without exits, or with the patience that is the point's threshold."""
    results = {}
    for point in points:
        leaves = None
        if point.threshold is not None:
            leaves = patience(full, point.threshold)
        results[point] = measure(model, split, task, apply_exits(full, leaves))
    return results


def evaluate(run, model, splits):
    """Choose the patience on held-out data; then measure, store and print each dev set."""
    settings, task = run.settings, TASKS[run.settings.task]
    plain, stars, held_out = Point("plain"), [], {}
    exits = [Point("exit", times) for times in range(1, len(model.heads))]
    _, held = hold_out(splits["train"], settings.held_out, settings.seed, settings.limit)
    if len(held) > 0:
        held, full = full_pass(run, model, held)
        held_out = measure_patience(model, held, task, full, [plain, *exits])
        if len(set(held.labels)) == len(task.labels):       # else their scores say little
            stars = choose({point: held_out[point] for point in exits}, held_out[plain], None)
    points = [plain] + [point for point in exits if point not in stars] + stars
    for name in task.devs:
        split, full = full_pass(run, model, splits[name])
        split.partial |= splits["train"].partial
        results = measure_patience(model, split, task, full, points)
        rows = []
        for point in points:
            before = held_out.get(point, NOTHING)
            rows.append(vars(point) | vars(results[point]) | {
                "criterion": "patience",
                "chosen": point in stars,
                "held_out": before.score,
                "held_out_flops": before.flops,
                "seconds": 0.0,
            })
        curve = [vars(point) | {"score": results[point].score, "flops": results[point].flops}
                 for point in exits]
        report(run, split, rows, curve)


def main(arguments=sys.argv[1:]):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("run", help="the folder of a run with exits")
    add("--criterion", choices=["patience"], help="evaluate the run by it; default: compare all")
    add("--data-dir", help="folder with GLUE's files, if they have moved")
    add("--device", default=DEVICES[0], choices=DEVICES, help="where to run")
    asked = parser.parse_args(arguments)
    with one_line_errors("criteria.py"):
        run, model = load_run(asked.run, asked.device)
        if asked.data_dir is not None:
            run.settings.data_dir = asked.data_dir
        if not run.exits or not run.finished:
            raise UserError(f"{run.folder} is not finished, or has no exit heads: name another")
        if asked.criterion not in (None, run.criterion):
            raise UserError(f"{run.folder} was trained for {run.criterion}: leave --criterion out")
        with autocast(run.settings):
            splits = load_task(run.settings.task, run.settings.data_dir)
            check_data(run, splits["train"])
            if asked.criterion is None:
                compare_on_dev(run, model, splits)
            else:
                evaluate(run, model, splits)


if __name__ == "__main__":
    main()
