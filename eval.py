"""What a trained SmartBERT skips, where it exits, what that costs and how well it answers.

    python eval.py runs/toy                                   # the table, also in eval.json
    python eval.py runs/toy --target-speedup 2                # the threshold that halves the FLOPs
    python eval.py runs/toy --criteria --plot                 # other exit criteria; pictures
    python eval.py runs/toy --trace "king coin b ab"          # one sentence, layer by layer
    python eval.py runs/toy --predict sentences.txt           # answers for a file; - is stdin

The inference modes: *plain* (every layer and the last head), *skip* (gates only), *exit* (exits
only), *both*; and *pruned* (a LayerDrop model at a fixed depth). FLOPs are counted on real tokens,
with gates and heads. `evaluate` and `evaluate_split` tell the whole story; read them first.

Gates do not depend on the threshold, and an exit only ends a row's computation early. So two
passes over a split, with and without gates, evaluate all heads and never exit: the *walks*. `cut`
ends each row of a walk at its exit, so every threshold follows from two walks. A pruned model
needs a walk for each depth. N examples, L layers, C classes.
"""

import argparse
import importlib.util
import json
import math
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C: no traceback
import numpy as np
import torch

import data
import train
from data import Split, Task, UserError
from smartbert import (Criterion, Outcome, SmartBert, entropy, entropy_below, first_correct,
                       fixed_layer, flops, infer, kept_layers, patience, plain_flops,
                       probability_above)

MAX_DROP = 0.5      # points of score that exits at a chosen threshold may lose on held-out data
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)     # the table's thresholds, over ln C
GRID = 250          # thresholds that are tried on held-out data where the user names none
MODES = ("plain", "skip", "exit", "both", "pruned")
CRITERIA = {"entropy": entropy_below, "probability": probability_above, "patience": patience,
            "layer": fixed_layer, "oracle": first_correct}
never = entropy_below(0.0)      # the criterion of a walk: every head is asked, no row exits


# --- Operating points ---------------------------------------------------------------------------

@dataclass
class OperatingPoint:
    """An inference mode and the number that goes with it."""
    mode: str
    threshold: float | None = None          # the criterion's number, or depth; or None
    criterion: str = "entropy"              # a name in CRITERIA
    held_out: float | None = None           # the score on the held-out part of the training set
    held_out_flops: float | None = None     # share of plain's FLOPs there
    chosen: bool = False                    # whether `choose` selected this point

    def __str__(self) -> str:
        name = "patience" if self.criterion == "patience" else "threshold"
        name = "depth" if self.mode == "pruned" else name
        return self.mode + ("" if self.threshold is None else f" at {name} {self.threshold:g}")

    @property
    def gated(self) -> bool:
        return self.mode in ("skip", "both")

    @property
    def starred(self) -> bool:
        return self.chosen and self.threshold is not None

    @property
    def walk_key(self) -> bool | str:
        """Which walk it needs: with gates or without (a bool), or that of a pruned model."""
        return str(self) if self.mode == "pruned" else self.gated

    def kept(self, L: int) -> list[int] | None:
        """The layers (from 0) of a pruned model, None for all."""
        return kept_layers(int(self.threshold), L) if self.mode == "pruned" else None

    def exit_criterion(self, labels: torch.Tensor | None = None) -> Criterion | None:
        """None without exits. labels (N,): only the oracle needs them."""
        if self.mode not in ("exit", "both"):
            return None
        return CRITERIA[self.criterion](labels if self.criterion == "oracle" else self.threshold)


@dataclass(kw_only=True)
class Row(OperatingPoint):
    """An operating point and its figures: one line of the table, one entry of eval.json."""
    score: float
    scores: dict[str, float]        # all of the task's metrics; score is the first
    layers: float                   # run on average
    flops: float                    # share of plain's
    seconds: float = 0.0            # for the whole split
    skip_rate: list[float]          # of the rows that reached layer i, the share that skipped it
    exit_histogram: list[int]       # rows that exit after layer i; last: without early exit
    levels: list[dict]              # of the toy: examples, accuracy, layers of each level


