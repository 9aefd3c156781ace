"""The tables and the picture of a study: mean and spread over seeds, all methods side by side.

    python results/study.py results/*-*.json                        # at the chosen thresholds
    python results/study.py results/*-*.json --target-speedup 2.5   # for two fifths of the FLOPs
    python results/study.py results/*-*.json --at 0.3 0.4 0.5       # at equal FLOPs
    python results/study.py results/*-*.json --plot                 # study.png beside the first

Each file is an eval.json that eval.py wrote, or the folder of a run that holds one.
"""

import argparse
import importlib.util
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import UserError
from eval import MAX_DROP, MODES, Row, at_cost, choose
from train import NOT_IN_RESULT, RECIPES, RELEASE, SMARTBERT_ONLY, Settings

# Colour and style of a curve: method and mode.
LOOKS = {("smartbert", "both"): ("#0072B2", "-"), ("smartbert", "exit"): ("#E69F00", "--"),
         ("smartbert", "skip"): ("#009E73", "D"), ("deebert", "exit"): ("#D55E00", "-"),
         ("fastbert", "exit"): ("#CC79A7", "-"), ("pabee", "exit"): ("#56B4E9", "-"),
         ("berxit", "exit"): ("#7F3C8D", "-"), ("layerdrop", "pruned"): ("black", ":")}


@dataclass
class Result:
    """One eval.json. kind: task and split, weights, method; curve: the rows of each mode, and the
    finer points that the file has, as (flops, score)."""
    kind: tuple[str, str, str]
    settings: dict
    rows: list[Row]
    curves: dict[str, list[tuple[float, float]]]


def read_result(path: Path) -> Result:
    """Raises UserError for a file that is missing, damaged or of another version."""
    advice = "evaluate its run with eval.py, and name that file or folder"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in result["rows"]]
        for row in rows:
            numbers = [row.score, row.layers, row.flops, row.seconds]
            for number in (row.threshold, row.held_out, row.held_out_flops):
                numbers += [number] * (number is not None)
            if row.mode not in MODES or not all(math.isfinite(number) for number in numbers):
                raise ValueError
        if rows[0].mode != "plain":
            raise ValueError
        points = [(row.mode, row.flops, row.score) for row in rows]
        points += [(point["mode"], point["flops"], point["score"])
                   for point in result.get("curve", [])]
        curves = {}
        for mode, flops, score in points:
            curves.setdefault(mode, []).append((flops, score))
        usual = {name: value for name, value in vars(Settings()).items()
                 if name not in NOT_IN_RESULT}          # of settings that the file does not know
        settings = usual | result["settings"]
        data = f"{result['task']} {result['split']}{' (partial)' * result['partial']}"
        data += f" ({settings['limit']} to train)" * bool(settings["limit"])
        kind = (data, settings["weights"] or "", settings["method"])
        return Result(kind, settings, rows, curves)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {advice}")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{path} is not an eval.json of this version: {advice}")


def read_study(paths: list[str], max_drop: float = MAX_DROP,
               speedup: float | None = None) -> dict[tuple, list[Result]]:
    """The eval.json files of a study: (data, weights, method, what is unusual) -> its seeds, each
    with the rows that `choose` takes. Raises UserError."""
    files = [path / "eval.json" if path.is_dir() else path for path in map(Path, paths)]
    names = [path.name if path.is_dir() else path.stem for path in map(Path, paths)]
    results, study = [read_result(path) for path in files], {}
    start_of = {name: result.kind[1] for name, result in zip(names, results)}
    for result in results:      # a run that started from another of these has that one's weights
        data, weights, method = result.kind
        result.kind = (data, start_of.get(weights, weights), method)
        result.settings |= {"weights": result.kind[1], "from_run": weights in start_of}
    for path, result in zip(files, results):
        choose(result.rows, max_drop, speedup)
        if not any(row.chosen for row in result.rows):
            raise UserError(f"{path}: nothing was held out, so no threshold can be chosen; "
                            f"leave it out")
        # A run is named by its settings that differ from its task's recipe, or where no run of its
        # kind has the recipe's value, from most of its kind.
        recipe, task = result.settings["recipe"], result.settings["task"]
        alike = [other.settings for other in results
                 if other.kind == result.kind and other.settings["recipe"] == recipe]
        differ = "" if recipe == "ours" else f" recipe={recipe}"
        defaults = vars(Settings(**(RECIPES.get(task, {}) if recipe == "ours" else RELEASE)))
        for name, value in result.settings.items():
            values = [other.get(name) for other in alike]
            usual = defaults.get(name, False)           # from_run: False
            if usual not in values:
                usual = statistics.mode(values)
            foreign = result.kind[2] != "smartbert" and name in SMARTBERT_ONLY
            if name not in ("seed", "bf16") and not foreign and value != usual:
                differ += f" {name}={value}"
        study.setdefault((*result.kind, differ), []).append(result)
    return dict(sorted(study.items()))


