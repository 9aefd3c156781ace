"""Gates, hard weight, contrast, dynamic inference and its cost, against brute force on tiny odd
sizes."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_batch, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from smartbert import (
    ClsAttention,
    Outcome,
    SmartBert,
    auxiliary_flops,
    contrast,
    entropy,
    entropy_below,
    first_correct,
    fixed_layer,
    flops,
    gate_width,
    gated_forward,
    hard_weight,
    infer,
    infer_one,
    layer_flops,
    patience,
    phase1_loss,
    phase2_loss,
    plain_flops,
    probability_above,
    skip_penalty,
)


def one_by_one(model: SmartBert, ids, segment_ids, mask, skip: bool, decide) -> Outcome:
    """The method as the paper tells it: one example, one layer after the other. decide: from the
    list of the probabilities that the row's heads gave so far, layer and row -> leave?"""
    L, N = len(model.gates), len(ids)
    logits, ran, exits = [], torch.zeros(N, L, dtype=torch.bool), torch.full((N,), L)
    gates, history = torch.full((N, L), torch.nan), torch.full((N, L, 3), torch.nan)
    for row in range(N):
        S = int(mask[row].sum())
        h, met = model.bert.embeddings(ids[row : row + 1, :S], segment_ids[row : row + 1, :S]), []
        for i in range(L):
            if skip:
                gates[row, i] = model.gates[i](h, None).item()
                if gates[row, i] >= 0.5:
                    continue
            h = model.bert.layers[i](h, None)
            ran[row, i] = True
            if decide is None:
                continue
            answer = model.heads[i](h, None)[0]
            history[row, i] = answer[0]
            met.append(answer.softmax(-1)[0].tolist())
            if i < L - 1 and decide(met, i + 1, row):
                exits[row] = i + 1
                break
        else:
            answer = model.heads[-1](h, None)[0]
            history[row, -1] = answer[0]
        logits.append(answer)
    return Outcome(torch.cat(logits), ran, exits, gates, history)


def unsure_below(threshold):
    return lambda met, layer, row: -sum(x * math.log(x) for x in met[-1]) < threshold


def assert_same(ours: Outcome, theirs: Outcome) -> None:
    assert torch.equal(ours.ran, theirs.ran)
    assert torch.equal(ours.exit, theirs.exit)
    for name in ("logits", "gates", "history"):
        torch.testing.assert_close(
            getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-5, equal_nan=True
        )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("threshold", [None, 0.3, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("batch_tokens", [1, 40, 999])
@torch.no_grad()
def test_a_pool_goes_as_each_of_its_rows_alone(seed, skip, threshold, batch_tokens):
    """Logits, layers run and exit layer of every row equal the one-example-at-a-time reference."""
    model, batch = tiny_model(seed), tiny_batch(seed, rows=11)
    leave = None if threshold is None else entropy_below(threshold)
    ours = infer(model, *batch, skip=skip, criterion=leave, batch_tokens=batch_tokens)
    assert_same(
        ours,
        one_by_one(model, *batch, skip, None if threshold is None else unsure_below(threshold)),
    )
    if skip and threshold is None:
        assert 0 < ours.ran.float().mean() < 1  # or this test would show little
    if threshold == 2.0:  # above ln C everybody leaves: the pool empties early
        assert (ours.exit[ours.ran.any(1)] < 5).any()


@torch.no_grad()
def test_without_gates_and_exits_it_is_the_plain_encoder():
    model, batch = tiny_model(), tiny_batch()
    outcome = infer(model, *batch, skip=False, criterion=None, batch_tokens=40)
    torch.testing.assert_close(outcome.logits, model(*batch), rtol=1e-4, atol=1e-5)
    assert outcome.ran.all() and (outcome.exit == 5).all()


@pytest.mark.parametrize("shut", [[0, 1, 2, 3, 4], [2], [4], [0, 4]])
@torch.no_grad()
def test_layers_that_nobody_runs(shut):
    """Rows that skip every layer, a layer that nobody runs, a last layer that is skipped: all take
    the last head."""
    model, batch = tiny_model(), tiny_batch()
    for i, gate in enumerate(model.gates):
        gate.out.weight.zero_()
        gate.out.bias.fill_(5.0 if i in shut else -5.0)
    for threshold in (None, 0.7):
        leave = None if threshold is None else entropy_below(threshold)
        outcome = infer(model, *batch, criterion=leave, batch_tokens=40)
        assert_same(
            outcome,
            one_by_one(
                model, *batch, True, None if threshold is None else unsure_below(threshold)
            ),
        )
        assert not outcome.ran[:, shut].any()


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.7, 1.0, 2.0])
@torch.no_grad()
def test_one_example_and_many_agree(skip, threshold):
    """infer_one, the method as the paper tells it, and the pooled version: answers, layers and
    exits of every row."""
    model, (ids, segment_ids, mask) = tiny_model(), tiny_batch()
    outcome = infer(
        model,
        ids,
        segment_ids,
        mask,
        skip=skip,
        criterion=entropy_below(threshold),
        batch_tokens=40,
    )
    for row, S in enumerate(mask.sum(1).tolist()):
        logits, ran, exit = infer_one(
            model, ids[row : row + 1, :S], segment_ids[row : row + 1, :S], threshold, skip
        )
        torch.testing.assert_close(logits[0], outcome.logits[row], rtol=1e-4, atol=1e-5)
        assert (
            ran == (outcome.ran[row].nonzero().squeeze(1) + 1).tolist()
            and exit == outcome.exit[row]
        )