def plan(settings: train.Settings, classes: int, L: int,
         thresholds: list[float] | None = None) -> list[OperatingPoint]:
    """A run's operating points, at these thresholds or at the usual ones of the method, from the
    most expensive on: shares of the largest entropy, every patience (PABEE), every depth
    (LayerDrop). Raises UserError for thresholds that the method does not have."""
    modes = []
    if settings.has_exits:
        modes = ["exit", "both"] if settings.has_gates else ["exit"]
    criterion, usual = "entropy", [round(share * math.log(classes), 3) for share in SHARES]
    if settings.method in ("pabee", "layerdrop"):
        usual = range(L - 1, 0, -1)
        if not set(thresholds or []) <= set(usual):
            raise UserError(f"--thresholds of {settings.method} are whole numbers from 1 to "
                            f"{L - 1}")
    if settings.method == "pabee":
        criterion = "patience"
    if settings.method == "layerdrop":
        modes = ["pruned"]
    if thresholds and not modes:
        raise UserError("this run has no exits: leave out --thresholds")
    points = [OperatingPoint("plain")]
    if settings.has_gates:
        points.append(OperatingPoint("skip"))
    for mode in modes:
        points += [OperatingPoint(mode, number, criterion) for number in thresholds or usual]
    return points


# --- Two walks, the cut, and what is measured ---------------------------------------------------

def walk(model: SmartBert, split: Split,
         points: list[OperatingPoint]) -> dict[bool | str, Outcome]:
    """The walks that these points need: with gates under True, without under False, and one for
    each pruned model."""
    batches, walks = train.pools(split, next(model.parameters()).device), {}
    for point in points:
        if point.walk_key not in walks:
            walks[point.walk_key] = train.predict(model, batches, point.gated, never,
                                                  point.kept(len(model.gates)))
    return walks


def cut(walked: Outcome, criterion: Criterion | None) -> Outcome:
    """The outcome that `infer` gives with this exit criterion (None: only the last head answers),
    from a walk. What lies beyond a row's exit becomes NaN."""
    N, L = walked.ran.shape
    leaves = torch.arange(1, L + 1).expand(N, L) == L                       # (N, L)
    for i in range(L - 1 if criterion else 0):
        asked = walked.ran[:, i].nonzero().squeeze(1)                       # (n,)
        leaves[asked, i] = criterion(walked.history[asked, :i + 1], asked)
    exits = leaves.int().argmax(1) + 1                                      # (N,), the first
    beyond = torch.arange(1, L + 1) > exits[:, None]                        # (N, L)
    history = walked.history.masked_fill(beyond[:, :, None], torch.nan)     # (N, L, C)
    if criterion is None:
        history[:, :-1] = torch.nan
    return Outcome(history[torch.arange(N), exits - 1], walked.ran & ~beyond, exits,
                   walked.gates.masked_fill(beyond, torch.nan), history)


def measure(model: SmartBert, split: Split, task: Task, walks: dict, point: OperatingPoint) -> Row:
    """The figures of an operating point, without seconds."""
    labels = torch.tensor(split.labels)                                     # (N,)
    outcome = cut(walks[point.walk_key], point.exit_criterion(labels))
    if point.criterion == "layer":              # a shallower BERT would not have asked these heads
        outcome.history[:, :int(point.threshold) - 1] = torch.nan
    L = outcome.ran.shape[1]
    tokens = torch.tensor([len(ids) for ids in split.ids])                  # (N,)
    layers, answers = outcome.ran.sum(1).float(), outcome.logits.argmax(1)  # (N,), (N,)
    scores = data.scores(task, answers.tolist(), split.labels)
    share = flops(model, tokens, outcome).sum() / plain_flops(model, tokens).sum()
    reached = outcome.exit[:, None] >= torch.arange(1, L + 1)               # (N, L)
    skipped = (reached & ~outcome.ran).sum(0) / reached.sum(0).clamp(min=1)     # (L,)
    levels = []
    for level in sorted(set(split.levels or [])):
        of = torch.tensor(split.levels) == level                            # (N,)
        right = (answers == labels)[of].float().mean()
        levels.append({"level": level, "examples": of.sum().item(), "accuracy": right.item(),
                       "layers": layers[of].mean().item()})
    return Row(**vars(point), score=scores[task.metrics[0]], scores=scores,
               layers=layers.mean().item(), flops=share.item(), skip_rate=skipped.tolist(),
               exit_histogram=outcome.exit.bincount(minlength=L + 1)[1:].tolist(), levels=levels)


