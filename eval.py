"""What a trained SmartBERT skips, where it exits, what it costs and how well it answers; and a look inside.

    python eval.py runs/toy                                   # the table, and eval.json in that folder
    python eval.py runs/toy --target-speedup 2                # choose the threshold that halves the FLOPs
    python eval.py runs/toy --criteria --plot                 # entropy beside its family; pictures (needs matplotlib)
    python eval.py runs/toy --trace "the cat is not kind"     # one sentence on its way through the layers
    python eval.py runs/toy --predict sentences.txt           # answers for your own, - for standard input
    python eval.py --summary results/*-*.json                 # a study: mean and spread over seeds, beside plain BERT

A run is measured four ways on the dev set: *plain* (this model, every layer and the last head), *skip* (gates only),
*exit* (exits only) and *both*. Thresholds are chosen on the part of the training set that was held out. FLOPs are counted on
real tokens with gates and heads, as a share of plain BERT; seconds are the median of several passes that collect
nothing, taken in turn with plain's. The paper's experiments, in one table.
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
from bert import Bert, BertConfig, WeightsError, read_file
from data import Batch, DataError, Split, Task
from smartbert import (Outcome, SmartBert, entropy_below, first_correct, fixed_layer, flops, infer, patience, plain_flops,
                       probability_above, trace)

VERSION = 1             # of the files in a run's folder; another number means another layout
MAX_DROP = 0.5          # points of score that exits at a chosen threshold may lose on held-out data
POOL = 1024             # rows that wait at a layer together: enough for full batches, little enough for memory
OF_A_MACHINE = {"data_dir", "cache", "out", "device", "resume", "overwrite"}        # settings that change no result
OF_SMARTBERT = set("budget budget_weight lam gate_bias push_start push_full soft_epochs eta1 eta2 tau1 tau2 epochs2 "
                   "no_skipping no_contrast soft_gates".split())                    # settings that a plain BERT does not have
NEEDED = set("task method weights data_dir cache max_length limit held_out seed bf16".split())    # what eval.py reads besides


class RunError(ValueError):
    """A run's folder that cannot be used; the message is one line that says why and what to do."""


# --- A run's folder ---------------------------------------------------------------------------------------------------

