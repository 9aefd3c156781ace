"""The table and the picture of a study: mean and spread over the seeds, beside plain BERT.

    python results/study.py results/*-*.json                            # the table
    python results/study.py results/*-*.json --target-speedup 2.5       # thresholds for two fifths of the FLOPs
    python results/study.py results/*-*.json --plot                     # study.png beside the first file

Each file is an eval.json that eval.py wrote, or the folder of a run that holds one.
"""

import argparse
import importlib.util
import math
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from eval import MAX_DROP, Row, at_cost, choose, read_result
from data import UserError


def read_study(paths: list[str], max_drop: float = MAX_DROP, speedup: float | None = None) -> dict[tuple, list[list[Row]]]:
    """The eval.json of a study's runs: (data, weights, method, what is unusual) -> the rows of each seed, each run with the
    thresholds that `choose` takes. Raises UserError."""
    files = [path / "eval.json" if path.is_dir() else path for path in map(Path, paths)]
    runs, study = [read_result(path) for path in files], {}
    for path, (kind, settings, rows) in zip(files, runs):
        choose(rows, max_drop, speedup)
        if not any(row.chosen for row in rows):
            raise UserError(f"{path}: nothing was held out, so no threshold can be chosen; leave it out")
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


def plot_study(study: dict, folder: Path) -> None:
    """study.png in a folder: score over FLOPs, mean over the seeds, a panel for each data set with a plain BERT of its own,
    whose mean and standard deviation are the gray line and band. Raises UserError."""
    panels = [(key, seeds, plain) for key, seeds in study.items()
              if key[2:] == ("smartbert", "") and (plain := baseline(study, *key[:2]))]
    if not panels:
        raise UserError("--plot needs runs of SmartBERT and a plain BERT (--method bert) on the same data from the same weights")
    from lesson.pictures import BLUE, GRAY, GREEN, ORANGE, canvas, picture      # here: the table needs no matplotlib
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="JSON", help="eval.json files, or folders of runs")
    parser.add_argument("--max-drop", type=float, default=MAX_DROP, metavar="POINTS",
                        help="as in eval.py (default %(default)s)")
    parser.add_argument("--target-speedup", type=float, metavar="X", help="as in eval.py")
    parser.add_argument("--plot", action="store_true",
                        help="write study.png beside the first file (needs matplotlib)")
    asked = parser.parse_args(arguments)
    try:
        for name, low in ("max_drop", 0), ("target_speedup", 1):
            value = getattr(asked, name)
            if value is not None and not low <= value < math.inf:       # false for nan as well
                raise UserError(f"--{name.replace('_', '-')} {value:g}: give a number from {low} up")
        if asked.plot and not importlib.util.find_spec("matplotlib"):   # better said before the work
            raise UserError("--plot needs the package matplotlib: python -m pip install matplotlib")
        study = read_study(asked.files, asked.max_drop, asked.target_speedup)
        print(summary(study))
        if asked.plot:
            plot_study(study, Path(asked.files[0]).parent)
    except BrokenPipeError:                                 # what reads has read enough: | head
        sys.stdout = None
    except (UserError, OSError) as error:
        print(f"study.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
