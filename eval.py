"""What a trained SmartBERT skips, where it exits, what it costs and how well it answers.

    python eval.py runs/toy                                       # the table, and eval.json in that folder
    python eval.py runs/toy --thresholds 0.05 0.1 0.3             # your own sweep of entropy thresholds
    python eval.py runs/rte --data_dir ~/glue                     # GLUE data from a folder of yours

A run is measured four ways on the dev set: *plain* (every layer, the last head: BERT), *skip* (gates only), *exit*
(exits only) and *both*. FLOPs are counted on real tokens with gates and heads, as a share of plain BERT; seconds are
the median of several passes that collect nothing, taken in turn with plain's. The paper's experiments, in one table.
"""

import argparse
import json
import math
import pickle
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import data
from bert import Bert, BertConfig, WeightsError
from data import Batch, DataError, Split, Task
from smartbert import Criterion, Outcome, SmartBert, entropy_below, flops, infer, plain_flops

VERSION = 1             # of the files in a run's folder; another number means another layout
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
    """A .pt file that train.py wrote. Raises RunError where it is missing, truncated or of another version."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"{path} is not there: is {path.parent} a run that train.py has finished?")
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
        raise RunError(f"{path} is truncated or no file of train.py's: train again")
    if not isinstance(content, dict) or content.get("version") != VERSION:
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

def pools(split: Split, device: str | torch.device = "cpu", size: int = POOL) -> list[Batch]:
    """An encoded split as a few large padded batches, sorted by length, so that a slice of one has little padding."""
    return [batch.to(device) for batch in data.batches(split, size)]


def predict(model: SmartBert, batches: list[Batch], *, skip: bool, leave: Criterion | None,
            batch_size: int = 32) -> Outcome:
    """`infer` on every pool; the outcome in the order of the split (N rows), on the CPU."""
    model.eval()
    parts = [infer(model, b.ids, b.types, b.mask, skip=skip, leave=leave, batch_size=batch_size) for b in batches]
    order = torch.cat([b.index for b in batches]).argsort().cpu()
    return Outcome(*(torch.cat([getattr(part, name) for part in parts]).cpu()[order]
                     for name in ("logits", "ran", "exit")))


@dataclass
class Row:
    """One line of the table. layers: run on average; flops, seconds: of plain's, for the whole split."""
    mode: str
    threshold: float | None
    score: float
    layers: float
    flops: float
    seconds: float
    skip_rate: list[float]          # share of the rows that reached layer i and skipped it
    exit_histogram: list[int]       # rows that left at layer i; the last counts all who reached the end
    scores: dict[str, float]
    levels: list[dict] | None


def measure(model: SmartBert, split: Split, task: Task, batches: list[Batch], mode: str, threshold: float | None,
            batch_size: int = 32) -> Row:
    """Run one mode over a split and account for it, in one pass. Seconds are left at 0: `time_rows` takes them."""
    skip, leave = mode in ("skip", "both"), entropy_below(threshold) if mode in ("exit", "both") else None
    outcome = predict(model, batches, skip=skip, leave=leave, batch_size=batch_size)
    tokens = torch.tensor([len(ids) for ids in split.ids])
    cost = flops(model, tokens, outcome, skip=skip, exits=leave is not None)
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
    return Row(mode, threshold, next(iter(scores.values())), outcome.ran.sum(1).float().mean().item(),
               (cost.sum() / plain_flops(model, tokens).sum()).item(), 0.0, skipped.tolist(),
               outcome.exit.bincount(minlength=L + 1)[1:].tolist(), scores, levels)


