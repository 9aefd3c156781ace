"""Decisions on the very border, every number of a row of the table against examples that go
through the model one by one, and which row and example is shown."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import save_tiny_weights, tiny_batch, tiny_model
from test_training import split_of, sst2_run
from torch import nn

import data
import eval as evaluation
import train
from data import find_task
from eval import OperatingPoint, Row, fine_grid, measure, walk
from smartbert import (
    auxiliary_flops,
    entropy,
    entropy_below,
    gated_forward,
    infer,
    infer_one,
    layer_flops,
    probability_above,
)

# --- On the border ------------------------------------------------------------------------------

@torch.no_grad()
def test_an_even_chance_skips():
    """g = 1/2 exactly, as in the release at its start: in training and both ways of inference."""
    model, batch = tiny_model(), tiny_batch()
    for gate in model.gates[1::2]:
        nn.init.zeros_(gate.out.weight)
        nn.init.zeros_(gate.out.bias)
    for ran in infer(model, *batch).ran, gated_forward(model, *batch, hard=True)[-1] == 0:
        assert not ran[:, [1, 3]].any() and ran[:, [0, 2, 4]].any()
    ids, segment_ids, mask = batch
    assert mask[0].all()
    _, ran, _ = infer_one(model, ids[:1], segment_ids[:1], -1.0)
    assert not {2, 4} & set(ran)


def test_on_the_threshold_nobody_leaves():
    """Entropy must be below it, probability above; certainty itself is not below 0."""
    torch.manual_seed(0)
    history, rows = torch.randn(5, 2, 3), torch.arange(5)
    history[4] = torch.tensor([0.0, 300.0, 0.0])
    for make, values, sign in ((entropy_below, entropy(history[:, 1]), 1),
                               (probability_above, history[:, 1].softmax(-1).amax(-1), -1)):
        for value in values.tolist():
            wanted = [sign * other < sign * value for other in values.tolist()]
            assert make(value)(history, rows).tolist() == wanted
    assert not entropy_below(0.0)(history, rows).any()


# --- The account of a way -----------------------------------------------------------------------


def examples(rows: int = 30):
    """Some of them of levels 0, 1 and 3; none of level 2."""
    split = split_of(rows)
    split.levels = [(0, 1, 3)[i // 2 % 3] for i in range(rows)]
    return split


@pytest.mark.parametrize("mode, threshold", [
    ("plain", None), ("skip", None), ("exit", 0.7), ("exit", 2.0), ("both", 0.0), ("both", 0.7)])
@torch.no_grad()
def test_a_row_by_hand(mode, threshold):
    """Score, layers, FLOPs, skip rates, exits and levels, from the ways of the single examples.

    A layer's skip rate is a share of those who reached it. A gate is asked before each layer that
    is reached, a head after each that ran and at the end.
    """
    model, split, task = tiny_model(), examples(), find_task("mnli")
    limit = -1.0 if threshold is None else threshold            # no entropy is below -1
    point, skip = OperatingPoint(mode, threshold), mode in ("skip", "both")
    got = measure(model, split, task, walk(model, split, [point]), point)
    reached, skipped, left, ways, cost, plain = [0] * 5, [0] * 5, [0] * 5, [], 0, 0
    for ids, label, level in zip(split.ids, split.labels, split.levels):
        ids = torch.from_numpy(ids)[None]
        logits, ran, exit = infer_one(model, ids, 0 * ids, limit, skip)
        for layer in range(1, exit + 1):
            reached[layer - 1] += 1
            skipped[layer - 1] += layer not in ran
        left[exit - 1] += 1
        ways.append((level, logits[0].argmax().item() == label, len(ran)))
        tokens = torch.tensor(ids.shape[1])
        gate, head = (auxiliary_flops(m[0], tokens) for m in (model.gates, model.heads))
        asked = exit if skip else 0
        met = 1 if threshold is None else len(ran) + (exit == 5 and 5 not in ran)
        cost += (len(ran) * layer_flops(model, tokens) + asked * gate + met * head).item()
        plain += (5 * layer_flops(model, tokens) + head).item()
    assert got.skip_rate == pytest.approx([s / max(r, 1) for s, r in zip(skipped, reached)])
    assert got.exit_histogram == left
    assert got.score == pytest.approx(sum(right for _, right, _ in ways) / 30)
    assert got.layers == pytest.approx(sum(layers for *_, layers in ways) / 30)
    assert got.flops == pytest.approx(cost / plain)
    assert [each["level"] for each in got.levels] == [0, 1, 3]
    for each in got.levels:
        of = [(right, layers) for level, right, layers in ways if level == each["level"]]
        assert each["examples"] == len(of)
        assert each["accuracy"] == pytest.approx(sum(right for right, _ in of) / len(of))
        assert each["layers"] == pytest.approx(sum(layers for _, layers in of) / len(of))
    if mode == "both" and threshold:                        # or a share of all would be the same
        assert any(0 < s and r < 30 for s, r in zip(skipped, reached))


@torch.no_grad()
def test_a_layer_as_criterion_costs_what_a_shallower_bert_costs():
    """Three layers and one head, whatever heads `infer` has asked on the way."""
    model, split = tiny_model(), examples(7)
    point = OperatingPoint("exit", 3, "layer")
    got = measure(model, split, find_task("mnli"), walk(model, split, [point]), point)
    tokens = torch.tensor([len(ids) for ids in split.ids])
    layer, head = layer_flops(model, tokens).sum(), auxiliary_flops(model.heads[0], tokens).sum()
    assert got.flops == pytest.approx(((3 * layer + head) / (5 * layer + head)).item())


@torch.no_grad()
def test_the_fine_grid_spans_the_entropies_that_were_seen(monkeypatch):
    """From the least to the largest of heads 1 .. 4, of each kind of walk its own, with as many
    between two neighbours as between any others."""
    monkeypatch.setattr(evaluation, "GRID", 5)
    model, split = tiny_model(), examples()
    points = [OperatingPoint(mode, 0.1) for mode in ("exit", "exit", "both")]
    grid = fine_grid(walk(model, split, points), points)
    for mode, skip in ("exit", False), ("both", True):
        seen = []
        for ids in map(torch.from_numpy, split.ids):
            h = model.bert.embeddings(ids[None], 0 * ids[None])
            for i in range(4):
                if skip and model.gates[i](h, None) >= 0.5:
                    continue
                h = model.bert.layers[i](h, None)
                p = model.heads[i](h, None)[0].softmax(1)[0].tolist()
                seen.append(-sum(x * math.log(x) for x in p))
        thresholds = [way.threshold for way in grid if way.mode == mode]
        assert (thresholds[0], thresholds[-1]) == pytest.approx((min(seen), max(seen)), rel=6e-3)
        for i, threshold in enumerate(thresholds):
            assert sum(e < threshold for e in seen) / len(seen) == pytest.approx(i / 4, abs=0.04)
    for gate in model.gates:  # all layers are skipped, so no head is asked before the last
        gate.out.bias.fill_(99.0)
    grid = fine_grid(walk(model, split, points), points)
    assert len(grid) == 5 and {point.mode for point in grid} == {"exit"}


@torch.no_grad()
def test_many_pools_in_the_order_of_the_split(monkeypatch):
    """The rows of several pools, sorted by length on their way, come out in their places, without
    dropout, also from a model that has just been trained."""
    monkeypatch.setattr(train, "POOL", 4)
    model, split = tiny_model(dropout=0.5).train(), split_of(11)
    pools = train.pools(split)
    assert sorted(len(pool.ids) for pool in pools) == [3, 4, 4]
    outcome = train.predict(model, pools, True, entropy_below(0.7))
    for row, ids in enumerate(map(torch.from_numpy, split.ids)):
        logits, ran, exit = infer_one(model, ids[None], 0 * ids[None], 0.7)
        torch.testing.assert_close(outcome.logits[row], logits[0], rtol=1e-4, atol=1e-5)
        assert outcome.ran[row].nonzero().flatten().tolist() == [layer - 1 for layer in ran]
        assert outcome.exit[row] == exit


@torch.no_grad()
def test_criteria_sweep_from_certainty_to_a_guess():
    model, split = tiny_model(), examples(7)
    walks = walk(model, split, [OperatingPoint("exit", 0.1)])
    rows = evaluation.criteria(model, split, find_task("mnli"), walks)
    tried = {name: [row.threshold for row in rows if row.criterion == name]
             for name in ("probability", "entropy", "patience", "layer", "oracle")}
    assert len(tried["entropy"]) == len(tried["probability"]) > 5
    assert 0 < tried["entropy"][0] < 0.03 and 1.07 < tried["entropy"][-1] < 1.0987
    assert 0.97 < tried["probability"][0] < 1 and 1 / 3 < tried["probability"][-1] < 0.36
    assert tried["patience"] == [1, 2, 3, 4] and tried["layer"] == [1, 2, 3, 4, 5]
    assert tried["oracle"] == [None]


def row(mode: str, threshold: float | None = None, **more) -> Row:
    return Row(mode, threshold, **dict(dict(score=.7, scores={}, layers=2., flops=.5, levels=None,
                                            skip_rate=[.5, .5], exit_histogram=[1, 1]), **more))


def test_seconds_are_the_median_after_a_pass_to_warm_up(monkeypatch):
    """A clock by hand: the rows in turn, 100 s each to warm up, then three passes."""
    ticks = iter([tick for i, seconds in enumerate([100, 100, 1, 20, 7, 90, 3, 50])
                  for tick in (1000 * i, 1000 * i + seconds)])
    monkeypatch.setattr(evaluation, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    rows = [row("plain"), row("exit", 0.5)]
    evaluation.clock(tiny_model(), split_of(3), rows, 3)
    assert [r.seconds for r in rows] == [3, 50]


def test_no_better_than_the_majority_is_said():
    """Also of a row that is just as good."""
    rows = [row("plain", score=.8), row("skip", score=.7), row("exit", .25, score=.6)]
    *_, last = evaluation.warnings(rows, .7)
    assert last.endswith("(0.700): skip, exit at threshold 0.25")
    assert not any("majority" in line for line in evaluation.warnings(rows, .5))
    *_, last = evaluation.warnings(rows, .8)
    assert last.endswith("all rows")


# --- A look inside ------------------------------------------------------------------------------

def test_the_two_texts_of_a_pair_keep_their_order():
    split = data.own_examples(find_task("rte"), ["first", "second"], None)
    assert split.texts == [("first", "second")]


@pytest.mark.parametrize("flags, taken", [([], "0.4"), (["--thresholds", "0.3", "0.1"], "0.3")])
def test_predict_takes_the_threshold_asked_for_else_the_chosen_one(tmp_path, capsys, flags, taken):
    """That of the mode "both", as the last evaluation has chosen it."""
    run = sst2_run(tmp_path)
    (tmp_path / "texts").write_text("good number 1\n")

    def predict() -> str:
        evaluation.main([str(run), "--predict", str(tmp_path / "texts"), *flags])
        return capsys.readouterr().err.splitlines()[-1]

    if not flags:                                           # not evaluated yet: the strictest
        assert predict() == "(both at threshold 0.014)"
    rows = [row("plain"), row("exit", .2, chosen=True), row("both", .2), row("both", .4)]
    rows[-1].chosen = True
    data.write_json(run / "eval.json", {
        "task": "sst2", "split": "dev", "partial": False, "rows": [vars(r) for r in rows],
        "settings": {"weights": None, "method": "smartbert"}})
    assert predict() == f"(both at threshold {taken})"


def test_the_bars_are_those_of_the_fullest_mode(tmp_path, capsys, monkeypatch):
    """Of the row that is chosen of "both", not of "plain" or "exit"."""
    monkeypatch.setattr(evaluation, "bars", lambda row: f"bars of {row}")
    run = sst2_run(tmp_path, "--held-out", "0.4")
    evaluation.main([str(run), "--repeats", "0", "--device", "cpu"])
    assert "bars of both at threshold" in capsys.readouterr().out


def test_the_table_and_the_bars_by_hand():
    """Speed-ups are plain's FLOPs and seconds over the row's."""
    rows = [row("plain", flops=1., seconds=4.), row("exit", .2, flops=.25, seconds=2.)]
    heading, plain, exits, *_ = evaluation.table(rows, "f1", 2).splitlines()
    assert plain.split() == ["plain", "0.700", "2.00", "1.000", "1.00x", "1.00x"]
    assert exits.split() == ["exit", "0.2", "0.700", "2.00", "0.250", "4.00x", "2.00x"]
    drawn = evaluation.bars(row("exit", .2, skip_rate=[.25, 0.], exit_histogram=[3, 1], levels=[]))
    assert drawn.splitlines()[1].split() == ["1", "#" * 5, "25%", "#" * 15, "75%"]
    drawn = evaluation.bars(row("exit", .2, exit_histogram=[2, 0], levels=[]))
    assert drawn.splitlines()[2].split() == ["2", "not", "reached"]


# --- Whole evaluations --------------------------------------------------------------------------

def test_without_held_out_data_nothing_is_chosen(tmp_path, capsys):
    run = sst2_run(tmp_path, "--held-out", "0")
    assert "both selects the epoch and is reported" in capsys.readouterr().err
    evaluation.main([str(run), "--repeats", "0", "--device", "cpu"])
    assert "no threshold chosen" in capsys.readouterr().out
    rows = json.loads((run / "eval.json").read_text())["rows"]
    assert len(rows) == 18 and not any(each["chosen"] for each in rows)


def test_both_dev_sets_of_mnli_are_partial_where_training_was(tmp_path):
    folder, labels = tmp_path / "MNLI", find_task("mnli").labels
    folder.mkdir()
    for name in "train.partial", "dev_matched", "dev_mismatched":
        lines = [f"a number {i}\tb number {i}\t{labels[i % 3]}" for i in range(30)]
        text = "\n".join(["sentence1\tsentence2\tgold_label", *lines])
        (folder / f"{name}.tsv").write_text(text + "\n")
    run = str(tmp_path / "run")
    train.main(["--task", "mnli", "--weights", str(save_tiny_weights(tmp_path / "weights")),
                "--data-dir", str(tmp_path), "--device", "cpu", "--out", run,
                "--max-length", "12", "--epochs1", "1", "--epochs2", "1"])
    evaluation.main([run, "--repeats", "0", "--device", "cpu"])
    for name, split in ("eval", "dev_matched"), ("eval-dev_mismatched", "dev_mismatched"):
        result = json.loads((tmp_path / "run" / f"{name}.json").read_text())
        assert (result["split"], result["partial"], result["examples"]) == (split, True, 30)


def test_inference_in_bf16(tmp_path):
    """--bf16 trains and evaluates; pooled answers are those of single examples, within its
    accuracy."""
    run = sst2_run(tmp_path, "--bf16")
    evaluation.main([str(run), "--repeats", "0", "--device", "cpu"])
    model, (ids, segment_ids, mask) = tiny_model(), tiny_batch()
    with torch.autocast("cpu", torch.bfloat16):
        logits = infer(model, ids, segment_ids, mask, skip=False).logits
        for r, length in enumerate(mask.sum(1).tolist()):
            one, *_ = infer_one(model, ids[r:r + 1, :length], segment_ids[r:r + 1, :length],
                                -1.0, skip=False)
            torch.testing.assert_close(logits[r], one[0].float(), rtol=.05, atol=.2)
