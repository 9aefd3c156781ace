"""The accounts: what is chosen, what is compared, and what a reader sees of single examples."""

import importlib.util
import io
import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from conftest import tiny_batch, tiny_model

import data
import eval as evaluation
import train
from eval import OperatingPoint, Row, at_cost, choose, cut, never, trace
from results import study
from smartbert import auxiliary_flops, entropy, entropy_below, infer, layer_flops
from data import UserError


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a small run of the toy task."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train.main([*"--limit 200 --epochs1 2 --epochs2 1 --batch-size 16 --device cpu".split(),
                "--out", str(folder)])
    return folder


def row(mode: str, score: float, flops: float, threshold: float | None = None, **more) -> Row:
    """A row whose held-out figures are these; its dev figures are worse and dearer, and have no
    say."""
    return Row(
        mode,
        threshold,
        score=score / 2,
        scores={},
        layers=1.0,
        flops=2 * flops,
        skip_rate=[],
        exit_histogram=[],
        levels=None,
        held_out=score,
        held_out_flops=flops,
        **more,
    )


ROWS = [
    row("plain", 0.90, 1.0),
    row("skip", 0.91, 0.5),
    row("exit", 0.92, 0.8, 0.1),
    row("exit", 0.901, 0.4, 0.2),
    row("exit", 0.89, 0.2, 0.3),
    row("both", 0.905, 0.3, 0.1),
    row("both", 0.899, 0.25, 0.2),
    row("both", 0.80, 0.1, 0.3),
]


@pytest.mark.parametrize(
    "max_drop, speedup, exits, both",
    [
        (
            0.5,
            None,
            0.2,
            0.1,
        ),  # exits at most half a point below plain's .90, both below skip's .91: .901 and .905
        (1.0, None, 0.3, 0.1),
        (2.5, None, 0.3, 0.2),
        (-5.0, None, 0.1, 0.1),  # nobody gains five points: the best score
        (1.0, 2.0, 0.2, 0.1),  # FLOPs at most .5: as near as can be
        (1.0, 4.0, 0.3, 0.2),
        (1.0, 50.0, 0.3, 0.3),
    ],
)  # none is as cheap as that: the cheapest
def test_choice(max_drop, speedup, exits, both):
    choose(ROWS, max_drop, speedup)
    taken = [r for r in ROWS if r.chosen]
    assert [(r.mode, r.threshold) for r in taken] == [
        ("plain", None),
        ("skip", None),
        ("exit", exits),
        ("both", both),
    ]


def test_a_target_is_used_up():
    """Of the rows that reach a target speed-up the dearest, whatever its score."""
    rows = [
        row("plain", 0.95, 1.0),
        row("skip", 0.95, 0.7),
        row("both", 0.900, 0.4, 0.1),
        row("both", 0.904, 0.2, 0.2),
        row("both", 0.70, 0.6, 0.3),
    ]
    choose(rows, 0.5, 2.0)
    assert [r.threshold for r in rows if r.chosen] == [None, None, 0.1]


def test_score_at_the_same_cost():
    """Between two points lies a mixture of them; outside of all points there is nothing."""
    points = [(0.2, 0.6), (0.8, 0.9), (0.4, 0.8)]  # by hand
    assert at_cost(points, 0.3) == pytest.approx(0.7)
    assert at_cost(points, 0.6) == pytest.approx(0.85)
    assert str(at_cost(points, 0.1)) == str(at_cost(points, 0.9)) == "nan"


