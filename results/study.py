"""The tables and the picture of a study: mean and spread over seeds, all methods side by side.

    python results/study.py results/*-5?.json                        # at the chosen thresholds
    python results/study.py results/*-5?.json --at 0.3 0.4 0.5       # at equal FLOPs
    python results/study.py results/*-5?.json --plot                 # study.png beside the first

Each file is an eval.json that eval.py or criteria.py wrote, or the folder of a run that holds one.
"""

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import UserError, atomic_write, one_line_errors
from train import FREE, parse, within

# What only some methods have: another method's value of it means nothing.
OF_GATES = {"budget", "lam", "gate_bias", "gates_from", "full_from", "full_share", "soft_epochs",
            "lr_gates"}
OF_CONTRAST = {"eta1", "eta2"}
# Colour and style of a curve: method and mode.
LOOKS = {("smartbert", "both"): ("#0072B2", "-"), ("smartbert", "exit"): ("#E69F00", "--"),
         ("smartbert", "skip"): ("#009E73", "D"), ("deebert", "exit"): ("#D55E00", "-"),
         ("fastbert", "exit"): ("#CC79A7", "-"), ("pabee", "exit"): ("#56B4E9", "-"),
         ("berxit", "exit"): ("#7F3C8D", "-"), ("exits", "exit"): ("#000000", ":")}
GRAY = "#999999"


# --- Reading ------------------------------------------------------------------------------------

@dataclass
class Result:
    """One eval.json. kind: data, weights, method; usual: the settings that its command would have
    without flags; rows: as in the file; curves: mode -> points (FLOPs, score)."""
    kind: tuple[str, str, str]
    settings: dict
    usual: dict
    rows: list[dict]
    curves: dict[str, list[tuple[float, float]]]


def read_result(path):
    """Raises UserError for a file that is not an eval.json of this version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return to_result(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not an eval.json of this version: evaluate its run again, "
                        f"and name that file or folder") from error


def to_result(content):
    task, recipe = content["task"], content["settings"]["recipe"]
    usual = vars(parse(["--task", task, "--recipe", recipe])) | {"from_run": None}
    settings = usual | content["settings"]              # only rivals.py's have from_run
    settings["from_run"] = settings["from_run"] is not None
    usual["from_run"] = False
    data = f"{task} {content['split']}"
    if content["partial"]:
        data += " (partial)"
    if settings["limit"] is not None:
        data += f" ({settings['limit']} to train)"
    weights = ""
    if task != "toy":
        weights = Path(settings["weights"]).name
    curves = {}
    for point in content["rows"] + content["curve"]:
        curves.setdefault(point["mode"], []).append((point["flops"], point["score"]))
    kind = (data, weights, settings["method"])
    return Result(kind, settings, usual, content["rows"], curves)


def read_study(names):
    """The eval.json files of a study: (data, weights, method, what is unusual) -> its seeds."""
    results, study = [], {}
    for path in map(Path, names):
        if path.is_dir():
            path = path / "eval.json"
        results.append(read_result(path))
    for result in results:
        alike = [other.settings for other in results if other.kind == result.kind
                 and other.settings["recipe"] == result.settings["recipe"]]
        key = (*result.kind, unusual(result, alike))
        study.setdefault(key, []).append(result)
    return dict(sorted(study.items()))


def unusual(result, alike):
    """What names a run: the settings that differ from its task's or, where no run of its kind has
    the task's value, from most of its kind (alike: their settings). The learning rate goes by the
    encoder, so it is compared with most of its kind."""
    means_nothing, words = FREE | {"task", "method", "recipe", "weights", "seed", "bf16"}, ""
    method, recipe = result.kind[2], result.settings["recipe"]
    if method != "smartbert":
        means_nothing = means_nothing | OF_GATES
    if method not in ("smartbert", "exits"):
        means_nothing = means_nothing | OF_CONTRAST
    if recipe != "ours":
        words = f" recipe={recipe}"
    for name, usual in result.usual.items():
        values = [settings[name] for settings in alike]
        if usual not in values or name == "lr":
            usual = statistics.mode(values)
        if name not in means_nothing and result.settings[name] != usual:
            words += f" {name}={result.settings[name]}"
    return words


# --- The tables ---------------------------------------------------------------------------------

def baseline(study, data, weights):
    """The scores of the separately trained plain BERTs on the same data from the same weights."""
    return [result.rows[0]["score"] for result in study.get((data, weights, "bert", ""), [])]


def cell(values):
    """Mean and standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} +- {np.std(values, ddof=1):.3f}"


