"""The pictures of a run (`python eval.py RUN --plot`) and what the study's picture shares with
them."""

import json
import os
from pathlib import Path

import numpy as np

import data
from smartbert import Outcome

# Told apart by colour-blind eyes as well. Of layers blue is run, yellow is skipped.
BLUE, ORANGE, GREEN, GRAY, YELLOW = "#0072B2", "#E69F00", "#009E73", "#999999", "#F0E442"


def canvas():
    """matplotlib's pyplot, set to be read from the last row of a lecture hall."""
    os.environ["MPLBACKEND"] = "Agg"            # a notebook's backend may not be there
    import matplotlib.pyplot as plt             # here: nothing else needs it
    plt.rcParams.update({
        "font.size": 14, "figure.figsize": (8, 5), "savefig.dpi": 200, "savefig.bbox": "tight", "axes.grid": True,
        "grid.alpha": 0.3, "axes.axisbelow": True, "image.aspect": "auto", "image.origin": "lower",
        "image.interpolation": "nearest", "axes.prop_cycle": plt.cycler(     # two curves on each other are seen to be two
            color=[GRAY, GREEN, ORANGE, BLUE, "black"], marker=list("sDo^*"), ls=["-", "--", "-", "-", "-"],
            markersize=[11, 6, 9, 9, 13])})
    return plt


def picture(plt, path: Path) -> None:
    """Write what was drawn, whole or not at all."""
    data.atomic_write(path, lambda file: plt.savefig(file, format="png"))
    plt.close()
    print(f"wrote {path}")


def plot(folder: Path, title: str, rows: list, points: list, row, outcome: Outcome, others: list, metric: str) -> None:
    """PNG files in a run's folder: score over FLOPs, skips and exits by layer, what became of each
    example, the training, and the exit criteria where others holds them. points: the modes at
    every threshold of a fine grid. row, outcome: what to show of the dev set by layer. All rows
    are eval.Row."""
    plt = canvas()
    N, L = outcome.ran.shape
    layer = np.arange(1, L + 1)

    def finish(name: str, **labels) -> None:
        plt.gca().set(**labels)
        picture(plt, folder / name)

    thresholds = [each for each in points if each.threshold is not None]
    whole = [each for each in rows if each.threshold is None] + thresholds              # every point of a curve
    for name, key, drawn in ("score.png", "mode", whole), ("criteria.png", "criterion", others):
        for group in dict.fromkeys(getattr(each, key) for each in drawn):
            curve = sorted((each.flops, each.score) for each in drawn if getattr(each, key) == group)
            plt.plot(*zip(*curve), label=group, markevery=max(1, len(curve) // 10))
        chosen = [(each.flops, each.score) for each in rows
                  if key == "mode" and each.chosen and each.threshold is not None]
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
    # 0: not reached, 1: skipped, 2: run, 3: run, then left; at layer L nobody leaves, it is the
    # end.
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
