"""What a trained SmartBERT skips, where it exits, what it costs and how well it answers; and a look inside.

    python eval.py runs/toy                                   # the table, and eval.json in that folder
    python eval.py runs/toy --target-speedup 2                # choose the threshold that halves the FLOPs
    python eval.py runs/toy --criteria --plot                 # entropy beside its family; pictures (needs matplotlib)
    python eval.py runs/toy --trace "the cat is not kind"     # one sentence on its way through the layers
    python eval.py runs/toy --predict sentences.txt           # answers for your own, - for standard input
    python eval.py --summary results/*-*.json                 # a study: mean and spread over seeds, beside plain BERT

A run is measured four ways on the dev set: *plain* (every layer, the last head: BERT), *skip* (gates only), *exit*
(exits only) and *both*. Thresholds are chosen on the part of the training set that was held out. FLOPs are counted on
real tokens with gates and heads, as a share of plain BERT; seconds are the median of several passes that collect
nothing, taken in turn with plain's. The paper's experiments, in one table.
"""

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
from bert import Bert, BertConfig, WeightsError, read_file
from data import Batch, DataError, Split, Task
from smartbert import (Criterion, Outcome, SmartBert, entropy_below, first_correct, fixed_layer, flops, infer, patience,
                       plain_flops, probability_above, trace)

VERSION = 1             # of the files in a run's folder; another number means another layout
MAX_DROP = 0.5          # points that a chosen threshold may lose on held-out data: half of what is to be lost at most on dev
POOL = 1024             # rows that wait at a layer together: enough for full batches, little enough for memory


class RunError(ValueError):
    """A run's folder that cannot be used; the message is one line that says why and what to do."""


# --- A run's folder ---------------------------------------------------------------------------------------------------

