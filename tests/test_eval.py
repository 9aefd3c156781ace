"""The cost, exits applied to a full pass, the choice of a threshold, the table, and whole
evaluations of small untrained runs."""

import json
import random
from dataclasses import asdict
from functools import partial
from itertools import cycle, product
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_batch, tiny_model
from test_smartbert import alone, certain_model, models, tiny_split
from torch import nn
from torch.distributions import Categorical
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import eval as evaluation
import train
from bert import Bert, BertConfig
from eval import (Point, Result, auxiliary_flops, bars, choose, flops, full_passes, layer_flops,
                  measure_all, plain_flops, quantiles, table)
from smartbert import SmartBert, infer, infer_one

CPU = SimpleNamespace(settings=SimpleNamespace(device="cpu"), gates=True, exits=True)


# --- The cost -----------------------------------------------------------------------------------

def counted(function) -> int:
    """torch's own count, with attention taken apart into products that it knows."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


@torch.no_grad()
def test_cost_is_what_torch_counts():
    """Of a layer, a gate and a head, at several lengths; and of whole rows, as inference runs."""
    model = tiny_model()
    for S in (2, 7, 13):
        h, tokens = torch.randn(1, S, 20), torch.tensor([S])
        assert layer_flops(model, tokens).item() == counted(lambda: model.bert.layers[0](h, None))
        for module in (model.gates[0], model.heads[0]):
            assert auxiliary_flops(module, tokens).item() == counted(lambda: module(h, None))
    for ids, segment_ids in alone(tiny_batch()):
        row = ids, segment_ids, torch.ones_like(ids, dtype=torch.bool)
        tokens = torch.tensor([ids.shape[1]])
        assert plain_flops(model, tokens).item() == counted(lambda: model(*row))
        for skip, threshold in product((True, False), (None, 0.8)):
            run = partial(infer, model, *row, skip=skip, threshold=threshold)
            assert flops(model, tokens, run()).sum().item() == counted(run)


def test_cost_of_bert_base():
    """22.35 GFLOPs for the 12 layers at 128 tokens: 24 S H^2 + 4 S^2 H each. Gates and heads are
    H / 6 wide, so that one costs 2 % of a layer at any H."""
    for H, W in {512: 88, 384: 64, 256: 40, 128: 24, 8: 16, 768: 128}.items():
        with torch.device("meta"):
            config = BertConfig(hidden_size=H, attention_probs_dropout_prob=0.3)
            model = SmartBert(Bert(config), classes=2)
        assert model.gates[0].body.dropout == model.heads[0].body.dropout == 0.3
        assert model.gates[0].out.in_features == model.heads[0].out.in_features == W
    cost = 12 * layer_flops(model, torch.tensor([128])).item()
    assert cost / 1e9 == pytest.approx(22.35, abs=0.005)


# --- Exits from a full pass ---------------------------------------------------------------------

@pytest.mark.parametrize("mode, threshold", [
    ("plain", None), ("skip", None), ("exit", 0.9), ("both", 0.0), ("both", 1.0), ("both", 2.0)])
@pytest.mark.parametrize("number", range(6))
@torch.no_grad()
def test_a_result_by_hand(number, mode, threshold):
    """Exits applied to full passes give what comes of single examples. A skip rate is a share of
    those who reached the layer. No exits ask fewer heads than exits that never fire."""
    model, split = [certain_model(), *models()][number], tiny_split(30)
    point, task = Point(mode, threshold), data.TASKS["mrpc"]
    got = measure_all(model, split, task, full_passes(CPU, model, split), [point])[point]
    limit = -1.0 if threshold is None else threshold        # no entropy is below -1
    answers, ways, cost, plain = [], [], 0, 0
    for ids, label, level in zip(split.ids, split.labels, split.levels):
        ids = torch.from_numpy(ids)[None]
        logits, ran, exit = infer_one(model, ids, 0 * ids, limit, point.gated)
        answers.append(logits[0].argmax().item())
        ways.append((level, answers[-1] == label, ran, exit))
        tokens = torch.tensor(ids.shape[1])
        gate, head = (auxiliary_flops(m[0], tokens) for m in (model.gates, model.heads))
        gates = exit if point.gated else 0                  # before each layer that is reached
        heads = 1 if threshold is None else len({*ran, exit})   # after each that ran, at the end
        cost += (len(ran) * layer_flops(model, tokens) + gates * gate + heads * head).item()
        plain += (5 * layer_flops(model, tokens) + head).item()
    assert got.flops == pytest.approx(cost / plain)
    assert got.layers == pytest.approx(sum(len(ran) for *_, ran, _ in ways) / 30)
    assert got.exit_histogram == [sum(exit == i for *_, exit in ways) for i in range(1, 6)]
    for i in range(1, 6):
        skipped = [i not in ran for *_, ran, exit in ways if exit >= i]
        assert got.skip_rate[i - 1] == pytest.approx(sum(skipped) / max(len(skipped), 1))
    assert got.scores == data.scores(task, answers, split.labels)
    assert got.score == got.scores["f1"]
    assert [each["level"] for each in got.levels] == [0, 1, 3]
    for each in got.levels:
        right, ran, _ = zip(*[way for level, *way in ways if level == each["level"]])
        assert each == {"level": each["level"], "examples": len(right),
                        "accuracy": pytest.approx(sum(right) / len(right)),
                        "layers": pytest.approx(sum(map(len, ran)) / len(ran))}


# --- The choice of a threshold ------------------------------------------------------------------

@torch.no_grad()
def test_quantiles_of_the_entropies_that_were_seen():
    """By heads 1 .. 4, where they were asked."""
    split = tiny_split(30)
    for gated, full in full_passes(CPU, tiny_model(), split).items():
        asked = full.head_asked & torch.tensor([True, True, True, True, False])
        seen = Categorical(logits=full.history[asked]).entropy()
        expected = seen.quantile(torch.linspace(0, 1, 250))
        points = quantiles("both" if gated else "exit", full)
        assert {point.gated for point in points} == {gated}
        found = torch.tensor([point.threshold for point in points])
        distance = (found[:, None] - expected).abs() / expected
        assert distance.amin(0).max() < 1e-3 and distance.amin(1).max() < 1e-3
    assert quantiles("both", full_passes(CPU, models()[2], split)[True]) == []  # skips all layers


def result(score: float, flops: float) -> Result:
    return Result(score, {}, 0.0, flops, [], [], [])


@pytest.mark.parametrize("without, speedup, chosen", [
    (0.90, None, [0.2]),                        # the cheapest that loses at most half a point
    (0.92, None, [0.1]), (0.93, None, []),      # .92 is the best score
    (0.90, 1.0, [0.1]), (0.90, 2.0, [0.2]), (0.90, 4.0, [0.3]),     # at most 1 / speed-up
    (0.90, 50.0, [0.4]),                        # no point is as cheap as that: the cheapest
    (0.0, None, []), (0.0, 2.0, [0.2])])        # learned nothing; a target asks for no score
def test_choice(without, speedup, chosen):
    tried = {Point("both", 0.1): result(0.92, 0.8), Point("both", 0.4): result(0.5, 0.1),
             Point("both", 0.2): result(0.896, 0.4), Point("both", 0.3): result(0.894, 0.2)}
    points = choose(tried, result(without, 1.0), speedup)
    assert [point.threshold for point in points] == chosen
    equal = {point: result(0.9, 0.3) for point in tried}        # no score tells one from another
    assert choose(equal, result(0.9, 1.0), None) == choose({}, result(0.9, 1.0), 2.0) == []
    assert choose(tried, result(0.92, 0.8), None) == []         # costs as much as no exits


# --- Seconds and the table ----------------------------------------------------------------------

@pytest.mark.parametrize("repeats, expected", [(3, [3, 50]), (0, [100, 200])])
def test_seconds_are_the_median_after_a_pass_to_warm_up(monkeypatch, repeats, expected):
    """A clock by hand: the points take turns, on 1,000 examples; 0 passes: the one to warm up."""
    ticks, calls = [], []
    for i, seconds in enumerate([100, 200, 1, 20, 7, 90, 3, 50]):
        ticks += [1000 * i, 1000 * i + seconds]
    def noted(model, ids, segment_ids, mask, skip, threshold):
        calls.append((len(ids), skip, threshold))
        return SimpleNamespace(exit=torch.zeros(1))
    monkeypatch.setattr(evaluation, "infer", noted)
    monkeypatch.setattr(evaluation, "time", SimpleNamespace(perf_counter=lambda: ticks.pop(0)))
    points = [Point("plain"), Point("both", 0.5)]
    got = evaluation.seconds(CPU, None, tiny_split(1005), points, repeats)
    assert got == dict(zip(points, expected))
    assert calls == [(1000, False, None), (1000, True, 0.5)] * (1 + repeats)


def row(mode: str, threshold: float | None = None, **more) -> dict:
    usual = dict(mode=mode, threshold=threshold, chosen=False, held_out=0.65, held_out_flops=0.4,
                 seconds=0.0, score=0.7, layers=2.0, flops=0.5, levels=[], skip_rate=[0.25, 0.0],
                 exit_histogram=[3, 1])
    return usual | more


def test_table_and_bars_by_hand():
    """Speed-ups are plain's over the row's; the star's note tells the one on held-out data."""
    rows = [row("plain", flops=1.0, seconds=4.0, held_out=None), row("both", 0.3),
            row("exit", 0.2, flops=0.25, seconds=2.0, chosen=True)]
    _, plain, both, exits, note, star = table(rows, "f1", 2).splitlines()
    assert plain.split() == ["plain", "0.700", "2.00", "1.000", "1.00x", "1.00x"]
    assert both.split() == ["both", "0.3", "0.700", "0.650", "2.00", "0.500", "2.00x"]
    assert exits.split() == "exit 0.2 0.700 0.650 2.00 0.250 4.00x 2.00x *".split()
    assert "2 layers" in note and star.startswith("* exit at 0.2: 2.50x in FLOPs on the held-out")
    levels = [{"level": 3, "examples": 12, "accuracy": 0.75, "layers": 1.5}]
    lines = [line.split() for line in bars(row("exit", 0.2, levels=levels)).splitlines()]
    assert lines[2:4] == [["1", "#" * 5, "25%", "#" * 15, "75%"], ["2", "0%", "#" * 5, "25%"]]
    assert lines[-1] == ["3", "12", "0.750", "1.50"]


