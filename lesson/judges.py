"""The judges of the assignment's exercises (assignment.py writes them as tests/test_exercises.py).

Each compares a function with plain loops over small numbers. Where they differ, it says in one
line what is wrong: the mistake that gives the same numbers, or else both numbers.
"""

import math
from itertools import product, zip_longest
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_batch, tiny_model
from torch import nn

import eval as evaluation
import smartbert


def fail(words: str) -> None:
    pytest.fail(words, pytrace=False)


def same(a, b) -> bool:
    a, b = (torch.as_tensor(x).detach().double() for x in (a, b))
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def numbers(x) -> str:
    """The first few numbers of a tensor."""
    return ", ".join(f"{value:.4g}" for value in torch.as_tensor(x).flatten()[:6].tolist())


def judge(what: str, got, right, mistakes: dict = {}) -> None:
    """Fail unless got is right. mistakes: what is wrong -> the value that one gets by it."""
    if got is None:
        fail(f"{what}: nothing is returned")
    if not isinstance(got, torch.Tensor):
        fail(f"{what} is a {type(got).__name__}, not a tensor: compute with torch")
    right = torch.as_tensor(right)
    if same(got, right):
        return
    for mistake, value in mistakes.items():
        if same(got, value):
            fail(f"{what}: {mistake}")
    if got.shape != right.shape:
        fail(f"{what} has shape {tuple(got.shape)}, not {tuple(right.shape)}")
    fail(f"{what} is {numbers(got)}, not {numbers(right)}")


def mean(values) -> float:
    return sum(values) / len(values)


def layers(row: torch.Tensor) -> list[int]:
    """(L,) bool -> the layers that are True, counted from 1."""
    return (row.nonzero().flatten() + 1).tolist()


# --- 1 entropy, 2 hard weight -------------------------------------------------------------------

def test_entropy():
    logits = torch.tensor([[2.0, -1.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [5.0, 0.0, 1.0, 0.0]])
    right = []
    for row in logits.tolist():
        p = [math.exp(x) / sum(map(math.exp, row)) for x in row]
        right.append(-sum(x * math.log(x) for x in p))
    right = torch.tensor(right)
    judge("the entropy", smartbert.entropy(logits), right, {
        "it is in bits, but the threshold is in nats: take the natural logarithm":
            right / math.log(2),
        "it is divided by ln C: a guess has ln C, not 1": right / math.log(4),
        "its sign is wrong: it is never negative": -right,
        "it is the sum over the classes, not their mean": right / 4})
    judge("the entropy of logits (3, 1, 4)", smartbert.entropy(logits[:, None]), right[:, None], {
        "the classes are the last dimension, -1": torch.zeros(3, 4)})
    certain = smartbert.entropy(torch.tensor([[0.0, 300, 0]]))
    judge("the entropy of a certain answer", certain, torch.zeros(1))
    if certain < 0:
        fail("the entropy of a certain answer is below 0: add nothing to p, take log_softmax")


def test_hard_weight():
    g = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.54, 0.8, 1.0], requires_grad=True)
    right, weights = torch.tensor([0.0, 0, 0, 1, 1, 1, 1]), torch.arange(7.0)
    hard = smartbert.hard_weight(g)
    judge("the hard weight", hard, right, {
        "at g = 1/2 the layer is skipped, so it is 1 there": (g > 0.5).float(),
        "1 means skip and 0 run, not the other way round": 1 - right,
        "it is still soft: its value is 0 or 1": g})
    if not torch.equal(hard, right):
        fail("the hard weight is not exactly 0 or 1: floats round, so the order of terms matters")
    if not hard.requires_grad:
        fail("the gradient of the hard weight is 0, so the gates never learn: it is that of g")
    (hard * weights).sum().backward()
    judge("the gradient of the hard weight", g.grad, weights, {
        "it is 0, so the gates never learn: it is that of g": 0 * weights,
        "its sign is wrong": -weights})


# --- 3 the gate ---------------------------------------------------------------------------------