def pick_device(name: str) -> torch.device:
    """auto takes what is there. Raises RunError for a device that is not."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, is_there in there.items() if is_there))
    if name not in there or not there[name]:
        raise RunError(f"--device {name}: there is none here; use one of auto, "
                       f"{', '.join(device for device, is_there in there.items() if is_there)}")
    return torch.device(name)


def load_file(path: Path) -> dict:
    """A .pt file that train.py wrote. Raises RunError where it is missing or of another version, WeightsError where it
    is truncated."""
    if not path.is_file():
        raise RunError(f"{path} is not there: is {path.parent} a run that train.py has finished?")
    content = read_file(path, "train again")
    if content.get("version") != VERSION:
        raise RunError(f"{path} was written by another version of this project: train again")
    return content


def load_run(folder: str | Path, device: torch.device) -> tuple[dict, SmartBert]:
    """Settings and trained model of a run. Raises RunError."""
    folder = Path(folder).expanduser()
    try:
        settings = json.loads((folder / "settings.json").read_text())
    except (OSError, ValueError):
        raise RunError(f"{folder} holds no run: no settings.json in it; train.py makes one")
    content = load_file(folder / "model.pt")
    model = SmartBert(Bert(BertConfig(**content["config"])), content["classes"])
    model.load_state_dict(content["model"])
    return settings, model.to(device).eval()


# --- Inference over a whole split -------------------------------------------------------------------------------------

CRITERIA = {"entropy": entropy_below, "probability": probability_above, "patience": patience, "layer": fixed_layer}


@dataclass
class Way:
    """One way to run a model. mode: plain, skip, exit or both; threshold: the number its exit criterion takes."""
    mode: str
    threshold: float | None = None
    criterion: str = "entropy"

    @property
    def skip(self) -> bool:
        return self.mode in ("skip", "both")

    def leave(self, labels: Tensor) -> Criterion | None:
        """The criterion for a pool; labels (N,) are for the oracle alone."""
        if self.mode not in ("exit", "both"):
            return None
        return first_correct(labels) if self.criterion == "oracle" else CRITERIA[self.criterion](self.threshold)

    def __str__(self) -> str:       # of rows, too
        return self.mode if self.threshold is None else f"{self.mode} at threshold {self.threshold:g}"


def pools(split: Split, device: str | torch.device = "cpu") -> list[Batch]:
    """An encoded split as a few large padded batches of about one size, sorted by length."""
    size = math.ceil(len(split) / math.ceil(len(split) / POOL))
    return [batch.to(device) for batch in data.batches(split, size)]


def run_pool(model: SmartBert, batch: Batch, way: Way) -> Outcome:
    """`infer` on one pool. On a GPU larger batches are full."""
    return infer(model, batch.ids, batch.types, batch.mask, skip=way.skip, leave=way.leave(batch.labels),
                 batch_tokens=1024 if batch.ids.device.type == "cpu" else 32768)


def predict(model: SmartBert, batches: list[Batch], way: Way) -> Outcome:
    """Every pool; the outcome in the order of the split (N rows), on the CPU."""
    model.eval()
    parts = [run_pool(model, batch, way) for batch in batches]
    order = torch.cat([batch.index for batch in batches]).argsort().cpu()
    return Outcome(*(torch.cat([getattr(part, f.name) for part in parts]).cpu()[order] for f in fields(Outcome)))


@dataclass(kw_only=True)
class Row(Way):
    """A way and what it gave: one line of the table."""
    score: float
    scores: dict[str, float]        # all of the task's metrics; score is the first
    layers: float                   # run on average
    flops: float                    # share of plain's
    seconds: float = 0.0            # for the whole split
    skip_rate: list[float]          # share of the rows that reached layer i and skipped it
    exit_histogram: list[int]       # rows that left at layer i; the last counts all who reached the end
    levels: list[dict] | None       # of the toy: examples, accuracy, layers of each level
    held_out: float | None = None   # the score on the held-out part of the training set, and the FLOPs there
    held_out_flops: float | None = None
    chosen: bool = False            # the one to take among those of its mode, by `choose` on the held-out part


def measure(model: SmartBert, split: Split, task: Task, batches: list[Batch], way: Way) -> Row:
    """Run a split one way and account for it, in one pass. Seconds are left at 0: `time_rows` takes them."""
    outcome = predict(model, batches, way)
    if way.criterion == "layer":                            # a shallower BERT would not have asked the heads before
        outcome.history[:, :int(way.threshold) - 1] = torch.nan
    tokens = torch.tensor([len(ids) for ids in split.ids])
    predictions, labels = outcome.logits.argmax(1), torch.tensor(split.labels)
    scores = data.scores(task, predictions.tolist(), split.labels)
    L = outcome.ran.shape[1]
    reached = outcome.exit[:, None] >= torch.arange(1, L + 1)                           # (N, L)
    skipped = (reached & ~outcome.ran).sum(0) / reached.sum(0).clamp(min=1)
    levels = None
    if split.levels:
        each = torch.tensor(split.levels)
        levels = [{"level": level, "examples": int((each == level).sum()),
                   "accuracy": (predictions == labels)[each == level].float().mean().item(),
                   "layers": outcome.ran.sum(1)[each == level].float().mean().item()}
                  for level in sorted(set(split.levels))]
    share = flops(model, tokens, outcome).sum() / plain_flops(model, tokens).sum()
    return Row(**vars(way), score=next(iter(scores.values())), scores=scores, flops=share.item(), levels=levels,
               layers=outcome.ran.sum(1).float().mean().item(), skip_rate=skipped.tolist(),
               exit_histogram=outcome.exit.bincount(minlength=L + 1)[1:].tolist())


def time_rows(model: SmartBert, batches: list[Batch], rows: list[Row], repeats: int = 3) -> None:
    """Fill in each row's seconds: the median of `repeats` passes, all rows in turn, after one pass to warm up."""
    def once(row: Row) -> float:
        start = time.perf_counter()
        for batch in batches:
            run_pool(model, batch, row)
        if batches[0].ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once(rows[0])
    times = [[once(row) for row in rows] for _ in range(repeats)]
    for row, seconds in zip(rows, zip(*times)):
        row.seconds = statistics.median(seconds)