# --- Whole evaluations --------------------------------------------------------------------------

def sentences(count: int, seed: int) -> list[str]:
    """Of 1 to 9 of the toy's words."""
    rng, words = random.Random(seed), data.OWNERS + data.THINGS
    return [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(count)]


def write_tsv(path, header: str, *columns: list):
    lines = ["\t".join(map(str, row)) for row in zip(*columns)]
    data.write_text(path, "\n".join([header, *lines]))


def wordy_model(**shape) -> SmartBert:
    """A tiny model with an embedding for each of the toy's words."""
    model = tiny_model(**shape)
    model.bert.config.vocab_size = 59
    model.bert.embeddings.word = nn.Embedding(59, 20)
    return model


def make_run(folder, *flags: str, task: str = "sst2", model=None, **kind):
    """A run as train.py leaves it, of an untrained model. 8 of 100 labels are 1 for SST-2."""
    place = folder / "SST-2"
    if task == "sst2" and not place.is_dir():
        labels = [int(i % 13 == 1) for i in range(100)]
        write_tsv(place / "train.tsv", "sentence\tlabel", sentences(100, 1), labels)
        write_tsv(place / "dev.tsv", "sentence\tlabel", sentences(25, 2), [0, 1, 0, 1, 0] * 5)
    if task != "toy":
        flags = ("--data-dir", str(folder), *flags)
    settings = train.parse(["--task", task, "--out", str(folder / "run"), *flags])
    model = model or wordy_model(classes=len(data.TASKS[task].labels))
    digest = data.digest(data.load_task(task, settings.data_dir)["train"])
    kind = {"gates": True, "exits": True, "finished": True} | kind
    run = train.Run(folder / "run", settings, digest, config=asdict(model.bert.config), **kind)
    data.write_text(run.folder / "tokenizer.json", data.toy_tokenizer().to_str())
    train.save_run(run, model)
    return run.folder