def time_rows(model: SmartBert, batches: list[Batch], rows: list[Row], batch_size: int = 32, repeats: int = 3) -> None:
    """Fill in each row's seconds: the median of `repeats` passes, all rows in turn, after one pass to warm up."""
    def once(row: Row) -> float:
        leave = entropy_below(row.threshold) if row.mode in ("exit", "both") else None
        start = time.perf_counter()
        for b in batches:
            infer(model, b.ids, b.types, b.mask, skip=row.mode in ("skip", "both"), leave=leave, batch_size=batch_size)
        if batches[0].ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once(rows[0])
    times = [[once(row) for row in rows] for _ in range(repeats)]
    for row, seconds in zip(rows, zip(*times)):
        row.seconds = statistics.median(seconds)


# --- Accounts and warnings --------------------------------------------------------------------------------------------

def sweep(model: SmartBert, split: Split, task: Task, thresholds: list[float], device: torch.device, *,
          skipping: bool = True, exiting: bool = True, batch_size: int = 32, repeats: int = 3) -> list[Row]:
    """The table's rows: plain, skip, then exit and both at each threshold, measured and timed side by side."""
    batches = pools(split, device)
    wanted = [("plain", None)] + [("skip", None)] * skipping
    for mode in ("exit",) * exiting + ("both",) * (exiting and skipping):
        wanted += [(mode, threshold) for threshold in thresholds]
    rows = [measure(model, split, task, batches, mode, threshold, batch_size) for mode, threshold in wanted]
    time_rows(model, batches, rows, batch_size, repeats)
    return rows


def warnings(rows: list[Row], floor: float) -> list[str]:
    """What a reader of the table should know before believing it. floor: the majority class's score."""
    found, L = [], len(rows[0].skip_rate)
    for row in rows:
        if row.mode == "skip" and max(row.skip_rate) == 0:
            found.append("no layer is ever skipped: the gates have learned nothing, or lambda or --budget asks nothing")
        if row.mode == "skip" and all(rate in (0.0, 1.0) for rate in row.skip_rate) and max(row.skip_rate) == 1:
            found.append("every example skips the same layers: the gates have become a smaller fixed BERT")
        if row.mode == "exit" and max(row.exit_histogram[:-1], default=0) == sum(row.exit_histogram):
            layer = row.exit_histogram.index(max(row.exit_histogram)) + 1
            found.append(f"at threshold {row.threshold:g} every example leaves at layer {layer}: it is too high")
        if row.score <= floor:
            found.append(f"{row.mode}{'' if row.threshold is None else f' at {row.threshold:g}'}: the score is no better "
                         f"than always answering the majority class ({floor:.3f})")
    exits = [row for row in rows if row.mode == "exit"]
    if exits and all(sum(row.exit_histogram[:-1]) == 0 for row in exits):
        found.append("nobody ever exits early: the thresholds are too low")
    return found


def table(rows: list[Row], metric: str, layers: int) -> str:
    """The rows as text. Speed-ups are plain's FLOPs or seconds over the row's."""
    lines = [f"{'mode':<6} {'threshold':>9} {metric:>9} {'layers':>7} {'FLOPs':>7} "
             f"{'speed-up in FLOPs':>18} {'in seconds':>11}"]
    for row in rows:
        threshold = "" if row.threshold is None else f"{row.threshold:g}"
        lines.append(f"{row.mode:<6} {threshold:>9} {row.score:>9.3f} {row.layers:>7.2f} {row.flops:>7.3f} "
                     f"{1 / row.flops:>17.2f}x {rows[0].seconds / row.seconds:>10.2f}x")
    return "\n".join(lines) + f"\n(layers of {layers}; FLOPs as a share of plain BERT, gates and heads counted)"


def bars(row: Row) -> str:
    """Skip rate and exits of each layer, as bars."""
    lines, total = ["layer  skipped by those who reached it     left after it"], max(sum(row.exit_histogram), 1)
    for i, (skipped, left) in enumerate(zip(row.skip_rate, row.exit_histogram)):
        lines.append(f"{i + 1:>5}  {'#' * round(20 * skipped):<20} {skipped:>4.0%}     "
                     f"{'#' * round(20 * left / total):<20} {left / total:>4.0%}")
    return "\n".join(lines)