# --- Accounts and warnings --------------------------------------------------------------------------------------------

def sweep(model: SmartBert, split: Split, held: Split | None, task: Task, ways: list[Way], device: torch.device,
          repeats: int = 3) -> list[Row]:
    """The table's rows, one for each way (the first is plain), measured and timed side by side, with what each gives on
    the held-out split."""
    batches = pools(split, device)
    rows = [measure(model, split, task, batches, way) for way in ways]
    if held is not None and len(held):
        batches_held = pools(held, device)
        for row in rows:
            other = measure(model, held, task, batches_held, Way(row.mode, row.threshold))
            row.held_out, row.held_out_flops = other.score, other.flops
    if repeats:
        time_rows(model, batches, rows, repeats)
    return rows


def choose(rows: list[Row], max_drop: float = MAX_DROP, speedup: float | None = None) -> None:
    """Mark the row of each mode to take, by what it gave on held-out data: the cheapest whose score is at most max_drop
    points below the best row without exits; or, for a target speed-up in FLOPs, the best score among those that reach
    it. Where none does: the best score, or the cheapest. Without held-out data none is marked."""
    if any(row.held_out is None for row in rows):
        return
    floor = max(row.held_out for row in rows if row.mode in ("plain", "skip")) - max_drop / 100
    cost, score = (lambda row: -row.held_out_flops), (lambda row: row.held_out)
    best, otherwise = (score, cost) if speedup else (cost, score)
    for mode in dict.fromkeys(row.mode for row in rows):
        ours = [row for row in rows if row.mode == mode]
        enough = [row for row in ours if (row.held_out_flops <= 1 / speedup if speedup else row.held_out >= floor)]
        taken = max(enough, key=best) if enough else max(ours, key=otherwise)
        for row in ours:
            row.chosen = row is taken


def warnings(rows: list[Row], floor: float) -> list[str]:
    """What a reader of the table should know before believing it. floor: the majority class's score."""
    found = []
    for row in rows:
        if row.mode == "skip" and max(row.skip_rate) == 0:
            found.append("no layer is ever skipped: the gates have learned nothing, or lambda or --budget asks nothing")
        if row.mode == "skip" and all(rate in (0.0, 1.0) for rate in row.skip_rate) and max(row.skip_rate) == 1:
            found.append("every example skips the same layers: the gates have become a smaller fixed BERT")
        if row.mode == "exit" and max(row.exit_histogram[:-1], default=0) == sum(row.exit_histogram):
            layer = row.exit_histogram.index(max(row.exit_histogram)) + 1
            found.append(f"at threshold {row.threshold:g} every example leaves at layer {layer}: it is too high")
        if row.score <= floor:
            found.append(f"{row}: the score is no better than always answering the majority class ({floor:.3f})")
    exits = [row for row in rows if row.mode == "exit"]
    if exits and all(sum(row.exit_histogram[:-1]) == 0 for row in exits):
        found.append("nobody ever exits early: the thresholds are too low")
    return found


def table(rows: list[Row], metric: str, layers: int) -> str:
    """The rows as text. Speed-ups are plain's FLOPs or seconds over the row's."""
    lines = [f"{'mode':<6} {'threshold':>9} {metric:>9} {'held-out':>9} {'layers':>7} {'FLOPs':>7} "
             f"{'speed-up in FLOPs':>18} {'in seconds':>11}"]
    for row in rows:
        threshold = "" if row.threshold is None else f"{row.threshold:g}"
        held = "" if row.held_out is None else f"{row.held_out:.3f}"
        seconds = f"{rows[0].seconds / row.seconds:.2f}x" if row.seconds else ""
        mark = " *" if row.chosen and row.threshold is not None else ""
        lines.append(f"{row.mode:<6} {threshold:>9} {row.score:>9.3f} {held:>9} {row.layers:>7.2f} {row.flops:>7.3f} "
                     f"{1 / row.flops:>17.2f}x {seconds:>11}{mark}")
    return "\n".join(lines) + (f"\n(layers of {layers}; FLOPs as a share of plain BERT, gates and heads counted; "
                               f"* chosen on held-out data)")