def gate_by_hand(gate, h, squash=torch.tanh, heads=2, shift=0) -> torch.Tensor:
    """The logit of a gate for one example without padding: h (S, H). shift W: values are keys."""
    z = [squash(gate.body.inner(x)) for x in h]
    W, q = len(z[0]), gate.body.query(z[0])
    keys_values, a = [gate.body.key_value(x).roll(shift) for x in z], []
    for part in torch.arange(W).chunk(heads):
        weights = [(q[part] @ both[:W][part] / len(part)**0.5).exp() for both in keys_values]
        mixed = [weight * both[W:][part] for weight, both in zip(weights, keys_values)]
        a.append(sum(mixed) / sum(weights))
    return gate.out(torch.cat(a))[0]


@torch.no_grad()
def test_gate():
    torch.manual_seed(2)
    gate, h = smartbert.Gate(20, 16, dropout=0.5, bias=0.3).eval(), torch.randn(4, 6, 20)
    nn.init.normal_(gate.body.query.weight, std=0.8)
    mask = torch.arange(6) < torch.tensor([6, 2, 4, 3])[:, None]

    def by_hand(rows=[x[m] for x, m in zip(h, mask)], **how):
        return torch.stack([gate_by_hand(gate, x, **how) for x in rows])

    def spy(q, *others, attend=smartbert.attend, **more):
        if q.dim() != 3 or q.shape[1] != 1:
            fail(f"attend gets queries {tuple(q.shape)}: only [CLS] asks, (B, 1, W), so z[:, :1]")
        return attend(q, *others, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smartbert, "attend", spy)
        got, right = gate(h, mask), by_hand()
    if got is not None and not torch.equal(got, gate(h, mask)):
        fail("the gate is random in eval mode: dropout is for training")
    judge("the gate", got, right.sigmoid(), {
        "the sigmoid is missing: g is a probability": right,
        "its shape is (B,), not (B, 1)": right.sigmoid()[:, None],
        "[CLS] attends to padding: pass the mask": by_hand(rows=h).sigmoid(),
        "tanh is missing: z = tanh(W_in h)": by_hand(squash=lambda x: x).sigmoid(),
        "attention has self.n_heads heads, two": by_hand(heads=1).sigmoid(),
        "key_value gives the keys first, then the values": by_hand(shift=16).sigmoid()})
    a, z = gate.body(h, mask)
    judge("gate.out(a), where a (B, W) is attention's output,", gate.out(a).squeeze(1), right)
    judge("z, which ClsAttention returns as well,", z, torch.tanh(gate.body.inner(h)))
    try:
        one = gate(h[:1], None)                         # the first row has no padding
    except IndexError:
        one = right[0].sigmoid()
    judge("the gate of a single row", one, right[:1].sigmoid(), {
        "squeeze() takes B = 1 away as well: squeeze(1)": right[0].sigmoid()})
    if torch.equal(gate.train()(h, mask), gate(h, mask)):
        fail("in training attention has dropout: pass self.dropout and self.training")


# --- 4 inference --------------------------------------------------------------------------------

class Scripted:
    """A SmartBERT of 3 layers whose gates and heads follow a script, and which notes what is
    asked: g1 is gate 1, l1 layer 1, h1 head 1. A hidden state tells the layers that made it: 0 is
    h_0, 12 is layer 1, then 2. An answer tells the head and what it read."""

    def __init__(self, gates: list[float], sure: list[int]):
        self.story = []
        self.bert = SimpleNamespace(embeddings=lambda ids, segment_ids: torch.zeros(1, 4, 2),
                                    config=SimpleNamespace(num_hidden_layers=3))
        self.gates = [self.module(f"g{i}", lambda h, g=g: torch.tensor([g]))
                      for i, g in enumerate(gates, 1)]
        self.bert.layers = [self.module(f"l{i}", lambda h, i=i: 10 * h + i) for i in (1, 2, 3)]
        self.heads = [self.module(f"h{i}", lambda h, i=i: (self.answer(i, h[0, 0, 0], sure), h))
                      for i in (1, 2, 3)]

    def module(self, name, function):
        def called(h, mask=None):
            self.story.append(f"{name} reads {h[0, 0, 0]:.0f}")
            return function(h)
        return called

    @staticmethod
    def answer(i: int, read: float, sure: list[int]) -> torch.Tensor:
        """The logits of head i: entropy 0 where it is sure, else ln 3."""
        peak = 300.0 if i in sure else 0.0
        return torch.tensor([[0.0, peak, 0.0]]) + 1000 * i + read


