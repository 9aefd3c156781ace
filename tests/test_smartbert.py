"""Gates, heads, losses and dynamic inference: against loops on tiny odd sizes, and against
fixtures/release.npz: what the authors' release, HuBoren99/SmartBert @5623774, computes with its
modules unchanged on random weights. 5 layers, 24 wide, 3 heads, gates and heads 12 wide, 3
classes, batch of 7, no dropout, lambda .4, eta1 .03, eta2 .2, tau1 .5, tau2 .55. "padded" has
padding, "full" has none.
"""

import math
import random
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_batch, tiny_model
from torch import nn

from bert import Bert, BertConfig, to_our_names
from data import Split, pools
from smartbert import (ExitHead, Gate, SmartBert, contrast, full_batches, gated_forward,
                       hard_weight, infer, infer_one, infer_pools, phase1_loss, phase2_loss,
                       projection)

STORED = np.load(Path(__file__).parent / "fixtures/release.npz")
RELEASE = {name: torch.from_numpy(value) for name, value in STORED.items()}
RELEASE["input/full_mask"] = torch.ones(7, 11)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def alone(batch) -> list[tuple]:
    """Each row of a batch by itself, without its padding: ids, segment_ids (1, S)."""
    ids, segment_ids, mask = batch
    return [(ids[row:row + 1, :S], segment_ids[row:row + 1, :S])
            for row, S in enumerate(mask.sum(1).tolist())]


def layers_of(row: torch.Tensor) -> list[int]:
    """(L,) bool -> the layers that are True, counted from 1."""
    return (row.nonzero().flatten() + 1).tolist()


