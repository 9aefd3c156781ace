"""The pictures of a run (`python eval.py RUN --plot`); results/study.py shares some of this."""

import json
import os
from pathlib import Path

import numpy as np

import data
from smartbert import Outcome

# Told apart by colour-blind eyes as well. Of layers, blue ran and yellow was skipped.
BLUE, ORANGE, GREEN, GRAY, YELLOW = "#0072B2", "#E69F00", "#009E73", "#999999", "#F0E442"


def canvas():
    """matplotlib's pyplot, set to be read from the last row of a lecture hall."""
    os.environ["MPLBACKEND"] = "Agg"            # a notebook's backend may not be installed here
    import matplotlib.pyplot as plt             # here: nothing else needs it
    cycle = plt.cycler(color=[GRAY, GREEN, ORANGE, BLUE, "black"], marker=list("sDo^*"),
                       ls=["-", "--", "-", "-", "-"], markersize=[11, 6, 9, 9, 13])
    plt.rcParams.update({
        "font.size": 14, "figure.figsize": (8, 5), "savefig.dpi": 200, "savefig.bbox": "tight",
        "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "image.aspect": "auto",
        "image.origin": "lower", "image.interpolation": "nearest", "axes.prop_cycle": cycle})
    return plt


def picture(plt, path: Path, **labels) -> None:
    """Label the axes, and write what was drawn: the whole file or none."""
    plt.gca().set(**labels)
    data.atomic_write(path, lambda file: plt.savefig(file, format="png"))
    plt.close()
    print(f"wrote {path}")


def plot(folder: Path, title: str, rows: list, points: list, row, outcome: Outcome,
         others: list, metric: str) -> None:
    """All PNG files of a run, in its folder.

    rows: of the table; points: the exits at every threshold of a fine grid; row, outcome: what to
    show of the dev set layer by layer; others: the exit criteria, or []. All rows are eval.Row.
    """
    plt = canvas()
    fixed = [each for each in rows if each.threshold is None]
    whole = fixed + points
    chosen = [each for each in rows if each.starred]
    plot_scores(plt, folder / "score.png", title, metric, "mode", whole, chosen)
    if others:
        plot_scores(plt, folder / "criteria.png", title, metric, "criterion", others, [])
    plot_layers(plt, folder / "layers.png", title, row)
    plot_examples(plt, folder / "examples.png", f"{title}: {row}", outcome)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    if any("run" in line for line in log):              # a model with gates
        plot_training(plt, folder / "training.png", title, metric, log)


def plot_scores(plt, path: Path, title: str, metric: str, key: str, rows: list,
                chosen: list) -> None:
    """Score over FLOPs, a curve for each value of key ("mode" or "criterion")."""
    for group in dict.fromkeys(getattr(each, key) for each in rows):
        curve = sorted((each.flops, each.score) for each in rows if getattr(each, key) == group)
        plt.plot(*zip(*curve), label=group, markevery=max(1, len(curve) // 10))
    if chosen:
        plt.plot([each.flops for each in chosen], [each.score for each in chosen], "o",
                 markersize=18, color="none", markeredgecolor="black",
                 label="chosen on held-out data")
    plt.legend()
    picture(plt, path, xlabel="FLOPs, share of plain BERT", ylabel=f"{metric} (dev)", title=title,
            xlim=(0, None))


def plot_layers(plt, path: Path, title: str, row) -> None:
    """Skip rate and exits of each layer."""
    layer = np.arange(1, len(row.skip_rate) + 1)
    exits = np.array(row.exit_histogram) / sum(row.exit_histogram)
    plt.bar(layer - 0.2, row.skip_rate, 0.4, color=YELLOW, hatch="//",
            label="skipped by those who reached it")
    plt.bar(layer + 0.2, exits, 0.4, color="black", label="exited after it")
    plt.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    picture(plt, path, xlabel="layer", ylabel="share of examples", title=f"{title}: {row}",
            xticks=layer, ylim=(0, 1))


def plot_examples(plt, path: Path, title: str, outcome: Outcome) -> None:
    """What happened to each example in each layer: a column each, the cheapest first."""
    N, L = outcome.ran.shape
    layer = np.arange(1, L + 1)
    exits, ran = outcome.exit.numpy()[:, None], outcome.ran.numpy()             # (N, 1), (N, L)
    # 0: not reached, 1: skipped, 2: ran, 3: ran and exited. After layer L there is no early exit.
    happened = 1 * (exits >= layer) + ran + ((exits == layer) & (layer < L))
    order = np.lexsort((exits[:, 0], ran.sum(1)))
    colours = plt.matplotlib.colors.ListedColormap(["white", YELLOW, BLUE, "black"])
    plt.imshow(happened[order].T, vmin=-0.5, vmax=3.5, extent=(0, N, 0.5, L + 0.5), cmap=colours)
    bar = plt.colorbar(ticks=range(4), location="bottom", pad=0.2)
    bar.set_ticklabels(["not reached", "skipped", "ran", "ran, exited"])
    plt.grid(False)
    picture(plt, path, xlabel="examples of the dev set, the cheapest first", ylabel="layer",
            yticks=layer, title=title)


def plot_training(plt, path: Path, title: str, metric: str, log: list[dict]) -> None:
    """Above, loss and score over the epochs; below, the share of examples whose gate says run."""
    steps = [line for line in log if "step" in line]
    epochs = [line for line in log if "step" not in line]
    judge = next(name for name, seen in epochs[0].items() if isinstance(seen, dict))
    run = np.array([step["run"] for step in steps if "run" in step])            # (steps, L)
    L, per_step = run.shape[1], len(epochs) / len(steps)
    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(8, 8), layout="constrained")
    upper.plot((np.arange(len(steps)) + 0.5) * per_step, [step["loss"] for step in steps], "-",
               color=BLUE, label="loss")
    upper.plot(np.arange(len(epochs)) + 1, [line[judge][metric] for line in epochs], "o",
               color=ORANGE, markersize=6, label=f"{metric}, {judge}")
    upper.legend()
    upper.set(title=f"{title}: phase 1, then (dashed) phase 2")
    image = lower.imshow(run.T, cmap="cividis_r", vmin=0, vmax=1,
                         extent=(0, len(run) * per_step, 0.5, L + 0.5))
    figure.colorbar(image, ax=lower, location="bottom",
                    label="share of examples whose gate says run")
    lower.grid(False)
    for axes in (upper, lower):
        axes.axvline(len(run) * per_step, color="black", ls="--", marker="")
    picture(plt, path, xlabel="epochs", ylabel="layer", yticks=np.arange(1, L + 1),
            xlim=(0, len(epochs)))