RUNS, SKIPS = 0.1, 0.9
STORIES = [     # gates, sure heads, threshold, skip, what is asked, the rule that it shows
    ([RUNS, RUNS, RUNS], [], 0.3, True, "g1 l1 h1 g2 l2 h2 g3 l3 h3",
     "where no gate skips and no head is sure, all layers run and the last head answers"),
    ([RUNS, SKIPS, RUNS], [], 0.3, True, "g1 l1 h1 g2 g3 l3 h3",
     "where g >= 1/2 the layer is not computed, and no head is asked after it"),
    ([RUNS, 0.5, RUNS], [], 0.3, True, "g1 l1 h1 g2 g3 l3 h3", "at g = 1/2 the layer is skipped"),
    ([RUNS, RUNS, RUNS], [2, 3], 0.3, True, "g1 l1 h1 g2 l2 h2",
     "an example exits after a layer where the head's entropy is below the threshold"),
    ([SKIPS, SKIPS, RUNS], [1, 2, 3], 0.3, True, "g1 g2 g3 l3 h3",
     "after a skipped layer there is no exit"),
    ([RUNS, RUNS, RUNS], [1, 2, 3], 0.0, True, "g1 l1 h1 g2 l2 h2 g3 l3 h3",
     "to exit, the entropy must be below the threshold, not equal to it"),
    ([RUNS, RUNS, SKIPS], [], 0.3, True, "g1 l1 h1 g2 l2 h2 g3 h3",
     "the last head answers even if the last layer was skipped"),
    ([SKIPS, SKIPS, SKIPS], [], 0.3, False, "l1 h1 l2 h2 l3 h3", "skip=False asks no gate")]


def test_infer_one():
    ids = torch.zeros(1, 4, dtype=torch.long)
    for gates, sure, threshold, skip, asked, rule in STORIES:
        story, read = [], 0
        for name in asked.split():
            story.append(f"{name} reads {read}")
            if name[0] == "l":
                read = 10 * read + int(name[1])
        model = Scripted(gates, sure)
        got = smartbert.infer_one(model, ids, ids, threshold, skip)
        what = f"{rule} (g = {gates}, sure heads {sure}, threshold {threshold}, skip={skip})"
        for yours, right in zip_longest(model.story, story, fillvalue="nothing more"):
            if yours != right:
                fail(f"{what}: of {asked} you ask '{yours}' where '{right}' is due (g gates, l "
                     f"layers, h heads; they read 0, h_0, or 12, what layers 1 and 2 made)")
        if not isinstance(got, tuple) or len(got) != 3:
            fail(f"{what}: return three things: the logits, the layers that ran, the exit")
        last, ran = int(asked[-1]), [int(name[1]) for name in asked.split() if name[0] == "l"]
        if list(got[1]) != ran or got[2] != last:
            fail(f"{what}: layers {got[1]} ran, exit at {got[2]}? They are {ran} and {last}, "
                 f"counted from 1")
        judge(f"{what}: the answer", got[0], model.answer(last, read, sure))


# --- 5 the contrast, 6 the penalty --------------------------------------------------------------

def contrast_by_hand(us, vs, tau, anchors=None, positive=True, similar=F.cosine_similarity):
    """The losses of the anchors: the first `anchors` tokens (default: all) of each row's u (S, W).
    All of v are candidates; positive: whether the right one is in the denominator as well."""
    losses = []
    for row, (u, v) in enumerate(zip(us, vs)):
        for t in range(len(u) if anchors is None else anchors[row]):
            s = [math.exp(similar(u[t], other, dim=0).item() / tau) for other in v]
            total = sum(s) if positive else sum(s) - s[t]
            losses.append(-math.log(s[t] / total))
    return losses