def pick_device(name: str) -> torch.device:
    """auto takes the best that is there. Raises RunError for a device that is not."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name not in ("auto", *there):
        raise RunError(f"--device {name}: there is none here; use one of auto, {', '.join(there)}")
    return torch.device(there[0] if name == "auto" else name)


def load_file(path: Path) -> dict:
    """A .pt file that train.py wrote. Raises WeightsError where it is missing or truncated, RunError where it is of
    another version."""
    content = read_file(path, "let train.py finish the run with --resume, or start over with --overwrite")
    if content.get("version") != VERSION:
        raise RunError(f"{path} was written by another version of this project: train again with --overwrite")
    return content


def load_run(folder: str | Path, device: torch.device) -> tuple[dict, SmartBert]:
    """Settings and trained model of a run. Raises RunError, and WeightsError for a model.pt that is missing or truncated."""
    path = Path(folder) / "settings.json"
    if not path.is_file():
        raise RunError(f"{folder} holds no run, for it has no settings.json: name a folder that train.py made, such as runs/toy")
    content = load_file(Path(folder) / "model.pt")
    try:
        settings = json.loads(path.read_text())
        if not NEEDED | OF_SMARTBERT <= settings.keys():
            raise KeyError
        model = SmartBert(Bert(BertConfig(**content["config"])), content["classes"])
        model.load_state_dict(content["model"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        raise RunError(f"{folder} was trained by another version of this code, or is damaged: train again with --overwrite")
    return settings, model.to(device).eval()


# --- Inference over a whole split -------------------------------------------------------------------------------------

CRITERIA = {"entropy": entropy_below, "probability": probability_above, "patience": patience, "layer": fixed_layer}


@dataclass
class Way:
    """One way to run a model. mode: plain, skip, exit or both; threshold: the number its exit criterion takes, if it has
    exits; criterion: a name in CRITERIA, or oracle."""
    mode: str
    threshold: float | None = None
    criterion: str = "entropy"

    def __str__(self) -> str:
        return self.mode if self.threshold is None else f"{self.mode} at threshold {self.threshold:g}"


@dataclass(kw_only=True)
class Row(Way):
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


def pools(split: Split, device: str | torch.device = "cpu") -> list[Batch]:
    """An encoded split as a few large padded batches of about one size, sorted by length."""
    size = math.ceil(len(split) / math.ceil(len(split) / POOL))
    return [batch.to(device) for batch in data.batches(split, size)]


def run_pool(model: SmartBert, batch: Batch, way: Way) -> Outcome:
    """`infer` on one pool, in one way. On a GPU larger batches are full."""
    leave = None
    if way.mode in ("exit", "both"):
        leave = first_correct(batch.labels) if way.criterion == "oracle" else CRITERIA[way.criterion](way.threshold)
    return infer(model, batch.ids, batch.types, batch.mask, skip=way.mode in ("skip", "both"), leave=leave,
                 batch_tokens=1024 if batch.ids.device.type == "cpu" else 32768)


def predict(model: SmartBert, batches: list[Batch], way: Way) -> Outcome:
    """Every pool; the outcome in the order of the split (N rows), on the CPU. Leaves the model in eval mode."""
    model.eval()
    parts = [vars(run_pool(model, batch, way)).values() for batch in batches]
    order = torch.cat([batch.index for batch in batches]).argsort().cpu()
    return Outcome(*(torch.cat(values).cpu()[order] for values in zip(*parts)))


def measure(model: SmartBert, split: Split, task: Task, batches: list[Batch], way: Way) -> Row:
    """Run a split one way and account for it. Seconds are left for `sweep`, held-out figures for `evaluate`."""
    outcome = predict(model, batches, way)
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

def sweep(model: SmartBert, split: Split, task: Task, ways: list[Way], device: torch.device, repeats: int = 3) -> list[Row]:
    """One row for each way. Seconds are the median of `repeats` passes that collect nothing, all ways in turn; measuring
    has warmed up."""
    batches = pools(split, device)

    def seconds(way: Way) -> float:
        start = time.perf_counter()
        for batch in batches:
            run_pool(model, batch, way)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    rows = [measure(model, split, task, batches, way) for way in ways]
    for row, times in zip(rows, zip(*([seconds(way) for way in ways] for _ in range(repeats)))):    # a row's, of each round
        row.seconds = statistics.median(times)
    return rows


def choose(rows: list[Row], max_drop: float = MAX_DROP, speedup: float | None = None) -> None:
    """Mark the row of each mode to take, by what it gave on held-out data; without such data none is marked.

    Without a target: the cheapest whose exits lose at most max_drop points (exit against plain, both against skip), or if
    all lose more the best. For a target speed-up in FLOPs: of those that reach it the dearest within max_drop points of the
    best of them, or if none reaches it the cheapest."""
    if any(row.held_out is None for row in rows):
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


def criteria(model: SmartBert, split: Split, task: Task, device: torch.device) -> list[Row]:
    """Every criterion over a sweep of its number, exits only, on the same heads."""
    L, C = len(model.gates), len(task.labels)
    # p: the likeliest class's probability, from certain (1) some way to a guess (1 / C). Entropy's threshold is that of p
    # with the rest shared equally by the others, so that both sweep alike.
    p = [1 - (1 - 1 / C) * share for share in (0.003, 0.01, 0.03, 0.07, 0.12, 0.2, 0.3, 0.45, 0.6, 0.8, 0.95)]
    numbers = {"entropy": [-q * math.log(q) - (1 - q) * math.log((1 - q) / (C - 1)) for q in p], "probability": p,
               "patience": range(1, max(L, 2)), "layer": range(1, L + 1), "oracle": [None]}
    ways = [Way("exit", number, name) for name, values in numbers.items() for number in values]
    return sweep(model, split, task, ways, device, repeats=0)


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
    """An eval.json: what it is of (data, weights, method), its run's settings, its rows. Raises RunError."""
    try:
        result = json.loads(path.read_text())
        settings, rows = result["settings"], [Row(**row) for row in result["rows"]]
        name = f"{result['task']} {result['split']}{' (partial)' * result['partial']}"
        return (name, settings["weights"] or "", settings["method"]), settings, rows
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}): evaluate its run with eval.py, and name that file or folder")
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{path} is no eval.json of this version: evaluate its run with eval.py, and name that file or folder")


