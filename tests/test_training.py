"""What an epoch of training does to the weights, seen from outside: which move, how far, by which
rate; and how a run's epochs are compared."""

import copy
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import save_tiny_weights, tiny_batch, tiny_model
from torch import nn

import data
import train
from bert import Bert, BertConfig, Layer
from data import Split
from smartbert import ClsAttention, SmartBert, gated_forward, phase1_loss, phase2_loss
from train import Settings


def split_of(rows: int, longest: int = 9) -> Split:
    """An encoded split of random tokens, of lengths 3 .. longest and three classes."""
    rng = random.Random(0)
    ids = [[rng.randint(1, 40) for _ in range(rng.randint(3, longest))] for _ in range(rows)]
    return Split([("", None)] * rows, [i % 3 for i in range(rows)],
                 ids=[np.array(row, np.int32) for row in ids],
                 segment_ids=[np.zeros(len(row), np.uint8) for row in ids])


def soft_model(**more):
    """Three layers whose gates are near an even chance, so that soft and hard ones differ."""
    model = tiny_model(layers=3, **more)
    for gate in model.gates:
        nn.init.normal_(gate.out.weight, std=0.3)
    return model


class Run:
    """One phase of training on a tiny model, watched: for each step the rate of the encoder (or of
    the heads, where it rests), the norm of the gradient and a copy of the weights after it."""

    def __init__(self, phase: int = 1, rows: int = 12, model=None, **settings):
        usual = dict(lr=1e-4, batch_size=4, epochs1=1, epochs2=1)
        self.settings = Settings(**usual | settings)
        self.model = model or soft_model()
        optimizer = train.make_optimizer(self.model, self.settings, phase)
        self.start, self.after, self.rates, self.norms = self.weights(), [], [], []
        optimizer.register_step_pre_hook(self.before_step)
        optimizer.register_step_post_hook(lambda *_: self.after.append(self.weights()))
        epochs = self.settings.epochs1 if phase == 1 else self.settings.epochs2
        self.logs = [train.train_epoch(self.model, optimizer, split_of(rows), self.settings, phase,
                                       epoch) for epoch in range(epochs)]

    def weights(self) -> dict[str, torch.Tensor]:
        return copy.deepcopy(self.model.state_dict())

    def before_step(self, optimizer, *_) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.norms.append(math.sqrt(sum(g.square().sum().item() for g in grads)))

    def moved(self, step: int) -> set[str]:
        """The parts (bert, gates, heads, projections) of which a number changed in this step."""
        before = self.after[step - 1] if step else self.start
        return {name.split(".")[0] for name, value in self.after[step].items()
                if not torch.equal(value, before[name])}


# --- The losses ---------------------------------------------------------------------------------

def tokens_told_apart(us: list, vs: list, tau: float) -> float:
    """The contrast of one pair of layers, from the real tokens (S, W) of each row: a loop."""
    losses = []
    for u, v in zip(us, vs):
        for t in range(len(u)):
            s = [math.exp(F.cosine_similarity(u[t], other, dim=0).item() / tau) for other in v]
            losses.append(-math.log(s[t] / sum(s)))
    return sum(losses) / len(losses)


def walked_alone(model, ids, segment_ids, mask):
    """Each row without padding through all layers, skipped where its gate says so: the inputs and
    raw outputs of the layers, [row][layer], and what comes out at the end, [row]."""
    inputs, outputs, ends = [], [], []
    for row, S in enumerate(mask.sum(1).tolist()):
        h = model.bert.embeddings(ids[row:row + 1, :S], segment_ids[row:row + 1, :S])
        inputs.append([])
        outputs.append([])
        for gate, layer in zip(model.gates, model.bert.layers):
            inputs[-1].append(h)
            outputs[-1].append(layer(h, None))
            h = h if gate(h, None) >= 0.5 else outputs[-1][-1]
        ends.append(h)
    return inputs, outputs, ends


@torch.no_grad()
def test_phase1_loss_by_hand():
    """The mean over rows of the last head's cross-entropy, and the penalty, weighted 1 - eta1; the
    sum over pairs of neighbours of the contrast of what enters them, weighted eta1."""
    model, batch = tiny_model(), tiny_batch(rows=4, longest=5)
    labels = [0, 2, 1, 1]
    inputs, _, ends = walked_alone(model, *batch)
    task = sum(-model.heads[-1](h, None)[0].log_softmax(1)[0, y].item()
               for h, y in zip(ends, labels)) / 4
    u = [[project(h[i])[0] for h in inputs] for i, project in enumerate(model.projections)]
    pairs = [tokens_told_apart(u[i], u[i + 1], 0.7) for i in range(4)]
    ran = gated_forward(model, *batch, hard=True)[-1].logical_not().float().mean().item()
    assert 0.2 < ran < 1
    penalty = 3 * (ran - 0.2)**2
    got = phase1_loss(model, *batch, torch.tensor(labels), hard=True, eta1=0.4, tau1=0.7,
                      penalty=dict(budget=0.2, budget_weight=3.0))
    assert got.loss.item() == pytest.approx(0.6 * (task + penalty) + 0.4 * sum(pairs), rel=1e-4)