def test_contrast():
    torch.manual_seed(1)
    u, v, lengths = 0.6 * torch.randn(3, 5, 4), 0.6 * torch.randn(3, 5, 4), [5, 2, 4]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    us, vs = [[x[b, :length] for b, length in enumerate(lengths)] for x in (u, v)]
    right = contrast_by_hand(us, vs, 0.5)
    got = smartbert.contrast(u, v, mask, 0.5)
    if isinstance(got, torch.Tensor) and not (got.abs() < 1e3).all():
        fail("the contrast is not finite, or huge, because an anchor's own logit is masked: use "
             "~mask to fill the padding of v, and average losses[mask], without padding's rows")
    judge("the contrast", got, mean(right), {
        "it is a mean over the real tokens, padding does not count": sum(right) / mask.numel(),
        "the positive is missing from the denominator":
            mean(contrast_by_hand(us, vs, 0.5, positive=False)),
        "padding is no negative: mask it in the denominator":
            mean(contrast_by_hand(u, v, 0.5, anchors=lengths)),
        "padding takes part: it is neither an anchor nor a negative":
            mean(contrast_by_hand(u, v, 0.5)),
        "the denominator sums over the tokens t' of v, not of u":
            mean(contrast_by_hand(vs, us, 0.5)),
        "the denominator sums over the tokens t' of v, not of u, where it has padding as well":
            mean(contrast_by_hand(v, u, 0.5, anchors=lengths)),
        "s has dot products; for the cosine, u and v must have length 1":
            mean(contrast_by_hand(us, vs, 0.5, similar=lambda a, b, dim: a @ b)),
        "tau is missing": mean(contrast_by_hand(us, vs, 1.0)),
        "tau divides the cosine": mean(contrast_by_hand(us, vs, 1 / 0.5)),
        "the negatives are tokens of the same example, not of the whole batch":
            mean(contrast_by_hand([torch.cat(us)], [torch.cat(vs)], 0.5)),
        "it is a mean over all tokens, not of the examples' means":
            mean([mean(contrast_by_hand([a], [b], 0.5)) for a, b in zip(us, vs)]),
        "it is a mean over the tokens, not a sum": sum(right),
        "its sign is wrong": -mean(right)})
    u.requires_grad_()
    if not torch.autograd.grad(smartbert.contrast(u, v, mask, 0.5), u)[0].isfinite().all():
        fail("the gradient is not finite at padding, as 0 / 0 is: mask the logits with -inf, and "
             "compute with logarithms")


def test_skip_penalty():
    soft = torch.tensor([[0.2, 0.4, 0.1], [0.7, 0.6, 0.3]])
    used = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    sum_of_means, run = (0.9 + 1.0 + 0.4) / 2, 4 / 6
    judge("the paper's penalty", smartbert.skip_penalty(soft, used, 0.3, 0.5),
          0.3 / sum_of_means, {
        "it takes the soft gates: used ones are rounded": 0.3 / 1.0,
        "it is lambda over the sum, not times": 0.3 * sum_of_means,
        "it has a sum over the layers, not a mean": 0.3 / (sum_of_means / 3),
        "it has a mean over the batch, not a sum": 0.3 / (2 * sum_of_means),
        "lambda is divided by the mean of the batch, not by each example's sum":
            (0.3 / 0.7 + 0.3 / 1.6) / 2,
        "the budget counts only where lambda is 0": 0.3 / sum_of_means + 10 * (run - 0.5)**2})
    for budget in 0.5, 0.9:
        above = max(0.0, run - budget)
        judge(f"the penalty where {run:.2f} of the layers run and the budget is {budget}",
              smartbert.skip_penalty(soft, used, 0.0, budget), 10 * above**2, {
            "a budget that is met costs nothing": 10 * (run - budget)**2,
            "the square is missing": 10 * above,
            "the factor 10 is missing": above**2,
            "it takes the gates as used, not the soft ones":
                10 * max(0, 1 - sum_of_means / 3 - budget)**2,
            "what runs is 1 - g": 10 * max(0, 1 - run - budget)**2})


# --- 7 phase 1, 8 phase 2 -----------------------------------------------------------------------

def phase_example() -> tuple:
    """A model whose soft and hard gates differ; ids, segment_ids and mask of 4 rows; labels."""
    model = tiny_model(seed=3)
    for gate in model.gates:
        nn.init.normal_(gate.out.weight, std=0.3)
    return model, tiny_batch(rows=4, longest=6), torch.tensor([0, 2, 1, 1])