def read_study(paths: list[str], max_drop: float = MAX_DROP, speedup: float | None = None) -> dict[tuple, list[list[Row]]]:
    """The eval.json of a study's runs: (data, weights, method, what is unusual) -> the rows of each seed, each run with the
    thresholds that `choose` takes. Raises RunError."""
    files = [path / "eval.json" if path.is_dir() else path for path in map(Path, paths)]
    runs, study = [read_result(path) for path in files], {}
    for path, (kind, settings, rows) in zip(files, runs):
        choose(rows, max_drop, speedup)
        if not any(row.chosen for row in rows):
            raise RunError(f"{path}: nothing was held out, so no threshold can be chosen; leave it out")
        # A run is named by what it has otherwise than most of its kind; where these are half, than what has no such flag.
        alike = [other for other_kind, other, _ in runs if other_kind == kind]
        differ = "".join(f" {key}={value}" for key, value in settings.items()
                         if key != "seed" and value != statistics.mode(sorted((other.get(key) for other in alike), key=bool)))
        study.setdefault((*kind, differ), []).append(rows)
    return dict(sorted(study.items()))


def baseline(study: dict, task: str, weights: str) -> list[float]:
    """The scores of the plain BERTs that were trained for themselves on the same data from the same weights."""
    return [rows[0].score for rows in study.get((task, weights, "bert", ""), [])]


def summary(study: dict) -> str:
    """Mean and standard deviation over the seeds of what was chosen, and the points lost or won against plain BERT."""
    def cell(values: list[float]) -> str:
        return f"{statistics.mean(values):.3f}" + (f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else "")

    names = [("data", "weights", "run")] + [(task, weights, method + differ) for task, weights, method, differ in study]
    names = [" ".join(map(str.ljust, name, [max(map(len, column)) for column in zip(*names)])) for name in names]
    lines = [f"{names[0]} {'mode':<6} {'seeds':>5} {'score':>14} {'FLOPs':>14} {'points':>7}"]
    for name, ((task, weights, method, _), seeds) in zip(names[1:], study.items()):
        plain = baseline(study, task, weights)
        for mode in sorted({row.mode for rows in seeds for row in rows}):
            chosen = [row for rows in seeds for row in rows if row.mode == mode and row.chosen]
            scores = [row.score for row in chosen]
            points = f"{100 * (statistics.mean(scores) - statistics.mean(plain)):+.1f}" if plain and method != "bert" else ""
            lines.append(f"{name} {mode:<6} {len(scores):>5} {cell(scores):>14} {cell([row.flops for row in chosen]):>14} "
                         f"{points:>7}".rstrip())
    return "\n".join(lines) + "\n(points: score against a plain BERT trained for itself)"


# --- A look inside ----------------------------------------------------------------------------------------------------

def own_examples(arguments: argparse.Namespace, task: Task) -> Split:
    """What --trace or --predict names, a sentence a line, or a pair with a tab between the two, as a split without
    labels. Raises DataError."""
    lines = (["\t".join(arguments.trace)] if arguments.trace else
             data.read_lines(Path(arguments.predict), "name a file with a sentence a line, or - for standard input"))
    pair, texts = bool(task.columns and task.columns[1]), [line.split("\t") for line in lines]
    wanted = "two sentences, in a file with a tab between them" if pair else "one sentence"
    for number, text in enumerate(texts, 1):
        if len(text) != 1 + pair or not all(part.strip() for part in text):
            raise DataError(f"example {number} is {' | '.join(text)!r}, but {task.name} takes {wanted}: in quotes on the "
                            f"command line, a line each in a file")
    return Split([(text[0], text[1] if pair else None) for text in texts], [0] * len(texts))