def account(settings: dict, name: str, split: Split, rows: list[Row], others: list[Row], layers: int, device: str) -> dict:
    """What goes to eval.json: the rows, what they were measured on, and what the run was trained with, without the
    folders of one machine."""
    task = data.find_task(settings["task"])
    recipe = {key: value for key, value in settings.items()
              if key not in ("data_dir", "cache", "out", "device", "resume", "overwrite", "version")}
    recipe["weights"] = settings["weights"] and Path(settings["weights"]).name
    result = {"task": task.name, "split": name, "partial": split.partial, "metric": task.metrics[0], "examples": len(split),
              "majority": data.majority(task, split.labels)[task.metrics[0]], "layers": layers, "device": device,
              "settings": recipe, "rows": [vars(row) for row in rows]}
    return result | ({"criteria": [vars(row) for row in others]} if others else {})


def report(result: dict, rows: list[Row], best: Row, others: list[Row]) -> str:
    """What eval.py prints: the table, the layers of the best row, warnings, the criteria."""
    partial = " (partial data: not the GLUE task)" if result["partial"] else ""
    parts = [f"{result['task']} {result['split']}{partial}: {result['examples']} examples, majority class "
             f"{result['majority']:.3f}", table(rows, result["metric"], result["layers"]), f"{best}:\n{bars(best)}"]
    parts[-1] += "".join(f"\nwarning: {warning}" for warning in warnings(rows, result["majority"]))
    return "\n\n".join(parts + ([criteria_table(others)] if others else []))


def bars(row: Row) -> str:
    """Skip rate and exits of each layer, as bars; and the toy's levels."""
    lines, total = ["layer  skipped by those who reached it     left after it"], max(sum(row.exit_histogram), 1)
    for i, (skipped, left) in enumerate(zip(row.skip_rate, row.exit_histogram)):
        lines.append(f"{i + 1:>5}  {'#' * round(20 * skipped):<20} {skipped:>4.0%}     "
                     f"{'#' * round(20 * left / total):<20} {left / total:>4.0%}")
    if row.levels:
        lines += ["", "level  examples  accuracy  layers run"]
        lines += [f"{each['level']:>5}  {each['examples']:>8}  {each['accuracy']:>8.3f}  {each['layers']:>10.2f}"
                  for each in row.levels]
    return "\n".join(lines)


def criteria(model: SmartBert, split: Split, task: Task, device: torch.device) -> list[Row]:
    """Every criterion over a sweep of its number, exits only, on the same heads."""
    L, C = len(model.gates), len(task.labels)
    # From sure to a guess; entropies as of a likeliest class with p and the others alike: for two classes the same thing.
    p = [1 - (1 - 1 / C) * share for share in (0.003, 0.01, 0.03, 0.07, 0.12, 0.2, 0.3, 0.45, 0.6, 0.8, 0.95)]
    numbers = {"entropy": [-q * math.log(q) - (1 - q) * math.log((1 - q) / (C - 1)) for q in p], "probability": p,
               "patience": range(1, L), "layer": range(1, L + 1), "oracle": [None]}
    batches = pools(split, device)
    return [measure(model, split, task, batches, Way("exit", number, name))
            for name, values in numbers.items() for number in values]


def at_cost(rows: list[Row], cost: float) -> float:
    """The score at that share of plain's FLOPs, between two rows as if each took some of the examples; NaN outside."""
    points = sorted((row.flops, row.score) for row in rows)
    return float(np.interp(cost, *zip(*points), left=np.nan, right=np.nan))