def argmax(p: list[float]) -> int:
    return p.index(max(p))


LABELS = [0, 1, 2, 0, 1, 2, 0, 1, 2]
CRITERIA = {  # ours, and the same in words for one row
    "probability": (probability_above(0.42), lambda met, layer, row: max(met[-1]) > 0.42),
    "patience 1": (
        patience(1),
        lambda met, layer, row: len(met) > 1 and argmax(met[-1]) == argmax(met[-2]),
    ),
    "patience 2": (
        patience(2),
        lambda met, layer, row: len(met) > 2 and len({argmax(p) for p in met[-3:]}) == 1,
    ),
    "layer": (fixed_layer(3), lambda met, layer, row: layer >= 3),
    "oracle": (
        first_correct(torch.tensor(LABELS)),
        lambda met, layer, row: argmax(met[-1]) == LABELS[row],
    ),
}


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("skip", [True, False])
@torch.no_grad()
def test_criteria(name, skip):
    left = set()
    for seed in range(4):
        model, batch, (ours, theirs) = tiny_model(seed), tiny_batch(seed), CRITERIA[name]
        outcome = infer(model, *batch, skip=skip, criterion=ours, batch_tokens=40)
        assert_same(outcome, one_by_one(model, *batch, skip, theirs))
        left |= set(outcome.exit.tolist())
    assert min(left) < 5  # or this test would show nothing


def test_only_the_cls_query_is_needed():
    """The [CLS] row of full multi-head attention over all queries, written out, is what gates and
    heads compute."""
    torch.manual_seed(0)
    body, h = ClsAttention(20, 12, heads=3, dropout=0.1).eval(), torch.randn(4, 7, 20)
    mask = torch.arange(7) < torch.tensor([7, 5, 2, 1])[:, None]
    z = torch.tanh(body.inner(h))
    q, (k, v) = body.query(z), body.key_value(z).chunk(2, dim=-1)
    full = torch.zeros(4, 7, 12)
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        s = (q[..., part] @ k[..., part].transpose(1, 2) / 2).masked_fill(
            ~mask[:, None], -torch.inf
        )
        full[..., part] = s.softmax(-1) @ v[..., part]
    torch.testing.assert_close(body(h, mask)[0], full[:, 0])


def test_width_is_a_sixth():
    sizes = (768, 512, 384, 256, 128, 96, 48, 8)
    assert [gate_width(H) for H in sizes] == [128, 88, 64, 40, 24, 16, 16, 16]


def test_hard_weight_is_exact_forward_and_soft_backward():
    g = torch.tensor([0.0, 0.1, 0.3, 0.49999997, 0.5, 0.7, 0.9, 1.0], requires_grad=True)
    hard = hard_weight(g)
    assert hard.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    weights = torch.arange(8.0)
    (hard * weights).sum().backward()
    assert torch.equal(g.grad, weights)


@pytest.mark.parametrize("hard", [True, False])
def test_gated_walk_mixes_input_and_output(hard):
    """h_i = (1 - g_i) layer_i(h_{i-1}) + g_i h_{i-1}; hard gates give what inference gives."""
    model, batch = tiny_model(), tiny_batch()
    inputs, outputs, h, soft, used = gated_forward(model, *batch, hard=hard)
    for i in range(5):
        after = inputs[i + 1] if i < 4 else h
        torch.testing.assert_close(
            after, (1 - used[:, i, None, None]) * outputs[i] + used[:, i, None, None] * inputs[i]
        )
    assert torch.equal(used, (soft >= 0.5).float() if hard else soft)
    if hard:
        assert torch.equal(infer(model, *batch, criterion=None).ran, used == 0)


@torch.no_grad()
def test_rows_in_full_run_every_layer():
    """Whatever their gates say. With a share of 1 these are all rows, with .5 some of 64; the
    gates that are returned, which the budget counts, stay as they were."""
    model, batch = tiny_model(), tiny_batch(rows=64)
    _, _, gated, soft, used = gated_forward(model, *batch, hard=True)
    plain, mask = model.bert(*batch)[-1], batch[2]
    _, _, h, soft_again, used_again = gated_forward(model, *batch, hard=True, full_share=1.0)
    torch.testing.assert_close(h[mask], plain[mask], rtol=1e-4, atol=1e-5)
    assert torch.equal(soft[:, 0], soft_again[:, 0]) and used.any() and used_again.any()
    torch.manual_seed(0)
    _, _, h, _, _ = gated_forward(model, *batch, hard=True, full_share=0.5)
    near = [[(h[r][mask[r]] - other[r][mask[r]]).abs().max() < 1e-4 for r in range(64)]
            for other in (plain, gated)]
    assert all(a or b for a, b in zip(*near)) and 16 < sum(near[0]) < 64 and 16 < sum(near[1]) < 64