def show(model: SmartBert, split: Split, task: Task, way: Way, outcome: Outcome, answers: bool, n: int | None) -> None:
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


# Told apart by colour-blind eyes as well. Of layers blue is run, yellow is skipped.
BLUE, ORANGE, GREEN, GRAY, YELLOW = "#0072B2", "#E69F00", "#009E73", "#999999", "#F0E442"


def canvas():
    """matplotlib's pyplot, set to be read from the last row of a lecture hall."""
    import matplotlib.pyplot as plt                         # here: nothing else needs it
    plt.switch_backend("Agg")
    plt.rcParams.update({
        "font.size": 14, "figure.figsize": (8, 5), "savefig.dpi": 200, "savefig.bbox": "tight", "axes.grid": True,
        "grid.alpha": 0.3, "axes.axisbelow": True, "image.aspect": "auto", "image.origin": "lower",
        "image.interpolation": "nearest", "axes.prop_cycle": plt.cycler(     # two curves on each other are seen to be two
            color=[GRAY, GREEN, ORANGE, BLUE, "black"], marker=list("sDo^*"), ls=["-", "--", "-", "-", "-"],
            markersize=[11, 6, 9, 9, 13])})
    return plt


def picture(plt, path: Path) -> None:
    """Write what was drawn, whole or not at all."""
    data.write_whole(path, lambda file: plt.savefig(file, format="png"))
    plt.close()
    print(f"wrote {path}")


def plot_study(study: dict, folder: Path) -> None:
    """study.png in a folder: score over FLOPs, mean over the seeds, a panel for each data set with a plain BERT of its own,
    whose mean and standard deviation are the gray line and band. Raises RunError."""
    panels = [(key, seeds, plain) for key, seeds in study.items()
              if key[2:] == ("smartbert", "") and (plain := baseline(study, *key[:2]))]
    if not panels:
        raise RunError("--plot needs runs of SmartBERT and a plain BERT (--method bert) on the same data from the same weights")
    plt, costs, tall = canvas(), np.linspace(0.1, 1, 91), math.ceil(len(panels) / 2)
    _, axes = plt.subplots(tall, 2, figsize=(14, 5 * tall), layout="constrained", squeeze=False)
    for panel, ((task, weights, *_), seeds, plain) in zip(axes.flat, panels):
        mean, spread = statistics.mean(plain), statistics.stdev(plain) if len(plain) > 1 else 0
        panel.axhspan(mean - spread, mean + spread, color=GRAY, alpha=0.25)
        panel.axhline(mean, color=GRAY, marker="", label="plain BERT, trained for itself")
        for mode, colour, style in ("skip", GREEN, "D"), ("exit", ORANGE, "--"), ("both", BLUE, "-"):
            ways = [[row for row in rows if row.mode == mode] for rows in seeds]
            if mode == "skip" and all(ways):                # one row of each seed: a point
                panel.plot(*np.mean([(row.flops, row.score) for (row,) in ways], 0), style, color=colour, label=mode)
            elif all(ways):
                scores = np.mean([[at_cost(rows, cost) for cost in costs] for rows in ways], 0)
                panel.plot(costs, scores, style, color=colour, lw=3, label=mode)
        panel.set(title=f"{task}, {weights}, {len(seeds)} seed{'s' * (len(seeds) > 1)}", xlim=(0, 1),
                  xlabel="FLOPs, share of plain BERT", ylabel="score")
    for panel in axes.flat[len(panels):]:
        panel.axis("off")
    axes[0, 0].legend()
    picture(plt, folder / "study.png")


