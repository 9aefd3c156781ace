"""The pictures of a run that eval.py has evaluated, as PNG files in its folder.

    python -m pip install matplotlib && python lesson/pictures.py runs/toy

score.png      score over FLOPs: each inference mode at every threshold
criteria.png   score over FLOPs: each exit criterion, without gates
layers.png     skip rate and exits of each layer
examples.png   what happened to each example in each layer
training.png   loss and score of each epoch, and what the gates say

N examples, L layers, E epochs of phase 1. plt is matplotlib's pyplot; a row is one of eval.json.
"""

import argparse
import importlib.util
import io
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np

from data import (TASKS, UserError, atomic_write, encode, load_task, load_tokenizer,
                  one_line_errors, pools)
from eval import Point
from results.criteria import compare
from smartbert import infer_pools
from train import autocast, load_run

# Told apart by colour-blind eyes as well. Of layers, blue ran and yellow was skipped.
BLUE, ORANGE, GREEN, GRAY, YELLOW = "#0072B2", "#E69F00", "#009E73", "#999999", "#F0E442"


def canvas():
    """matplotlib's pyplot, set to be read from the last row of a lecture hall."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("pictures need a package: python -m pip install matplotlib")
    os.environ["MPLBACKEND"] = "Agg"            # a notebook's backend may not be installed here
    import matplotlib.pyplot as plt             # here: nothing else needs it
    plt.rcParams.update({
        "font.size": 14,
        "figure.figsize": (8, 5),
        "figure.constrained_layout.use": True,
        "savefig.dpi": 100,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.prop_cycle": plt.cycler(
            color=[GRAY, GREEN, ORANGE, BLUE],
            marker=["s", "D", "o", "^"],
        ),
        "image.aspect": "auto",
        "image.origin": "lower",
        "image.interpolation": "nearest",
    })
    return plt


def picture(plt, path, **labels):
    """Label the axes, and write what was drawn: the whole file or none."""
    from PIL import Image                       # matplotlib needs it as well
    plt.gca().set(**labels)
    drawn = io.BytesIO()
    plt.savefig(drawn, format="png")
    plt.close()
    image = Image.open(drawn).convert("RGB").quantize(128)      # colours; no file is above 60 kB
    atomic_write(path, lambda file: image.save(file, "PNG"))
    print(f"wrote {path}")


# --- The pictures -------------------------------------------------------------------------------

def plot_scores(plt, path, rows, key, chosen, **labels):
    """Score over FLOPs, a curve for each value of this key of the rows; chosen: rows to circle."""
    for name in dict.fromkeys(row[key] for row in rows):
        curve = [(row["flops"], row["score"]) for row in rows if row[key] == name]
        flops, score = np.array(sorted(curve)).T
        every = max(1, len(curve) // 10)                # about ten points of a curve have a marker
        plt.plot(flops, score, label=name, markersize=9, markevery=every)
    for row in chosen:
        plt.plot(row["flops"], row["score"], "ok", fillstyle="none", markersize=18)
    plt.legend()
    picture(plt, path, xlabel="FLOPs, share of plain BERT", xlim=(0, None), **labels)


def plot_layers(plt, path, row, title):
    """Skip rate and exits of each layer."""
    layer = np.arange(1, len(row["skip_rate"]) + 1)                             # (L,)
    exits = np.array(row["exit_histogram"])                                     # (L,)
    skips = "skipped by those who reached it"
    plt.bar(layer - 0.2, row["skip_rate"], 0.4, label=skips, color=YELLOW, hatch="//")
    plt.bar(layer + 0.2, exits / exits.sum(), 0.4, label="exited after it", color="black")
    plt.legend()
    plt.ylim(0, 1)
    picture(plt, path, xlabel="layer", ylabel="share of examples", title=title, xticks=layer)


def plot_examples(plt, path, outcome, title):
    """What happened to each example in each layer: a column each, the cheapest first."""
    N, L = outcome.ran.shape
    layer = np.arange(1, L + 1)
    ran = outcome.ran.numpy()                                                   # (N, L)
    exits = outcome.exit.numpy()[:, None]                                       # (N, 1)
    happened = np.zeros((N, L))
    happened[exits >= layer] = 1
    happened[ran] = 2
    happened[(exits == layer) & (layer < L)] = 3        # after layer L there is no early exit
    happened = happened[np.lexsort((exits[:, 0], ran.sum(1)))]
    colours = plt.matplotlib.colors.ListedColormap(["white", YELLOW, BLUE, "black"])
    place = (0, N, 0.5, L + 0.5)
    plt.imshow(happened.T, vmin=-0.5, vmax=3.5, extent=place, cmap=colours)
    bar = plt.colorbar(ticks=range(4), location="bottom")
    bar.set_ticklabels(["not reached", "skipped", "ran", "ran, exited"])
    plt.grid(False)
    picture(plt, path, xlabel="examples of the dev set, the cheapest first",
            ylabel="layer", yticks=layer, title=title)


def plot_training(plt, path, log, metric, title):
    """Above, loss and score of each epoch; below, the share of examples whose gate says run. log:
    run.json's. Phase 2 begins at the dashed line."""
    judge = next(name for name, value in log[0].items() if isinstance(value, dict))
    run = np.array([entry["run"] for entry in log if entry["phase"] == 1])      # (E, L)
    E, L = run.shape
    epochs = np.arange(1, len(log) + 1)
    loss = [entry["loss"] for entry in log]
    score = [entry[judge][metric] for entry in log]
    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(8, 8))
    upper.plot(epochs, loss, color=BLUE, label="loss")
    upper.plot(epochs, score, color=ORANGE, label=f"{metric}, {judge}")
    upper.legend()
    upper.set(title=title)
    place = (0.5, E + 0.5, 0.5, L + 0.5)
    image = lower.imshow(run.T, cmap="cividis_r", vmin=0, vmax=1, extent=place)
    figure.colorbar(image, location="bottom", label="share of examples whose gate says run")
    lower.grid(False)
    for axes in (upper, lower):
        axes.axvline(E + 0.5, color="black", ls="--", marker="")
    plt.xlim(0.5, len(log) + 0.5)
    picture(plt, path, xlabel="epoch", ylabel="layer", yticks=np.arange(1, L + 1))