def test_threshold_is_chosen_on_held_out_data(finished, capsys):
    """The marked rows are those that `choose` takes by held-out scores computed here anew; dev has
    no say."""
    ask = [str(finished), *"--thresholds 0.3 0.6 0.68 --repeats 0 --device cpu --criteria".split()]
    evaluation.main(ask + ["--target-speedup", "2"])
    assert "no criterion scores higher" in capsys.readouterr().out
    result = json.loads((finished / "eval.json").read_text())
    settings, model = train.load_run(finished, torch.device("cpu"))
    training = data.load_task("toy")["train"].select(range(200))
    held = data.encode(
        data.load_tokenizer(finished), data.hold_out(training, 0.1, settings.seed)[1]
    )
    assert len(held) == 21        # 7 of each class
    again = []
    for r in result["rows"]:
        mode, leave = r["mode"], None if r["threshold"] is None else entropy_below(r["threshold"])
        batch = data.collate(held, list(range(21)))
        outcome = infer(
            model,
            batch.ids,
            batch.segment_ids,
            batch.mask,
            skip=mode in ("skip", "both"),
            criterion=leave,
        )
        assert r["held_out"] == pytest.approx(
            (outcome.logits.argmax(1) == batch.labels).float().mean().item()
        )
        tokens = batch.mask.sum(1)
        share = (
            evaluation.flops(model, tokens, outcome).sum()
            / evaluation.plain_flops(model, tokens).sum()
        )
        again.append(row(mode, r["held_out"], share.item(), r["threshold"]))
        assert r["held_out_flops"] == pytest.approx(share.item())
    choose(again, speedup=2.0)
    assert [r["chosen"] for r in result["rows"]] == [r.chosen for r in again]
    # the criteria: all layers at the last one is plain BERT, and none is better than the oracle
    others = result["criteria"]
    last = next(r for r in others if r["criterion"] == "layer" and r["threshold"] == 6)
    assert (last["score"], last["flops"], last["layers"]) == (
        result["rows"][0]["score"],
        pytest.approx(1),
        6,
    )
    assert others[-1]["criterion"] == "oracle" and others[-1]["score"] == max(
        r["score"] for r in others
    )


def test_a_target_out_of_reach_is_said(finished, capsys):
    ask = "--thresholds 0.3 --repeats 0 --device cpu --target-speedup 99"
    evaluation.main([str(finished), *ask.split()])
    assert "no threshold reaches --target-speedup 99" in capsys.readouterr().out


def test_own_sentences(finished, tmp_path, capsys, monkeypatch):
    """--predict answers in the order of the lines, each as if it were alone; bad lines are refused
    by number."""
    lines = ["cat coin b ab", "dog ring a", "king pea c ab ac", "bear coin b"] * 3
    path = tmp_path / "text"

    def answers(text: str, source) -> str:
        path.write_bytes(text.encode("latin-1"))
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode("latin-1"))))
        evaluation.main(
            [str(finished), "--device", "cpu", "--thresholds", "0.5", "--predict", str(source)]
        )
        return capsys.readouterr().out

    _, model = train.load_run(finished, torch.device("cpu"))
    tokenizer, wanted = data.load_tokenizer(finished), ""
    for line in lines:
        ids = torch.tensor([tokenizer.encode(line).ids])
        outcome = infer(model, ids, torch.zeros_like(ids), ids > 0, criterion=entropy_below(0.5))
        p = outcome.logits[0].softmax(0)
        wanted += f"{'abc'[p.argmax()]}\t{p.max():.3f}\t{outcome.ran.sum()}\n"
    assert answers("\n".join(lines) + "\n", path) == answers("\n".join(lines), "-") == wanted
    for text, source, words in (
        ("a\n\nb\n", "-", "example 2"),
        ("a\tb\n", "-", "one sentence"),
        ("", tmp_path / "no", "no"),
        ("caf\u00e9\n", "-", "UTF-8"),
        ("caf\u00e9\n", path, "UTF-8"),
    ):
        with pytest.raises(SystemExit) as stop:
            answers(text, source)
        printed = capsys.readouterr()
        assert stop.value.code == 2 and words in printed.err and not printed.out