@torch.no_grad()
def run_by_hand(model, batch, hard: bool, exchanged: bool = False) -> SimpleNamespace:
    """Each row without padding through the layers: states[i], outputs[i], a list of (S, H), one
    for each row; soft (B, L). exchanged: g weighs the layer's output."""
    L = len(model.gates)
    told = SimpleNamespace(states=[[] for _ in range(L + 1)], outputs=[[] for _ in range(L)])
    soft = torch.zeros(len(batch[0]), L)
    for row, (ids, segment_ids, mask) in enumerate(zip(*batch)):
        h = model.bert.embeddings(ids[mask][None], segment_ids[mask][None])
        for i in range(L):
            told.states[i].append(h[0])
            g, output = model.gates[i](h, None).item(), model.bert.layers[i](h, None)
            soft[row, i] = g
            told.outputs[i].append(output[0])
            if hard:
                g = float(g >= 0.5)
            if exchanged:
                g = 1 - g
            h = (1 - g) * output + g * h
        told.states[L].append(h[0])
    told.soft, told.used = soft, (soft >= 0.5).float() if hard else soft
    return told


def real(h: torch.Tensor, mask: torch.Tensor) -> list:
    """The real tokens of each row."""
    return [x[m] for x, m in zip(h, mask)]


def cross_entropy_by_hand(head, rows, labels) -> float:
    answers = [head(h[None], None)[0][0].log_softmax(0) for h in rows]
    return -mean([answer[y].item() for answer, y in zip(answers, labels)])


def pairs_by_hand(us) -> list[float]:
    """The contrasts of neighbours."""
    return [mean(contrast_by_hand(a, b, 0.7)) for a, b in zip(us, us[1:])]


def test_gated_forward():
    model, batch, _ = phase_example()
    for hard in True, False:
        told, other = run_by_hand(model, batch, hard), run_by_hand(model, batch, not hard)
        exchanged = run_by_hand(model, batch, hard, exchanged=True)
        gated = smartbert.gated_forward(model, *batch, hard=hard)
        if gated is None:
            fail("gated_forward returns nothing")

        def check(name, h, right, mistakes):
            judge(f"hard={hard}: {name}", torch.cat(real(h, batch[2])), torch.cat(right),
                  {mistake: torch.cat(rows) for mistake, rows in mistakes.items()})

        check("last, which is h_L,", gated.last, told.states[-1], {
            "g weighs the input; it is the probability of skipping": exchanged.states[-1],
            "with full_share 0 every row obeys its gates": real(model.bert(*batch)[-1], batch[2]),
            "hard gates mix if hard, else soft ones": other.states[-1]})
        for i in range(5):
            mixed = {"it is the mixture h_i, after the gate": told.states[i + 1]}
            check(f"inputs[{i}], what entered the layer,", gated.inputs[i], told.states[i], mixed)
            check(f"outputs[{i}], what left the layer,", gated.outputs[i], told.outputs[i], mixed)
        judge(f"hard={hard}: g_soft", gated.g_soft, told.soft, {
            "these are the gates before the hard weight": (told.soft >= 0.5)})
        judge(f"hard={hard}: g_used", gated.g_used, told.used, {
            "these are the gates that mix, after the hard weight": told.soft})
        if not gated.g_used.requires_grad:
            fail("g_used has no gradient: store what mixes: through it gates learn the budget")
    d = len(smartbert.gated_forward(model, *batch, hard=True, depth=3).outputs)
    judge("the number of layers that depth=3 runs", torch.tensor(d), 3)
    smartbert.gated_forward(model, *batch, hard=True).last.sum().backward()
    if model.gates[0].out.weight.grad is None:
        fail("no gradient reaches the gates: mix by the hard weight, which has one")


@torch.no_grad()
def test_full_share():
    model, batch = tiny_model(), tiny_batch(rows=32)
    torch.manual_seed(0)
    obeying, half, full = (
        real(smartbert.gated_forward(model, *batch, hard=True, full_share=share).last, batch[2])
        for share in (0.0, 0.5, 1.0))
    judge("full_share 1 runs every layer: h_L", torch.cat(full),
          torch.cat(real(model.bert(*batch)[-1], batch[2])),
          {"the rows still obey their gates": torch.cat(obeying)})
    used = smartbert.gated_forward(model, *batch, hard=True, full_share=1.0).g_used
    gates = [gate(h, batch[2]) for gate, h in zip(model.gates, model.bert(*batch))]
    judge("full_share 1: g_used", used, (torch.stack(gates, 1) >= 0.5).float(), {
        "it is what the gates say, even of rows that ignore them": torch.zeros_like(used)})
    kinds = {(same(h, a), same(h, b)) for h, a, b in zip(half, obeying, full)}
    if (False, False) in kinds:
        fail("full_share: a row obeys all its gates or none: draw before the first layer")
    if not kinds >= {(True, False), (False, True)}:
        fail("full_share: draw for each row, not once for the batch")


