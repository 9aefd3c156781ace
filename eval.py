"""What a trained SmartBERT skips, where it exits, what that costs and how well it answers.

    python eval.py runs/toy                                   # the table, also in eval.json
    python eval.py runs/toy --target-speedup 2                # the threshold that halves the FLOPs
    python eval.py runs/toy --criteria --plot                 # other exit criteria; pictures
    python eval.py runs/toy --trace "the cat is not kind"     # one sentence, layer by layer
    python eval.py runs/toy --predict sentences.txt           # answers for a file; - is stdin

There are four inference modes: *plain* (every layer and the last head), *skip* (gates only),
*exit* (exits only) and *both*. Thresholds are chosen on the held-out part of the training set.
FLOPs are counted on real tokens, with gates and heads. Seconds are the median of several passes.

Gates do not depend on the threshold, and an exit only ends a row's computation early. So two
passes over a split, with and without gates, evaluate all heads and never exit. The results at
every threshold follow from these two passes.
"""

import argparse
import importlib.util
import json
import math
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C before main: no traceback
import numpy as np
import torch

import data
import train
from data import Split, Task, UserError
from smartbert import (Criterion, Outcome, SmartBert, auxiliary_flops, entropy, entropy_below,
                       first_correct, fixed_layer, flops, infer, layer_flops, patience,
                       plain_flops, probability_above)

MAX_DROP = 0.5      # points of score that exits at a chosen threshold may lose on held-out data
GRID = 250          # thresholds that are tried on held-out data where the user names none
MODES = ("plain", "skip", "exit", "both")
CRITERIA = {"entropy": entropy_below, "probability": probability_above, "patience": patience,
            "layer": fixed_layer}


# --- One operating point ------------------------------------------------------------------------

@dataclass
class OperatingPoint:
    """An inference mode and, where it has exits, the number that its exit criterion takes.
    criterion: a name in CRITERIA, or oracle."""
    mode: str
    threshold: float | None = None
    criterion: str = "entropy"

    def __str__(self) -> str:
        at = "" if self.threshold is None else f" at threshold {self.threshold:g}"
        return self.mode + at

    @property
    def gated(self) -> bool:
        return self.mode in ("skip", "both")

    def exits(self, labels: torch.Tensor) -> Criterion | None:
        """Its exit criterion, or None without exits. labels (N,): only the oracle sees them."""
        if self.mode in ("plain", "skip"):
            return None
        if self.criterion == "oracle":
            return first_correct(labels)
        return CRITERIA[self.criterion](self.threshold)


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
    levels: list[dict] | None       # of the toy: examples, accuracy, layers of each level
    held_out: float | None = None   # the score on the held-out part of the training set
    held_out_flops: float | None = None     # share of plain's FLOPs there
    chosen: bool = False            # whether `choose` selected this row