def criteria_table(rows: list[Row]) -> str:
    """Score of every criterion at the same cost."""
    costs = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
    lines = ["exit criteria, score at the same FLOPs (share of plain BERT; no gates)",
             "criterion    " + "".join(f"{cost:>8}" for cost in costs)]
    for name in dict.fromkeys(row.criterion for row in rows if row.criterion != "oracle"):
        values = [at_cost([row for row in rows if row.criterion == name], cost) for cost in costs]
        lines.append(f"{name:<13}" + "".join(f"{'-' if math.isnan(v) else format(v, '.3f'):>8}" for v in values))
    best = next(row for row in rows if row.criterion == "oracle")
    return "\n".join(lines) + f"\nthe oracle reaches {best.score:.3f} at {best.flops:.3f}: no criterion can pass it"


def summary(paths: list[str], max_drop: float = MAX_DROP, speedup: float | None = None) -> str:
    """Mean and standard deviation over the seeds of a study, from the eval.json of its runs, each with the threshold that
    `choose` takes; and the points lost or won against the plain BERTs trained on the same data from the same weights.
    Raises RunError."""
    results, groups = [], {}
    for path in map(Path, paths):
        path = path / "eval.json" if path.is_dir() else path
        try:
            result = json.loads(path.read_text())
            rows = [Row(**row) for row in result["rows"]]
            settings = result["settings"]
            origin = f"{result['task']} {result['split']}{' (partial)' * result['partial']}", settings["weights"] or ""
            choose(rows, max_drop, speedup)
        except FileNotFoundError:
            raise RunError(f"{path} is not there: name the eval.json files of runs, or the runs' folders")
        except (OSError, ValueError, KeyError, TypeError):
            raise RunError(f"{path} is no eval.json of this version: evaluate the run again")
        results.append((origin, settings, [row for row in rows if row.chosen]))
    for origin, settings, rows in results:                  # runs that differ in no more than the seed belong together
        method = settings["method"]
        alike = [other for place, other, _ in results if (place, other["method"]) == (origin, method)]
        differ = "".join(f" {key}={value}" for key, value in settings.items()
                         if key != "seed" and any(other.get(key) != value for other in alike))
        for row in rows:
            groups.setdefault((*origin, method, differ, row.mode), []).append(row)

    def cell(values: list[float]) -> str:
        return f"{statistics.mean(values):.3f}" + (f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else "")

    lines = [f"{'data':<18} {'weights':<10} {'run':<26} {'mode':<6} {'seeds':>5} {'score':>14} {'FLOPs':>14} {'points':>7}"]
    for (task, weights, method, differ, mode), rows in sorted(groups.items()):
        plain = [row.score for key, others in groups.items() if key[:3] == (task, weights, "bert") for row in others]
        scores = [row.score for row in rows]
        points = f"{100 * (statistics.mean(scores) - statistics.mean(plain)):+.1f}" if plain and method != "bert" else ""
        lines.append(f"{task:<18} {weights:<10} {method + differ:<26} {mode:<6} {len(rows):>5} {cell(scores):>14} "
                     f"{cell([row.flops for row in rows]):>14} {points:>7}".rstrip())
    return "\n".join(lines) + "\n(points: score against a plain BERT trained for itself)"


# --- A look inside ----------------------------------------------------------------------------------------------------

def own_examples(lines: list[str], task: Task) -> Split:
    """The user's own sentences, a line each, or pairs with a tab between the two, as a split without labels. Raises
    DataError."""
    pair, texts = bool(task.columns and task.columns[1]), []
    for number, line in enumerate(lines, 1):
        text = line.split("\t")
        if len(text) != 1 + pair or not all(part.strip() for part in text):
            raise DataError(f"example {number} is {line.replace(chr(9), ' | ')!r}, but {task.name} takes " + (
                "two sentences, in a file with a tab between them" if pair else "one sentence") +
                ": in quotes on the command line, a line each in a file")
        texts.append((text[0], text[1] if pair else None))
    return Split(texts, [0] * len(texts))