def test_phase1_loss():
    model, batch, labels = phase_example()
    for hard in False, True:
        told = run_by_hand(model, batch, hard)
        task = cross_entropy_by_hand(model.heads[-1], told.states[-1], labels)
        penalty = 10 * max(0, (1 - told.used).mean().item() - 0.2)**2

        def pairs_of(hiddens):
            return pairs_by_hand([[project(h) for h in rows]
                                  for project, rows in zip(model.projections, hiddens)])

        pairs = pairs_of(told.states)
        parts = smartbert.phase1_loss(model, *batch, labels, hard=hard, budget=0.2,
                                      eta1=0.4, tau1=0.7)
        if parts is None:
            fail("phase1_loss returns nothing")
        judge("task", parts["task"], task, {
            "the last head reads h_L, not what left the last layer":
                cross_entropy_by_hand(model.heads[-1], told.outputs[-1], labels)})
        judge("penalty", parts["penalty"], penalty)
        judge("contrast", parts["contrast"], sum(pairs), {
            "it is the sum over the pairs, not the mean (as in phase 2)": mean(pairs),
            "it compares what enters the layers, not what leaves them":
                sum(pairs_of(told.outputs))})
        judge("run", parts["run"], (1 - told.used).mean(0), {
            "it takes the gates as used, not the soft ones": (1 - told.soft).mean(0),
            "it is the share that runs, not that skips": told.used.mean(0)})
        judge("the loss", parts["loss"], 0.6 * (task + penalty) + 0.4 * sum(pairs), {
            "eta1 weighs the contrast, 1 - eta1 the rest":
                0.4 * (task + penalty) + 0.6 * sum(pairs),
            "1 - eta1 weighs the penalty, too": 0.6 * task + penalty + 0.4 * sum(pairs)})
    whole = smartbert.phase1_loss(model, *batch, labels, hard=True, full_share=1.0)["task"]
    judge("the task with full_share=1", whole, F.cross_entropy(model(*batch), labels), {
        "pass full_share on": cross_entropy_by_hand(model.heads[-1], told.states[-1], labels)})


def test_phase2_loss():
    model, batch, labels = phase_example()
    hard, soft = run_by_hand(model, batch, True), run_by_hand(model, batch, False)

    def losses(read, heads=model.heads[:4]):
        return [cross_entropy_by_hand(head, rows, labels) for head, rows in zip(heads, read)]

    task = sum(losses(hard.outputs))
    pairs = pairs_by_hand([[head.project(head(h[None], None)[1][0]) for h in rows]
                           for head, rows in zip(model.heads[:4], hard.outputs)])
    parts = smartbert.phase2_loss(model, *batch, labels, eta2=0.4, tau2=0.7)
    if parts is None:
        fail("phase2_loss returns nothing")
    judge("task", parts["task"], task, {
        "head i reads what left layer i, even if the gate skips it; not the mixture h_i":
            sum(losses(hard.states[1:])),
        "head i reads what left layer i, not what entered it": sum(losses(hard.states)),
        "the hidden states follow the hard gates, not the soft ones": sum(losses(soft.outputs)),
        "the last head is trained in phase 1, not here": sum(losses(hard.outputs, model.heads)),
        "it is the sum over the heads, not the mean": task / 4})
    judge("contrast", parts["contrast"], mean(pairs), {
        "it is the mean over the pairs, not the sum (as in phase 1)": sum(pairs),
        "there are L - 2 pairs, the last one is missing": mean(pairs[:-1]),
        "it is divided by the number of pairs, not of heads": sum(pairs) / 4})
    judge("the loss", parts["loss"], 0.6 * task + 0.4 * mean(pairs), {
        "eta2 weighs the contrast, 1 - eta2 the rest": 0.4 * task + 0.6 * mean(pairs)})
    whole = smartbert.phase2_loss(model, *batch, labels, full_share=1.0)["task"]
    full = [real(h, batch[2]) for h in model.bert(*batch)[1:]]
    judge("the task with full_share=1", whole, sum(losses(full)), {"pass full_share on": task})
    parts["loss"].backward()
    for name, p in model.named_parameters():
        trained = name.startswith("heads.") and not name.startswith("heads.4.")
        if trained and p.grad is None:
            fail(f"no gradient reaches {name}: heads 1 .. L-1 are trained")
        if p.grad is not None and not trained:
            fail(f"{name} gets a gradient: all but heads 1 .. L-1 is frozen in phase 2")
    short = smartbert.phase2_loss(tiny_model(layers=2), *batch, labels)["contrast"]
    judge("with L = 2 there is one head and no pair: the contrast", short, 0.0)