def names_of(study):
    """The first columns of a table: a heading, then a line for each entry of the study."""
    lines = [("data", "weights", "run")]
    lines += [(data, weights, method + differ) for data, weights, method, differ in study]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return [" ".join(map(str.ljust, line, widths)) for line in lines]


def summary(study):
    """Score and FLOPs of the rows without exits and of the starred ones, and the points lost or
    won against plain BERT."""
    heading, *names = names_of(study)
    lines = [f"{heading} {'mode':<6} {'seeds':>5} {'score':>14} {'FLOPs':>14} {'points':>7}"]
    for name, ((data, weights, method, _), seeds) in zip(names, study.items()):
        plain = baseline(study, data, weights)
        for mode in sorted({row["mode"] for result in seeds for row in result.rows}):
            chosen = []
            for result in seeds:
                chosen += [row for row in result.rows if row["mode"] == mode
                           and (row["chosen"] or row["threshold"] is None)]
            if not chosen:
                continue
            scores = [row["score"] for row in chosen]
            costs = [row["flops"] for row in chosen]
            points = ""
            if plain and method != "bert":
                points = f"{100 * (statistics.mean(scores) - statistics.mean(plain)):+.1f}"
            lines.append(f"{name} {mode:<6} {len(scores):>5} {cell(scores):>14} {cell(costs):>14} "
                         f"{points:>7}".rstrip())
    return "\n".join(lines) + "\n(points: score against a separately trained plain BERT)"


def at_cost(points, cost):
    """The score at a share of plain's FLOPs, interpolated between the two nearest points (FLOPs,
    score); NaN outside."""
    costs, scores = zip(*sorted(points))
    return np.interp(cost, costs, scores, left=np.nan, right=np.nan)


def at_costs(study, costs):
    """The score of every method at the same shares of plain BERT's FLOPs: mean and spread over the
    seeds, and in brackets the points by which it differs from SmartBERT's gates and exits with the
    same seed. These are of the same run for its *exit*, if it has gates; else of SmartBERT as
    usual."""
    heading, *names = names_of(study)
    lines = [f"{heading} {'mode':<6} {'seeds':>5}" + "".join(f" {cost:>30.2f}" for cost in costs)]
    for name, ((data, weights, *_), seeds) in zip(names, study.items()):
        usual = study.get((data, weights, "smartbert", ""), [])
        rivals = {}
        if seeds is not usual:
            rivals = {result.settings["seed"]: result for result in usual}
        for mode in ("exit", "both"):
            runs = [result for result in seeds if mode in result.curves]
            if not runs:
                continue
            line = f"{name} {mode:<6} {len(runs):>5}"
            for cost in costs:
                scores, points = [], []
                for result in runs:
                    scores.append(at_cost(result.curves[mode], cost))
                    rival = rivals.get(result.settings["seed"])
                    if mode == "exit" and "both" in result.curves:
                        rival = result
                    if rival is not None and "both" in rival.curves:
                        points.append(100 * (scores[-1] - at_cost(rival.curves["both"], cost)))
                line += f" {score_and_points(scores, points):>30}"
            lines.append(line.rstrip())
    return "\n".join(lines) + ("\n(in brackets: points above SmartBERT's both, seed by seed; "
                               "-: a seed has no threshold at this cost)")


def score_and_points(scores, points):
    """One cell of the table: mean and spread of the scores, then of the points in brackets."""
    if np.isnan(scores).any():
        return "-"
    difference = ""
    if points and not np.isnan(points).any():
        difference = f"({np.mean(points):+.1f})"
        if len(points) > 1:
            difference = f"({np.mean(points):+.1f} +- {np.std(points, ddof=1):.1f})"
    return f"{cell(scores)} {difference:>15}"