def evaluated(run, *flags: str) -> dict:
    evaluation.main([str(run), "--repeats", "0", "--device", "cpu", *flags])
    return json.loads((run / "eval.json").read_text())


def tried_one_by_one(model, split, points) -> dict:
    """Score and share of plain's FLOPs at each point, by real inference."""
    batch, results = data.collate(split, range(len(split))), {}
    tokens = batch.mask.sum(1)
    for point in points:
        outcome = infer(model, *batch.inputs, skip=point.gated, threshold=point.threshold)
        score = (outcome.logits.argmax(1) == batch.labels).double().mean().item()
        share = flops(model, tokens, outcome).sum() / plain_flops(model, tokens).sum()
        results[point] = result(score, share.item())
    return results


@torch.no_grad()
def test_the_threshold_is_chosen_on_held_out_data(tmp_path, capsys):
    """A run where dev data, plain BERT's score as the reference, or the most expensive of the good
    points would give other thresholds. Every figure and every choice by real inference."""
    model, tokenizer = wordy_model(classes=2, layers=4, seed=4), data.toy_tokenizer()
    labelled = {"train": [(-1.0, False), (0.5, True), (0.5, False)], "dev": [(-1.0, True)]}
    for name, ways in labelled.items():
        texts, answers = sentences(50, len(ways)), []       # labels: what the model says, in turns
        for text, (threshold, skip) in zip(texts, cycle(ways)):
            ids = torch.tensor([tokenizer.encode(text).ids])
            answers.append(infer_one(model, ids, 0 * ids, threshold, skip)[0].argmax().item())
        write_tsv(tmp_path / f"SST-2/{name}.tsv", "sentence\tlabel", 2 * texts, 2 * answers)
    run = make_run(tmp_path, "--held-out", "0.5", "--limit", "50", model=model)
    content, printed = evaluated(run), capsys.readouterr().out
    splits = data.load_task("sst2", tmp_path)
    held = data.encode(tokenizer, data.hold_out(splits["train"], 0.5, 50, 50)[1])
    dev = data.encode(tokenizer, splits["dev"])
    rows, curve = [{Point(each["mode"], each["threshold"]): each for each in content[name]}
                   for name in ("rows", "curve")]
    on_held, on_dev = (tried_one_by_one(model, split, rows | curve) for split in (held, dev))
    for point, each in (rows | curve).items():
        assert on_dev[point] == result(each["score"], each["flops"])
    for point, each in rows.items():
        assert on_held[point] == result(each["held_out"], each["held_out_flops"])
    fast = evaluated(run, "--target-speedup", "2")["rows"]
    for mode, without in ("exit", Point("plain")), ("both", Point("skip")):
        points = [point for point in curve if point.mode == mode]
        def good(results, reference):
            limit, full = results[reference].score - 0.005, results[reference].flops
            found = [p for p in points if results[p].score >= limit and results[p].flops < full]
            return sorted(found, key=lambda point: results[point].flops)
        star, *_, dearest = good(on_held, without)
        assert [point for point in rows if rows[point]["chosen"] and point.mode == mode] == [star]
        assert star not in [dearest, *good(on_dev, without)[:1]]    # or this would show little
        assert mode == "exit" or [star] != good(on_held, Point("plain"))[:1]
        assert f"{mode} at {star.threshold:g}: {1 / on_held[star].flops:.2f}x in FLOPs" in printed
        assert rows[star]["seconds"] > 0 < rows[Point("plain")]["seconds"]
        assert points == quantiles(mode, full_passes(CPU, model, held)[mode == "both"])
        reached = max(on_held[p].flops for p in points if on_held[p].flops <= 0.5)
        [taken] = [each for each in fast if each["chosen"] and each["mode"] == mode]
        assert taken["held_out_flops"] == pytest.approx(reached)