@torch.no_grad()
def test_phase2_loss_by_hand():
    """The sum over heads 1 .. L-1 of their cross-entropy on the layers' raw outputs, weighted
    1 - eta2, and the mean over pairs of neighbours of the contrast, weighted eta2."""
    model, batch = tiny_model(), tiny_batch(rows=4, longest=5)
    labels = [0, 2, 1, 1]
    _, outputs, _ = walked_alone(model, *batch)
    task, u = 0.0, []
    for i in range(4):
        answers = [model.heads[i](out[i], None) for out in outputs]
        task += sum(-logits.log_softmax(1)[0, y].item()
                    for (logits, _), y in zip(answers, labels)) / 4
        u.append([model.heads[i].project(z)[0] for _, z in answers])
    pairs = [tokens_told_apart(u[i], u[i + 1], 0.7) for i in range(3)]
    got = phase2_loss(model, *batch, torch.tensor(labels), eta2=0.4, tau2=0.7)
    assert got.item() == pytest.approx(0.6 * task + 0.4 * sum(pairs) / 3, rel=1e-4)


@pytest.mark.parametrize("no_contrast", [False, True])
def test_each_phase_has_its_own_contrast(monkeypatch, no_contrast):
    """Weights, temperatures and the share of rows in full reach the losses; the ablation sets both
    weights to 0."""
    seen = []

    def noted(loss):
        return lambda *inputs, **more: seen.append(more) or loss(*inputs, **more)

    monkeypatch.setattr(train, "phase1_loss", noted(phase1_loss))
    monkeypatch.setattr(train, "phase2_loss", noted(phase2_loss))
    for phase in 1, 2:
        Run(phase, rows=4, eta1=0.1, eta2=0.2, tau1=0.3, tau2=0.4, no_contrast=no_contrast,
            full_share=0.25)
    eta1, eta2 = (0, 0) if no_contrast else (0.1, 0.2)
    assert (seen[0]["eta1"], seen[0]["tau1"], seen[0]["full_share"]) == (eta1, 0.3, 0.25)
    assert seen[1:] == [dict(eta2=eta2, tau2=0.4, full_share=0.25)]


def test_the_log_holds_means_of_twenty_steps(monkeypatch):
    """Of 45 steps: 1 to 20, 21 to 40 and the last five."""
    losses = iter(range(45))

    def counted(*inputs, **more):
        result = phase1_loss(*inputs, **more)
        result.loss = result.loss * 0 + next(losses)
        return result

    monkeypatch.setattr(train, "phase1_loss", counted)
    log, = Run(rows=45, batch_size=1).logs
    assert [record["step"] for record in log] == [20, 40, 45]
    assert [record["loss"] for record in log] == [9.5, 29.5, 42]


# --- The order of the examples ------------------------------------------------------------------

def test_a_file_sorted_by_class_is_mixed():
    """1000 rows of one class, then 1000 of the other: nearly every batch of 8 holds both. Of a
    fair draw one in 128 does not."""
    split = Split([("", None)] * 2000, [0] * 1000 + [1] * 1000, ids=[[1, 2, 3]] * 2000,
                  segment_ids=[[0, 0, 0]] * 2000)
    made = data.batch_indices(split, 8, seed=1)
    mixed = sum(len({split.labels[i] for i in rows}) == 2 for rows in made)
    assert mixed > 0.95 * len(made) == 0.95 * 250


def test_every_epoch_has_an_order_of_its_own(monkeypatch):
    """Five epochs, two of phase 1 and three of phase 2, see the same rows in five orders."""
    orders, collate = [], data.collate

    def noted(split, indices):
        orders[-1] += indices
        return collate(split, indices)

    monkeypatch.setattr(data, "collate", noted)
    model, settings = soft_model(), Settings(lr=1e-4, batch_size=4, epochs1=2, epochs2=3)
    for phase, epochs in (1, 2), (2, 3):
        optimizer = train.make_optimizer(model, settings, phase)
        for epoch in range(epochs):
            orders.append([])
            train.train_epoch(model, optimizer, split_of(12), settings, phase, epoch)
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len(set(map(tuple, orders))) == 5


