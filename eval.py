"""What a trained SmartBERT skips, where it exits, what it costs and how well it answers; and a look inside.

    python eval.py runs/toy                                   # the table, and eval.json in that folder
    python eval.py runs/toy --target-speedup 2                # choose the threshold that halves the FLOPs
    python eval.py runs/toy --criteria --plot                 # entropy beside its family; pictures (needs matplotlib)
    python eval.py runs/toy --trace "the cat is not kind"     # one sentence on its way through the layers
    python eval.py runs/toy --predict sentences.txt           # answers for your own, - for standard input

A run is measured four ways on the dev set: *plain* (this model, every layer and the last head), *skip* (gates only),
*exit* (exits only) and *both*. Thresholds are chosen on the part of the training set that was held out. FLOPs are counted on
real tokens with gates and heads, as a share of plain BERT; seconds are the median of several passes that collect
nothing, taken in turn with plain's. The paper's experiments, in one table.

A gate does not know the threshold, and an exit only cuts a walk short. So two walks over a split, one with gates and one
without, in which every head is asked and nobody leaves, hold the outcome of every threshold and every criterion.
"""

import argparse
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
import train
from data import Split, Task, UserError
from smartbert import (Criterion, Outcome, SmartBert, auxiliary_flops, entropy, entropy_below, first_correct,
                       fixed_layer, flops, layer_flops, patience, plain_flops, probability_above)
from train import load_run, pick_device, pools, predict, run_pool

MAX_DROP = 0.5          # points of score that exits at a chosen threshold may lose on held-out data
MODES = ("plain", "skip", "exit", "both")
FORMER_NAMES = {"push_start": "penalty_start", "push_full": "penalty_full"}     # in older eval.json
GRID = 200              # thresholds that are tried on held-out data, where the user names none


# --- Inference over a whole split -------------------------------------------------------------------------------------

CRITERIA = {"entropy": entropy_below, "probability": probability_above, "patience": patience, "layer": fixed_layer}


@dataclass
class InferenceMode:
    """One way to run a model. mode: plain, skip, exit or both; threshold: the number its exit criterion takes, if it has
    exits; criterion: a name in CRITERIA, or oracle."""
    mode: str
    threshold: float | None = None
    criterion: str = "entropy"

    def __str__(self) -> str:
        return self.mode if self.threshold is None else f"{self.mode} at threshold {self.threshold:g}"


@dataclass(kw_only=True)
class Row(InferenceMode):
    """A way and what it gave: one line of the table, one entry of eval.json."""
    score: float
    scores: dict[str, float]        # all of the task's metrics; score is the first
    layers: float                   # run on average
    flops: float                    # share of plain's
    seconds: float = 0.0            # for the whole split
    skip_rate: list[float]          # share of the rows that reached layer i and skipped it
    exit_histogram: list[int]       # rows that left at layer i; the last counts all who reached the end
    levels: list[dict] | None       # of the toy: examples, accuracy, layers of each level
    held_out: float | None = None   # the score on the held-out part of the training set
    held_out_flops: float | None = None                     # share of plain's FLOPs there
    chosen: bool = False            # the one to take among those of its mode, by `choose` on the held-out part


def leaves(way: InferenceMode, labels: torch.Tensor) -> Criterion | None:
    """The exit criterion of an inference mode, None where it has no exits. labels (N,): the oracle looks at them."""
    if way.mode not in ("exit", "both"):
        return None
    return first_correct(labels) if way.criterion == "oracle" else CRITERIA[way.criterion](way.threshold)