@pytest.mark.parametrize("kind, flags, asked, modes, stars", [
    ({}, [], [], "plain skip exit both", 2), ({"gates": False}, [], [], "plain exit", 1),
    ({"exits": False}, [], [], "plain skip", 0),
    ({"gates": False, "exits": False}, [], [], "plain", 0),                 # plain BERT
    ({}, [], ["--thresholds", "0.5", "0.1"], "plain skip exit both", 0),    # the user's own
    ({}, ["--held-out", "0.06"], [], "plain skip exit both", 0),            # six rows of one class
    ({}, ["--held-out", "0"], [], "plain skip exit both", 0)])
def test_every_kind_of_run(tmp_path, kind, flags, asked, modes, stars):
    """Its modes and thresholds, the stars last; which names eval.json has."""
    content = evaluated(make_run(tmp_path, "--weights", f"{tmp_path}/w", *flags, **kind), *asked)
    rows = content.pop("rows")
    thresholds = [0.5, 0.1] if asked else [0.014, 0.035, 0.069, 0.139, 0.208, 0.277, 0.416, 0.555]
    expected = [(mode, None) for mode in modes.split() if mode in ("plain", "skip")]
    expected += product(modes.split()[len(expected):], thresholds)
    assert [(each["mode"], each["threshold"]) for each in rows[:len(expected)]] == expected
    assert [each["chosen"] for each in rows] == [False] * len(expected) + [True] * stars
    assert all((each["held_out"] is None) == ("0" in flags) for each in rows)
    if "0" not in flags:
        assert {each["mode"] for each in content["curve"]} == set(modes.split()) & {"exit", "both"}
    assert " ".join(rows[0]) == (
        "mode threshold score scores layers flops skip_rate exit_histogram levels criterion "
        "chosen held_out held_out_flops seconds")
    assert str(tmp_path) not in json.dumps(content)         # no path of this machine
    assert content.pop("settings")["task"] == "sst2" and rows[0]["criterion"] == "entropy"
    assert content == {
        "task": "sst2", "split": "dev", "partial": False, "metric": "accuracy", "examples": 25,
        "majority": 15 / 25, "layers": 5, "curve": content.get("curve")}