def tiny_split(rows: int) -> Split:
    """An encoded split of random tokens: lengths 3 .. 9, three classes, levels 0, 1, 3."""
    rng = random.Random(0)
    ids = [rng.choices(range(1, 41), k=rng.randint(3, 9)) for _ in range(rows)]
    return Split("dev", [("", None)] * rows, [i % 3 for i in range(rows)],
                 levels=[(0, 1, 3)[i // 2 % 3] for i in range(rows)],
                 ids=[np.array(row, np.int32) for row in ids],
                 segment_ids=[np.zeros(len(row), np.uint8) for row in ids])


def soft_model(**more) -> SmartBert:
    """A tiny model whose gates are near an even chance, so that soft and hard ones differ."""
    model = tiny_model(**more)
    for gate in model.gates:
        nn.init.normal_(gate.out.weight, std=0.3)
    return model


# --- Modules ------------------------------------------------------------------------------------

def test_a_new_gate_says_what_its_bias_says():
    """-2 unless told otherwise: g = .12, so layers run at first."""
    bert = tiny_model().bert
    for model, bias in (SmartBert(bert, 3), -2.0), (SmartBert(bert, 3, gate_bias=1.0), 1.0):
        for body in model.gates[0].body, model.heads[1].body:   # an input of scale 1 keeps it
            assert 0.8 < 4 * body.key_value.weight.std() < 1.2
        assert 0.8 < 20**0.5 * model.projections[2][0].weight.std() < 1.2
        nn.init.zeros_(model.gates[2].out.weight)
        g = model.gates[2](torch.randn(2, 4, 20), None)
        assert g.tolist() == pytest.approx(2 * [1 / (1 + math.exp(-bias))])


def test_hard_weight_is_exact_forward_and_soft_backward():
    g = torch.tensor([0.0, 0.1, 0.3, 0.49999997, 0.5, 0.7, 0.9, 1.0], requires_grad=True)
    hard = hard_weight(g)
    assert hard.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    hard.backward(torch.arange(8.0))
    assert torch.equal(g.grad, torch.arange(8.0))


# --- The losses ---------------------------------------------------------------------------------

def contrast_by_hand(us: list, vs: list, tau: float) -> float:
    """The contrast of one pair of layers, from the real tokens (S, W) of each row: a loop."""
    losses = []
    for u, v in zip(us, vs):
        for t in range(len(u)):
            s = [math.exp(F.cosine_similarity(u[t], other, dim=0).item() / tau) for other in v]
            losses.append(-math.log(s[t] / sum(s)))
    return sum(losses) / len(losses)


def test_contrast_by_brute_force():
    """Padding is neither an anchor nor a negative, whatever stands in it."""
    torch.manual_seed(1)
    u, v, mask = torch.randn(3, 6, 5), torch.randn(3, 6, 5), tiny_batch(1, 3, 6)[2]
    us, vs = [u[b][mask[b]] for b in range(3)], [v[b][mask[b]] for b in range(3)]
    for padding in 0.0, 9.0, -1e9:
        padded = [x.masked_fill(~mask[..., None], padding) for x in (u, v)]
        ours = contrast(*padded, mask, 0.5).item()
        assert ours == pytest.approx(contrast_by_hand(us, vs, 0.5), rel=1e-4)


def layers_by_hand(model, batch, hard: bool) -> tuple:
    """Each row without padding through all layers, mixed by its gates: h_0 .. h_L, the layers' raw
    outputs, the soft gates and the used ones, each [row][layer]."""
    rows = alone(batch)
    states, outputs, g_soft = [[model.bert.embeddings(*one)] for one in rows], [], []
    for row in states:
        outputs.append([])
        g_soft.append([])
        for gate, layer in zip(model.gates, model.bert.layers):
            h, g = row[-1], gate(row[-1], None).item()
            outputs[-1].append(layer(h, None))
            g_soft[-1].append(g)
            if hard:
                g = float(g >= 0.5)
            row.append((1 - g) * outputs[-1][-1] + g * h)
    g_soft = torch.tensor(g_soft)
    return states, outputs, g_soft, (g_soft >= 0.5).float() if hard else g_soft


def cross_entropy_by_hand(head, hiddens, labels) -> float:
    answers = [head(h, None)[0].log_softmax(1)[0, y] for h, y in zip(hiddens, labels)]
    return -sum(answers).item() / len(answers)


@pytest.mark.parametrize("lam, budget", [(0.0, 0.2), (0.0, 0.9), (0.3, 0.2)])
@pytest.mark.parametrize("hard", [True, False])
def test_phase1_loss_by_hand(hard, lam, budget):
    """Every part. The paper's penalty takes the soft gates, the budget the used ones, and a met
    budget costs nothing; the contrast is a sum over the pairs. The penalty teaches the gates."""
    model, batch, labels = soft_model(seed=3), tiny_batch(rows=4, longest=5), [0, 2, 1, 1]
    states, _, soft, used = layers_by_hand(model, batch, hard)
    task = cross_entropy_by_hand(model.heads[-1], [row[5] for row in states], labels)
    over, g = max((1 - used).mean().item() - budget, 0), soft[:, -1]
    penalty, slope = 10 * over**2, -4 * over        # slope: by the mean of the last gate, of 5
    if lam > 0:
        penalty = lam / soft.mean(0).sum().item()
        slope = -penalty**2 / lam
    u = [[project(row[i])[0] for row in states] for i, project in enumerate(model.projections)]
    pairs = sum(contrast_by_hand(u[i], u[i + 1], 0.7) for i in range(4))
    parts = phase1_loss(model, *batch, torch.tensor(labels), hard=hard, lam=lam, budget=budget,
                        eta1=0.4, tau1=0.7)
    turn = torch.autograd.grad(parts["penalty"], model.gates[-1].out.bias, retain_graph=True)[0]
    assert turn.item() == pytest.approx(slope * (g * (1 - g)).mean().item(), rel=1e-4)
    assert parts.pop("run").tolist() == pytest.approx((1 - used).mean(0).tolist(), abs=1e-5)
    expected = {"loss": 0.6 * (task + penalty) + 0.4 * pairs, "task": task, "penalty": penalty,
                "contrast": pairs}
    assert {k: v.item() for k, v in parts.items()} == pytest.approx(expected, rel=1e-4)


def test_phase2_loss_by_hand():
    """Every part: heads read raw outputs, states follow hard gates, the contrast is a mean."""
    model, batch, labels = soft_model(seed=3), tiny_batch(rows=4, longest=5), [0, 2, 1, 1]
    _, outputs, *_ = layers_by_hand(model, batch, hard=True)
    task, u = 0.0, []
    for i, head in enumerate(model.heads[:-1]):
        task += cross_entropy_by_hand(head, [row[i] for row in outputs], labels)
        u.append([head.project(head(row[i], None)[1])[0] for row in outputs])
    pairs = sum(contrast_by_hand(u[i], u[i + 1], 0.55) for i in range(3)) / 3
    parts = phase2_loss(model, *batch, torch.tensor(labels), eta2=0.4)
    expected = {"loss": 0.6 * task + 0.4 * pairs, "task": task, "contrast": pairs}
    assert {k: v.item() for k, v in parts.items()} == pytest.approx(expected, rel=1e-4)
    assert torch.autograd.grad(parts["contrast"], model.heads[1].body.inner.weight)[0].any()
    parts = phase2_loss(tiny_model(layers=2), *batch, torch.tensor(labels))
    assert parts["contrast"] == 0                           # one head has no neighbour


@torch.no_grad()
def test_rows_in_full_run_every_layer():
    """With a share of .5 some of 64 rows, each in all layers or in none."""
    model, batch = tiny_model(), tiny_batch(rows=64)
    hiddens, mask = model.bert(*batch)[1:], batch[2]
    torch.manual_seed(0)
    h, gated = (gated_forward(model, *batch, hard=True, full_share=s).last for s in (0.5, 0.0))
    near = [[(h[r][mask[r]] - other[r][mask[r]]).abs().max() < 1e-4 for r in range(64)]
            for other in (hiddens[-1], gated)]
    assert all(a or b for a, b in zip(*near)) and 16 < sum(near[0]) < 64 and 16 < sum(near[1]) < 64


# --- Dynamic inference --------------------------------------------------------------------------

def by_hand(model, ids, segment_ids, threshold: float | None, skip: bool) -> SimpleNamespace:
    """One example, one layer after the other: answer, layers that ran, exit, and what gates and
    heads said, by layer. threshold None: no exits; below 0: all heads are asked, nobody exits."""
    L, h = len(model.gates), model.bert.embeddings(ids, segment_ids)
    story = SimpleNamespace(ran=[], gates={}, heads={})
    for i in range(1, L + 1):
        if skip:
            story.gates[i] = model.gates[i - 1](h, None).item()
            if story.gates[i] >= 0.5:
                continue
        h = model.bert.layers[i - 1](h, None)
        story.ran.append(i)
        if threshold is not None and i < L:
            story.heads[i] = model.heads[i - 1](h, None)[0][0]
            p = story.heads[i].softmax(0).tolist()
            if -sum(x * math.log(x) for x in p) < threshold:
                break
    else:
        i, story.heads[L] = L, model.heads[-1](h, None)[0][0]
    story.exit, story.answer = i, story.heads[i]
    return story


def models() -> list[SmartBert]:
    """Random ones, and some whose gates skip every layer, the third alone, the last alone."""
    made = [tiny_model(seed) for seed in range(5)]
    for model, shut in zip(made[2:], ([0, 1, 2, 3, 4], [2], [4])):
        for i, gate in enumerate(model.gates):
            nn.init.zeros_(gate.out.weight)
            nn.init.constant_(gate.out.bias, 5.0 if i in shut else -5.0)
    return made


@pytest.fixture
def fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True)                # fills what nobody has written
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("threshold, all_heads", [
    (None, False), (None, True), (0.0, True), (0.3, True), (0.9, False), (2, False)])
@pytest.mark.parametrize("skip", [True, False])
@torch.no_grad()
def test_both_ways_of_inference_go_as_by_hand(fresh_memory_is_nan, skip, threshold, all_heads):
    """`infer_one`, and each row of a pool in batches of any size: answer, layers and exit; the
    gates and heads that were asked, and what they said, 0 elsewhere."""
    kinds, how = set(), dict(skip=skip, threshold=threshold, all_heads=all_heads)
    limit = -1.0 if threshold is None else threshold
    for seed, model in enumerate(models()):
        batch = tiny_batch(seed, rows=11)
        pooled = [infer(model, *batch, **how, batch_tokens=size) for size in (1, 40, 999)]
        for row, one in enumerate(alone(batch)):
            logits, ran, exit = infer_one(model, *one, limit, skip)
            hand = by_hand(model, *one, limit if all_heads else threshold, skip)
            close(logits[0], hand.answer)
            assert (ran, exit) == (hand.ran, hand.exit)
            kinds.add((exit < 5, exit not in ran))
            gates = torch.tensor([hand.gates.get(i, 0.0) for i in range(1, 6)])
            history = torch.stack([hand.heads.get(i, torch.zeros(3)) for i in range(1, 6)])
            for ours in pooled:
                assert layers_of(ours.ran[row]) == hand.ran and ours.exit[row] == hand.exit
                assert layers_of(ours.gate_asked[row]) == list(hand.gates)
                assert layers_of(ours.head_asked[row]) == list(hand.heads)
                close((ours.gates[row], ours.history[row], ours.logits[row]),
                      (gates, history, hand.answer))
        if not skip and threshold is None:
            close(pooled[0].logits, model(*batch))          # plain BERT
    assert ((False, True) in kinds) == skip                 # some row skips its last layer
    assert limit < 0.5 or (True, False) in kinds     # some exit


def certain_model() -> SmartBert:
    """A tiny model of which head 4 is certain: its entropy is exactly 0."""
    model = tiny_model()
    nn.init.zeros_(model.heads[3].out.weight)
    model.heads[3].out.bias.data = torch.tensor([0.0, 300.0, 0.0])
    return model


@torch.no_grad()
def test_on_the_edge():
    """g = 1/2 exactly, as in the release at its start, skips in training and in both ways of
    inference. To exit, the entropy must be below the threshold."""
    model, batch = certain_model(), tiny_batch()
    for threshold, exit in (0.0, 5), (1e-6, 4):
        assert (infer(model, *batch, skip=False, threshold=threshold).exit == exit).all()
        assert {infer_one(model, *one, threshold, skip=False)[2] for one in alone(batch)} == {exit}
    for gate in model.gates:
        nn.init.zeros_(gate.out.weight)                     # the bias is 0
    assert gated_forward(model, *batch, hard=True).g_used.all()
    assert not infer(model, *batch).ran.any()
    assert not any(infer_one(model, *one, -1.0)[1] for one in alone(batch))


def test_batches_are_full_and_no_fuller():
    """No batch is above the limit, except a single row, and none has room for the next row."""
    mask, chosen = tiny_batch(5, rows=40)[2], torch.arange(40) % 3 != 0
    lengths = mask.sum(1)
    for limit in 1, 13, 40, 100, 9999:
        made = list(full_batches(chosen, mask, limit))
        assert torch.equal(torch.cat([rows for rows, *_ in made]), chosen.nonzero().flatten())
        for rows, longest, m in made:
            assert longest == lengths[rows].max()
            assert len(rows) == 1 or len(rows) * longest <= limit
            assert torch.equal(m, mask[rows, :longest])
        for (rows, longest, _), (others, *_) in zip(made, made[1:]):
            assert (len(rows) + 1) * max(longest, lengths[others[0]]) > limit


@torch.no_grad()
def test_many_pools_in_the_order_of_the_split():
    """Each row in its place, and without dropout even where the model has just been trained."""
    model, split = tiny_model(dropout=0.5).train(), tiny_split(11)
    outcome = infer_pools(model, pools(split, largest=4), threshold=0.7)
    for row, ids in enumerate(map(torch.from_numpy, split.ids)):
        logits, ran, exit = infer_one(model, ids[None], 0 * ids[None], 0.7)
        close(outcome.logits[row], logits[0])
        assert (layers_of(outcome.ran[row]), outcome.exit[row]) == (ran, exit)


# --- The release --------------------------------------------------------------------------------

# Our names inside a gate, a head or a projection -> the release's.
BODY = {"body.inner": ["output_layer_0"], "body.query": ["atten.query"],
        "body.key_value": ["atten.key", "atten.value"]}
PARTS = {("gates", "gate"): BODY | {"out": ["output_layer_1"]},
    ("heads", "classifier"): BODY | {"hidden": ["output_layer_1"], "out": ["output_layer_2"]}
                             | {f"project.{i}": [f"main.{i}"] for i in (0, 1, 3)},
    ("projections", "contrast"): {"0": ["0"], "1": ["1"], "3": ["3"]}}


@pytest.fixture
def release() -> SmartBert:
    """Our model with the release's weights."""
    config = BertConfig(vocab_size=61, hidden_size=24, num_hidden_layers=5, num_attention_heads=3,
                        intermediate_size=40, max_position_embeddings=19)
    model = SmartBert(Bert(config), classes=3)
    for i in range(5):                                      # ours would be 16 wide
        model.gates[i] = Gate(24, 12, dropout=0.0, bias=0.0)
        model.heads[i] = ExitHead(24, 12, classes=3, dropout=0.0)
        model.projections[i] = projection(24, 12)
    weights = {name.removeprefix("weights/"): value for name, value in RELEASE.items()
               if name.startswith("weights/")}
    encoder = {name.replace("embedding.", "embeddings.", 1): weights.pop(name)
               for name in list(weights) if name.startswith(("embedding.", "encoder."))}
    state = {f"bert.{name}": value for name, value in to_our_names(encoder, config).items()}
    for (ours, theirs), table in PARTS.items():
        for name, parts in table.items():
            for i, end in product(range(5), ("weight", "bias")):
                found = [weights.pop(f"{theirs}.{i}.{part}.{end}") for part in parts]
                state[f"{ours}.{i}.{name}.{end}"] = torch.cat(found)
    assert not weights, f"weights of the release that nothing of ours takes: {list(weights)}"
    model.load_state_dict(state)
    return model.eval()


def inputs(batch: str) -> tuple:
    """ids, segment_ids, mask, labels."""
    before = "input/full_" if batch == "full" else "input/"
    ids, segment_ids, mask = (RELEASE[before + name] for name in ("ids", "types", "mask"))
    return ids, segment_ids, mask.bool(), RELEASE["input/labels"]


@pytest.mark.parametrize("batch, eta1", [("padded", 0.0), ("full", 0.0), ("full", 0.03)])
@pytest.mark.parametrize("gates", ["soft", "hard"])
def test_phase1_as_in_the_release(release, batch, eta1, gates):
    """Loss, the last head's logits, and gradients of every gate and of the first layer's queries.
    With padding the contrast differs on purpose: ours leaves [PAD] out."""
    where = f"expect/{batch}/{'contrast' if eta1 else 'plain'}/phase1_{gates}"
    *x, labels = inputs(batch)
    loss = phase1_loss(release, *x, labels, hard=gates == "hard", lam=0.4, eta1=eta1)["loss"]
    close(loss, RELEASE[f"{where}/loss"])
    loss.backward()
    for i, gate in enumerate(release.gates):
        close(gate.out.weight.grad, RELEASE[f"{where}/grad_gate{i}_out"])
    close(release.bert.layers[0].qkv.weight.grad[:24], RELEASE[f"{where}/grad_query0"])
    h = gated_forward(release, *x, hard=gates == "hard").last
    close(release.heads[-1](h, x[2])[0], RELEASE[f"{where}/last_logits"])


@pytest.mark.parametrize("batch", ["padded", "full"])
def test_phase2_as_in_the_release(release, batch):
    """The heads' loss and gradients, without the contrast."""
    *x, labels = inputs(batch)
    loss = phase2_loss(release, *x, labels, eta2=0.0)["loss"]
    close(loss, RELEASE[f"expect/{batch}/plain/phase2/loss"])
    loss.backward()
    for i, head in enumerate(release.heads[:-1]):
        close(head.out.weight.grad, RELEASE[f"expect/{batch}/plain/phase2/grad_head{i}_out"])


@torch.no_grad()
def test_phase2s_contrast_differs_only_where_we_say(release):
    """Ours keeps the positive in the denominator and takes all L - 2 pairs of heads. With both of
    the release's oddities put back, our projections give the release's loss."""
    *x, labels = inputs("full")
    outputs, u, odd = gated_forward(release, *x, hard=True).outputs, [], 0.0
    for head, h in zip(release.heads, outputs):
        u.append(F.normalize(head.project(head(h, x[2])[1]), dim=-1))
    for a, b in zip(u[:2], u[1:3]):                         # one pair short
        s = (a @ b.transpose(1, 2) / 0.55).exp()
        positive = s.diagonal(dim1=1, dim2=2)
        odd -= (positive / (s.sum(-1) - positive)).log().mean()
    task = phase2_loss(release, *x, labels, eta2=0.0)["task"]
    close(0.8 * task + 0.2 * odd / 3, RELEASE["expect/full/contrast/phase2/loss"])


@pytest.mark.parametrize("threshold", ["0.0", "0.6", "0.9", "1.05"])
@pytest.mark.parametrize("skip", [True, False])
def test_inference_as_in_the_release(release, threshold, skip):
    """Logits, skipped layers and exit layer of every row, one by one and in a pool."""
    batch, kind = inputs("padded")[:3], "skip" if skip else "noskip"
    where = f"expect/infer/threshold_{threshold}/{kind}"
    exits, skipped = RELEASE[f"{where}/exit"], RELEASE[f"{where}/skipped"]
    pooled = infer(release, *batch, skip=skip, threshold=float(threshold), batch_tokens=30)
    close(pooled.logits, RELEASE[f"{where}/logits"])
    for row, one in enumerate(alone(batch)):
        logits, ran, exit = infer_one(release, *one, float(threshold), skip)
        close(logits[0], RELEASE[f"{where}/logits"][row])
        assert exit == exits[row] == pooled.exit[row]
        assert ran == layers_of(pooled.ran[row]) == layers_of(~skipped[row, :exit].bool())