# --- 9 FLOPs, 10 the threshold ------------------------------------------------------------------

def products(*shapes) -> int:
    """FLOPs of matrix products (rows, inner) x (inner, columns)."""
    return sum(2 * rows * inner * columns for rows, inner, columns in shapes)


def test_flops():
    model, H, I, A, W, C = tiny_model(), 20, 28, 5, 16, 3
    lengths, linear, attention, body = torch.tensor([2, 7, 13]), [], [], []
    for S in lengths.tolist():
        linear.append(products(*4 * [(S, H, H)], (S, H, I), (S, I, H)))
        attention.append(products(*A * [(S, H // A, S), (S, S, H // A)]))
        body.append(products((S, H, W), (1, W, W), (S, W, 2 * W), (1, W, S), (1, S, W)))
    linear, attention, body = map(torch.tensor, (linear, attention, body))
    layer, hidden = linear + attention, products((1, W, W))
    gate, head = body + products((1, W, 1)), body + hidden + products((1, W, C))
    judge("FLOPs of a layer", evaluation.layer_flops(model, lengths), layer, {
        "attention's own products (scores, weighted sum) are missing": linear,
        "a multiply-add counts two": layer / 2,
        "I need not be 4H: see the config": layer + 4 * lengths * H * (4 * H - I)})
    for name, module, right, other in (("gate", model.gates[0], gate, gate + hidden),
                                       ("head", model.heads[0], head, head - hidden)):
        judge(f"FLOPs of a {name}", evaluation.auxiliary_flops(module, lengths), right, {
            "only [CLS] has a query": right + hidden * (lengths - 1),
            "the products of attention are missing": right - 4 * lengths * W,
            "a head has a hidden layer, a gate has none": other,
            "a multiply-add counts two": right / 2})
    generator = torch.Generator().manual_seed(0)
    ran, gates, heads = torch.rand(3, 3, 5, generator=generator) < 0.5
    outcome = SimpleNamespace(ran=ran, gate_asked=gates, head_asked=heads)
    layer, gate, head = layer[:, None], gate[:, None] * gates, head[:, None] * heads
    right = layer * ran + gate + head
    judge("FLOPs (N, L)", evaluation.flops(model, lengths, outcome), right, {
        "the gates are missing": layer * ran + head, "the heads are missing": layer * ran + gate,
        "skipped layers cost nothing": layer + gate + head,
        "they are summed over the layers": right.sum(1)})


def test_apply_exits():
    generator = torch.Generator().manual_seed(0)
    ran, asked, leaves = torch.rand(3, 8, 4, generator=generator) < 0.5
    asked[:, 3] = True
    history = torch.randn(8, 4, 3, generator=generator)
    full = smartbert.Outcome(history[:, 3], torch.full((8,), 4), ran, ran | asked,
                             torch.rand(8, 4), asked, history)
    before = [value.clone() for value in vars(full).values()]
    for row, exits in product(range(8), (leaves, None)):
        got = evaluation.apply_exits(full, exits)
        if got is None:
            fail("apply_exits returns nothing")
        if not all(map(torch.equal, vars(full).values(), before)):
            fail("apply_exits changes the full pass, which serves every threshold")
        exit, heads, what = 4, [4], f"without exits, heads {layers(asked[row])} asked"
        if exits is not None:
            what = f"heads {layers(asked[row])} asked, leaves {layers(exits[row])}"
            exit = min(layers(exits[row] & asked[row]) + [4])
            heads = [i for i in layers(asked[row]) if i <= exit]
        if got.exit[row] != exit:
            fail(f"{what}: the exit is {got.exit[row]}, not {exit}: the first head that was asked "
                 f"and lets the row leave, else the last")
        judge(f"{what}: the answer", got.logits[row], history[row, exit - 1], {
            "it is that of the head at the exit, not the last": history[row, 3]})
        for name, right in (("ran", layers(ran[row, :exit])), ("head_asked", heads),
                            ("gate_asked", layers((ran | asked)[row, :exit]))):
            if layers(getattr(got, name)[row]) != right:
                fail(f"{what}, exit {exit}: {name} is {layers(getattr(got, name)[row])}, not "
                     f"{right}: nothing after the exit; without exits no head but the last")


CHOICES = [     # the score without exits, the target speed-up, the right threshold, the rule
    (0.90, None, 0.2, "the cheapest that loses at most half a point"),
    (0.99, None, None, "none where each loses more than half a point"),
    (0.90, 2.5, 0.2, "of those with at most 1/X of the FLOPs, the one with the most"),
    (0.90, 50.0, 0.4, "where none reaches the speed-up, the cheapest"),
    (0.0, None, None, "none where the mode without exits has learned nothing"),
    (-0.1, None, None, "none where the mode without exits has learned nothing")]


def test_choose():
    def result(score, flops):
        return evaluation.Result(score, {}, 0.0, flops, [], [], [])

    table = {0.1: (0.92, 0.8), 0.4: (0.5, 0.1), 0.2: (0.896, 0.4), 0.3: (0.894, 0.2)}
    tried = {evaluation.Point("both", threshold): result(*each)
             for threshold, each in table.items()}
    for without, speedup, right, rule in CHOICES:
        got = evaluation.choose(tried, result(without, 1.0), speedup)
        points = [point for point in tried if point.threshold == right]
        if got != points:
            fail(f"{rule}: {points}, not {got}, from {{threshold: (score, FLOPs)}} {table}, with "
                 f"score {without} without exits, target speed-up {speedup}")
    if evaluation.choose(tried, result(0.92, 0.8), None) != []:
        fail("a point that costs as much as the mode without exits saves nothing: choose none")
    alike = {point: result(0.9, each.flops) for point, each in tried.items()}
    if evaluation.choose(alike, result(0.9, 1.0), None) != []:
        fail("where all scores are equal, they tell no point from another: choose none")


# --- 11 inference in batches --------------------------------------------------------------------

@torch.no_grad()
def test_infer():
    model, batch = tiny_model(1), tiny_batch(rows=11)
    computed = []
    for layer in model.bert.layers:
        layer.register_forward_hook(lambda layer, inputs, output: computed.append(len(output)))
    for skip, threshold, size in product((True, False), (0.7, None), (1, 40)):
        computed.clear()
        how = f"skip={skip}, threshold={threshold}, batch_tokens={size}"
        got = smartbert.infer(model, *batch, skip=skip, threshold=threshold, batch_tokens=size)
        if got is None:
            fail("infer returns nothing")
        if size == 1 and max(computed, default=0) > 1:
            fail(f"{how}: a batch has {max(computed)} rows: let full_batches make the batches")
        if sum(computed) > got.ran.sum():
            fail(f"{how}: {sum(computed)} rows go through a layer, {got.ran.sum()} need to: "
                 f"compute no skipped layer, and none after the exit")
        calls = sum(len(list(smartbert.full_batches(ran, batch[2], size))) for ran in got.ran.T)
        if len(computed) > calls:
            fail(f"{how}: layers are called {len(computed)} times, but {calls} full batches do")
        for row, (ids, segment_ids, mask) in enumerate(zip(*batch)):
            one = ids[mask][None], segment_ids[mask][None]
            limit = -1.0 if threshold is None else threshold        # no entropy is below -1
            logits, ran, exit = smartbert.infer_one(model, *one, limit, skip)
            gates = list(range(1, exit + 1)) if skip else []
            heads = [5] if threshold is None else sorted({*ran, exit})
            for name, right in ("ran", ran), ("gate_asked", gates), ("head_asked", heads):
                if layers(getattr(got, name)[row]) != right:
                    fail(f"{how}: row {row} alone has {name} {right}, in the pool "
                         f"{layers(getattr(got, name)[row])}")
            judge(f"{how}: row {row}'s exit", got.exit[row], torch.tensor(exit))
            judge(f"{how}: row {row}'s answer", got.logits[row], logits[0])