# --- A run --------------------------------------------------------------------------------------

def plot(folder):
    """All pictures of a run, in its folder."""
    plt = canvas()
    path = folder / "eval.json"
    if not path.is_file():
        raise UserError(f"{path} is not there: first python eval.py {folder}")
    result = json.loads(path.read_text(encoding="utf-8"))
    rows, name, split = result["rows"], result["task"], result["split"]
    shown = rows[-1]                                    # the star, where there is one
    if shown["threshold"] is None or shown["criterion"] != "entropy":
        raise UserError(f"{folder} has no exits by entropy: name another run")
    run, model = load_run(folder, "cpu")
    title = f"{name}: {shown['mode']} at threshold {shown['threshold']:g}"
    score = f"{result['metric']} ({split})"

    chosen = [row for row in rows if row["chosen"]]
    plot_scores(plt, folder / "score.png", rows + result["curve"], "mode", chosen,
                title=f"{name} (circle: chosen on held-out data)", ylabel=score)
    plot_layers(plt, folder / "layers.png", shown, title)
    if run.gates:
        plot_training(plt, folder / "training.png", run.log, result["metric"], name)

    dev = load_task(name, run.settings.data_dir)[split]
    dev = encode(load_tokenizer(folder), dev, run.settings.max_length)
    point = Point(shown["mode"], shown["threshold"])
    with autocast(run.settings):
        outcome = infer_pools(model, pools(dev), skip=point.gated, threshold=point.threshold)
        full = infer_pools(model, pools(dev), skip=False, all_heads=True)
    plot_examples(plt, folder / "examples.png", outcome, title)
    *criteria, oracle = compare(model, dev, TASKS[name], full)
    plot_scores(plt, folder / "criteria.png", criteria, "criterion", [],
                title=f"{name}: exits without gates", ylabel=score)


def main(arguments=sys.argv[1:]):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="the folder of a run that eval.py has evaluated")
    asked = parser.parse_args(arguments)
    with one_line_errors("pictures.py"):
        plot(Path(asked.run))


if __name__ == "__main__":
    main()