def nobody(history: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The exit criterion of a walk: every head is asked, nobody leaves."""
    return torch.zeros_like(rows, dtype=torch.bool)


def walk(model: SmartBert, split: Split, device: torch.device, modes: set[str]) -> dict[bool, Outcome]:
    """An encoded split run to the end with all heads asked: with gates under True, without under False,
    as far as the modes want them."""
    wanted = sorted({mode in ("skip", "both") for mode in modes})
    batches = pools(split, device)
    return {gates: predict(model, batches, gates, nobody) for gates in wanted}


def cut(walked: Outcome, leave: Criterion | None) -> Outcome:
    """The outcome that `infer` gives with this exit criterion, from a walk on which nobody left.

    The criterion is asked where `infer` asks it: after each layer but the last that a row ran. What comes after a
    row's exit is forgotten. leave None: no exits, and only the last head was asked.
    """
    N, L = walked.ran.shape
    exits, here = torch.full((N,), L), torch.ones(N, dtype=torch.bool)                  # here: has not left yet
    for i in range(L - 1 if leave else 0):
        asked = (here & walked.ran[:, i]).nonzero().squeeze(1)                          # (n,)
        leaving = asked[leave(walked.history[asked, :i + 1], asked)]
        exits[leaving] = i + 1                                                          # layers count from 1
        here[leaving] = False
    beyond = torch.arange(1, L + 1) > exits[:, None]                                    # (N, L)
    history = walked.history.masked_fill(beyond[:, :, None], torch.nan)                 # (N, L, C)
    if leave is None:
        history[:, :-1] = torch.nan
    return Outcome(history[torch.arange(N), exits - 1], walked.ran & ~beyond, exits,
                   walked.gates.masked_fill(beyond, torch.nan), history)


def outcome_of(walks: dict[bool, Outcome], split: Split, way: InferenceMode) -> Outcome:
    """What became of a split in one inference mode, from its walks."""
    return cut(walks[way.mode in ("skip", "both")], leaves(way, torch.tensor(split.labels)))


def measure(model: SmartBert, split: Split, task: Task, walks: dict[bool, Outcome], way: InferenceMode) -> Row:
    """The account of one inference mode. Seconds are left for `clock`, held-out figures for `evaluate`."""
    outcome = outcome_of(walks, split, way)
    if way.criterion == "layer":                            # a shallower BERT would not have asked the heads before
        outcome.history[:, :int(way.threshold) - 1] = torch.nan
    tokens, layers = torch.tensor([len(ids) for ids in split.ids]), outcome.ran.sum(1).float()      # (N,), (N,)
    predictions = outcome.logits.argmax(1)
    scores = data.scores(task, predictions.tolist(), split.labels)
    share = flops(model, tokens, outcome).sum() / plain_flops(model, tokens).sum()
    L = outcome.ran.shape[1]
    reached = outcome.exit[:, None] >= torch.arange(1, L + 1)                           # (N, L)
    skipped = (reached & ~outcome.ran).sum(0) / reached.sum(0).clamp(min=1)
    right, level = (predictions == torch.tensor(split.labels)).float(), torch.tensor(split.levels or [])
    levels = [{"level": k, "examples": int((level == k).sum()), "accuracy": right[level == k].mean().item(),
               "layers": layers[level == k].mean().item()} for k in level.unique().tolist()]
    return Row(**vars(way), score=scores[task.metrics[0]], scores=scores, layers=layers.mean().item(), flops=share.item(),
               skip_rate=skipped.tolist(), exit_histogram=outcome.exit.bincount(minlength=L + 1)[1:].tolist(), levels=levels)


# --- The table --------------------------------------------------------------------------------------------------------

def clock(model: SmartBert, split: Split, rows: list[Row], device: torch.device, repeats: int) -> None:
    """Fill in each row's seconds: real dynamic inference, the median of `repeats` passes that collect nothing, all
    rows in turn, after one pass to warm up."""
    batches = pools(split, device)

    def seconds(row: Row) -> float:
        start = time.perf_counter()
        for batch in batches:
            run_pool(model, batch, row.mode in ("skip", "both"), leaves(row, batch.labels))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    rounds = [[seconds(row) for row in rows] for _ in range(repeats + 1 if repeats else 0)]
    for row, times in zip(rows, zip(*rounds[1:])):
        row.seconds = statistics.median(times)


def fine_grid(walks: dict[bool, Outcome], ways: list[InferenceMode]) -> list[InferenceMode]:
    """The ways, with GRID thresholds for each mode that has exits: quantiles of the entropies that the heads gave on
    these walks, so that about equally many answers lie between two neighbours."""
    made = []
    for mode in dict.fromkeys(way.mode for way in ways):
        if mode not in ("exit", "both"):
            made.append(InferenceMode(mode))
            continue
        history = walks[mode == "both"].history[:, :-1].flatten(0, 1)                   # (N (L - 1), C)
        values = entropy(history[~history[:, 0].isnan()]).double()
        if len(values):                                 # none where every layer is skipped
            quantiles = np.quantile(values.numpy(), np.linspace(0, 1, GRID))
            made += [InferenceMode(mode, e) for e in sorted({float(f"{q:.3g}") for q in quantiles})]
    return made


def choose(rows: list[Row], max_drop: float = MAX_DROP, speedup: float | None = None) -> None:
    """Mark the row of each mode to take, by what it gave on held-out data; without such data, or where every
    score on them is 0 (too few examples for F1 or Matthews), none is marked.

    Without a target: the cheapest whose exits lose at most max_drop points (exit against plain, both against skip), or if
    all lose more the best. For a target speed-up in FLOPs: of those that reach it the dearest within max_drop points of the
    best of them, or if none reaches it the cheapest."""
    if any(row.held_out is None for row in rows) or not any(row.held_out for row in rows):
        return
    without = {row.mode: row.held_out for row in rows if row.threshold is None}
    for mode in dict.fromkeys(row.mode for row in rows):
        alike = sorted((row for row in rows if row.mode == mode), key=lambda row: row.held_out_flops)
        if speedup:
            cheap = [row for row in alike if row.held_out_flops <= 1 / speedup] or alike[:1]
            best = max(row.held_out for row in cheap)
            chosen = [row for row in cheap if row.held_out >= best - max_drop / 100][-1]
        else:
            floor = without["skip" if mode == "both" else "plain"] - max_drop / 100
            best = max(alike, key=lambda row: row.held_out)
            chosen = next((row for row in alike if row.held_out >= floor), best)
        for row in alike:
            row.chosen = row is chosen


def warnings(rows: list[Row], majority: float) -> Iterator[str]:
    """What a reader of the table should know before believing it. majority: the majority class's score."""
    for row in rows:
        if row.mode == "skip" and set(row.skip_rate) <= {0, 1}:
            yield ("every example skips the same layers: the gates have become a smaller fixed BERT" if any(row.skip_rate)
                   else "no layer is ever skipped: the gates have learned nothing, or lambda or --budget asks nothing")
        left = [layer for layer, count in enumerate(row.exit_histogram, 1) if count]
        if row.mode == "exit" and len(left) == 1 and left[0] < len(row.exit_histogram):
            yield f"at threshold {row.threshold:g} every example leaves at layer {left[0]}: it is too high"
    exits = [row for row in rows if row.mode == "exit"]
    if exits and not any(sum(row.exit_histogram[:-1]) for row in exits):
        yield "nobody ever exits early: the thresholds are too low"
    if exits and exits[0].held_out is None:
        yield "nothing was held out of the training set, so no threshold could be chosen"
    elif exits and not any(row.held_out for row in rows):
        yield "every score on the held-out examples is 0, so no threshold could be chosen: hold out more of them"
    poor = [row for row in rows if row.score <= majority]
    if poor:
        ways = ["all rows"] if len(poor) == len(rows) else map(str, poor)
        yield f"no better than always answering the majority class ({majority:.3f}): {', '.join(ways)}"


def table(rows: list[Row], metric: str, layers: int) -> str:
    """The rows as text. Speed-ups are plain's FLOPs or seconds over the row's."""
    lines = [f"{'mode':<6} {'threshold':>9} {metric:>9} {'held-out':>9} {'layers':>7} {'FLOPs':>7} "
             f"{'speed-up in FLOPs':>18} {'in seconds':>11}"]
    for row in rows:
        threshold = "" if row.threshold is None else f"{row.threshold:g}"
        held = "" if row.held_out is None else f"{row.held_out:.3f}"
        seconds = f"{rows[0].seconds / row.seconds:.2f}x" if row.seconds else ""
        lines.append(f"{row.mode:<6} {threshold:>9} {row.score:>9.3f} {held:>9} {row.layers:>7.2f} {row.flops:>7.3f} "
                     f"{1 / row.flops:>17.2f}x {seconds:>11}{' *' if row.chosen and threshold else ''}")
    lines.append(f"(layers of {layers}; FLOPs as a share of plain BERT, gates and heads counted; * chosen on held-out data)")
    lines += [f"* {row}: {1 / row.held_out_flops:.2f}x in FLOPs on the data that chose it"
              for row in rows if row.chosen and row.threshold is not None]
    return "\n".join(lines)


def bars(row: Row) -> str:
    """Skip rate and exits of each layer, as bars; and the toy's levels."""
    lines, total = ["layer  skipped by those who reached it     left after it"], sum(row.exit_histogram)
    for i, (skipped, left) in enumerate(zip(row.skip_rate, row.exit_histogram), 1):
        lines.append(f"{i:>5}  {'#' * round(20 * skipped):<20} {skipped:>4.0%}     "
                     f"{'#' * round(20 * left / total):<20} {left / total:>4.0%}")
    if row.levels:
        lines += ["", "level  examples  accuracy  layers run"]
        lines += ["{level:>5}  {examples:>8}  {accuracy:>8.3f}  {layers:>10.2f}".format(**each) for each in row.levels]
    return "\n".join(lines)


def criteria(model: SmartBert, split: Split, task: Task, walks: dict[bool, Outcome]) -> list[Row]:
    """Every criterion over a sweep of its number, exits only, on the same heads."""
    L, C = len(model.gates), len(task.labels)
    # p: the likeliest class's probability, from certain (1) some way to a guess (1 / C). Entropy's threshold is that of p
    # with the rest shared equally by the others, so that both sweep alike.
    p = [1 - (1 - 1 / C) * share for share in (0.003, 0.01, 0.03, 0.07, 0.12, 0.2, 0.3, 0.45, 0.6, 0.8, 0.95)]
    numbers = {"entropy": [-q * math.log(q) - (1 - q) * math.log((1 - q) / (C - 1)) for q in p], "probability": p,
               "patience": range(1, max(L, 2)), "layer": range(1, L + 1), "oracle": [None]}
    ways = [InferenceMode("exit", number, name) for name, values in numbers.items() for number in values]
    return [measure(model, split, task, walks, way) for way in ways]


def at_cost(rows: list[Row], cost: float) -> float:
    """The score at that share of plain's FLOPs, between two rows as if each took some of the examples; NaN outside."""
    points = sorted((row.flops, row.score) for row in rows)
    return float(np.interp(cost, *zip(*points), left=np.nan, right=np.nan))


def criteria_table(rows: list[Row]) -> str:
    """Score of every criterion at the same cost."""
    costs, oracle = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8), rows[-1]
    lines = ["exit criteria, score at the same FLOPs (share of plain BERT; no gates)",
             "criterion    " + "".join(f"{cost:>8}" for cost in costs)]
    for name in CRITERIA:
        scores = [at_cost([row for row in rows if row.criterion == name], cost) for cost in costs]
        lines.append(f"{name:<13}" + "".join(f"{score:>8.3f}" for score in scores).replace("nan", "  -"))
    return "\n".join(lines) + (f"\nthe oracle reaches {oracle.score:.3f} at {oracle.flops:.3f}: with these heads none is right "
                               f"more often")


