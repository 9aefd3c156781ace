"""What a trained SmartBERT skips, where it exits, what that costs and how well it answers.

    python eval.py runs/toy                                   # the table, also in eval.json
    python eval.py runs/toy --target-speedup 2                # the threshold that halves the FLOPs

The inference modes: *plain* (every layer and the last head), *skip* (gates only), *exit* (exits
only), *both*. FLOPs are counted on real tokens, with gates and heads.

Gates do not depend on the threshold, and an exit only ends a row's computation early. So two
*full passes* over a split, with and without gates, serve every threshold: no row exits, and the
heads of all layers that run are asked, as is the last. `apply_exits` then ends each row at its
exit; only the seconds are those of real dynamic inference. Read `evaluate` first. N examples, L
layers, C classes. Unless said otherwise, run is a train.Run, model a SmartBert, split a Split,
points a list of Point.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import (TASKS, UserError, encode, hold_out, load_task, load_tokenizer,
                  one_line_errors, pools, scores, write_text)
from smartbert import ExitHead, Gate, Outcome, SmartBert, entropy, infer, infer_pools
from train import DEVICES, FREE, autocast, check_data, load_run, within

SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)     # the table's thresholds, as shares of ln C


# --- The cost -----------------------------------------------------------------------------------

def layer_flops(model: SmartBert, tokens: Tensor) -> Tensor:
    """FLOPs of one layer, two for a multiply-add. tokens: each row's real S, in any shape.

        2 S (4 H^2 + 2 H I) + 4 S^2 H       which is    24 S H^2 + 4 S^2 H    where I = 4H
    """
    H, I = model.bert.config.hidden_size, model.bert.config.intermediate_size
    return 2 * tokens * (4 * H * H + 2 * H * I) + 4 * tokens**2 * H


def auxiliary_flops(module: Gate | ExitHead, tokens: Tensor) -> Tensor:
    """FLOPs of one gate or one exit head. tokens: each row's real S, in any shape.

        2 S H W + 4 S W^2      W_in; keys and values
        2 W^2 + 4 S W          the query of [CLS]; its scores and weighted sum
        2 W                    output of a gate
        2 W^2 + 2 W C          hidden layer and output of a head
    """
    W, H = module.body.inner.weight.shape
    body = 2 * tokens * H * W + 4 * tokens * W * W + 2 * W * W + 4 * tokens * W
    output = 2 * W * module.out.out_features
    if isinstance(module, ExitHead):
        output += 2 * W * W
    return body + output


def flops(model: SmartBert, tokens: Tensor, outcome: Outcome) -> Tensor:
    """FLOPs of each row in each layer, gate and head included, (N, L). tokens (N,): its real S."""
    tokens = tokens[:, None]                                                # (N, 1)
    return (layer_flops(model, tokens) * outcome.ran
            + auxiliary_flops(model.gates[0], tokens) * outcome.gate_asked
            + auxiliary_flops(model.heads[0], tokens) * outcome.head_asked)


def plain_flops(model: SmartBert, tokens: Tensor) -> Tensor:
    """FLOPs of plain BERT for each row, (N,). tokens (N,): its real S."""
    return (layer_flops(model, tokens) * len(model.bert.layers)
            + auxiliary_flops(model.heads[-1], tokens))


# --- Points, and what is measured at them --------------------------------------------------------

@dataclass(frozen=True)
class Point:
    """An inference mode and its threshold in nats. Without exits the threshold is None."""
    mode: str                       # plain, skip, exit or both
    threshold: float | None = None

    @property
    def gated(self) -> bool:
        return self.mode in ("skip", "both")


@dataclass(frozen=True)
class Result:
    """What was measured at a point, on one split."""
    score: float                    # the task's main metric
    scores: dict[str, float]        # all of its metrics
    layers: float                   # run on average
    flops: float                    # share of plain BERT's
    skip_rate: list[float]          # of the rows that reached layer i, the share that skipped it
    exit_histogram: list[int]       # rows that exit after layer i; the last: all others
    levels: list[dict]              # of the toy: examples, accuracy, layers of each level


NOTHING = Result(*[None] * 7)       # where there are no held-out data


def full_passes(run, model, split):
    """Return a dict with the outcome without gates (key False) and, if the run has gates, with
    them (key True). No row exits. If the run has exits, every layer that ran asks its head."""
    batches = pools(split, run.settings.device)
    return {gated: infer_pools(model, batches, skip=gated, all_heads=run.exits)
            for gated in {False, run.gates}}            # one pass if there are no gates


def apply_exits(full: Outcome, leaves: Tensor | None) -> Outcome:
    """Return what `infer` would return with exits. leaves (N, L) is True where a row would exit if
    its head was asked. If leaves is None, no row exits early and only the last head is asked. The
    fields gates and history keep the values of the full pass."""
    N, L = full.ran.shape
    layer = torch.arange(1, L + 1)                                          # (L,)
    asked = full.head_asked                                                 # (N, L)
    if leaves is None:
        leaves = asked = (layer == L).expand(N, L)
    exits = torch.where(leaves & asked, layer, L).amin(1)       # (N,): the first such layer, or L
    inside = layer <= exits[:, None]                                        # (N, L)
    return replace(full, logits=full.history[torch.arange(N), exits - 1], exit=exits,
                   ran=full.ran & inside, gate_asked=full.gate_asked & inside,
                   head_asked=asked & inside)


def measure(model, split, task, outcome) -> Result:
    """Score, layers, FLOPs and more of an outcome on a split."""
    answers = outcome.logits.argmax(1)                                      # (N,)
    values = scores(task, answers.tolist(), split.labels)
    tokens = torch.tensor([len(ids) for ids in split.ids])                  # (N,)
    share = flops(model, tokens, outcome).sum() / plain_flops(model, tokens).sum()
    layers = outcome.ran.sum(1).float()                                     # (N,)
    asked = outcome.gate_asked              # (N, L): with gates, by all rows that reach the layer
    skipped = (asked & ~outcome.ran).sum(0) / asked.sum(0).clamp(min=1)     # (L,)
    histogram = outcome.exit.bincount(minlength=len(skipped) + 1)[1:]       # (L,)

    right, levels = (answers == torch.tensor(split.labels)).float(), []     # (N,)
    for level in sorted(set(split.levels)):
        rows = torch.tensor(split.levels) == level                          # (N,)
        levels.append({"level": level, "examples": rows.sum().item(),
                       "accuracy": right[rows].mean().item(),
                       "layers": layers[rows].mean().item()})
    return Result(values[task.metrics[0]], values, layers.mean().item(), share.item(),
                  skipped.tolist(), histogram.tolist(), levels)


def measure_all(model, split, task, passes, points) -> dict[Point, Result]:
    """Return the result at every point. passes: the `full_passes` of the split."""
    results = {}
    for point in points:
        leaves = None
        if point.threshold is not None:
            leaves = entropy(passes[point.gated].history) < point.threshold     # (N, L)
        results[point] = measure(model, split, task, apply_exits(passes[point.gated], leaves))
    return results


# --- The choice of a threshold ------------------------------------------------------------------

def quantiles(mode: str, full: Outcome) -> list[Point]:
    """A mode's candidates: about 250 quantiles of the entropies of a full pass."""
    values = entropy(full.history)[:, :-1][full.head_asked[:, :-1]]         # (asked heads,)
    if len(values) == 0:            # no exits, or the gates skip layers 1 .. L-1 of every row
        return []
    found = np.quantile(values.double().numpy(), np.linspace(0, 1, 250))
    return [Point(mode, value) for value in sorted({float(f"{value:.4g}") for value in found})]


