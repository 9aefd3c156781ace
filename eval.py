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
