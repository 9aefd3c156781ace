"""Every number of a row of the table, against examples that go through the model one by one."""

import math

import pytest
import torch
from conftest import tiny_model

import eval as evaluation
from data import find_task
from eval import InferenceMode, fine_grid, measure, walk
from smartbert import auxiliary_flops, infer_one, layer_flops
from test_training import split_of


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
    way, skip = InferenceMode(mode, threshold), mode in ("skip", "both")
    got = measure(model, split, task, walk(model, split, torch.device("cpu"), {mode}), way)
    reached, skipped, left, ways, cost, plain = [0] * 5, [0] * 5, [0] * 5, [], 0, 0
    for ids, label, level in zip(split.ids, split.labels, split.levels):
        ids = torch.tensor([ids])
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
    walks = walk(model, split, torch.device("cpu"), {"exit"})
    got = measure(model, split, find_task("mnli"), walks, InferenceMode("exit", 3, "layer"))
    tokens = torch.tensor([len(ids) for ids in split.ids])
    layer, head = layer_flops(model, tokens).sum(), auxiliary_flops(model.heads[0], tokens).sum()
    assert got.flops == pytest.approx(((3 * layer + head) / (5 * layer + head)).item())


@torch.no_grad()
def test_the_fine_grid_spans_the_entropies_that_were_seen(monkeypatch):
    """From the least to the largest of heads 1 .. 4, of each kind of walk its own, with as many
    between two neighbours as between any others."""
    monkeypatch.setattr(evaluation, "GRID", 5)
    model, split = tiny_model(), examples()
    walks = walk(model, split, torch.device("cpu"), {"exit", "both"})
    grid = fine_grid(walks, [InferenceMode(mode, 0.1) for mode in ("exit", "exit", "both")])
    for mode, skip in ("exit", False), ("both", True):
        seen = []
        for ids in map(torch.tensor, split.ids):
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