@torch.no_grad()
def test_trace_tells_what_happened():
    """Each layer's line against the outcome, its share against a loop over all parts."""
    model, seen = tiny_model(), set()
    ids, segment_ids, mask = tiny_batch()
    for r in range(9):
        S = int(mask[r].sum())
        outcome = infer(
            model,
            ids[r : r + 1, :S],
            segment_ids[r : r + 1, :S],
            mask[r : r + 1, :S],
            criterion=entropy_below(0.8),
        )
        *lines, answer = trace(
            model, torch.tensor([S]), outcome, ("no", "maybe", "yes")
        ).splitlines()[1:]
        for i, line in enumerate(lines):
            left = i + 1 == outcome.exit[0] < 5
            what = (
                "ran, exited"
                if left
                else "ran"
                if outcome.ran[0, i]
                else "skipped"
                if i < outcome.exit[0]
                else "not reached"
            )
            assert line.split()[0] == str(i + 1) and what in line and ("exited" in line) == left
            seen.add(what)
        assert f"{outcome.ran.sum()} of 5 layers run" in answer
        assert ("no", "maybe", "yes")[outcome.logits[0].argmax()] in answer
        tokens, spent = torch.tensor([S]), 0  # layer by layer, as a loop counts it
        for i, line in enumerate(lines):
            if not outcome.gates[0, i].isnan():
                spent += auxiliary_flops(model.gates[i], tokens).item()
            if outcome.ran[0, i]:
                spent += layer_flops(model, tokens).item()
            if not outcome.history[0, i, 0].isnan():
                spent += auxiliary_flops(model.heads[i], tokens).item()
            if "not reached" not in line:
                share = spent / evaluation.plain_flops(model, tokens).item()
                assert line.split()[-1] == f"{share:.1%}"
        assert all(
            f"{entropy(h):.3f}" in line
            for h, line in zip(outcome.history[0], lines)
            if not h[0].isnan()
        )
    assert seen == {"ran, exited", "ran", "skipped", "not reached"}


def test_trace_from_the_command_line(finished, capsys):
    evaluation.main(
        [str(finished), "--trace", "cat coin b ab", "--thresholds", "0.1", "--device", "cpu"]
    )
    printed = capsys.readouterr().out
    assert "both at threshold 0.1" in printed and "\033" not in printed
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(finished), "--trace", "one", "two", "--device", "cpu"])
    assert stop.value.code == 2 and "one sentence" in capsys.readouterr().err


def test_bytes_that_are_no_text_are_refused(finished, capsys):
    """As a terminal of another encoding gives them: é in Latin-1."""
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(finished), "--trace", "caf\udce9", "--device", "cpu"])
    assert stop.value.code == 2 and "example 1 is not UTF-8" in capsys.readouterr().err


def test_a_closed_standard_input_is_said(finished, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(finished), "--predict", "-", "--device", "cpu"])
    assert stop.value.code == 2 and "or - for stdin" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": [1]}', '{"rows": [{"mode": "both"}]}'])
def test_a_damaged_last_evaluation_is_said(finished, tmp_path, capsys, content):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "eval.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(tmp_path / "run"), "--trace", "cat coin b", "--device", "cpu"])
    assert stop.value.code == 2 and "eval.json is damaged" in capsys.readouterr().err


def write_result(path: Path, rows: list[dict], **settings) -> Path:
    """An eval.json of CoLA with these rows and settings."""
    settings = {"task": "cola", "weights": "w"} | settings
    content = {"task": "cola", "split": "dev", "partial": False, "settings": settings}
    content["rows"] = rows
    path.write_text(json.dumps(content))
    return path