def baseline(study: dict, data: str, weights: str) -> list[float]:
    """The scores of the separately trained plain BERTs on the same data from the same weights."""
    return [result.rows[0].score for result in study.get((data, weights, "bert", ""), [])]


def cell(values: list[float]) -> str:
    """Mean and standard deviation."""
    spread = f" +- {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def names_of(study: dict) -> list[str]:
    """The first columns of a table: a heading, then a line for each entry of the study."""
    lines = [("data", "weights", "run")]
    lines += [(data, weights, method + differ) for data, weights, method, differ in study]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return [" ".join(map(str.ljust, line, widths)) for line in lines]


def summary(study: dict) -> str:
    """Score and FLOPs of the chosen rows, and the points lost or won against plain BERT."""
    heading, *names = names_of(study)
    lines = [f"{heading} {'mode':<6} {'seeds':>5} {'score':>14} {'FLOPs':>14} {'points':>7}"]
    for name, ((data, weights, method, _), seeds) in zip(names, study.items()):
        plain = baseline(study, data, weights)
        for mode in sorted({row.mode for result in seeds for row in result.rows}):
            chosen = [row for result in seeds for row in result.rows
                      if row.mode == mode and row.chosen]
            if not chosen:                  # no score above 0 without exits on held-out data
                continue
            scores, costs = [row.score for row in chosen], [row.flops for row in chosen]
            points = ""
            if plain and method != "bert":
                points = f"{100 * (statistics.mean(scores) - statistics.mean(plain)):+.1f}"
            lines.append(f"{name} {mode:<6} {len(scores):>5} {cell(scores):>14} {cell(costs):>14} "
                         f"{points:>7}".rstrip())
    return "\n".join(lines) + "\n(points: score against a separately trained plain BERT)"


def at_costs(study: dict, costs: list[float]) -> str:
    """The score of every method at the same shares of plain BERT's FLOPs: mean and spread over the
    seeds, and in brackets the points by which it differs from SmartBERT's gates and exits with the
    same seed: those of the same run, or else of SmartBERT as usual."""
    heading, *names = names_of(study)
    lines = [f"{heading} {'mode':<6} {'seeds':>5}" + "".join(f" {cost:>30.2f}" for cost in costs)]
    for name, ((data, weights, *_), seeds) in zip(names, study.items()):
        rivals = {result.settings["seed"]: result
                  for result in study.get((data, weights, "smartbert", ""), [])}
        for mode in ("exit", "both", "pruned"):
            runs = [result for result in seeds if mode in result.curves]
            cells = ""
            for cost in costs if runs else []:
                scores, points = [at_cost(result.curves[mode], cost) for result in runs], []
                for result, score in zip(runs, scores):
                    rival = result if "both" in result.curves else rivals.get(
                        result.settings["seed"])
                    if rival and mode != "both":
                        points.append(100 * (score - at_cost(rival.curves["both"], cost)))
                spread = f" +- {np.std(points, ddof=1):.1f}" if len(points) > 1 else ""
                known = points and not np.isnan(points).any()
                difference = f"({np.mean(points):+.1f}{spread})" if known else ""
                text = "-" if np.isnan(scores).any() else f"{cell(scores)} {difference:>15}"
                cells += f" {text:>30}"
            if runs:
                lines.append(f"{name} {mode:<6} {len(runs):>5}{cells}".rstrip())
    return "\n".join(lines) + ("\n(in brackets: points above SmartBERT's both, seed by seed; "
                               "-: a seed has no threshold at this cost)")