def test_the_toy(tmp_path, capsys):
    content = evaluated(make_run(tmp_path, task="toy", exits=False))
    printed, rows = capsys.readouterr().out, content["rows"]
    assert [each["level"] for each in rows[-1]["levels"]] == [0, 1, 2]
    assert content["examples"] == 900 and content["majority"] == 1 / 3
    assert table(rows, "accuracy", 5) in printed and bars(rows[-1]) in printed


def test_both_dev_sets_of_mnli(tmp_path, capsys):
    """Each in a file of its own; not the GLUE task where the training data are partial."""
    for name in "train.partial", "dev_matched", "dev_mismatched":
        write_tsv(tmp_path / f"MNLI/{name}.tsv", "sentence1\tsentence2\tgold_label",
                  sentences(30, 3), sentences(30, 4), 10 * data.TASKS["mnli"].labels)
    run = make_run(tmp_path, "--max-length", "12", "--held-out", "0.5", task="mnli")
    evaluated(run)
    for name, split in ("eval", "dev_matched"), ("eval-dev_mismatched", "dev_mismatched"):
        content = json.loads((run / f"{name}.json").read_text())
        assert (content["split"], content["partial"], content["examples"]) == (split, True, 30)
    assert capsys.readouterr().out.count("partial data: not the GLUE task") == 2


def test_files_before_words(tmp_path, monkeypatch, refused):
    """Where nothing can be printed, the figures are stored all the same."""
    run, broken = make_run(tmp_path), lambda text: open("/nowhere/x")
    monkeypatch.setattr("sys.stdout", SimpleNamespace(write=broken, flush=lambda: None))
    refused(evaluation.main, [run, "--repeats", "0"], "eval.py")
    assert len(json.loads((run / "eval.json").read_text())["rows"]) == 20


def test_what_is_refused(tmp_path, refused):
    """In a line that says what to do."""
    refused(evaluation.main, [tmp_path / "none"], "none/model.pt")
    refused(evaluation.main, [make_run(tmp_path, criterion="patience")], "run --criterion")
    refused(evaluation.main, [make_run(tmp_path, finished=False)], "--resume")
    run = make_run(tmp_path)
    for flags in (["--thresholds", "-1"], ["--target-speedup", "0.5"], ["--repeats", "-1"],
                  ["--thresholds", "0.3", "--target-speedup", "2"]):
        refused(evaluation.main, [run, *flags], flags[0])
    moved = (tmp_path / "SST-2").rename(tmp_path / "moved")
    refused(evaluation.main, [run], "train.tsv")
    evaluated(run, "--data-dir", str(moved))
    with open(moved / "train.tsv", "a") as file:
        file.write("\ncat\t1\n")
    refused(evaluation.main, [run, "--data-dir", moved], "another train.tsv")