def choose(tried, baseline, speedup) -> list[Point]:
    """Return at most one point, as a list. `tried` maps the points of a mode to held-out results.
    For a target speedup, take the point with the most FLOPs that reaches it, else the cheapest.
    Otherwise take the cheapest that scores at most .005 below the baseline, which has no exits,
    but none if that saves no FLOPs, if all scores are equal, or if the baseline scores <= 0."""
    points = sorted(tried, key=lambda point: tried[point].flops)
    if speedup is not None:
        fast = [point for point in points if tried[point].flops <= 1 / speedup]
        return fast[-1:] if fast else points[:1]
    if len({result.score for result in tried.values()}) < 2 or baseline.score <= 0:
        return []
    good = [point for point in points if tried[point].score >= baseline.score - 0.005]
    return [point for point in good[:1] if tried[point].flops < baseline.flops]


def seconds(run, model, split, points, repeats) -> dict[Point, float]:
    """Return the seconds of dynamic inference on at most 1,000 examples. The points take turns.
    After a pass to warm up, the median of `repeats` passes counts. With 0, that pass counts."""
    rows = np.random.default_rng(0).permutation(len(split))[:1000].tolist()
    [batch] = pools(split.select(rows), run.settings.device)    # one pool is enough for them
    taken = [[] for _ in range(1 + repeats)]
    for one_pass in taken:
        for point in points:
            start = time.perf_counter()
            outcome = infer(model, *batch.inputs, skip=point.gated, threshold=point.threshold)
            outcome.exit.cpu()                          # waits for a GPU
            one_pass.append(time.perf_counter() - start)
    return dict(zip(points, np.median(taken[-repeats:], axis=0).tolist()))