def test_contrast_by_brute_force():
    """A loop over tokens; padding is neither an anchor nor a negative, whatever stands in it."""
    torch.manual_seed(1)
    u, v, (_, _, mask) = (
        torch.randn(3, 6, 5),
        torch.randn(3, 6, 5),
        tiny_batch(1, rows=3, longest=6),
    )
    losses = []
    for b in range(3):
        real = mask[b].nonzero().flatten().tolist()
        for t in real:
            s = {
                o: math.exp(F.cosine_similarity(u[b, t], v[b, o], dim=0).item() / 0.5)
                for o in real
            }
            losses.append(-math.log(s[t] / sum(s.values())))
    torch.testing.assert_close(
        contrast(u, v, mask, 0.5).item(), sum(losses) / len(losses), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        contrast(u.masked_fill(~mask[..., None], 9.0), v, mask, 0.5), contrast(u, v, mask, 0.5)
    )


def test_skip_penalty():
    soft, used = torch.tensor([[0.25, 0.5], [0.75, 0.5]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    assert skip_penalty(soft, used, lam=0.3).item() == pytest.approx(0.3 / (0.5 + 0.5))
    assert skip_penalty(soft, used, budget=0.1, budget_weight=10.0).item() == pytest.approx(
        10 * (0.25 - 0.1) ** 2
    )
    assert skip_penalty(soft, used, budget=0.3, budget_weight=10.0).item() == 0  # met


def test_phase1_reaches_all_it_trains_and_phase2_only_the_heads():
    """A step of phase 2 leaves everything but heads 1 .. L-1 as it was, to the bit."""
    model, (ids, segment_ids, mask) = tiny_model(dropout=0.1).train(), tiny_batch()
    labels = torch.arange(9) % 3
    phase1_loss(
        model, ids, segment_ids, mask, labels, hard=True, penalty=dict(lam=0.1)
    ).loss.backward()
    heads = dict(model.heads.named_parameters())
    assert all(heads[n].grad is None for n in heads if n[0] != "4")
    assert heads["4.out.weight"].grad is not None
    assert all(
        p.grad is not None
        for n, p in model.named_parameters()
        if n.startswith(("bert", "gates", "projections"))
    )
    model.zero_grad()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    phase2_loss(model, ids, segment_ids, mask, labels).backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        trained = name.startswith("heads.") and not name.startswith("heads.4.")
        if not trained:
            assert torch.equal(value, before[name]), name
    assert not torch.equal(model.heads[0].out.weight, before["heads.0.out.weight"])


def test_entropy():
    """Natural log: ln C for a guess, 0 for certainty, also where a probability is exactly 0."""
    logits = torch.tensor([[0.0, 0.0, 0.0], [200.0, 0.0, 0.0], [1.0, 2.0, 0.5]])
    p = logits[2].softmax(-1)
    torch.testing.assert_close(
        entropy(logits),
        torch.stack([torch.tensor(math.log(3)), torch.tensor(0.0), -(p * p.log()).sum()]),
    )


def counted(function) -> int:
    """torch's own count, with attention taken apart into products that it knows."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


@torch.no_grad()
def test_cost_is_what_torch_counts():
    """A layer, a gate and a head, on several lengths; and a whole row of a dynamic pool."""
    model = tiny_model()
    for S in (2, 7, 13):
        h, tokens = torch.randn(1, S, 20), torch.tensor([S])
        assert layer_flops(model, tokens).item() == counted(lambda: model.bert.layers[0](h, None))
        for companion in (model.gates[0], model.heads[0]):
            assert auxiliary_flops(companion, tokens).item() == counted(lambda: companion(h, None))
    ids, segment_ids, mask = tiny_batch()
    for row in range(9):
        S = int(mask[row].sum())
        one, tokens = (
            (ids[row : row + 1, :S], segment_ids[row : row + 1, :S], mask[row : row + 1, :S]),
            torch.tensor([S]),
        )
        assert plain_flops(model, tokens).item() == counted(lambda: model(*one))
        for skip in (True, False):
            for leave in (None, entropy_below(0.8)):
                ask = dict(skip=skip, criterion=leave)
                outcome = infer(model, *one, **ask)
                assert flops(model, tokens, outcome).sum().item() == counted(
                    lambda: infer(model, *one, **ask)
                )


def test_cost_of_bert_base():
    """22.35 GFLOPs for the 12 layers of BERT-base at 128 tokens: 24 S H^2 + 4 S^2 H each."""
    from bert import Bert, BertConfig

    with torch.device("meta"):
        base = SmartBert(Bert(BertConfig()), classes=2)
    assert 12 * layer_flops(base, torch.tensor([128], device="cpu")).item() / 1e9 == pytest.approx(
        22.35, abs=0.005
    )