def plot(folder: Path, title: str, rows: list[Row], row: Row, outcome: Outcome, others: list[Row], metric: str) -> None:
    """PNG files in a run's folder: score over FLOPs, skips and exits by layer, what became of each example, the training,
    and the exit criteria where others holds them. row, outcome: what to show of the dev set by layer."""
    plt = canvas()
    N, L = outcome.ran.shape
    layer = np.arange(1, L + 1)

    def finish(name: str, **labels) -> None:
        plt.gca().set(**labels)
        picture(plt, folder / name)

    for name, key, drawn in ("score.png", "mode", rows), ("criteria.png", "criterion", others):
        for group in dict.fromkeys(getattr(each, key) for each in drawn):
            plt.plot(*zip(*sorted((each.flops, each.score) for each in drawn if getattr(each, key) == group)), label=group)
        chosen = [(each.flops, each.score) for each in drawn if each.chosen and each.threshold is not None]
        if chosen:
            plt.plot(*zip(*chosen), "o", markersize=18, color="none", markeredgecolor="black", label="chosen on held-out data")
        if drawn:
            plt.legend()
            finish(name, xlabel="FLOPs, share of plain BERT", ylabel=f"{metric} (dev)", title=title, xlim=(0, None))

    plt.bar(layer - 0.2, row.skip_rate, 0.4, color=YELLOW, hatch="//", label="skipped by those who reached it")
    plt.bar(layer + 0.2, np.array(row.exit_histogram) / N, 0.4, color="black", label="left after it")
    plt.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    finish("layers.png", xlabel="layer", ylabel="share of examples", title=f"{title}: {row}", xticks=layer, ylim=(0, 1))

    left, ran = outcome.exit.numpy()[:, None], outcome.ran.numpy()                      # (N, 1), (N, L)
    # 0: not reached, 1: skipped, 2: run, 3: run, then left; at layer L nobody leaves, it is the end.
    became = 1 * (left >= layer) + ran + ((left == layer) & (layer < L))
    plt.imshow(became[np.lexsort((left[:, 0], ran.sum(1)))].T, vmin=-0.5, vmax=3.5, extent=(0, N, 0.5, L + 0.5),
               cmap=plt.matplotlib.colors.ListedColormap(["white", YELLOW, BLUE, "black"]))     # each example a column
    plt.colorbar(ticks=range(4), location="bottom", pad=0.2).set_ticklabels(["not reached", "skipped", "run", "run, then left"])
    plt.grid(False)
    finish("examples.png", xlabel="examples of the dev set, the cheapest first", ylabel="layer", yticks=layer,
           title=f"{title}: {row}")

    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps, epochs = [line for line in log if "step" in line], [line for line in log if "step" not in line]
    judge = next(name for name, seen in epochs[0].items() if isinstance(seen, dict))    # held-out, or a dev set
    run = np.array([step["run"] for step in steps if "run" in step])                    # (steps of phase 1, L)
    per_line = len(epochs) / len(steps)                                                 # epochs to a line of the log
    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(8, 8), layout="constrained")
    upper.plot((np.arange(len(steps)) + 0.5) * per_line, [step["loss"] for step in steps], "-", color=BLUE, label="loss")
    upper.plot(np.arange(len(epochs)) + 1, [line[judge][metric] for line in epochs], "o", color=ORANGE, markersize=6,
               label=f"{metric}, {judge}")
    upper.legend()
    upper.set(title=f"{title}: phase 1, then (dashed) phase 2")
    image = lower.imshow(run.T, cmap="cividis_r", vmin=0, vmax=1, extent=(0, len(run) * per_line, 0.5, L + 0.5))
    figure.colorbar(image, ax=lower, location="bottom", label="share of examples that run the layer")
    lower.grid(False)
    for axes in (upper, lower):
        axes.axvline(len(run) * per_line, color="black", ls="--", marker="")
    finish("training.png", xlabel="epochs", ylabel="layer", yticks=layer, xlim=(0, len(epochs)))


# --- From the command line --------------------------------------------------------------------------------------------