def chosen_threshold(folder: Path, mode: str, otherwise: float) -> float:
    """The threshold that was chosen for a mode when the run was evaluated; otherwise where it was not yet."""
    try:
        rows = json.loads((folder / "eval.json").read_text())["rows"]
        return next(row["threshold"] for row in rows if row["mode"] == mode and row["chosen"])
    except (OSError, ValueError, KeyError, StopIteration):
        return otherwise


def show_traces(model: SmartBert, split: Split, task: Task, way: Way, outcome: Outcome, n: int | None) -> None:
    """Print the way of every example through the layers; or, of a labelled split, of its n cheapest and n dearest."""
    order = outcome.ran.sum(1).argsort(stable=True).tolist()
    for i in order[:n] + order[-n:] if n else order:
        if n:
            print(f"\nlabel {task.labels[split.labels[i]]}: {' | '.join(text for text in split.texts[i] if text)}")
        one = Outcome(*(value[i:i + 1] for value in vars(outcome).values()))
        print(f"{trace(model, torch.tensor([len(split.ids[i])]), one, task.labels, sys.stdout.isatty())}; {way}")


def pyplot():
    """matplotlib's drawing part, set up to be read from the last row of a lecture hall. Raises RunError."""
    try:
        import matplotlib
    except ImportError:
        raise RunError("--plot needs the package matplotlib: python -m pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 14, "figure.figsize": (8, 5), "figure.dpi": 120, "axes.grid": True, "grid.alpha": 0.3,
                         "savefig.bbox": "tight", "axes.axisbelow": True, "lines.markersize": 9})
    return plt