def never(history: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The exit criterion of a walk: every head is asked, no row exits."""
    return torch.zeros_like(rows, dtype=torch.bool)


def walk(model: SmartBert, split: Split, points: list[OperatingPoint]) -> dict[bool, Outcome]:
    """An encoded split run to its end with all heads asked: with gates under True, without under
    False, as far as the points need them."""
    batches = train.pools(split, next(model.parameters()).device)
    return {gated: train.predict(model, batches, gated, never)
            for gated in sorted({point.gated for point in points})}


def cut(walked: Outcome, criterion: Criterion | None) -> Outcome:
    """The outcome that `infer` gives with this exit criterion, from a walk without exits.

    The criterion decides after each layer that a row ran, except the last. Everything after the
    exit becomes NaN. criterion None: only the last head answers.
    """
    N, L = walked.ran.shape
    exits, inside = torch.full((N,), L), torch.ones(N, dtype=torch.bool)
    for i in range(L - 1 if criterion else 0):
        asked = (inside & walked.ran[:, i]).nonzero().squeeze(1)            # (n,)
        leaving = asked[criterion(walked.history[asked, :i + 1], asked)]
        exits[leaving] = i + 1
        inside[leaving] = False
    beyond = torch.arange(1, L + 1) > exits[:, None]                        # (N, L)
    history = walked.history.masked_fill(beyond[:, :, None], torch.nan)     # (N, L, C)
    if criterion is None:
        history[:, :-1] = torch.nan
    return Outcome(history[torch.arange(N), exits - 1], walked.ran & ~beyond, exits,
                   walked.gates.masked_fill(beyond, torch.nan), history)


def outcome_of(walks: dict[bool, Outcome], split: Split, point: OperatingPoint) -> Outcome:
    """What happens to a split at an operating point, from its walks."""
    return cut(walks[point.gated], point.exits(torch.tensor(split.labels)))


def measure(model: SmartBert, split: Split, task: Task, walks: dict[bool, Outcome],
            point: OperatingPoint) -> Row:
    """The figures of an operating point, without seconds and held-out figures."""
    outcome = outcome_of(walks, split, point)
    if point.criterion == "layer":              # a shallower BERT would not have asked these heads
        outcome.history[:, :int(point.threshold) - 1] = torch.nan
    N, L = outcome.ran.shape
    tokens = torch.tensor([len(ids) for ids in split.ids])                  # (N,)
    layers, answers = outcome.ran.sum(1).float(), outcome.logits.argmax(1)  # (N,), (N,)
    scores = data.scores(task, answers.tolist(), split.labels)
    share = flops(model, tokens, outcome).sum() / plain_flops(model, tokens).sum()
    reached = outcome.exit[:, None] >= torch.arange(1, L + 1)               # (N, L)
    skipped = (reached & ~outcome.ran).sum(0) / reached.sum(0).clamp(min=1)
    right = (answers == torch.tensor(split.labels)).float()                 # (N,)
    level, levels = torch.tensor(split.levels or []), []                    # (N,) or empty
    for k in level.unique().tolist():
        of = level == k
        levels.append({"level": k, "examples": of.sum().item(),
                       "accuracy": right[of].mean().item(), "layers": layers[of].mean().item()})
    return Row(**vars(point), score=scores[task.metrics[0]], scores=scores,
               layers=layers.mean().item(), flops=share.item(), skip_rate=skipped.tolist(),
               exit_histogram=outcome.exit.bincount(minlength=L + 1)[1:].tolist(), levels=levels)


def clock(model: SmartBert, split: Split, rows: list[Row], repeats: int) -> None:
    """Fill in each row's seconds: the median of `repeats` timed passes of real dynamic inference,
    after one warm-up pass. All rows take turns in each pass."""
    device = next(model.parameters()).device
    batches = train.pools(split, device)

    def seconds(row: Row) -> float:
        start = time.perf_counter()
        for batch in batches:
            infer(model, batch.ids, batch.segment_ids, batch.mask, skip=row.gated,
                  criterion=row.exits(batch.labels))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    if repeats:
        rounds = [[seconds(row) for row in rows] for _ in range(1 + repeats)]
        for row, times in zip(rows, zip(*rounds[1:])):
            row.seconds = statistics.median(times)


# --- The choice of a threshold ------------------------------------------------------------------

def fine_grid(walks: dict[bool, Outcome], points: list[OperatingPoint]) -> list[OperatingPoint]:
    """The points' modes, each with exits at GRID thresholds: quantiles of the entropies that the
    heads gave on these walks, so that about equally many answers lie between two neighbours."""
    grid = []
    for mode in dict.fromkeys(point.mode for point in points):
        if mode in ("plain", "skip"):
            grid.append(OperatingPoint(mode))
            continue
        history = walks[mode == "both"].history[:, :-1].flatten(0, 1)       # (N (L - 1), C)
        values = entropy(history[~history[:, 0].isnan()]).double().numpy()
        if len(values):                                 # none where every layer is skipped
            quantiles = np.quantile(values, np.linspace(0, 1, GRID))
            rounded = sorted({float(f"{value:.4g}") for value in quantiles})
            grid += [OperatingPoint(mode, threshold) for threshold in rounded]
    return grid


def choose(rows: list[Row], max_drop: float = MAX_DROP, speedup: float | None = None) -> None:
    """Mark one row of each mode by its held-out figures; none without held-out data or where every
    score there is 0 (too few examples for F1 or Matthews).

    Without a target: the cheapest row that loses at most max_drop points, compared with the same
    mode without exits; else the best. With a target speed-up in FLOPs: the row with the most FLOPs
    that still reaches it, else the cheapest.
    """
    if any(row.held_out is None for row in rows) or not any(row.held_out for row in rows):
        return
    without = {row.mode: row.held_out for row in rows if row.threshold is None}
    for mode in dict.fromkeys(row.mode for row in rows):
        alike = [row for row in rows if row.mode == mode]
        alike.sort(key=lambda row: row.held_out_flops)
        if speedup:
            fast = [row for row in alike if row.held_out_flops <= 1 / speedup]
            chosen = fast[-1] if fast else alike[0]
        else:
            floor = without["skip" if mode == "both" else "plain"] - max_drop / 100
            good = [row for row in alike if row.held_out >= floor]
            chosen = good[0] if good else max(alike, key=lambda row: row.held_out)
        for row in alike:
            row.chosen = row is chosen


def measure_held_out(model: SmartBert, held: Split, task: Task, points: list[OperatingPoint],
                     arguments: argparse.Namespace) -> list[Row]:
    """The points measured on the held-out part, the one that `choose` takes of each mode marked.
    Where the user named no thresholds it chooses from a fine grid, and its choice joins the
    points."""
    walks = walk(model, held, points)
    grid = [] if arguments.thresholds else fine_grid(walks, points)
    tried = points + [point for point in grid if point not in points]
    rows = [measure(model, held, task, walks, point) for point in tried]
    for row in rows:
        row.held_out, row.held_out_flops = row.score, row.flops
    choose(rows, arguments.max_drop, arguments.target_speedup)
    kept = [row for point, row in zip(tried, rows) if row.chosen or point in points]
    return sorted(kept, key=lambda row: (MODES.index(row.mode), row.threshold or 0))


# --- The table ----------------------------------------------------------------------------------

def table(rows: list[Row], metric: str, layers: int) -> str:
    """The rows as text. Speed-ups are plain's FLOPs or seconds over the row's."""
    lines = [f"{'mode':<6} {'threshold':>9} {metric:>9} {'held-out':>9} {'layers':>7} {'FLOPs':>7}"
             f" {'speed-up in FLOPs':>18} {'in seconds':>11}"]
    notes = [f"(layers of {layers}; FLOPs as a share of plain BERT, gates and heads counted; "
             f"* chosen on held-out data)"]
    for row in rows:
        threshold = "" if row.threshold is None else f"{row.threshold:g}"
        held = "" if row.held_out is None else f"{row.held_out:.3f}"
        seconds = f"{rows[0].seconds / row.seconds:.2f}x" if row.seconds else ""
        star = " *" if row.chosen and threshold else ""
        lines.append(f"{row.mode:<6} {threshold:>9} {row.score:>9.3f} {held:>9} {row.layers:>7.2f}"
                     f" {row.flops:>7.3f} {1 / row.flops:>17.2f}x {seconds:>11}{star}")
        if star:
            notes.append(f"* {row}: {1 / row.held_out_flops:.2f}x in FLOPs on the held-out data")
    return "\n".join(lines + notes)


def bars(row: Row) -> str:
    """Skip rate and exits of each layer, as bars; and the toy's levels."""
    lines = ["layer  skipped by those who reached it     exited after it"]
    total = sum(row.exit_histogram)
    for i, (skipped, count) in enumerate(zip(row.skip_rate, row.exit_histogram), 1):
        lines.append(f"{i:>5}  {'#' * round(20 * skipped):<20} {skipped:>4.0%}     "
                     f"{'#' * round(20 * count / total):<20} {count / total:>4.0%}")
    if row.levels:
        lines += ["", "level  examples  accuracy  layers run"]
    for each in row.levels or []:
        lines.append("{level:>5}  {examples:>8}  {accuracy:>8.3f}  {layers:>10.2f}".format(**each))
    return "\n".join(lines)


def warnings(rows: list[Row], majority: float, speedup: float | None = None) -> Iterator[str]:
    """What a reader of the table should know first. majority: the score of the majority class."""
    exits = [row for row in rows if row.mode == "exit"]
    for row in rows:
        if row.mode == "skip" and not any(row.skip_rate):
            yield "no layer is ever skipped: the gates learned nothing, or the budget is 1"
        elif row.mode == "skip" and set(row.skip_rate) <= {0, 1}:
            yield "every example skips the same layers: the gates became a smaller fixed BERT"
        starred = row.chosen and row.threshold is not None
        if speedup and starred and row.held_out_flops > 1 / speedup:
            yield (f"{row.mode}: no threshold reaches --target-speedup {speedup:g}; the cheapest"
                   f" is taken, at {1 / row.held_out_flops:.2f}x in FLOPs")
    for row in exits:
        used = [layer for layer, count in enumerate(row.exit_histogram, 1) if count]
        if len(used) == 1 and used[0] < len(row.exit_histogram):
            yield f"at threshold {row.threshold:g} every example exits at layer {used[0]}"
    if exits and not any(sum(row.exit_histogram[:-1]) for row in exits):
        yield "no example ever exits early: the thresholds are too low"
    if exits and exits[0].held_out is None:
        yield "nothing was held out of the training set, so no threshold could be chosen"
    elif exits and not any(row.held_out for row in rows):
        yield ("every score on the held-out examples is 0, so no threshold could be chosen: "
               "hold out more of them")
    poor = [str(row) for row in rows if row.score <= majority]
    if poor:
        shown = ", ".join(poor[:3]) + ", ..." * (len(poor) > 3)
        names = "all rows" if len(poor) == len(rows) else shown
        yield f"no better than always answering the majority class ({majority:.3f}): {names}"


# --- Exit criteria side by side -----------------------------------------------------------------

def criteria(model: SmartBert, split: Split, task: Task, walks: dict[bool, Outcome]) -> list[Row]:
    """Every criterion over a sweep of its number, exits only, on the same heads; last the
    oracle."""
    L, C = len(model.gates), len(task.labels)
    share = np.linspace(0.01, 0.99, 50)         # of the way from certainty to a guess
    nats, p = share * math.log(C), 1 - share * (1 - 1 / C)
    sweeps = {"entropy": nats.tolist(), "probability": p.tolist(), "patience": range(1, max(L, 2)),
              "layer": range(1, L + 1), "oracle": [None]}
    points = [OperatingPoint("exit", number, name)
              for name, numbers in sweeps.items() for number in numbers]
    return [measure(model, split, task, walks, point) for point in points]


def at_cost(points: list[tuple[float, float]], cost: float) -> float:
    """The score at a share of plain's FLOPs, between two of the points (flops, score); NaN
    outside."""
    return float(np.interp(cost, *zip(*sorted(points)), left=np.nan, right=np.nan))


def criteria_table(rows: list[Row]) -> str:
    """Score of every criterion at the same cost."""
    costs, oracle = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8), rows[-1]
    lines = ["exit criteria, score at the same FLOPs (share of plain BERT; no gates)",
             "criterion    " + "".join(f"{cost:>8}" for cost in costs)]
    for name in CRITERIA:
        points = [(row.flops, row.score) for row in rows if row.criterion == name]
        cells = "".join(f"{at_cost(points, cost):>8.3f}" for cost in costs)
        lines.append(f"{name:<13}" + cells.replace("nan", "  -"))
    lines.append(f"the oracle reaches {oracle.score:.3f} at {oracle.flops:.3f}: no criterion over "
                 f"these heads is right more often")
    return "\n".join(lines)