# --- The table ----------------------------------------------------------------------------------

def table(rows, metric, L):
    """The rows of eval.json as text. Speed-ups are plain's FLOPs or seconds over the row's."""
    lines = [f"mode   threshold {metric:>9}  held-out  layers   FLOPs  speed-up in FLOPs"
             "  in seconds"]
    notes = [f"({L} layers; FLOPs with gates and heads, plain: 1; * chosen on held-out data, "
             f"where exits and those data allow it)"]
    for row in rows:
        threshold = "" if row["threshold"] is None else f"{row['threshold']:g}"
        held = "" if row["held_out"] is None else f"{row['held_out']:.3f}"
        faster = f"{rows[0]['seconds'] / row['seconds']:.2f}x" if row["seconds"] > 0 else ""
        star = " *" if row["chosen"] else ""
        if row["chosen"]:
            notes.append(f"* {row['mode']} at {threshold}: {1 / row['held_out_flops']:.2f}x in "
                         f"FLOPs on the held-out data")
        lines.append(f"{row['mode']:<6} {threshold:>9} {row['score']:>9.3f} {held:>9} "
                     f"{row['layers']:>7.2f} {row['flops']:>7.3f} {1 / row['flops']:>17.2f}x "
                     f"{faster:>11}{star}")
    return "\n".join(lines + notes)


def bars(row):
    """Skip rate and exits of each layer, as bars; and the toy's levels."""
    lines = [f"the last row, {row['mode']}:",
             "layer  skipped by those who reached it     exited after it"]
    for i, (skipped, count) in enumerate(zip(row["skip_rate"], row["exit_histogram"]), 1):
        exited = count / sum(row["exit_histogram"])
        lines.append(f"{i:>5}  {'#' * round(20 * skipped):<20} {skipped:>4.0%}     "
                     f"{'#' * round(20 * exited):<20} {exited:>4.0%}")
    if row["levels"]:
        lines += ["", "level  examples  accuracy  layers run"]
    for each in row["levels"]:
        lines.append("{level:>5}  {examples:>8}  {accuracy:>8.3f}  {layers:>10.2f}".format(**each))
    return "\n".join(lines)


# --- A run, evaluated ---------------------------------------------------------------------------