# --- The optimizer ------------------------------------------------------------------------------

@pytest.mark.parametrize("phase", [1, 2])
def test_decay_shrinks_matrices_alone(phase):
    """A step with gradients of zero: what is trained and is a matrix shrinks by rate * decay;
    biases and LayerNorm, and what is frozen, stay."""
    model = soft_model()
    settings = Settings(lr=0.1, lr_new=0.2, weight_decay=0.5)
    optimizer = train.make_optimizer(model, settings, phase)
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    norms = {f"{name}.{kind}" for name, module in model.named_modules()
             if isinstance(module, nn.LayerNorm) for kind in ("weight", "bias")}
    shrunk = set()
    for name, value in model.state_dict().items():
        part, number = (name + "..").split(".")[:2]
        last = part == "heads" and number == "2"
        trained = (part == "heads") != last if phase == 2 else part != "heads" or last
        factor = 1.0
        if trained and name not in norms and not name.endswith("bias"):
            factor = 1 - 0.5 * (0.1 if part == "bert" else 0.2)
            shrunk.add(part)
        torch.testing.assert_close(value, before[name] * factor, rtol=1e-5, atol=0)
    assert shrunk == ({"bert", "gates", "heads", "projections"} if phase == 1 else {"heads"})


def test_no_gradient_is_longer_than_clip():
    """As the optimizer gets it, over all that is trained; with a large clip it is longer."""
    clipped, free = Run(clip=0.01), Run(clip=1e9)
    assert len(clipped.norms) == 3 and max(clipped.norms) == pytest.approx(0.01, rel=1e-3)
    assert min(free.norms) > 0.1


def test_gradients_of_a_step_are_its_own():
    """With learning rates of nothing, three steps see the same gradients of the same rows: none is
    left over from a former step."""
    run = Run(rows=4, epochs1=3, lr=0.0, lr_new=0.0, clip=1e9, penalty_start=0.9)
    assert run.norms[1:] == pytest.approx([run.norms[0]] * 2, rel=1e-3)


@pytest.mark.parametrize("phase", [1, 2])
def test_the_rate_rises_and_falls_to_nothing(phase):
    """Over the phase, not the epoch: up to the whole rate in the warm-up, nearly 0 at the end. The
    first step trains already. (With gates, phase 1 does so twice: tests/test_train.py.)"""
    run = Run(phase, rows=40, epochs1=2, epochs2=2, batch_size=4, warmup=0.2, lr=1.0, lr_new=1.0,
              no_skipping=True)
    rates = run.rates
    assert len(rates) == 20
    assert 0 < rates[0] < 0.3 and rates[1] < rates[2] < rates[3] and 0.9 < max(rates) <= 1.0001
    assert 0 <= rates[-1] < 0.1 and rates[-1] < rates[-3] < rates[-5]
    assert "heads" in run.moved(0)


# --- Gates --------------------------------------------------------------------------------------

def test_gates_rest_until_they_are_penalised():
    """The first 4 of 10 steps leave the gates as they were, to the bit, and move all else."""
    run = Run(rows=40, penalty_start=0.4, weight_decay=0.1)
    assert len(run.after) == 10
    for step in range(4):
        assert run.moved(step) == {"bert", "heads", "projections"}
    for step in range(6, 10):
        assert run.moved(step) == {"bert", "gates", "heads", "projections"}


def test_without_skipping_gates_rest_for_good():
    run = Run(rows=40, no_skipping=True)
    assert not any("gates" in run.moved(step) for step in range(10))


@pytest.mark.parametrize("more, hard", [
    (dict(soft_epochs=0), [True, True, True]), (dict(soft_epochs=1), [False, True, True]),
    (dict(soft_epochs=2), [False, False, True]), (dict(soft_gates=True), [False, False, False])])
def test_gates_are_soft_for_so_many_epochs(more, hard):
    """Of hard gates the share of 4 rows that ran a layer is a whole number of quarters."""
    run = Run(rows=4, epochs1=3, **more)
    quarters = [[4 * share for record in log for share in record["run"]] for log in run.logs]
    assert [all(n == round(n) for n in numbers) for numbers in quarters] == hard


def penalties(monkeypatch, **settings) -> list[dict]:
    """What each of 10 steps passes on as the skip penalty."""
    seen, loss = [], train.phase1_loss

    def noted(*inputs, penalty, **more):
        seen.append(penalty)
        return loss(*inputs, penalty=penalty, **more)

    monkeypatch.setattr(train, "phase1_loss", noted)
    Run(rows=20, batch_size=2, **settings)
    return seen