def clock(model: SmartBert, split: Split, rows: list[Row], repeats: int) -> None:
    """Fill in each row's seconds: the median of `repeats` timed passes of dynamic inference, after
    one to warm up. The rows take turns."""
    device = next(model.parameters()).device
    batches, passes = train.pools(split, device), [[] for _ in rows]
    for _ in range(1 + repeats):
        for row, seconds in zip(rows, passes):
            start = time.perf_counter()
            for batch in batches:
                infer(model, batch.ids, batch.segment_ids, batch.mask, skip=row.gated,
                      criterion=row.exit_criterion(), layers=row.kept(len(model.gates)))
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    for row, seconds in zip(rows, passes):
        row.seconds = float(np.median(seconds[1:]))


# --- The choice of a threshold ------------------------------------------------------------------

def fine_grid(walks: dict, points: list[OperatingPoint]) -> list[OperatingPoint]:
    """The points among which to choose. Patience and depth: those given. Entropy: up to GRID
    for each mode, the quantiles of the entropies on these walks."""
    grid = [point for point in points if point.mode == "pruned" or point.criterion != "entropy"]
    for mode in dict.fromkeys(point.mode for point in points
                              if point.mode in ("exit", "both") and point not in grid):
        history = walks[mode == "both"].history[:, :-1].flatten(0, 1)       # (N (L - 1), C)
        values = entropy(history[~history[:, 0].isnan()]).double().numpy()
        if not len(values):                             # gates skip layers 1 .. L-1 of all rows
            continue
        quantiles = np.quantile(values, np.linspace(0, 1, GRID))
        thresholds = {float(f"{value:.4g}") for value in quantiles}
        grid += [OperatingPoint(mode, threshold) for threshold in sorted(thresholds)]
    return grid


def choose(points: list, max_drop: float = MAX_DROP, speedup: float | None = None) -> None:
    """Mark the cheapest point of each mode that loses at most max_drop points of held-out score
    against the same mode without exits; if none does, that of the best held-out score. With a
    target speed-up in FLOPs: the point with the most FLOPs that reaches it, else the cheapest.
    Mark none where nothing was held out, or where that mode without exits scores 0 or less."""
    if any(point.held_out is None for point in points):
        return
    without = {point.mode: point.held_out for point in points if point.threshold is None}
    for mode in dict.fromkeys(point.mode for point in points):
        alike = sorted([p for p in points if p.mode == mode], key=lambda p: p.held_out_flops)
        reference = without["skip" if mode == "both" else "plain"]
        if speedup:
            chosen = next((p for p in alike[::-1] if p.held_out_flops <= 1 / speedup), alike[0])
        else:
            good = [p for p in alike if p.held_out >= reference - max_drop / 100]
            chosen = good[0] if good else max(alike, key=lambda point: point.held_out)
        for point in alike:
            point.chosen = reference > 0 and point is chosen


# --- The table, and exit criteria side by side --------------------------------------------------

def table(rows: list[Row], metric: str, layers: int) -> str:
    """The rows as text. Speed-ups are plain's FLOPs or seconds over the row's."""
    lines = [f"mode   threshold {metric:>9}  held-out  layers   FLOPs  speed-up in FLOPs"
             f"  in seconds"]
    notes = [f"({layers} layers; FLOPs with gates and heads, plain: 1; * chosen on held-out data)"]
    for row in rows:
        threshold = "" if row.threshold is None else f"{row.threshold:g}"
        held = "" if row.held_out is None else f"{row.held_out:.3f}"
        seconds = f"{rows[0].seconds / row.seconds:.2f}x" if row.seconds else ""
        star = " *" * row.starred
        lines.append(f"{row.mode:<6} {threshold:>9} {row.score:>9.3f} {held:>9} {row.layers:>7.2f}"
                     f" {row.flops:>7.3f} {1 / row.flops:>17.2f}x {seconds:>11}{star}")
        if star:
            notes.append(f"* {row}: {1 / row.held_out_flops:.2f}x in FLOPs on the held-out data")
    return "\n".join(lines + notes)


def bars(row: Row) -> str:
    """Skip rate and exits of each layer, as bars; and the toy's levels."""
    lines = ["layer  skipped by those who reached it     exited after it"]
    for i, (skipped, count) in enumerate(zip(row.skip_rate, row.exit_histogram), 1):
        if not any(row.exit_histogram[i - 1:]):
            lines.append(f"{i:>5}  not reached")
            continue
        exited = count / sum(row.exit_histogram)
        lines.append(f"{i:>5}  {'#' * round(20 * skipped):<20} {skipped:>4.0%}     "
                     f"{'#' * round(20 * exited):<20} {exited:>4.0%}")
    if row.levels:
        lines += ["", "level  examples  accuracy  layers run"]
    for each in row.levels:
        lines.append("{level:>5}  {examples:>8}  {accuracy:>8.3f}  {layers:>10.2f}".format(**each))
    return "\n".join(lines)