# --- The picture --------------------------------------------------------------------------------

def plot_study(study, folder):
    """study.png in a folder: score over FLOPs of all methods, mean and standard deviation over
    seeds, a panel for each data set that has a SmartBERT and a plain BERT. Raises UserError."""
    try:
        import matplotlib                               # here: the tables need none of it
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UserError("--plot needs the package matplotlib: pip install matplotlib") from error
    panels = [key for key in study
              if key[2:] == ("smartbert", "") and baseline(study, *key[:2])]
    if not panels:
        raise UserError("--plot needs runs of SmartBERT and a plain BERT (--method bert) on the "
                        "same data from the same weights")
    plt.rcParams.update({"font.size": 14, "axes.grid": True, "grid.alpha": 0.3})
    tall = math.ceil(len(panels) / 2)
    figure, axes = plt.subplots(tall, 2, figsize=(14, 5 * tall), layout="constrained",
                                squeeze=False)
    lines = {}                                          # label -> a line that has it
    for panel, key in zip(axes.flat, panels):
        draw_panel(panel, study, key)
        handles, labels = panel.get_legend_handles_labels()
        lines |= dict(zip(labels, handles))
    for panel in axes.flat[len(panels):]:
        panel.axis("off")
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=5)
    path = folder / "study.png"
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=90,
                                                   bbox_inches="tight"))
    plt.close(figure)
    print(f"wrote {path}")


def draw_panel(panel, study, key):
    """The curves of one data set. key: that of its SmartBERT."""
    data, weights, *_ = key
    plain = baseline(study, data, weights)
    mean, spread = np.mean(plain), np.std(plain, ddof=min(1, len(plain) - 1))
    panel.axhspan(mean - spread, mean + spread, color=GRAY, alpha=0.25)
    panel.axhline(mean, color=GRAY, label="plain BERT, separately trained")
    costs = np.linspace(0.1, 1, 91)
    for (of_data, of_weights, method, differ), runs in study.items():
        if (of_data, of_weights, differ) != (data, weights, ""):
            continue
        for mode in ("both", "exit", "skip"):
            curves = [run.curves[mode] for run in runs if mode in run.curves]
            if not curves:
                continue
            colour, style = LOOKS.get((method, mode), (None, "-"))
            name = method
            if method == "smartbert":
                name = f"smartbert, {mode}"
            if mode == "skip":                          # one point of each seed
                cost, score = np.mean([curve[0] for curve in curves], axis=0)
                panel.plot(cost, score, style, color=colour, ms=9, label=name)
                continue
            scores = np.array([at_cost(curve, costs) for curve in curves])      # (seeds, costs)
            mean, spread = scores.mean(0), scores.std(0, ddof=min(1, len(scores) - 1))
            line, = panel.plot(costs, mean, style, color=colour, lw=2, label=name)
            panel.fill_between(costs, mean - spread, mean + spread, alpha=0.15,
                               color=line.get_color())
    seeds = f"{len(study[key])} seeds"
    if len(study[key]) == 1:
        seeds = "1 seed"
    names = ", ".join(filter(None, (data, weights, seeds)))
    panel.set(title=names, xlim=(0, 1), xlabel="FLOPs, share of plain BERT", ylabel="score")


# --- From the command line ----------------------------------------------------------------------

def main(arguments=sys.argv[1:]):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, share = parser.add_argument, within(float, 0, 1)
    add("files", nargs="+", metavar="JSON", help="eval.json files, or runs")
    add("--at", nargs="+", type=share, metavar="SHARE",
        help="compare exits and both at these shares of plain BERT's FLOPs")
    add("--plot", action="store_true",
        help="write study.png beside the first file (needs matplotlib)")
    asked = parser.parse_args(arguments)
    with one_line_errors("study.py"):
        study = read_study(asked.files)
        if asked.at is None:
            print(summary(study))
        else:
            print(at_costs(study, asked.at))
        if asked.plot:
            plot_study(study, Path(asked.files[0]).parent)


if __name__ == "__main__":
    main()