def test_the_budget_tightens_from_all_layers_to_the_one_asked_for(monkeypatch):
    """From 1 at penalty_start straight down to the budget at penalty_full; there it stays."""
    seen = penalties(monkeypatch, penalty_start=0.25, penalty_full=0.75, budget=0.2,
                     budget_weight=7.0)
    assert [bool(penalty) for penalty in seen] == [False] * 3 + [True] * 7
    assert {penalty["budget_weight"] for penalty in seen[3:]} == {7.0}
    assert [penalty["budget"] for penalty in seen[3:]] == pytest.approx(
        [0.92, 0.76, 0.6, 0.44, 0.28, 0.2, 0.2])


def test_lambda_replaces_the_budget(monkeypatch):
    seen = penalties(monkeypatch, penalty_start=0.25, lam=0.04)
    assert seen == [{}] * 3 + [{"lam": 0.04}] * 7


# --- Dropout ------------------------------------------------------------------------------------

def seen_by_a_head(phase: int) -> tuple:
    """Of the first step: what enters a head that is trained, and what its attention gives; each as
    it was and as it is without dropout."""
    model, seen = soft_model(dropout=0.5), []
    twin, head = copy.deepcopy(model).eval(), 2 if phase == 1 else 1
    model.heads[head].body.register_forward_hook(
        lambda _, inputs, out: seen.append((*inputs, out[0])))
    split = split_of(4)
    Run(phase, rows=4, model=model, epochs1=1, epochs2=1, no_contrast=True)
    h, mask, a = seen[0]
    batch = data.collate(split, data.batch_indices(split, 4, seed=50 + (phase == 2))[0])
    inputs = batch.ids, batch.segment_ids, batch.mask
    _, outputs, end, _, _ = gated_forward(twin, *inputs, hard=True)
    a_without, _ = twin.heads[head].body(h, mask)
    return h, end if phase == 1 else outputs[head], a, a_without, batch.mask


@pytest.mark.parametrize("phase", [1, 2])
def test_dropout_acts_on_what_is_trained_alone(phase):
    """On encoder and head in phase 1; in phase 2 on the heads, while the frozen encoder gives
    what it gives at inference."""
    h, h_without, a, a_without, mask = seen_by_a_head(phase)
    assert torch.allclose(h[mask], h_without[mask], atol=1e-5) == (phase == 2)
    assert not torch.allclose(a, a_without, atol=1e-3)


# --- The best epoch -----------------------------------------------------------------------------

def kept(epochs: list[tuple[float, float]], **settings) -> int:
    """Which of phase 1's epochs, given by score and share of the layers run, is kept; from 1."""
    settings, best, number = Settings(epochs1=len(epochs), **settings), None, 0
    for epoch, (score, share) in enumerate(epochs):
        new = train.merit(settings, epoch, score, share)
        if best is None or new >= best:
            best, number = new, epoch + 1
    return number


@pytest.mark.parametrize("epochs, settings, number", [
    ([(.9, .60), (.8, .54)], dict(budget=.5), 2),               # a tenth above the budget meets it
    ([(.9, .549), (.8, .5)], dict(budget=.5), 1),
    ([(.9, .56), (.8, .549)], dict(budget=.5), 2),
    ([(.8, .4), (.9, .5), (.9, .45), (.9, .46)], dict(budget=.5), 3),   # as good and cheaper
    ([(.8, .4), (.9, .5), (.9, .5)], dict(budget=.5), 3),       # or as cheap and later
    ([(.9, .4), (.8, .3)], dict(budget=.5, soft_epochs=1), 2),  # first of all as inference is
    ([(.9, .4), (.8, .3), (.7, .3)], dict(budget=.5, soft_epochs=2), 3),
    ([(.9, .4), (.8, .3)], dict(budget=.5, soft_gates=True), 1),
    ([(.9, 1.), (.8, .9)], dict(budget=.5, no_skipping=True), 1),
    ([(.9, 1.), (.8, .9)], dict(budget=.5, method="bert"), 1),
    # where none meets it, the best of those that were penalised in full
    ([(.9, 1.), (.8, .9), (.7, .8), (.6, .7)], dict(budget=.5, penalty_full=.5), 3),
    ([(.9, 1.), (.8, .9), (.7, .8)], dict(lam=.1, penalty_start=.4, penalty_full=.8), 2),
    ([(.9, .5), (.1, 0.)], dict(lam=.1, penalty_start=0.), 1)])    # to skip everything is no merit