def warnings(rows: list[Row], majority: float, speedup: float | None = None) -> list[str]:
    """What a reader of the table should know first. majority: the score of the majority class."""
    found, early = [], [row for row in rows if row.mode in ("exit", "both")]
    for row in rows:
        if row.mode == "skip" and set(row.skip_rate) <= {0, 1}:
            found.append("every example skips the same layers, or none: the gates do not choose")
        if row.mode == "exit" and sum(row.exit_histogram) in row.exit_histogram[:-1]:
            found.append(f"{row}: every example exits at layer {row.layers:g}")
        if row.starred and speedup and row.held_out_flops > 1 / speedup:
            found.append(f"{row.mode}: no threshold reaches --target-speedup {speedup:g}")
    if early and not any(sum(row.exit_histogram[:-1]) for row in early):
        found.append("no example ever exits early: the thresholds are too strict")
    if rows[-1].threshold is not None and not any(row.starred for row in rows):
        found.append("nothing was held out, or no held-out score is above 0: no threshold chosen")
    poor = [str(row) for row in rows if row.score <= majority]
    if poor:
        names = "all rows" if len(poor) == len(rows) else ", ".join(poor)
        found.append(f"no better than the majority class ({majority:.3f}): {names}")
    return found


def criteria(model: SmartBert, split: Split, task: Task, walks: dict[bool, Outcome]) -> list[Row]:
    """Every criterion over a sweep of its number, without gates; last the oracle."""
    L, C = len(model.gates), len(task.labels)
    share = np.linspace(0.01, 0.99, 50)         # of the way from certainty to a guess
    nats, p = share * math.log(C), 1 - share * (1 - 1 / C)
    sweeps = {"entropy": nats.tolist(), "probability": p.tolist(), "patience": range(1, max(L, 2)),
              "layer": range(1, L + 1), "oracle": [None]}
    return [measure(model, split, task, walks, OperatingPoint("exit", number, name))
            for name, numbers in sweeps.items() for number in numbers]


def at_cost(points: list[tuple[float, float]], cost: float) -> float:
    """The score at a share of plain's FLOPs, interpolated between the two nearest points (flops,
    score); NaN outside."""
    return float(np.interp(cost, *zip(*sorted(points)), left=np.nan, right=np.nan))


def criteria_table(rows: list[Row]) -> str:
    """Score of every criterion at the same cost; the oracle has only one."""
    *others, oracle = rows
    costs = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
    lines = ["score at FLOPs" + "".join(f"{cost:>8}" for cost in costs) + "  (no gates)"]
    for name in dict.fromkeys(row.criterion for row in others):
        points = [(row.flops, row.score) for row in others if row.criterion == name]
        cells = "".join(f"{at_cost(points, cost):>8.3f}" for cost in costs)
        lines.append(f"{name:<14}" + cells.replace("nan", "  -"))
    lines.append(f"oracle: {oracle.score:.3f} at {oracle.flops:.3f} (no criterion scores higher)")
    return "\n".join(lines)


# --- A run, evaluated ---------------------------------------------------------------------------

def evaluate(arguments: argparse.Namespace, settings: train.Settings, model: SmartBert) -> None:
    """Choose the thresholds on held-out data, then evaluate each dev set. Raises UserError."""
    folder, task = Path(arguments.run), data.find_task(settings.task)
    points = plan(settings, len(task.labels), len(model.gates), arguments.thresholds)
    if (arguments.plot or arguments.criteria) and not settings.has_exits:
        raise UserError(f"{folder} has no trained exit heads: nothing to plot or compare")
    if arguments.target_speedup and points[-1].threshold is None:
        raise UserError(f"{folder} has no exits: leave out --target-speedup")
    splits = data.load_task(task.name, arguments.data_dir or settings.data_dir, settings.cache)
    _, held, identity = train.split_training_set(splits["train"], settings)
    train.check_data(folder, identity)
    tokenizer = data.load_tokenizer(folder)
    if held:
        held = data.encode(tokenizer, held, settings.max_length)
        walks = walk(model, held, points)
        grid = [] if arguments.thresholds else fine_grid(walks, points)
        tried = points + [point for point in grid if point not in points]
        for point in tried:
            row = measure(model, held, task, walks, point)
            point.held_out, point.held_out_flops = row.score, row.flops
        choose(tried, arguments.max_drop, arguments.target_speedup)
        points += [point for point in tried if point.chosen and point not in points]
        points.sort(key=lambda point: (MODES.index(point.mode), point.threshold or 0))
    for name in task.devs:
        split = data.encode(tokenizer, splits[name], settings.max_length)
        split.partial |= identity["partial"]
        evaluate_split(arguments, settings, model, name, split, points)