def check(arguments: argparse.Namespace) -> None:
    """Raises RunError for a number that makes no sense and for flags that do not go together."""
    for name, low in {"thresholds": 0, "max_drop": 0, "repeats": 0, "target_speedup": 1, "trace_examples": 1}.items():
        value = getattr(arguments, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not low <= number < math.inf:     # false for nan as well
                raise RunError(f"--{name.replace('_', '-')} {number:g}: give a number from {low} up")
    look = arguments.trace or arguments.trace_examples or arguments.predict
    if look and (arguments.target_speedup or arguments.plot or arguments.criteria):
        raise RunError("--plot, --criteria and --target-speedup belong to a run's table; --trace, --trace-examples and "
                       "--predict go by --thresholds")
    if arguments.summary and (arguments.run or arguments.criteria or arguments.thresholds):
        raise RunError("--summary reads eval.json files: name them after it, without a run, --criteria or --thresholds")
    if arguments.plot and not importlib.util.find_spec("matplotlib"):   # better said before the work
        raise RunError("--plot needs the package matplotlib: python -m pip install matplotlib")
    if arguments.plot and not arguments.summary and not (Path(arguments.run) / "log.jsonl").is_file():
        raise RunError(f"--plot needs {Path(arguments.run) / 'log.jsonl'}, which train.py wrote: train again")


def plan(arguments: argparse.Namespace, settings: dict, classes: int) -> list[Way]:
    """The table's rows: the modes that a run has, over the thresholds asked for, or shares of the largest entropy that so
    many classes can have."""
    smart = settings["method"] == "smartbert"
    gates, exits = smart and not settings["no_skipping"], smart and settings["epochs2"] > 0
    thresholds = arguments.thresholds or [
        round(share * math.log(classes), 3) for share in (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)]
    modes = {"plain": [None]} | ({"skip": [None]} if gates else {}) | ({"exit": thresholds} if exits else {})
    modes |= {"both": thresholds} if gates and exits else {}
    return [Way(mode, threshold) for mode, values in modes.items() for threshold in values]


def read_splits(arguments: argparse.Namespace, settings: dict, task: Task) -> dict[str, Split]:
    """The task's splits, encoded as in training; or the user's own examples as its dev set. Raises DataError."""
    own = arguments.trace or arguments.predict
    splits = {task.devs[0]: own_examples(arguments, task)} if own else data.load_task(
        task.name, arguments.data_dir or settings["data_dir"], settings["cache"])
    tokenizer = data.load_tokenizer(arguments.run)
    splits = {name: data.encode(tokenizer, split, settings["max_length"]) for name, split in splits.items()}
    unknown = sum(tokenizer.token_to_id("[UNK]") in ids for ids in splits[task.devs[0]].ids) if own else 0
    if unknown:
        print(f"warning: {unknown} of {len(splits[task.devs[0]])} examples hold words that this model has never seen",
              file=sys.stderr)
    return splits


def look_inside(arguments: argparse.Namespace, settings: dict, model: SmartBert, device: torch.device) -> None:
    """--trace, --trace-examples and --predict, in the fullest mode that the run has, at the first threshold asked for, else
    the one that its last evaluation chose, else the strictest. Raises DataError, RunError."""
    task, last = data.find_task(settings["task"]), Path(arguments.run) / "eval.json"
    split = read_splits(arguments, settings, task)[task.devs[0]]
    ways = plan(arguments, settings, len(task.labels))
    way = next(way for way in ways if way.mode == ways[-1].mode)
    if last.is_file() and not arguments.thresholds:
        way = next((row for row in read_result(last)[-1] if row.mode == way.mode and row.chosen), way)
    outcome = predict(model, pools(split, device), way)
    show(model, split, task, way, outcome, bool(arguments.predict), arguments.trace_examples)


def evaluate(arguments: argparse.Namespace, settings: dict, model: SmartBert, device: torch.device) -> None:
    """The table of a run, for each dev set of its task, printed and written beside it. Raises DataError, RunError."""
    folder, task = Path(arguments.run), data.find_task(settings["task"])
    ways = plan(arguments, settings, len(task.labels))
    if (arguments.plot or arguments.criteria) and ways[-1].threshold is None:
        raise RunError(f"{folder} is a plain BERT or had no phase 2: it lacks the exit heads that --plot and --criteria want")
    splits = read_splits(arguments, settings, task)
    training = splits["train"].select(range(len(splits["train"]))[:settings["limit"]])      # the same part as in train.py
    held = data.hold_out(training, settings["held_out"], settings["seed"])[1]
    dropped = OF_A_MACHINE if settings["method"] == "smartbert" else OF_A_MACHINE | OF_SMARTBERT
    kept = {key: value for key, value in settings.items() if key not in dropped}
    kept["weights"] = settings["weights"] and Path(settings["weights"]).name
    metric, judged = task.metrics[0], sweep(model, held, task, ways, device, repeats=0) if held else []
    for name in task.devs:
        split, partial = splits[name], splits[name].partial or splits["train"].partial
        rows = sweep(model, split, task, ways, device, arguments.repeats)
        for row, other in zip(rows, judged):
            row.held_out, row.held_out_flops = other.score, other.flops
        choose(rows, arguments.max_drop, arguments.target_speedup)
        compared = criteria(model, split, task, device) if arguments.criteria else []
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
            "rows": [vars(row) for row in rows]} | ({"criteria": [vars(row) for row in compared]} if compared else {}))
        print(f"\nwrote {path}{f'; --predict and --trace now take {best}' if name == task.devs[0] and best.chosen else ''}")
        if arguments.plot and name == task.devs[0]:
            plot(folder, task.name, rows, best, predict(model, pools(split, device), best), compared, metric)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", help="the folder of a run that train.py made")
    parser.add_argument("--thresholds", nargs="+", type=float, metavar="E", help="entropies below which an example leaves; "
                        "--trace and --predict take the first")
    parser.add_argument("--max-drop", type=float, default=MAX_DROP, metavar="POINTS", help="star the cheapest threshold "
                        f"whose exits lose at most so much on held-out data (default {MAX_DROP})")
    parser.add_argument("--target-speedup", type=float, metavar="X", help="star a threshold with X times fewer FLOPs, the "
                        "strictest that is at most --max-drop below the best of these")
    parser.add_argument("--criteria", action="store_true", help="compare entropy with other criteria to exit")
    parser.add_argument("--plot", action="store_true", help="write PNG files into the run's folder, or with --summary "
                        "study.png beside the first file (needs matplotlib)")
    look = parser.add_mutually_exclusive_group()
    look.add_argument("--trace", nargs="+", metavar="TEXT", help="show a sentence, or the two of a pair, layer by layer")
    look.add_argument("--trace-examples", type=int, metavar="N", help="show the N of the dev set that run the fewest layers, "
                      "and the N that run the most")
    look.add_argument("--predict", metavar="FILE", help="label, probability and layers run for each line; - for stdin")
    look.add_argument("--summary", nargs="+", metavar="JSON", help="mean and spread over the eval.json files of runs")
    parser.add_argument("--data-dir", help="folder with GLUE's files; default: where the run was trained from")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes of each row, 0 for none (default 3)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    asked = parser.parse_args(arguments)
    if not asked.run and not asked.summary:
        parser.error("name the folder of a run, such as runs/toy")
    try:
        check(asked)
        if asked.summary:
            study = read_study(asked.summary, asked.max_drop, asked.target_speedup)
            print(summary(study))
            if asked.plot:
                plot_study(study, Path(asked.summary[0]).parent)
        else:
            device = pick_device(asked.device)
            settings, model = load_run(asked.run, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings["bf16"]):     # as it was trained
                look = asked.trace or asked.trace_examples or asked.predict
                (look_inside if look else evaluate)(asked, settings, model, device)
    except BrokenPipeError:                                 # what reads has read enough: | head
        sys.stdout = None
    except (DataError, WeightsError, RunError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
