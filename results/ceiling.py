"""What could per-example skipping gain? A trained SmartBERT on paths its gates did not choose.

    python results/ceiling.py runs/cola runs/mrpc --data-dir GLUE

Every path answers with the last head, on the dev set:

    gates      the path of the gates: each example its own
    shuffled   the same paths, dealt out to the examples at random: as many layers, the wrong ones
    most run   one path for all: the layers that the gates run most often, as many as they run on
               average
    greedy     one path for all: of the full path, always that layer is dropped whose loss hurts
               the held-out examples least
    plain      all layers

Where *gates* is no better than *shuffled*, the gates know nothing about single examples; where it
is no better than *greedy*, a smaller fixed BERT would do as well.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import train
from data import Batch, Split, Task, UserError
from smartbert import SmartBert

SHUFFLES = 5


@torch.inference_mode()
def score_of(model: SmartBert, batches: list[Batch], split: Split, task: Task,
             ran: torch.Tensor) -> float:
    """The main metric of the last head's answers, where row n of the split runs the layers that
    are True in ran (N, L)."""
    answers = torch.zeros(len(split), dtype=torch.long)
    for batch in batches:
        h = model.bert.embeddings(batch.ids, batch.segment_ids)             # (B, S, H)
        for i, layer in enumerate(model.bert.layers):
            rows = ran[batch.index, i].nonzero().squeeze(1)                 # (n,)
            if len(rows):
                h[rows] = layer(h[rows], batch.mask[rows])
        answers[batch.index] = model.heads[-1](h, batch.mask)[0].argmax(-1)
    return data.scores(task, answers.tolist(), split.labels)[task.metrics[0]]


def fixed(layers: set[int], rows: int, L: int) -> torch.Tensor:
    """One path for all rows, (rows, L)."""
    return torch.tensor([i in layers for i in range(L)]).expand(rows, L)


def greedy(model: SmartBert, batches: list[Batch], held: Split, task: Task,
           depth: int) -> set[int]:
    """The layers that are left when the least useful is dropped until `depth` are left."""
    L = len(model.gates)
    kept = set(range(L))
    while len(kept) > depth:
        scores = {i: score_of(model, batches, held, task, fixed(kept - {i}, len(held), L))
                  for i in sorted(kept)}
        kept -= {max(scores, key=scores.get)}
    return kept


def ceiling(folder: Path, data_dir: str | None) -> dict:
    """The scores of all paths of a run. Raises UserError."""
    settings, model = train.load_run(folder, torch.device("cpu"))
    if not settings.has_gates:
        raise UserError(f"{folder} has no gates: name a run of SmartBERT")
    task, tokenizer = data.find_task(settings.task), data.load_tokenizer(folder)
    splits = data.load_task(task.name, data_dir or settings.data_dir, settings.cache)
    _, held, _ = train.split_training_set(splits["train"], settings)
    held, dev = (data.encode(tokenizer, split, settings.max_length)
                 for split in (held, splits[task.devs[0]]))
    batches, held_batches = (list(data.batches(split, 64)) for split in (dev, held))
    ran = train.predict(model, train.pools(dev), True, None).ran            # (N, L)
    N, L = ran.shape
    depth = round(ran.float().sum(1).mean().item())
    most_run = set(ran.float().mean(0).topk(depth).indices.tolist())
    chosen = greedy(model, held_batches, held, task, depth)
    torch.manual_seed(0)
    shuffled = [score_of(model, batches, dev, task, ran[torch.randperm(N)])
                for _ in range(SHUFFLES)]
    return {"run": folder.name, "layers": ran.float().sum(1).mean().item(), "depth": depth,
            "patterns": len(ran.unique(dim=0)),
            "gates": score_of(model, batches, dev, task, ran),
            "shuffled": statistics.mean(shuffled), "shuffled_spread": statistics.stdev(shuffled),
            "most_run": score_of(model, batches, dev, task, fixed(most_run, N, L)),
            "greedy": score_of(model, batches, dev, task, fixed(chosen, N, L)),
            "greedy_layers": [i + 1 for i in sorted(chosen)],
            "plain": score_of(model, batches, dev, task, fixed(set(range(L)), N, L))}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="folders of runs that train.py made")
    parser.add_argument("--data-dir", help="folder with GLUE's files")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    asked = parser.parse_args(arguments)
    try:
        results = []
        print(f"{'run':<12} {'layers':>6} {'paths':>6} {'gates':>7} {'shuffled':>9} "
              f"{'most run':>9} {'greedy':>7} {'plain':>7}")
        for run in asked.runs:
            bf16 = train.read_settings(Path(run)).bf16              # as trained
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                found = ceiling(Path(run), asked.data_dir)
            results.append(found)
            print("{run:<12} {layers:>6.2f} {patterns:>6} {gates:>7.3f} {shuffled:>9.3f} "
                  "{most_run:>9.3f} {greedy:>7.3f} {plain:>7.3f}".format(**found), flush=True)
        if asked.json:
            data.write_json(asked.json, results)
    except (UserError, OSError) as error:
        print(f"ceiling.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