def read_result(path: Path) -> tuple[tuple[str, str, str], dict, list[Row]]:
    """An eval.json: what it is of (data, weights, method), its run's settings, its rows. Raises UserError."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        settings = {FORMER_NAMES.get(name, name): value for name, value in result["settings"].items()}
        rows = [Row(**row) for row in result["rows"]]
        for row in rows:
            numbers = [row.score, row.layers, row.flops, row.seconds]
            numbers += [x for x in (row.threshold, row.held_out, row.held_out_flops) if x is not None]
            if row.mode not in MODES or not all(math.isfinite(number) for number in numbers):
                raise ValueError
        if rows[0].mode != "plain":
            raise ValueError
        name = f"{result['task']} {result['split']}{' (partial)' * result['partial']}"
        return (name, settings["weights"] or "", settings["method"]), settings, rows
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): evaluate its run with eval.py, and name that file or folder")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{path} is no eval.json of this version: evaluate its run with eval.py, and name that file or folder")


# --- A look inside ----------------------------------------------------------------------------------------------------

def own_examples(arguments: argparse.Namespace, task: Task) -> Split:
    """What --trace or --predict names, a sentence a line, or a pair with a tab between the two, as a split without
    labels. Raises UserError."""
    lines = (["\t".join(arguments.trace)] if arguments.trace else
             data.read_lines(Path(arguments.predict), "name a file with a sentence a line, or - for standard input"))
    pair, texts = bool(task.columns and task.columns[1]), [line.split("\t") for line in lines]
    wanted = "two sentences, in a file with a tab between them" if pair else "one sentence"
    for number, text in enumerate(texts, 1):
        if len(text) != 1 + pair or not all(part.strip() for part in text):
            raise UserError(f"example {number} is {' | '.join(text)!r}, but {task.name} takes {wanted}: in quotes on the "
                            f"command line, a line each in a file")
    return Split([(text[0], text[1] if pair else None) for text in texts], [0] * len(texts))


def trace(model: SmartBert, tokens: torch.Tensor, outcome: Outcome, labels: tuple[str, ...], colour: bool = False) -> str:
    """The way of the one row of an outcome as text: for each layer its gate, what became of it, the answer and the
    entropy (in nats) of its head, the FLOPs so far as a share of plain BERT's. tokens (1,); labels: the classes' names."""
    layer, total = layer_flops(model, tokens), plain_flops(model, tokens)
    gate, head = auxiliary_flops(model.gates[0], tokens), auxiliary_flops(model.heads[0], tokens)
    lines, cost = ["layer   gate               what         head's answer          entropy   FLOPs so far"], 0
    for i, (g, ran, answer) in enumerate(zip(outcome.gates[0], outcome.ran[0], outcome.history[0]), 1):
        asked, met, left = not g.isnan(), not answer[0].isnan(), i == outcome.exit[0] and i < len(model.gates)
        cost = cost + asked * gate + ran * layer + met * head
        bar = f"{g:.3f} {'#' * round(10 * g.item())}" if asked else ""
        what = "not reached" if i > outcome.exit[0] else "ran, left" if left else "ran" if ran else "skipped"
        said = f"{labels[answer.argmax()]:<14} {answer.softmax(0).max():>4.0%} {entropy(answer):>10.3f}" if met else ""
        share = f"{(cost / total).item():>14.1%}" if i <= outcome.exit[0] else ""
        line = f"{i:>5}   {bar:<16}   {what:<12} {said:<30} {share}".rstrip()
        style = "\033[1m" if left else "" if ran else "\033[2m"                         # bold where it left, faint unrun
        lines.append(f"{style}{line}\033[0m" if colour else line)
    answer = outcome.logits[0]
    return "\n".join(lines + [f"answer: {labels[answer.argmax()]} ({answer.softmax(0).max():.0%}), "
                              f"{outcome.ran.sum()} of {len(model.gates)} layers run"])


def show(model: SmartBert, split: Split, task: Task, way: InferenceMode, outcome: Outcome, answers: bool, n: int | None) -> None:
    """Print each example's answer (answers) or its way through the layers; or, of a labelled split, the ways of the n
    that ran the fewest layers and the n that ran the most."""
    layers = outcome.ran.sum(1)
    if answers:
        print(f"({way})", file=sys.stderr)
        for logits, count in zip(outcome.logits, layers.tolist()):
            print(f"{task.labels[logits.argmax()]}\t{logits.softmax(0).max():.3f}\t{count}")
        return
    order = layers.argsort(stable=True).tolist()
    for i in order[:n] + order[n:][-n:] if n else order:                # no example twice
        if n:
            print(f"\nlabel {task.labels[split.labels[i]]}: {' | '.join(text for text in split.texts[i] if text)}")
        one = Outcome(*(value[i:i + 1] for value in vars(outcome).values()))
        print(f"{trace(model, torch.tensor([len(split.ids[i])]), one, task.labels, sys.stdout.isatty())}; {way}")


# --- From the command line --------------------------------------------------------------------------------------------

def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for a number that makes no sense and for flags that do not go together."""
    for name, low in {"thresholds": 0, "max_drop": 0, "repeats": 0, "target_speedup": 1, "trace_examples": 1}.items():
        value = getattr(arguments, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not low <= number < math.inf:     # false for nan as well
                raise UserError(f"--{name.replace('_', '-')} {number:g}: give a number from {low} up")
    look = arguments.trace or arguments.trace_examples or arguments.predict is not None
    if look and (arguments.target_speedup or arguments.plot or arguments.criteria):
        raise UserError("--plot, --criteria and --target-speedup belong to a run's table; --trace, --trace-examples and "
                       "--predict go by --thresholds")
    if arguments.plot and not importlib.util.find_spec("matplotlib"):   # better said before the work
        raise UserError("--plot needs the package matplotlib: python -m pip install matplotlib")
    if arguments.plot and not (Path(arguments.run) / "log.jsonl").is_file():
        raise UserError(f"--plot needs {Path(arguments.run) / 'log.jsonl'}, which train.py wrote: train again")


def plan(arguments: argparse.Namespace, settings: dict, classes: int) -> list[InferenceMode]:
    """The table's rows: the modes that a run has, over the thresholds asked for, or shares of the largest entropy that so
    many classes can have."""
    smart = settings["method"] == "smartbert"
    gates, exits = smart and not settings["no_skipping"], smart and settings["epochs2"] > 0
    thresholds = arguments.thresholds or [
        round(share * math.log(classes), 3) for share in (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)]
    modes = {"plain": [None]} | ({"skip": [None]} if gates else {}) | ({"exit": thresholds} if exits else {})
    modes |= {"both": thresholds} if gates and exits else {}
    return [InferenceMode(mode, threshold) for mode, values in modes.items() for threshold in values]


def read_splits(arguments: argparse.Namespace, settings: dict, task: Task) -> dict[str, Split]:
    """The task's dev sets and, under "train", the held-out part of its training set, encoded as in training; or the
    user's own examples as its dev set. Raises UserError."""
    own = arguments.trace or arguments.predict is not None
    splits = {task.devs[0]: own_examples(arguments, task)} if own else data.load_task(
        task.name, arguments.data_dir or settings["data_dir"], settings["cache"])
    tokenizer = data.load_tokenizer(arguments.run)
    if "train" in splits:                               # of which only the held-out part is wanted, as in train.py
        training = splits["train"].select(range(len(splits["train"]))[:settings["limit"]])
        splits["train"] = data.hold_out(training, settings["held_out"], settings["seed"])[1]
        train.check_data(Path(arguments.run), train.identify(training, splits["train"]))
    splits = {name: data.encode(tokenizer, split, settings["max_length"]) if split else split
              for name, split in splits.items()}
    unknown = sum(tokenizer.token_to_id("[UNK]") in ids for ids in splits[task.devs[0]].ids) if own else 0
    if unknown:
        print(f"warning: {unknown} of {len(splits[task.devs[0]])} examples hold words that this model has never seen",
              file=sys.stderr)
    return splits


def look_inside(arguments: argparse.Namespace, settings: dict, model: SmartBert, device: torch.device) -> None:
    """--trace, --trace-examples and --predict, in the fullest mode that the run has, at the first threshold asked for, else
    the one that its last evaluation chose, else the strictest. Raises UserError."""
    task, last = data.find_task(settings["task"]), Path(arguments.run) / "eval.json"
    split = read_splits(arguments, settings, task)[task.devs[0]]
    ways = plan(arguments, settings, len(task.labels))
    way = next(way for way in ways if way.mode == ways[-1].mode)
    if last.is_file() and not arguments.thresholds:
        way = next((row for row in read_result(last)[-1] if row.mode == way.mode and row.chosen), way)
    walks = walk(model, split, device, {way.mode})
    outcome = outcome_of(walks, split, way)
    show(model, split, task, way, outcome, arguments.predict is not None, arguments.trace_examples)


def judge(model: SmartBert, held: Split, task: Task, ways: list[InferenceMode], device: torch.device,
          arguments: argparse.Namespace) -> list[Row]:
    """The ways measured on the held-out part, and the one that `choose` takes of each mode marked. Where the user
    named no thresholds, it chooses from a fine grid, and what it took is put among the ways."""
    walks = walk(model, held, device, {way.mode for way in ways})
    asked = {(way.mode, way.threshold) for way in ways}
    tried = ways if arguments.thresholds else ways + [
        way for way in fine_grid(walks, ways) if (way.mode, way.threshold) not in asked]
    rows = [measure(model, held, task, walks, way) for way in tried]
    for row in rows:
        row.held_out, row.held_out_flops = row.score, row.flops
    choose(rows, arguments.max_drop, arguments.target_speedup)
    order = list(dict.fromkeys(way.mode for way in ways))
    shown = [row for row in rows if row.chosen or (row.mode, row.threshold) in asked]
    return sorted(shown, key=lambda row: (order.index(row.mode), row.threshold or 0))


def evaluate(arguments: argparse.Namespace, settings: dict, model: SmartBert, device: torch.device) -> None:
    """The table of a run, for each dev set of its task, printed and written beside it. Raises UserError."""
    folder, task = Path(arguments.run), data.find_task(settings["task"])
    ways = plan(arguments, settings, len(task.labels))
    if (arguments.plot or arguments.criteria) and ways[-1].threshold is None:
        raise UserError(f"{folder} is a plain BERT or had no phase 2: it lacks the exit heads that --plot and --criteria want")
    splits = read_splits(arguments, settings, task)
    held = splits["train"]
    dropped = train.OF_A_MACHINE | (set() if settings["method"] == "smartbert" else train.OF_SMARTBERT)
    kept = {key: value for key, value in settings.items() if key not in dropped}
    kept["weights"] = settings["weights"] and Path(settings["weights"]).name
    metric = task.metrics[0]
    judged = judge(model, held, task, ways, device, arguments) if held else []
    ways = [InferenceMode(row.mode, row.threshold) for row in judged] or ways
    for name in task.devs:
        split, partial = splits[name], splits[name].partial or splits["train"].partial
        walks = walk(model, split, device, {way.mode for way in ways})
        rows = [measure(model, split, task, walks, way) for way in ways]
        for row, other in zip(rows, judged):
            row.held_out, row.held_out_flops, row.chosen = other.held_out, other.held_out_flops, other.chosen
        clock(model, split, rows, device, arguments.repeats)
        points = [measure(model, split, task, walks, way) for way in fine_grid(walks, ways)]
        curve = [{"mode": row.mode, "threshold": row.threshold, "score": row.score, "flops": row.flops}
                 for row in points if row.threshold is not None]
        compared = criteria(model, split, task, walks) if arguments.criteria else []
        best = next((row for row in reversed(rows) if row.chosen), rows[0])     # of the fullest mode; plain if none is chosen
        majority = data.majority(task, split.labels)[metric]
        print(f"\n{task.name} {name}{' (partial data: not the GLUE task)' * partial}: {len(split)} examples, majority class "
              f"{majority:.3f}\n\n{table(rows, metric, len(model.gates))}\n\n{best}:\n{bars(best)}")
        for warning in warnings(rows, majority):
            print(f"warning: {warning}")
        for row in rows if arguments.target_speedup else []:
            if row.chosen and row.threshold is not None and row.held_out_flops > 1 / arguments.target_speedup:
                print(f"warning: {row.mode}: no threshold saves so much that --target-speedup {arguments.target_speedup:g} is "
                      f"reached; the cheapest is taken")
        if compared:
            print(f"\n{criteria_table(compared)}")
        path = folder / ("eval.json" if name == task.devs[0] else f"eval-{name}.json")
        data.write_json(path, {
            "task": task.name, "split": name, "partial": partial, "metric": metric, "examples": len(split),
            "majority": majority, "layers": len(model.gates), "device": device.type, "settings": kept,
            "rows": [vars(row) for row in rows], "curve": curve} | ({"criteria": [vars(row) for row in compared]} if compared else {}))
        print(f"\nwrote {path}{f'; --predict and --trace now take {best}' if name == task.devs[0] and best.chosen else ''}")
        if arguments.plot and name == task.devs[0]:
            from lesson import pictures                     # here: nothing else needs matplotlib
            pictures.plot(folder, task.name, rows, points, best, outcome_of(walks, split, best), compared, metric)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="the folder of a run that train.py made")
    parser.add_argument("--thresholds", nargs="+", type=float, metavar="E", help="entropies below which an example leaves; "
                        "--trace and --predict take the first")
    parser.add_argument("--max-drop", type=float, default=MAX_DROP, metavar="POINTS", help="star the cheapest threshold "
                        f"whose exits lose at most so much on held-out data (default {MAX_DROP})")
    parser.add_argument("--target-speedup", type=float, metavar="X", help="star a threshold with X times fewer FLOPs, the "
                        "strictest that is at most --max-drop below the best of these")
    parser.add_argument("--criteria", action="store_true", help="compare entropy with other criteria to exit")
    parser.add_argument("--plot", action="store_true", help="write PNG files into the run's folder (needs matplotlib)")
    look = parser.add_mutually_exclusive_group()
    look.add_argument("--trace", nargs="+", metavar="TEXT", help="show a sentence, or the two of a pair, layer by layer")
    look.add_argument("--trace-examples", type=int, metavar="N", help="show the N of the dev set that run the fewest layers, "
                      "and the N that run the most")
    look.add_argument("--predict", metavar="FILE", help="label, probability and layers run for each line; - for stdin")
    parser.add_argument("--data-dir", help="folder with GLUE's files; default: where the run was trained from")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes of each row, 0 for none (default 3)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    asked = parser.parse_args(arguments)
    try:
        check(asked)
        device = pick_device(asked.device)
        settings, model = load_run(asked.run, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings["bf16"]):     # as it was trained
            look = asked.trace or asked.trace_examples or asked.predict is not None
            (look_inside if look else evaluate)(asked, settings, model, device)
    except BrokenPipeError:                                 # what reads has read enough: | head
        sys.stdout = None
    except (UserError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