def plot_study(study: dict, folder: Path) -> None:
    """study.png in a folder: score over FLOPs of all methods, mean and standard deviation over
    seeds, a panel for each data set that has a SmartBERT and a plain BERT. Raises UserError."""
    panels = []
    for key, seeds in study.items():
        plain = baseline(study, *key[:2])
        if key[2:] == ("smartbert", "") and plain:
            panels.append((key, seeds, plain))
    if not panels:
        raise UserError("--plot needs runs of SmartBERT and a plain BERT (--method bert) on the "
                        "same data from the same weights")
    # here: the tables need no matplotlib
    from lesson.pictures import GRAY, canvas, picture
    plt, costs, tall = canvas(), np.linspace(0.1, 1, 91), math.ceil(len(panels) / 2)
    plt.rcParams["savefig.dpi"] = 90                    # it is large
    figure, axes = plt.subplots(tall, 2, figsize=(14, 5 * tall), layout="constrained",
                                squeeze=False)
    for panel, ((data, weights, *_), seeds, plain) in zip(axes.flat, panels):
        mean, spread = statistics.mean(plain), statistics.stdev(plain) if len(plain) > 1 else 0
        panel.axhspan(mean - spread, mean + spread, color=GRAY, alpha=0.25)
        panel.axhline(mean, color=GRAY, marker="", label="plain BERT, separately trained")
        for (*of, method, differ), runs in study.items():
            if of != [data, weights] or differ:
                continue
            for mode in sorted(set.intersection(*(set(run.curves) for run in runs)) - {"plain"}):
                curves = [run.curves[mode] for run in runs]
                colour, style = LOOKS.get((method, mode), (None, "-"))
                name = f"smartbert, {mode}" if method == "smartbert" else method
                if mode == "skip":                      # one point of each seed
                    point = np.mean([curve[0] for curve in curves], axis=0)
                    panel.plot(*point, style, color=colour, label=name)
                    continue
                scores = np.array([[at_cost(curve, cost) for cost in costs] for curve in curves])
                mean, spread = scores.mean(0), scores.std(0, ddof=min(1, len(scores) - 1))
                line = panel.plot(costs, mean, style, color=colour, lw=2, marker="", label=name)
                panel.fill_between(costs, mean - spread, mean + spread, alpha=0.15,
                                   color=line[0].get_color())
        names = ", ".join(filter(None, (data, weights)))
        panel.set(title=f"{names}, {len(seeds)} seed{'s' * (len(seeds) > 1)}",
                  xlim=(0, 1), xlabel="FLOPs, share of plain BERT", ylabel="score")
    for panel in axes.flat[len(panels):]:
        panel.axis("off")
    lines = {}                                          # label -> a line that has it
    for panel in axes.flat:
        lines |= dict(zip(*panel.get_legend_handles_labels()[::-1]))
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=5)
    picture(plt, folder / "study.png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="JSON", help="eval.json files, or runs")
    parser.add_argument("--max-drop", type=float, default=MAX_DROP, metavar="POINTS",
                        help="as in eval.py (default %(default)s)")
    parser.add_argument("--target-speedup", type=float, metavar="X", help="as in eval.py")
    parser.add_argument("--at", nargs="+", type=float, metavar="SHARE",
                        help="compare exits and both at these shares of plain BERT's FLOPs")
    parser.add_argument("--plot", action="store_true",
                        help="write study.png beside the first file (needs matplotlib)")
    asked = parser.parse_args(arguments)
    try:
        for name, low in ("max_drop", 0), ("target_speedup", 1):
            value = getattr(asked, name)
            if value is not None and not low <= value < math.inf:       # false for NaN as well
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} {value:g}: give a number from {low} up")
        if asked.plot and not importlib.util.find_spec("matplotlib"):   # said before the work
            raise UserError("--plot needs the package matplotlib: pip install matplotlib")
        study = read_study(asked.files, asked.max_drop, asked.target_speedup)
        print(at_costs(study, asked.at) if asked.at else summary(study))
        if asked.plot:
            plot_study(study, Path(asked.files[0]).parent)
    except BrokenPipeError:                             # its reader has read enough: | head
        sys.stdout = None
    except (UserError, OSError) as error:
        print(f"study.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