def plot(folder: Path, rows: list[Row], row: Row, outcome: Outcome, others: list[Row], metric: str) -> None:
    """PNG files in a run's folder: score over FLOPs, skips and exits by layer, layers by example, the training, and the
    exit criteria where others holds them. row, outcome: what to show of the dev set by layer. Raises RunError."""
    plt = pyplot()
    blue, orange, green, gray = "#0072B2", "#E69F00", "#009E73", "#999999"      # told apart by colour-blind eyes as well

    def finish(axes, name: str, **labels) -> None:
        axes.set(**labels)
        axes.figure.savefig(folder / name)
        plt.close(axes.figure)
        print(f"wrote {folder / name}")

    def curves(name: str, rows: list[Row], key: str, styles: dict) -> None:
        axes = plt.subplots()[1]
        for group, (colour, marker) in styles.items():
            points = sorted((row.flops, row.score) for row in rows if getattr(row, key) == group)
            if points:
                axes.plot(*zip(*points), marker, ls="-", color=colour, label=group)
        axes.legend()
        finish(axes, name, xlabel="FLOPs, share of plain BERT", ylabel=f"{metric} (dev)", xlim=(0, None))

    curves("score.png", rows, "mode", {"plain": (gray, "s"), "skip": (green, "D"), "exit": (orange, "o"), "both": (blue, "^")})
    if others:
        curves("criteria.png", others, "criterion", {"entropy": (blue, "o"), "probability": (orange, "x"), "patience": (
            green, "D"), "layer": (gray, "s"), "oracle": ("black", "*")})

    L, total = len(row.skip_rate), sum(row.exit_histogram)
    axes, places = plt.subplots()[1], np.arange(1, L + 1)
    axes.bar(places - 0.2, row.skip_rate, 0.4, color=green, hatch="//", label="skipped by those who reached it")
    axes.bar(places + 0.2, [n / total for n in row.exit_histogram], 0.4, color=blue, label="left after it")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    finish(axes, "layers.png", xlabel="layer", ylabel="share of examples", title=str(row), xticks=places, ylim=(0, 1))

    # Each example a column, the cheapest first; 0 not reached, 1 skipped, 2 run, 3 run and left
    layer = torch.arange(1, L + 1)
    left = (outcome.exit[:, None] == layer) & (layer < L)
    picture = (outcome.exit[:, None] >= layer).int() + outcome.ran + left
    order = np.lexsort((outcome.exit.numpy(), outcome.ran.sum(1).numpy()))
    axes = plt.subplots()[1]
    colours = ["white", "#F0E442", blue, "black"]
    axes.imshow(picture[order].T, aspect="auto", interpolation="nearest", origin="lower", vmin=0, vmax=3,
                cmap=plt.matplotlib.colors.ListedColormap(colours), extent=(0, len(order), 0.5, L + 0.5))
    axes.grid(False)
    axes.legend(handles=[plt.Rectangle((0, 0), 1, 1, facecolor=colour, edgecolor="black", label=name) for colour, name
                         in zip(colours[1:], ("skipped", "run", "run, then left"))], loc="upper left")
    finish(axes, "examples.png", xlabel="examples of the dev set, the cheapest first", ylabel="layer", yticks=places,
           title=str(row))

    steps = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines() if '"step"' in line]
    gated, end = [line["run"] for line in steps if "run" in line], len(steps) + 0.5
    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(8, 8), layout="constrained")
    upper.plot(np.arange(1, end), [line["loss"] for line in steps], color=blue)
    upper.set(ylabel="loss", title="phase 1, then (dashed) phase 2")
    image = lower.imshow(np.array(gated).T, aspect="auto", origin="lower", cmap="cividis", vmin=0, vmax=1,
                         interpolation="nearest", extent=(0.5, len(gated) + 0.5, 0.5, L + 0.5))
    figure.colorbar(image, ax=lower, location="bottom", label="share of examples that run the layer")
    lower.grid(False)
    for axes in (upper, lower):
        axes.axvline(len(gated) + 0.5, color="black", ls="--")
    finish(lower, "training.png", xlabel="training, in averages of 20 steps", ylabel="layer", xlim=(0.5, end), yticks=places)


# --- From the command line --------------------------------------------------------------------------------------------