def test_summary_is_mean_and_spread(tmp_path):
    """Over the chosen rows of several seeds, by hand, and with another choice; a run with another
    setting stands alone; another file is refused."""
    scores, files = (0.5, 0.6, 0.9, 0.3), []
    for i, score in enumerate(scores):
        rows = [
            vars(row("plain", 0.1, 1.0)),
            vars(row("skip", 2 * score, 1.0)),
            vars(row("both", 2 * score, score / 4, 0.2)),
            vars(row("both", 2 * score, 0.9, 0.1)),
            vars(row("both", 0.02, 0.01, 0.3)),
        ]
        budget = 0.5 if i < 3 else 0.4
        files.append(write_result(tmp_path / f"{i}.json", rows, method="smartbert", seed=i,
                                  budget=budget))
    line, alone = [l for l in study.summary(study.read_study(files)).splitlines() if " both " in l]
    mean, spread = statistics.mean(scores[:3]), statistics.stdev(scores[:3])
    assert line.split()[-9:] == [
        "smartbert",
        "both",
        "3",
        f"{mean:.3f}",
        "+-",
        f"{spread:.3f}",
        f"{mean / 2:.3f}",
        "+-",
        f"{spread / 2:.3f}",
    ]
    assert alone.split()[-5:] == ["budget=0.4", "both", "1", "0.300", "0.150"]
    dear = [
        l for l in study.summary(study.read_study(files, speedup=99)).splitlines() if " both " in l
    ][0]
    assert dear.split()[-6:] == ["0.010", "+-", "0.000", "0.020", "+-", "0.000"]
    for i, score in enumerate((0.3, 0.4)):  # beside two plain BERTs of .35 on average
        rows = [vars(row("plain", 2 * score, 1.0))]
        files.append(write_result(tmp_path / f"bert{i}.json", rows, method="bert", seed=i))
    lines = study.summary(study.read_study(files)).splitlines()
    assert [l.split()[-1] for l in lines if " both " in l] == [
        f"{100 * (mean - 0.35):+.1f}",
        "-5.0",
    ]
    rows = [vars(row("plain", 0.1, 1.0)), vars(row("skip", 0.0, 1.0)),
            vars(row("both", 0.5, 0.3, 0.2))]
    poor = write_result(tmp_path / "poor.json", rows, method="smartbert", seed=9)
    table = study.summary(study.read_study([poor]))     # both has no chosen row, so no line
    assert " plain " in table and " both " not in table
    good = json.loads(files[0].read_text())
    spoilt = [
        good | {"rows": good["rows"][1:]},
        good | {"rows": [good["rows"][0] | {"mode": "half"}]},
        good | {"rows": [good["rows"][0] | {"score": None}]},
        good | {"settings": [1]},
    ]
    for content in ("[]", '{"rows": []}', *map(json.dumps, spoilt)):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(UserError, match="x.json"):
            study.read_study([tmp_path / "x.json"])


def test_the_shipped_results_are_whole():
    """Every run in results/ takes part in the summary, and every toy figure of the README's table
    stands in its file."""
    folder = Path(__file__).parent.parent / "results"
    for paths in sorted(folder.glob("*-*.json")), sorted(folder.glob("former/*.json")):
        table = study.summary(study.read_study(paths)).splitlines()[1:-1]
        seeds = [int(words[words.index("plain") + 1]) for words in map(str.split, table)
                 if "plain" in words]                       # every run has that row
        assert paths and sum(seeds) == len(paths)
    rows = json.loads((folder / "toy-50.json").read_text())["rows"]
    printed = (
        (folder.parent / "README.md")
        .read_text()
        .split("in seconds\n")[1]
        .split("\n...")[0]
        .splitlines()
    )
    for line in printed:
        mode, *numbers = (word.removesuffix("x") for word in line.removesuffix("*").split())
        r = next(
            r
            for r in rows
            if r["mode"] == mode and (len(numbers) == 6 or f"{r['threshold']:g}" == numbers[0])
        )
        speed = [1 / r["flops"], rows[0]["seconds"] / r["seconds"]]
        assert numbers[-6:] == [
            f"{r['score']:.3f}",
            f"{r['held_out']:.3f}",
            f"{r['layers']:.2f}",
            f"{r['flops']:.3f}",
            *(f"{value:.2f}" for value in speed),
        ]