def evaluate_split(arguments: argparse.Namespace, settings: train.Settings, model: SmartBert,
                   name: str, split: Split, points: list[OperatingPoint]) -> None:
    """Measure, print and store one dev set; draw it where asked."""
    task = data.find_task(settings.task)
    metric, first = task.metrics[0], name == task.devs[0]
    walks = walk(model, split, points)
    rows = [measure(model, split, task, walks, point) for point in points]
    if arguments.repeats:
        train.say(f"timing {len(rows)} rows, {1 + arguments.repeats} passes each (--repeats 0: "
                  f"leave this out)", sys.stderr)
        clock(model, split, rows, arguments.repeats)
    # for pictures and tables of several runs; nothing is chosen here
    curve = [measure(model, split, task, walks, point) for point in fine_grid(walks, points)]
    compared = criteria(model, split, task, walks) if arguments.criteria else []
    majority = data.majority(task, split.labels)[metric]
    chosen = [row for row in rows if row.chosen and row.mode == rows[-1].mode]      # one or none
    best = chosen[0] if chosen else rows[0]
    note = " (partial data: not the GLUE task)" if split.partial else ""
    print(f"\n{task.name} {name}{note}: {len(split)} examples; always the most frequent label: "
          f"{majority:.3f}\n")
    print(f"{table(rows, metric, len(model.gates))}\n\n{best}:\n{bars(best)}")
    for warning in warnings(rows, majority, arguments.target_speedup):
        print(f"warning: {warning}")
    result = {"task": task.name, "split": name, "partial": split.partial, "metric": metric,
              "examples": len(split), "majority": majority, "layers": len(model.gates),
              "device": next(model.parameters()).device.type,
              "settings": train.of_result(settings), "rows": [vars(row) for row in rows],
              "curve": [{"mode": row.mode, "threshold": row.threshold, "score": row.score,
                         "flops": row.flops} for row in curve]}
    if compared:
        result["criteria"] = [vars(row) for row in compared]
        print(f"\n{criteria_table(compared)}")
    path = Path(arguments.run) / ("eval.json" if first else f"eval-{name}.json")
    data.write_json(path, result)
    used = f"; --predict and --trace now take {best}" if first and chosen else ""
    print(f"\nwrote {path}{used}")
    if arguments.plot and first:
        from lesson import pictures                     # here: nothing else needs matplotlib
        outcome = cut(walks[best.walk_key], best.exit_criterion())
        pictures.plot(path.parent, task.name, rows, curve, best, outcome, compared, metric)


# --- One example, layer by layer ----------------------------------------------------------------

def trace(model: SmartBert, tokens: torch.Tensor, outcome: Outcome, labels: tuple) -> str:
    """The one row of an outcome, layer by layer. tokens (1,): its length; labels: class names."""
    gates, ran, history = outcome.gates[0], outcome.ran[0], outcome.history[0]  # (L,) (L,) (L, C)
    asked, met = ~gates.isnan(), ~history[:, 0].isnan()                     # (L,), (L,)
    share = flops(model, tokens, outcome)[0].cumsum(0) / plain_flops(model, tokens)     # (L,)
    p, c = history.softmax(1).max(1)                                        # (L,), (L,)
    exit, L = outcome.exit[0] - 1, len(ran)
    title = "gate" if asked.any() else ""
    lines = [f"layer  {title:<5}  what         head's answer        entropy   FLOPs"]
    for i in range(L):
        what = "ran" if ran[i] else "skipped"
        if i >= exit and exit < L - 1:
            what = "ran, exited" if i == exit else "not reached"
        gate = f"{gates[i]:.3f}" if asked[i] else ""
        said = f"{labels[c[i]]:<14} {p[i]:>4.0%} {entropy(history[i]):>8.3f}" if met[i] else ""
        spent = "" if what == "not reached" else f"{share[i]:.1%}"
        lines.append(f"{i + 1:>5}  {gate:<5}  {what:<11}  {said:<28} {spent:>7}".rstrip())
    answer = f"answer: {labels[c[exit]]} ({p[exit]:.0%}), {ran.sum()} of {L} layers run"
    return "\n".join([*lines, answer])