# --- One example, layer by layer ----------------------------------------------------------------

def trace(model: SmartBert, tokens: torch.Tensor, outcome: Outcome,
          labels: tuple[str, ...]) -> str:
    """The single row of an outcome as text: for each layer its gate, whether it ran, its head's
    answer and entropy (nats), and the FLOPs so far as a share of plain BERT's.

    tokens (1,): its length; labels: the names of the classes.
    """
    layer, total = layer_flops(model, tokens), plain_flops(model, tokens)
    gate, head = auxiliary_flops(model.gates[0], tokens), auxiliary_flops(model.heads[0], tokens)
    L, cost = len(model.gates), 0
    lines = ["layer   gate               what          head's answer          entropy   FLOPs"]
    for i in range(1, L + 1):
        g, ran, logits = outcome.gates[0, i - 1], outcome.ran[0, i - 1], outcome.history[0, i - 1]
        asked, met = not g.isnan(), not logits[0].isnan()
        cost = cost + asked * gate + ran * layer + met * head
        bar = f"{g:.3f} {'#' * round(10 * g.item())}" if asked else ""
        if i > outcome.exit[0]:
            what = "not reached"
        elif not ran:
            what = "skipped"
        else:
            what = "ran, exited" if i == outcome.exit[0] and i < L else "ran"
        answer, share = "", ""
        if met:
            name, p = labels[logits.argmax()], logits.softmax(0).max()
            answer = f"{name:<14} {p:>4.0%} {entropy(logits):>10.3f}"
        if what != "not reached":
            share = f"{(cost / total).item():>14.1%}"
        lines.append(f"{i:>5}   {bar:<16}   {what:<13} {answer:<30} {share}".rstrip())
    p, answer = outcome.logits[0].softmax(0).max(0)
    lines.append(f"answer: {labels[answer]} ({p:.0%}), {outcome.ran.sum()} of {L} layers run")
    return "\n".join(lines)