def test_pictures(finished, capsys):
    """Where matplotlib is installed: five PNG files; where not: one line that says how to get
    it."""
    ask = "--plot --criteria --repeats 0 --thresholds 0.2 0.5 --device cpu"
    ask = [str(finished), *ask.split()]
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(SystemExit) as stop:
            evaluation.main(ask)
        assert stop.value.code == 2 and "pip install matplotlib" in capsys.readouterr().err
        pytest.skip("matplotlib is not installed: the message is tested, the pictures are not")
    evaluation.main(ask)
    for name in ("score", "layers", "examples", "training", "criteria"):
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((finished / "eval.json").read_text())
    files = [finished / "eval.json", finished / "bert.json"]
    command = ["--plot", *map(str, files)]
    with pytest.raises(SystemExit) as stop:  # of a study: nothing to compare with
        study.main(command[:-1])
    assert stop.value.code == 2 and "--method bert" in capsys.readouterr().err
    data.write_json(
        files[1],
        result | {"rows": result["rows"][:1], "settings": result["settings"] | {"method": "bert"}},
    )
    study.main(command)
    assert (finished / "study.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("gates", [True, False])
@torch.no_grad()
def test_a_cut_walk_is_what_inference_gives(gates):
    """For each exit criterion and none: layers, exits, gates asked, heads met and answers of every
    row."""
    labels, left = torch.arange(9) % 3, set()
    ways = [
        OperatingPoint("exit", 0.3),
        OperatingPoint("exit", 0.9),
        OperatingPoint("exit", 2.0),
        OperatingPoint("exit", 0.42, "probability"),
        OperatingPoint("plain"),
        OperatingPoint("exit", 1, "patience"),
        OperatingPoint("exit", 2, "patience"),
        OperatingPoint("exit", 3, "layer"),
        OperatingPoint("exit", None, "oracle"),
    ]
    for seed in range(4):
        model, batch = tiny_model(seed), tiny_batch(seed)
        walked = infer(model, *batch, skip=gates, criterion=never)
        for way in ways:
            ours, theirs = (
                cut(walked, way.exit_criterion(labels)),
                infer(model, *batch, skip=gates, criterion=way.exit_criterion(labels)),
            )
            assert torch.equal(ours.ran, theirs.ran) and torch.equal(ours.exit, theirs.exit)
            for name in ("logits", "gates", "history"):
                torch.testing.assert_close(
                    getattr(ours, name),
                    getattr(theirs, name),
                    rtol=1e-4,
                    atol=1e-5,
                    equal_nan=True,
                )
            left |= set(theirs.exit.tolist())
    assert min(left) < 3  # or this test would show little


def test_the_threshold_meets_its_target(finished):
    """Chosen from the fine grid, it saves what was asked for on the held-out rows, and stands in
    the table."""
    ask = "--repeats 0 --device cpu --target-speedup 2 --max-drop 100"
    evaluation.main([str(finished), *ask.split()])
    result = json.loads((finished / "eval.json").read_text())
    for mode in ("exit", "both"):
        rows = [r for r in result["rows"] if r["mode"] == mode]
        assert sum(r["chosen"] for r in rows) == 1 and rows == sorted(
            rows, key=lambda r: r["threshold"]
        )
        chosen = next(r for r in rows if r["chosen"])
        assert chosen["held_out_flops"] <= 0.5
        assert {"threshold", "score", "flops"} < result["curve"][0].keys()


def test_nothing_is_chosen_where_the_held_out_score_is_0():
    """A lucky threshold on a model that learned nothing does not count."""
    rows = [row("plain", 0.0, 1.0), row("exit", 0.02, 0.3, 0.1), row("exit", 0.0, 0.2, 0.2)]
    rows[1].chosen = True                                   # as a file may say
    choose(rows)
    assert not any(r.chosen for r in rows)
    assert any("no threshold chosen" in line for line in evaluation.warnings(rows, 0.0))