def check(arguments: argparse.Namespace) -> None:
    """Raises RunError for a number that makes no sense."""
    for name, low in {"thresholds": 0, "max_drop": 0, "repeats": 0, "target_speedup": 1, "trace_examples": 1}.items():
        value = getattr(arguments, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not low <= number < math.inf:     # false for nan as well
                raise RunError(f"--{name.replace('_', '-')} {number:g}: give a number from {low} up")
    if (arguments.plot or arguments.criteria) and (arguments.trace or arguments.trace_examples or arguments.predict):
        raise RunError("--plot and --criteria belong to the table, not to --trace, --trace-examples or --predict")


def evaluate(arguments: argparse.Namespace, settings: dict, model: SmartBert, device: torch.device) -> None:
    """Do what the command line asks with one run. Raises DataError, WeightsError, RunError."""
    folder, task = Path(arguments.run).expanduser(), data.find_task(settings["task"])
    smart = settings["method"] == "smartbert"
    modes = ["plain"] + ["skip"] * (smart and not settings["no_skipping"]) + ["exit"] * smart
    modes += ["both"] * ("skip" in modes)
    if (arguments.plot or arguments.criteria) and not smart:
        raise RunError(f"{folder} is a plain BERT: --plot and --criteria look at gates and exits, which it does not have")
    if arguments.plot:
        pyplot()                                            # what is missing is better said before the work
    # The default sweep: shares of the largest entropy that C classes can have.
    thresholds = arguments.thresholds or [
        round(share * math.log(len(task.labels)), 3) for share in (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)]
    tokenizer = data.load_tokenizer(folder)

    def encode(split: Split) -> Split:
        return data.encode(tokenizer, split, settings["max_length"])

    if arguments.trace or arguments.predict:
        lines = (["\t".join(arguments.trace)] if arguments.trace else
                 sys.stdin.read().rstrip("\n").split("\n") if arguments.predict == "-" else
                 data.read_lines(Path(arguments.predict), "name a file with a sentence a line, or - for standard input"))
        splits = {"own": encode(own_examples(lines, task))}
    else:
        splits = {name: encode(split) for name, split in data.load_task(
            task.name, arguments.data_dir or settings["data_dir"], settings["cache"]).items()}
    if arguments.trace or arguments.predict or arguments.trace_examples:
        threshold = arguments.thresholds[0] if arguments.thresholds else chosen_threshold(folder, modes[-1], thresholds[0])
        way = Way(modes[-1], threshold if smart else None)
        split = splits.get("own") or splits[task.devs[0]]
        outcome = predict(model, pools(split, device), way)
        unknown = sum(tokenizer.token_to_id("[UNK]") in ids for ids in split.ids)
        if unknown:
            print(f"warning: {unknown} of {len(split)} examples hold words that this model has never seen", file=sys.stderr)
        if arguments.predict:
            print(f"({way})", file=sys.stderr)
            for logits, layers in zip(outcome.logits, outcome.ran.sum(1).tolist()):
                print(f"{task.labels[logits.argmax()]}\t{logits.softmax(0).max():.3f}\t{layers}")
        else:
            show_traces(model, split, task, way, outcome, arguments.trace_examples)
        return

    training = splits["train"].select(range(min(settings["limit"] or len(splits["train"]), len(splits["train"]))))
    held = data.hold_out(training, settings["held_out"], settings["seed"])[1]
    ways = [Way(mode, threshold) for mode in modes for threshold in (thresholds if mode in ("exit", "both") else [None])]
    for name in task.devs:
        rows = sweep(model, splits[name], held, task, ways, device, arguments.repeats)
        choose(rows, arguments.max_drop, arguments.target_speedup)
        others = criteria(model, splits[name], task, device) if arguments.criteria else []
        best = next((row for row in reversed(rows) if row.chosen), rows[-1])
        splits[name].partial |= splits["train"].partial
        result = account(settings, name, splits[name], rows, others, len(model.gates), device.type)
        print(f"\n{report(result, rows, best, others)}")
        path = folder / ("eval.json" if name == task.devs[0] else f"eval-{name}.json")
        data.write_json(path, result)
        print(f"\nwrote {path}")
        if arguments.plot and name == task.devs[0]:
            plot(folder, rows, best, predict(model, pools(splits[name], device), best), others, task.metrics[0])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", help="the folder of a run that train.py made")
    parser.add_argument("--thresholds", nargs="+", type=float, metavar="E", help="entropies below which an example leaves")
    parser.add_argument("--max-drop", type=float, default=MAX_DROP, metavar="POINTS",
                        help=f"choose the cheapest threshold that loses at most so much on held-out data (default {MAX_DROP})")
    parser.add_argument("--target-speedup", type=float, metavar="X", help="choose the best threshold with so many times "
                        "fewer FLOPs on held-out data instead")
    parser.add_argument("--criteria", action="store_true", help="compare entropy with other criteria to exit")
    parser.add_argument("--plot", action="store_true", help="write PNG files into the run's folder (needs matplotlib)")
    look = parser.add_mutually_exclusive_group()
    look.add_argument("--trace", nargs="+", metavar="TEXT", help="show a sentence, or the two of a pair, layer by layer")
    look.add_argument("--trace-examples", type=int, metavar="N", help="show the N easiest and hardest of the dev set")
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
            print(summary(asked.summary, asked.max_drop, asked.target_speedup))
        else:
            device = pick_device(asked.device)
            settings, model = load_run(asked.run, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings["bf16"]):     # as it was trained
                evaluate(asked, settings, model, device)
    except (DataError, WeightsError, RunError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
