"""What could per-example skipping gain? A trained SmartBERT on paths its gates did not choose.

    python results/ceiling.py runs/cola runs/mrpc --data-dir GLUE

Every path answers with the last head, on the dev set:

    gates      the path of the gates: each example its own
    shuffled   the same paths, permuted across examples: as many layers, the wrong ones
    most run   one path for all: the layers that the gates run most often, as many as they run on
               average
    greedy     one path for all: layers are removed one by one, each time the one whose removal
               costs the least held-out score
    plain      all layers

Where *gates* is no better than *shuffled*, the gates know nothing about single examples; where it
is no better than *greedy*, a smaller fixed BERT would do as well. N examples, L layers.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import (TASKS, UserError, encode, hold_out, load_task, load_tokenizer, one_line_errors,
                  pools, scores, write_text)
from smartbert import infer_pools
from train import autocast, check_data, load_run

SHUFFLES = 5
PATHS = ("gates", "shuffled", "most_run", "greedy", "plain")


@torch.inference_mode()
def score_of(model, split, task, ran):
    """The main metric of the last head's answers, where row n of the split runs the layers that
    are True in ran (N, L)."""
    answers = torch.zeros(len(split), dtype=torch.long)                     # (N,)
    for batch in pools(split, largest=64):
        h = model.bert.embeddings(batch.ids, batch.segment_ids)             # (B, S, H)
        for i, layer in enumerate(model.bert.layers):
            rows = ran[batch.rows, i].nonzero().squeeze(1)                  # (n,)
            if len(rows) > 0:
                h[rows] = layer(h[rows], batch.mask[rows])
        logits, _ = model.heads[-1](h, batch.mask)                          # (B, C)
        answers[batch.rows] = logits.argmax(1)
    return scores(task, answers.tolist(), split.labels)[task.metrics[0]]


def one_path(layers, N, L):
    """The same layers (from 0) for all examples: (N, L) bool."""
    return torch.tensor([i in layers for i in range(L)]).expand(N, L)


def greedy(model, held, task, depth):
    """The layers that are left when the least useful is dropped until `depth` are left."""
    L = len(model.gates)
    kept = set(range(L))
    while len(kept) > depth:
        without = {}
        for i in sorted(kept):
            path = one_path(kept - {i}, len(held), L)
            without[i] = score_of(model, held, task, path)
        kept.remove(max(without, key=without.get))
    return kept


def ceiling(run, model):
    """The scores of all paths of a run. Raises UserError."""
    settings, task = run.settings, TASKS[run.settings.task]
    if not run.gates or not run.finished or settings.held_out == 0:
        raise UserError(f"{run.folder} is not finished, or has no gates, or holds nothing out: "
                        f"name another run of SmartBERT")
    splits = load_task(task.name, settings.data_dir)
    tokenizer = load_tokenizer(run.folder)
    check_data(run, splits["train"])
    _, held = hold_out(splits["train"], settings.held_out, settings.seed, settings.limit)
    held = encode(tokenizer, held, settings.max_length)
    dev = encode(tokenizer, splits[task.devs[0]], settings.max_length)

    ran = infer_pools(model, pools(dev), skip=True).ran                     # (N, L)
    N, L = ran.shape
    layers = ran.float().sum(1).mean().item()
    depth = round(layers)
    most_run = set(ran.float().mean(0).topk(depth).indices.tolist())
    chosen = greedy(model, held, task, depth)
    torch.manual_seed(0)
    shuffled = [score_of(model, dev, task, ran[torch.randperm(N)]) for _ in range(SHUFFLES)]
    return {
        "run": run.folder.name,
        "layers": layers,
        "depth": depth,
        "patterns": len(ran.unique(dim=0)),
        "gates": score_of(model, dev, task, ran),
        "shuffled": statistics.mean(shuffled),
        "shuffled_spread": statistics.stdev(shuffled),
        "most_run": score_of(model, dev, task, one_path(most_run, N, L)),
        "greedy": score_of(model, dev, task, one_path(chosen, N, L)),
        "greedy_layers": [i + 1 for i in sorted(chosen)],
        "plain": score_of(model, dev, task, one_path(set(range(L)), N, L)),
    }


def main(arguments=sys.argv[1:]):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="folders of runs that train.py made")
    parser.add_argument("--data-dir", help="folder with GLUE's files, if they have moved")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    asked = parser.parse_args(arguments)
    with one_line_errors("ceiling.py"):
        results = []
        print(f"{'run':<14} layers  paths" + "".join(f"{path:>10}" for path in PATHS))
        for folder in asked.runs:
            run, model = load_run(folder, "cpu")
            if asked.data_dir is not None:
                run.settings.data_dir = asked.data_dir
            with autocast(run.settings):  # as trained
                found = ceiling(run, model)
            results.append(found)
            line = "{run:<14} {layers:>6.2f} {patterns:>6}".format(**found)
            for path in PATHS:
                line += f"{found[path]:>10.3f}"
            print(line, flush=True)
        if asked.json is not None:
            write_text(asked.json, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