def show(row: Row, title: str) -> None:
    print(f"\n{title}\n{bars(row)}")
    if row.levels:
        print("\nlevel  examples  accuracy  layers run")
        for level in row.levels:
            print(f"{level['level']:>5}  {level['examples']:>8}  {level['accuracy']:>8.3f}  {level['layers']:>10.2f}")


def threshold_list(values: list[str]) -> list[float]:
    """Thresholds from the command line. Raises RunError for what is no number or below 0."""
    try:
        thresholds = [float(value) for value in values]
    except ValueError as error:
        raise RunError(f"--thresholds: {error}; give numbers such as 0.1 0.3")
    if not all(0 <= value < float("inf") for value in thresholds):      # false for nan as well
        raise RunError("--thresholds: an entropy is a number from 0 up; give numbers such as 0.1 0.3")
    return thresholds


def evaluate(arguments: argparse.Namespace) -> None:
    """Print the table of one run and write eval.json into its folder. Raises DataError, RunError."""
    device = pick_device(arguments.device)
    settings, model = load_run(arguments.run, device)
    folder = Path(arguments.run).expanduser()
    task = data.find_task(settings["task"])
    L, C = len(model.gates), len(task.labels)
    # The default sweep: shares of the largest entropy that C classes can have.
    thresholds = threshold_list(arguments.thresholds) if arguments.thresholds else [
        round(share * math.log(C), 3) for share in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)]
    splits = data.load_task(task.name, arguments.data_dir or settings["data_dir"], settings["cache"])
    tokenizer = data.load_tokenizer(folder)
    for name in task.devs:
        split = data.encode(tokenizer, splits[name], settings["max_length"])
        smart = settings["method"] == "smartbert"
        rows = sweep(model, split, task, thresholds, device, skipping=smart and not settings["no_skipping"],
                     exiting=smart, batch_size=arguments.batch_size, repeats=arguments.repeats)
        floor = data.majority(task, split.labels)[task.metrics[0]]
        partial = " (partial data: not the GLUE task)" if split.partial or splits["train"].partial else ""
        print(f"\n{task.name} {name}{partial}: {len(split)} examples, majority class {floor:.3f}\n")
        print(table(rows, task.metrics[0], L))
        # Of the rows near the best, the cheapest is the one worth looking at.
        near = [row for row in rows if row.score >= max(r.score for r in rows) - 0.01]
        chosen = min(near, key=lambda row: row.flops)
        show(chosen, f"{chosen.mode}{'' if chosen.threshold is None else f' at threshold {chosen.threshold:g}'}, "
                     f"the cheapest row within .01 of the best score:")
        for warning in warnings(rows, floor):
            print(f"warning: {warning}")
        # What the run was trained with, without the folders of one machine.
        recipe = {key: value for key, value in settings.items()
                  if key not in ("data_dir", "cache", "out", "device", "resume", "overwrite", "version")}
        recipe["weights"] = settings["weights"] and Path(settings["weights"]).name
        result = {"task": task.name, "split": name, "partial": bool(partial), "metric": task.metrics[0],
                  "examples": len(split), "majority": floor, "layers": L, "device": device.type,
                  "batch_size": arguments.batch_size, "settings": recipe, "rows": [vars(row) for row in rows]}
        path = folder / ("eval.json" if name == task.devs[0] else f"eval-{name}.json")
        data.write_json(path, result)
        print(f"\nwrote {path}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="the folder of a run that train.py made")
    parser.add_argument("--thresholds", nargs="+", metavar="E", help="entropies below which an example leaves")
    parser.add_argument("--data_dir", help="folder with GLUE's files; default: where the run was trained from")
    parser.add_argument("--batch_size", type=int, default=32, help="rows that a layer runs at once (default 32)")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes of each row (default 3)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    try:
        evaluate(parser.parse_args(arguments))
    except (DataError, WeightsError, RunError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