def evaluate(run, model, options):
    """Choose the thresholds on held-out data; then measure, store and print each dev set."""
    settings, task = run.settings, TASKS[run.settings.task]
    if not run.finished:
        raise UserError(f"{run.folder} is not finished: continue it with train.py --resume")
    if run.criterion != "entropy":
        raise UserError(f"{run.folder} exits by another criterion: python results/criteria.py "
                        f"{run.folder} --criterion {run.criterion}")
    splits = load_task(task.name, settings.data_dir)
    check_data(run, splits["train"])
    tokenizer = load_tokenizer(run.folder)
    _, held = hold_out(splits["train"], settings.held_out, settings.seed, settings.limit)

    # The table's points: each mode without exits, then with exits at each threshold.
    baselines = {"exit": Point("plain")}        # a mode with exits -> the same without
    if run.gates:
        baselines["both"] = Point("skip")
    points = list(baselines.values())
    thresholds = options.thresholds
    if thresholds is None:
        thresholds = [round(share * math.log(len(task.labels)), 3) for share in SHARES]
    if run.exits:
        points += [Point(mode, value) for mode, value in product(baselines, thresholds)]

    # A threshold for each mode is chosen on the held-out data, if they contain every class.
    can_choose = options.thresholds is None and len(set(held.labels)) == len(task.labels)
    stars, for_curve, held_out = [], [], {}
    if len(held) > 0:
        held = encode(tokenizer, held, settings.max_length)
        passes = full_passes(run, model, held)
        held_out = measure_all(model, held, task, passes, points)
        for mode, baseline in baselines.items():
            candidates = quantiles(mode, passes[baseline.gated])
            tried = measure_all(model, held, task, passes, candidates)
            if can_choose:
                stars += choose(tried, held_out[baseline], options.target_speedup)
            for_curve += candidates
            held_out |= tried
    points = [point for point in points if point not in stars] + stars

    # On each dev set, the full passes give the results. Only the seconds need real inference.
    for name in task.devs:
        split = encode(tokenizer, splits[name], settings.max_length)
        split.partial |= splits["train"].partial
        results = measure_all(model, split, task, full_passes(run, model, split),
                              points + for_curve)
        timed = seconds(run, model, split, points[:1] + stars, options.repeats)
        rows = []
        for point in points:
            before = held_out.get(point, NOTHING)
            rows.append(vars(point) | vars(results[point]) | {
                "criterion": run.criterion, "chosen": point in stars, "held_out": before.score,
                "held_out_flops": before.flops, "seconds": timed.get(point, 0.0)})
        curve = [vars(point) | {"score": results[point].score, "flops": results[point].flops}
                 for point in for_curve]
        report(run, split, rows, curve)


def report(run, split, rows, curve):
    """Store a dev set's rows as eval.json (a second one's as eval-NAME.json), then print them."""
    task = TASKS[run.settings.task]
    metric, L = task.metrics[0], len(rows[0]["skip_rate"])
    guess = int(np.bincount(split.labels).argmax())
    majority = scores(task, [guess] * len(split), split.labels)[metric]
    settings = {name: value for name, value in vars(run.settings).items() if name not in FREE}
    settings["weights"] = Path(settings["weights"]).name
    result = {"task": task.name, "split": split.name, "partial": split.partial, "metric": metric,
              "examples": len(split), "majority": majority, "layers": L,
              "settings": settings, "rows": rows, "curve": curve}
    suffix = "" if split.name == task.devs[0] else f"-{split.name}"
    path = run.folder / f"eval{suffix}.json"
    write_text(path, json.dumps(result, indent=1) + "\n")
    note = " (partial data: not the GLUE task)" if split.partial else ""
    print(f"\n{task.name} {split.name}{note}: {len(split)} examples; always the most frequent "
          f"label: {majority:.3f}\n\n{table(rows, metric, L)}\n\n{bars(rows[-1])}\n\nwrote {path}")


# --- From the command line ----------------------------------------------------------------------

def main(arguments=sys.argv[1:]):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     usage="%(prog)s RUN [OPTIONS]   (--help lists them)",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("run", help="the folder of a run that train.py made")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--thresholds", nargs="+", type=within(float, 0, 1e9), metavar="T",
           help="exit below these entropies (nats), in place of the usual ones and the *")
    either("--target-speedup", type=within(float, 1, 1e9), metavar="X",
           help="choose the threshold that just reaches X times fewer FLOPs on held-out data")
    add("--data-dir", help="folder with GLUE's files, if they have moved")
    add("--repeats", type=within(int, 0, 1000), default=3, help="timed passes after a first one")
    add("--device", default=DEVICES[0], choices=DEVICES, help="where to run")
    options = parser.parse_args(arguments)
    with one_line_errors("eval.py"):
        run, model = load_run(options.run, options.device)
        if options.data_dir is not None:
            run.settings.data_dir = options.data_dir
        with autocast(run.settings):
            evaluate(run, model, options)


if __name__ == "__main__":
    main()