def test_which_epoch_is_kept(epochs, settings, number):
    assert kept(epochs, **settings) == number


# --- Whole runs, and what they start from ------------------------------------------------------

def sst2_run(folder, *flags: str):
    """Train on 41 sentences and tiny weights; returns the folder of the run."""
    glue = folder / "SST-2"
    glue.mkdir()
    for name in "train", "dev":
        rows = [f"{'very ' * (i % 9)}good number {i}\t{i % 2}" for i in range(41)]
        (glue / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    train.main(["--task", "sst2", "--weights", str(save_tiny_weights(folder / "weights")),
                "--data-dir", str(folder), "--device", "cpu", "--out", str(folder / "run"),
                "--max-length", "12", "--epochs1", "1", "--epochs2", "1", *flags])
    return folder / "run"


@pytest.mark.parametrize("epochs2", [0, 1])
def test_phase_1_ends_with_its_best_epoch(tmp_path, monkeypatch, epochs2):
    """Of three epochs the second is the best: phase 2 leaves its encoder and gates to the bit, and
    without a phase 2 it is the model."""
    scores, written, save = iter([.7, .9, .8, .1]), [], train.save

    def noted(path, **content):
        if path.name == "checkpoint.pt":
            written.append(copy.deepcopy(content["model"]))
        save(path, **content)

    monkeypatch.setattr(train, "validate", lambda *_: {"accuracy": next(scores), "layers": 0.0})
    monkeypatch.setattr(train, "save", noted)
    run = sst2_run(tmp_path, "--epochs1", "3", "--epochs2", str(epochs2))
    model = torch.load(run / "model.pt", weights_only=True)["model"]
    kept = {name for name in model if epochs2 == 0 or not name.startswith("heads.0.")}
    assert all(torch.equal(model[name], written[1][name]) for name in kept)
    assert not all(torch.equal(model[name], written[2][name]) for name in kept)


def test_training_sees_the_first_rows_less_what_is_held_out(tmp_path, monkeypatch):
    """--limit rows of the file, a share of them held out, none longer than --max-length."""
    seen, epoch = [], train.train_epoch

    def noted(model, optimizer, training, *more):
        seen.append(training)
        return epoch(model, optimizer, training, *more)

    monkeypatch.setattr(train, "train_epoch", noted)
    sst2_run(tmp_path, "--limit", "20", "--held-out", "0.2", "--max-length", "9")
    numbers = [int(text.split()[-1]) for text, _ in seen[0].texts]
    assert len(numbers) == 16 and set(numbers) < set(range(20)) and numbers == sorted(numbers)
    assert max(map(len, seen[0].ids)) == 9 and len(seen) == 2


@pytest.mark.parametrize("weights", [False, True])
def test_dropout_reaches_encoder_gates_and_heads(tmp_path, weights):
    """Of the toy's fresh encoder, and of one from a folder, whatever its config.json says."""
    folder = save_tiny_weights(tmp_path / "weights") if weights else None
    settings = Settings(dropout=0.375, max_length=9)
    model = train.build_model(settings, folder, 9, data.find_task("toy"))
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.375}
    assert {m.attention_dropout for m in model.modules() if isinstance(m, Layer)} == {0.375}
    assert {m.dropout for m in model.modules() if isinstance(m, ClsAttention)} == {0.375}


@pytest.mark.parametrize("no_skipping, g", [(False, .11920292), (True, 0.0)])
def test_gates_start_where_they_are_told(no_skipping, g):
    model = train.build_model(Settings(no_skipping=no_skipping), None, 9, data.find_task("toy"))
    for gate in model.gates:
        nn.init.zeros_(gate.out.weight)
        assert gate(torch.randn(1, 3, 64), None).item() == pytest.approx(g, abs=1e-6)


def test_fresh_parts_start_at_the_scale_of_what_comes_in():
    """Gates, heads and projections: variance 1 / inputs. The encoder is used as it is."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=9, hidden_size=384, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=8, initializer_range=0.5, layer_norm_eps=0.25)
    model = SmartBert(Bert(config), classes=2)
    for name, p in model.named_parameters():
        if p.dim() > 1 and p.numel() > 2000:
            wanted = 0.5 if name.startswith("bert.") else p.shape[1] ** -0.5
            assert p.std().item() == pytest.approx(wanted, rel=0.05), name
    assert {m.eps for m in model.bert.modules() if isinstance(m, nn.LayerNorm)} == {0.25}
    biases = [m.bias for m in model.bert.modules() if isinstance(m, nn.Linear)]
    assert not any(bias.any() for bias in biases)