def look_inside(arguments: argparse.Namespace, settings: train.Settings, model: SmartBert) -> None:
    """--trace and --predict, at the first of --thresholds, else at the threshold that the last
    evaluation chose, else at the most expensive one."""
    folder, task, chosen = Path(arguments.run), data.find_task(settings.task), []
    points = plan(settings, len(task.labels), len(model.gates), arguments.thresholds)
    path = folder / "eval.json"
    if path.is_file() and not arguments.thresholds:
        try:
            rows = [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged: evaluate the run again")
        chosen = [row for row in rows if row.chosen]
    point = next(point for point in chosen + points if point.mode == points[-1].mode)
    tokenizer = data.load_tokenizer(folder)
    split = data.own_examples(task, arguments.trace, arguments.predict)
    split = data.encode(tokenizer, split, settings.max_length)
    for text in dict.fromkeys(text for pair in split.texts for text in pair if text):
        row = tokenizer.encode(text)
        words = [text[a:b] for token, (a, b) in zip(row.tokens, row.offsets) if token == "[UNK]"]
        if words:
            print(f"warning: not in the vocabulary: {', '.join(words)[:200]}", file=sys.stderr)
    outcome = cut(walk(model, split, [point])[point.walk_key], point.exit_criterion())
    if arguments.trace:
        tokens = torch.tensor([len(split.ids[0])])                          # (1,)
        print(f"{trace(model, tokens, outcome, task.labels)}; {point}")
        return
    print(f"({point})", file=sys.stderr)
    for logits, ran in zip(outcome.logits, outcome.ran):                    # (C,), (L,)
        print(f"{task.labels[logits.argmax()]}\t{logits.softmax(0).max():.3f}\t{ran.sum()}")


# --- From the command line ----------------------------------------------------------------------

def number_from(low: int, kind: type = float):
    """An argparse type: a finite number from low up."""
    def number(text: str) -> float:
        if not low <= kind(text) < math.inf:            # false for NaN as well
            raise argparse.ArgumentTypeError(f"{text}: give a number from {low} up")
        return kind(text)
    return number


def main(arguments: list[str] | None = None) -> None:
    train.open_streams()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     usage="%(prog)s RUN [OPTIONS]   (--help lists them)")
    add = parser.add_argument
    add("run", help="the folder of a run that train.py made")
    add("--thresholds", nargs="+", type=number_from(0), metavar="T",
        help="exit below these entropies (nats); PABEE: patience; LayerDrop: depth")
    add("--max-drop", type=number_from(0), default=MAX_DROP, metavar="POINTS",
        help="held-out score that exits may lose (default %(default)s)")
    add("--target-speedup", type=number_from(1), metavar="X",
        help="choose the threshold that just reaches X times fewer FLOPs on held-out data")
    add("--criteria", action="store_true", help="compare entropy with other exit criteria")
    add("--plot", action="store_true", help="write PNG files to the folder (needs matplotlib)")
    add("--data-dir", help="folder with GLUE's files; default: where the run was trained from")
    add("--repeats", type=number_from(0, int), default=3,
        help="timed passes of a row, 0: none (default %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--trace", nargs="+", metavar="TEXT", help="show a sentence, or a pair, layer by layer")
    add("--predict", metavar="FILE", help="label, probability and layers of each line (-: stdin)")
    asked = parser.parse_args(arguments)
    looks = asked.trace or asked.predict is not None
    if looks and (asked.target_speedup or asked.plot or asked.criteria):
        parser.error("--trace and --predict go by --thresholds; --plot, --criteria and "
                     "--target-speedup belong to a run's table")
    if asked.plot and not importlib.util.find_spec("matplotlib"):       # said before the work
        parser.error("--plot needs the package matplotlib: python -m pip install matplotlib")
    try:
        device = train.pick_device(asked.device)
        settings, model = train.load_run(asked.run, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):    # as trained
            (look_inside if looks else evaluate)(asked, settings, model)
    except BrokenPipeError:                             # its reader has read enough: | head
        sys.stdout = None
    except torch.cuda.OutOfMemoryError:
        print("eval.py: the GPU's memory is too small: take --device cpu", file=sys.stderr)
        sys.exit(2)
    except (UserError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
