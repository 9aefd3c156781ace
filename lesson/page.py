"""A page to look at: where every example skips and exits.

    python lesson/page.py runs/toy                  # writes runs/toy/page.html

The page is one file for a browser and asks for no other. It holds two full passes over the dev
set, with gates and without; all modes and thresholds follow from them, as in eval.py. A rounded
entropy could change an exit, so entropies and gates are stored as float32. Probabilities are only
shown, and rounded. lesson/page.html is the template.

Read `content` first: all that the page holds.
N examples, L layers, C classes; run is a train.Run, model a SmartBert.
"""

import argparse
import base64
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from data import (TASKS, UserError, encode, load_task, load_tokenizer, one_line_errors,
                  write_text)
from eval import auxiliary_flops, full_passes, layer_flops
from smartbert import entropy
from train import DEVICES, FREE, METHODS, autocast, check_data, load_run, parse

LARGEST = 1100                          # a larger dev set is shown as a sample


def packed(values, kind):
    """A tensor's bytes as base64. kind: numpy's type; "<f4" is float32, "u1" a byte."""
    return base64.b64encode(values.numpy().astype(kind).tobytes()).decode()


def shown_pass(full):
    """Of a full pass: entropy and answer of each head (N, L), its probabilities (N, L, C)."""
    percent = (100 * full.history.softmax(-1)).round()
    return {"entropies": packed(entropy(full.history), "<f4"),
            "answers": packed(full.history.argmax(-1), "u1"),
            "percent": packed(percent, "u1")}


def costs(model, split):
    """FLOPs of a layer, a gate and a head for each example, N lists of 3."""
    tokens = torch.tensor([len(ids) for ids in split.ids])                  # (N,)
    modules = [layer_flops(model, tokens),
               auxiliary_flops(model.gates[0], tokens),
               auxiliary_flops(model.heads[0], tokens)]
    return torch.stack(modules, 1).tolist()


def stars(run):
    """Mode -> the threshold that eval.py chose on held-out data, where it did."""
    path = run.folder / "eval.json"
    if not path.is_file():
        return {}
    result = json.loads(path.read_text())
    return {row["mode"]: row["threshold"] for row in result["rows"] if row["chosen"]}


def commands(run):
    """The commands that made the page; training has the settings that are not the usual ones."""
    settings, script, words = vars(run.settings).copy(), "train.py", []
    out = shlex.quote(run.settings.out)
    usual = vars(parse(["--task", settings["task"], "--recipe", settings["recipe"]]))
    usual |= {"task": "toy", "recipe": "ours", "from_run": None}
    if settings["budget"] != usual["budget"]:
        del settings["lam"]             # train.py takes one of the two
    if settings["method"] not in METHODS:
        script = "results/rivals.py"
    for name, value in settings.items():
        if value != usual[name] and name not in FREE - {"out"}:
            words.append(f"--{name.replace('_', '-')}")
            if value is not True:
                words.append(str(value))
    train = shlex.join(["python", script, *words])
    return [train, f"python eval.py {out}", f"python lesson/page.py {out}"]


def content(run, model):
    """All that the page shows, as JSON takes it."""
    settings, task = run.settings, TASKS[run.settings.task]
    splits, tokenizer = load_task(task.name, settings.data_dir), load_tokenizer(run.folder)
    check_data(run, splits["train"])
    dev, tokens = splits[task.devs[0]], []
    rows = np.random.default_rng(0).permutation(len(dev))[:LARGEST]
    rows = sorted(rows.tolist())
    split = encode(tokenizer, dev.select(rows), settings.max_length)
    for ids in split.ids:
        tokens.append(" ".join(map(tokenizer.id_to_token, ids.tolist())))
    passes = list(full_passes(run, model, split).values())      # without gates, with gates
    return {"task": vars(task), "split": vars(split) | {"ids": [], "segment_ids": []},
            "whole": len(dev), "rows": rows, "tokens": tokens, "gated": run.gates,
            "exits": run.exits, "seed": settings.seed, "config": run.config,
            "costs": costs(model, split), "stars": stars(run), "commands": commands(run),
            "gates": packed(passes[-1].gates, "<f4"),
            "passes": [shown_pass(full) for full in passes]}


def main(arguments=sys.argv[1:]):
    parser = argparse.ArgumentParser()
    parser.add_argument("run", help="the folder of a run that eval.py has evaluated")
    folder = parser.parse_args(arguments).run
    with one_line_errors("page.py"):
        run, model = load_run(folder, DEVICES[0])
        if run.criterion != "entropy" or not run.finished:
            raise UserError(f"{folder} is not finished, or does not exit by entropy")
        with autocast(run.settings):
            values = json.dumps(content(run, model), ensure_ascii=False)
        values = values.replace("<", "\\u003c")         # so no text ends the script that holds it
        template = (HERE / "page.html").read_text(encoding="utf-8")
        write_text(run.folder / "page.html", template.replace("{{DATA}}", values))
        print(f"wrote {run.folder / 'page.html'}: open it in a browser")


if __name__ == "__main__":
    main()