def last_choice(folder: Path, points: list[OperatingPoint]) -> OperatingPoint:
    """The point that the last evaluation chose in the run's last mode, else that mode's first
    point. Raises UserError."""
    path, mode = folder / "eval.json", points[-1].mode
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
        for row in rows:
            if row["mode"] == mode and row["chosen"]:
                return OperatingPoint(mode, row["threshold"] and float(row["threshold"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: evaluate the run again")
    return next(point for point in points if point.mode == mode)


def look_inside(arguments: argparse.Namespace, settings: train.Settings, model: SmartBert) -> None:
    """--trace, --trace-examples and --predict. Raises UserError."""
    folder, task = Path(arguments.run), data.find_task(settings.task)
    points = plan(arguments, settings, len(task.labels))
    if arguments.thresholds:
        point = next(point for point in points if point.mode == points[-1].mode)
    else:
        point = last_choice(folder, points)
    tokenizer, n = data.load_tokenizer(folder), arguments.trace_examples
    if n:
        split = data.load_task(task.name, arguments.data_dir or settings.data_dir,
                               settings.cache)[task.devs[0]]
    else:
        split = data.own_examples(task, arguments.trace, arguments.predict)
    split = data.encode(tokenizer, split, settings.max_length)
    unknown = sum(tokenizer.token_to_id("[UNK]") in ids for ids in split.ids)
    if unknown and not n:
        print(f"warning: {unknown} of {len(split)} examples hold words that are not in the "
              f"vocabulary", file=sys.stderr)
    outcome = outcome_of(walk(model, split, [point]), split, point)
    if arguments.predict is None:
        show(model, split, task, point, outcome, n)
        return
    print(f"({point})", file=sys.stderr)
    for logits, ran in zip(outcome.logits, outcome.ran):
        print(f"{task.labels[logits.argmax()]}\t{logits.softmax(0).max():.3f}\t{ran.sum()}")


def show(model: SmartBert, split: Split, task: Task, point: OperatingPoint, outcome: Outcome,
         n: int | None) -> None:
    """Print the trace of every row, or of a labelled split the n rows that ran the fewest layers
    and the n that ran the most, none twice."""
    order = outcome.ran.sum(1).argsort(stable=True).tolist()
    for i in order[:n] + order[n:][-n:] if n else order:
        if n:
            texts = " | ".join(text for text in split.texts[i] if text)
            print(f"\nlabel {task.labels[split.labels[i]]}: {texts}")
        one = Outcome(*(value[i:i + 1] for value in vars(outcome).values()))
        print(f"{trace(model, torch.tensor([len(split.ids[i])]), one, task.labels)}; {point}")


# --- A run, evaluated ---------------------------------------------------------------------------

def plan(arguments: argparse.Namespace, settings: train.Settings, classes: int) -> list[OperatingPoint]:
    """The rows of the table: the modes that a run has, at the thresholds asked for, or at shares
    of the largest entropy of so many classes."""
    shares = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
    thresholds = arguments.thresholds or [round(share * math.log(classes), 3) for share in shares]
    exits = settings.method == "smartbert" and settings.epochs2 > 0
    points = [OperatingPoint("plain")]
    if settings.has_gates:
        points.append(OperatingPoint("skip"))
    if exits:
        points += [OperatingPoint("exit", threshold) for threshold in thresholds]
    if settings.has_gates and exits:
        points += [OperatingPoint("both", threshold) for threshold in thresholds]
    return points


def read_splits(arguments: argparse.Namespace, settings: train.Settings) -> dict[str, Split]:
    """The dev sets of a run's task and, under "train", the held-out part of its training set,
    encoded as in training. Raises UserError."""
    folder, data_dir = Path(arguments.run), arguments.data_dir or settings.data_dir
    splits = data.load_task(settings.task, data_dir, settings.cache)
    _, held, identity = train.split_training_set(splits["train"], settings)
    train.check_data(folder, identity)
    tokenizer, splits["train"] = data.load_tokenizer(folder), held
    return {name: data.encode(tokenizer, split, settings.max_length)
            for name, split in splits.items()}


def evaluate(arguments: argparse.Namespace, settings: train.Settings, model: SmartBert) -> None:
    """Print and store a run's table for each dev set of its task. Raises UserError."""
    folder, task = Path(arguments.run), data.find_task(settings.task)
    points = plan(arguments, settings, len(task.labels))
    if (arguments.plot or arguments.criteria) and points[-1].threshold is None:
        raise UserError(f"{folder} is a plain BERT or had no phase 2: it lacks the exit heads "
                        f"that --plot and --criteria need")
    splits = read_splits(arguments, settings)
    held, held_out_rows = splits["train"], []
    if held:
        held_out_rows = measure_held_out(model, held, task, points, arguments)
        points = [OperatingPoint(row.mode, row.threshold) for row in held_out_rows]
    for name in task.devs:
        split, metric, first = splits[name], task.metrics[0], name == task.devs[0]
        walks = walk(model, split, points)
        rows = [measure(model, split, task, walks, point) for point in points]
        for row, other in zip(rows, held_out_rows):
            row.held_out, row.held_out_flops = other.held_out, other.held_out_flops
            row.chosen = other.chosen
        clock(model, split, rows, arguments.repeats)
        # the chosen row of the last mode; plain where none is chosen
        best = next((row for row in reversed(rows) if row.chosen), rows[0])
        majority = data.majority(task, split.labels)[metric]
        partial = split.partial or held.partial
        note = " (partial data: not the GLUE task)" if partial else ""
        print(f"\n{task.name} {name}{note}: {len(split)} examples, "
              f"majority class {majority:.3f}\n")
        print(f"{table(rows, metric, len(model.gates))}\n\n{best}:\n{bars(best)}")
        for warning in warnings(rows, majority, arguments.target_speedup):
            print(f"warning: {warning}")
        curve = [measure(model, split, task, walks, point) for point in fine_grid(walks, points)]
        shown = ("mode", "threshold", "score", "flops")
        result = {"task": task.name, "split": name, "partial": partial, "metric": metric,
                  "examples": len(split), "majority": majority, "layers": len(model.gates),
                  "device": next(model.parameters()).device.type,
                  "settings": train.of_result(settings), "rows": [vars(row) for row in rows],
                  "curve": [{key: getattr(row, key) for key in shown}
                            for row in curve if row.threshold is not None]}
        compared = []
        if arguments.criteria:
            compared = criteria(model, split, task, walks)
            result["criteria"] = [vars(row) for row in compared]
            print(f"\n{criteria_table(compared)}")
        path = folder / ("eval.json" if first else f"eval-{name}.json")
        data.write_json(path, result)
        used = f"; --predict and --trace now take {best}" if first and best.chosen else ""
        print(f"\nwrote {path}{used}")
        if arguments.plot and first:
            from lesson import pictures                 # here: nothing else needs matplotlib
            outcome = outcome_of(walks, split, best)
            pictures.plot(folder, task.name, rows, curve, best, outcome, compared, metric)


# --- From the command line ----------------------------------------------------------------------

def check(arguments: argparse.Namespace) -> None:
    """Raise UserError for a number that makes no sense and for flags that do not go together."""
    for name in ("thresholds", "max_drop", "repeats", "target_speedup", "trace_examples"):
        value, low = getattr(arguments, name), name in ("target_speedup", "trace_examples")
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not low <= number < math.inf:     # false for NaN as well
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} {number:g}: give a number from {int(low)} up")
    if arguments.look and (arguments.target_speedup or arguments.plot or arguments.criteria):
        raise UserError("--plot, --criteria and --target-speedup belong to a run's table; "
                        "--trace, --trace-examples and --predict go by --thresholds")
    if arguments.plot and not importlib.util.find_spec("matplotlib"):   # said before the work
        raise UserError("--plot needs the package matplotlib: python -m pip install matplotlib")
    if arguments.plot and not (Path(arguments.run) / "log.jsonl").is_file():
        raise UserError(f"--plot needs {Path(arguments.run) / 'log.jsonl'}, which train.py wrote: "
                        f"train again")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("run", help="the folder of a run that train.py made")
    add("--thresholds", nargs="+", type=float, metavar="E",
        help="entropies (nats) below which an example exits; --trace and --predict take the first")
    add("--max-drop", type=float, default=MAX_DROP, metavar="POINTS",
        help="star the cheapest threshold whose exits lose at most so much on held-out data "
             "(default %(default)s)")
    add("--target-speedup", type=float, metavar="X",
        help="star the threshold that just reaches X times fewer FLOPs on held-out data")
    add("--criteria", action="store_true", help="compare entropy with other exit criteria")
    add("--plot", action="store_true", help="write PNG files to the folder (needs matplotlib)")
    add("--data-dir", help="folder with GLUE's files; default: where the run was trained from")
    add("--repeats", type=int, default=3, help="timed passes of each row (default %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default %(default)s)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--trace", nargs="+", metavar="TEXT", help="show a sentence, or a pair, layer by layer")
    add("--trace-examples", type=int, metavar="N",
        help="show the N examples of the dev set that run the fewest layers, and the N with most")
    add("--predict", metavar="FILE",
        help="label, probability and layers run for each line of a file, or of standard input (-)")
    asked = parser.parse_args(arguments)
    asked.look = bool(asked.trace or asked.trace_examples is not None or asked.predict is not None)
    return asked


def main(arguments: list[str] | None = None) -> None:
    train.open_streams()
    asked = parse(arguments)
    try:
        check(asked)
        device = train.pick_device(asked.device)
        settings, model = train.load_run(asked.run, device)
        # in the precision it was trained in
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
            (look_inside if asked.look else evaluate)(asked, settings, model)
    except BrokenPipeError:                             # its reader has read enough: | head
        sys.stdout = None
    except (UserError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
