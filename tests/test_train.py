"""Training as a user starts it: what its steps change, which epoch it keeps, and what its folder
holds after a kill, on a full disk, beside a second training. Nearly every test watches whole runs
of `train.main`; `by_hand` is a whole training, written out once more."""

import copy
import importlib.util
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import save_tiny_weights
from torch import nn

import data
import train
from bert import Bert, BertConfig
from smartbert import SmartBert, gated_forward, infer_one, phase1_loss, phase2_loss

ROOT = Path(train.__file__).parent
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
FLAGS = train.make_parser(train.METHODS)._actions[1:]       # without --help
# 4 steps an epoch; the first is the best.
SMALL = "--limit 109 --budget 1 --epochs1 3 --epochs2 4 --seed 52 --device cpu".split()
# 6 rows held out, 49 to train on: three batches of 16 and one of a single row.
HAND = "--limit 55 --full-share 0 --epochs1 3 --epochs2 2 --batch-size 16 --device cpu".split()
QUICK = "--limit 40 --epochs1 1 --epochs2 1 --device cpu".split()
STEPS = "--limit 40 --epochs1 2 --epochs2 1 --batch-size 16 --device cpu".split()  # 3 an epoch
OTHER = ("--method exits --recipe release --weights w --budget 0.3 --lam 0.1 --gate-bias -3 "
         "--gates-from 0.2 --full-from 0.7 --full-share 0.1 --soft-epochs 1 --eta1 0 --eta2 0 "
         "--epochs1 2 --epochs2 2 --batch-size 8 --lr 1e-5 --lr-new 1e-4 --lr-gates 1e-4 "
         "--warmup 0.1 --max-length 16 --held-out 0.2 --limit 50 --seed 51").split()
EARLY = {"heads.0", "heads.1", "heads.2", "heads.3", "heads.4"}     # of the toy's 6 layers


def trained(arguments, folder) -> Path:
    """Train into this folder; returns it."""
    train.main([*arguments, "--out", str(folder)])
    return folder


def stored(folder) -> dict:
    """What model.pt holds: the run's fields, and the weights."""
    content = torch.load(Path(folder) / "model.pt", weights_only=True)
    return content["run"] | {"weights": dict(content["weights"])}


def readable(folder) -> dict:
    return json.loads((Path(folder) / "run.json").read_text())


def moved(before: dict, after: dict) -> set[str]:
    """The parts of a model of which a bit changed: bert, gates, projections, heads.0, ..."""
    names = [name for name in before | after if not torch.equal(after[name], before[name])]
    return {name[:7] if name.startswith("heads") else name.split(".")[0] for name in names}


def fails_in_call(number: int, function, error):
    """The function, which raises the error when it is called for this time."""
    calls = itertools.count(1)
    def call(*more):
        if next(calls) == number:
            raise error
        return function(*more)
    return call


def process(arguments, stdout=subprocess.PIPE) -> subprocess.Popen:
    """train.py as a process of its own."""
    return subprocess.Popen([sys.executable, ROOT / "train.py", *arguments], env=ONE_THREAD,
                            stdout=stdout, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A small run of the toy that was never stopped."""
    return trained(SMALL, tmp_path_factory.mktemp("runs") / "whole")


def sentences(folder: Path, dropout: float = 0.0) -> list[str]:
    """Files like SST-2's, easy to learn, a third of them too long, and tiny weights; the arguments
    to train on them. dev has the opposite labels, so whoever looks at it is misled."""
    glue = folder / "SST-2"
    glue.mkdir(parents=True)
    for name, words in ("train", ("no", "yes")), ("dev", ("yes", "no")):
        rows = [f"{i // 2 % 10} {words[i % 2]} {'x ' * (i % 3 * 12)}\t{i % 2}" for i in range(59)]
        (glue / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    weights = save_tiny_weights(folder / "weights")
    config = (weights / "config.json").read_text().replace("_prob\": 0.1", f"_prob\": {dropout}")
    (weights / "config.json").write_text(config)
    return ["--task", "sst2", "--data-dir", str(folder), "--weights", str(weights),
            "--max-length", "20", "--device", "cpu"]


# --- The command line ---------------------------------------------------------------------------

def test_the_defaults():
    """The paper's and the authors' numbers, and what the toy needs. A budget on the command line
    replaces the authors' lambda."""
    assert len(FLAGS) <= 34
    names = {action.dest for action in FLAGS}
    for changes in train.AUTHORS, train.FREE, *train.BY_TASK.values():
        assert names.issuperset(changes)
    assert train.BY_TASK.keys() <= data.TASKS.keys()
    expected = {
        "": dict(task="toy", method="smartbert", out="runs/toy", lr=5e-4, budget=0.65, epochs1=16),
        "--task rte": dict(out="runs/rte", lr=3e-5, lr_new=1e-3, lr_gates=3e-4, budget=0.5, lam=0,
                           gate_bias=-2, soft_epochs=0, eta1=0.01, eta2=0.05, epochs1=8, epochs2=2,
                           batch_size=16, max_length=128, seed=50, held_out=0.1, full_share=0),
        "--task mrpc --method bert": dict(out="runs/mrpc-bert", epochs1=5, lr_gates=1e-3),
        "--task rte --recipe release": dict(lam=0.04, budget=1, gate_bias=0, soft_epochs=3,
                                            lr=2e-5, lr_new=2e-5, lr_gates=2e-5, epochs1=5,
                                            epochs2=4, gates_from=0, full_share=0),
        "--task cola --epochs1 9": dict(epochs1=9, lr_gates=3e-4), "--lam 0.3": dict(lam=0.3),
        "--recipe release --lam 0.3": dict(lam=0.3), "--recipe release --budget .4": dict(lam=0)}
    for line, values in expected.items():
        assert vars(train.parse(line.split())).items() >= values.items()


@pytest.mark.parametrize("line", ["", "--task cola", "--task mnli --method exits",
                                  "--task rte --recipe release"])
def test_help_shows_the_values_in_force(capsys, monkeypatch, line):
    monkeypatch.setenv("COLUMNS", "999")        # so that nothing is broken over two lines
    with pytest.raises(SystemExit, match="^0$"):
        train.main([*line.split(), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    values = vars(train.parse(line.split()))
    for action in FLAGS:
        default = re.search(rf" {action.option_strings[0]} .*?\(default: (.*?)\)", shown)
        if action.dest not in ("task", "method", "recipe"):     # they choose the defaults
            assert default[1] == str(values[action.dest]), action.dest


def test_every_flag_refuses_what_is_no_value(refused):
    """Empty, as a shell leaves it where a variable is not set; of a number, what is none."""
    for action in FLAGS:
        flag, none = action.option_strings[0], ["nan", "inf", "-inf", "1e99", "x"]
        if action.nargs != 0:
            for arguments in [flag, ""], [f"{flag}="], ["--task", "rte", f"{flag}="]:
                refused(train.parse, arguments)
        for value in none if action.type else []:
            refused(train.parse, [flag, value], flag)


@pytest.mark.parametrize("line, words", [
    ("--task sst-2", ["--task", "sst-2", "sst2"]), ("--method magic", ["magic", "exits"]),
    ("--device tpu", ["tpu", "cpu"]), ("--lim 1", ["unrecognized"]), ("rte", ["rte"]),
    ("--epochs1 0", ["--epochs1", "0"]), ("--epochs2 -1", ["--epochs2"]), ("--limit 0", ["0"]),
    ("--batch-size 2.5", ["2.5"]), ("--budget 1.01", ["1.01"]), ("--budget -0.1", ["--budget"]),
    ("--lam -1", ["--lam"]), ("--lr -0.1", ["--lr"]), ("--eta1 1.5", ["--eta1"]),
    ("--gates-from 1", ["--gates-from"]), ("--held-out 1", ["--held-out"]), ("--seed -1", ["-1"]),
    ("--warmup 1", ["--warmup"]), ("--full-share 2", ["2"]), ("--max-length 3", ["3"]),
    ("--lam 0 --budget 0.5", ["--budget", "--lam", "not allowed"]),
    ("--data-dir .", ["--data-dir", "--task"]), ("--weights x", ["--weights", "--task"]),
    ("--max-length 129", ["--max-length", "128"]),
    ("--task rte --data-dir nowhere --weights nowhere", ["nowhere", "train.tsv"]),
    ("--task rte --data-dir glue --weights w", ["train.tsv", "no column", "sentence1"]),
    ("--task sst2 --data-dir glue --weights ./nowhere", ["--weights", "./nowhere"]),
    ("--task sst2 --data-dir glue --weights no/weights", ["--weights", "no/weights"]),
    ("--task sst2 --data-dir glue --weights glue", ["glue", "tokenizer.json"]),
    ("--task sst2 --data-dir glue --weights w --max-length 25", ["--max-length", "24"]),
    ("--task sst2 --data-dir glue --weights w --max-length 20", ["78", "words"])])
def test_mistakes_leave_no_folder(tmp_path, refused, line, words):
    """One line, status 2. The tokenizer of the folder w has a word more than its weights."""
    sentences(tmp_path / "glue")
    rte = tmp_path / "glue/RTE"
    rte.mkdir()
    (rte / "train.tsv").write_text("index\ttext\tlabel\n0\ta b\tentailment\n")
    with open(save_tiny_weights(tmp_path / "w", old=True) / "vocab.txt", "a") as file:
        file.write("zebra\n")
    refused(train.main, [*QUICK, *line.split(), "--out", "run"], *words)
    assert not (tmp_path / "run").exists()


# --- A whole training, by hand ------------------------------------------------------------------

def judged(model, split) -> tuple[float, float]:
    """Accuracy with gates and without exits, and the share of the layers that ran."""
    right = ran = 0
    model.eval()
    for ids, segments, label in zip(split.ids, split.segment_ids, split.labels):
        inputs = torch.tensor([ids.tolist()]), torch.tensor([segments.tolist()])
        logits, layers, _ = infer_one(model, *inputs, threshold=-1.0)
        right += int(logits.argmax()) == label
        ran += len(layers)
    return right / len(split), ran / len(split) / len(model.gates)


def kept(epochs, settings, gated=True) -> int:
    """Which of phase 1's epochs is kept, from 0; epochs: (score, share of the layers). Those that
    meet the budget, with gates as they are at inference; without any, those under the whole
    penalty. Among them the best score, then fewest layers, then the last."""
    numbers, soft, full = range(len(epochs)), settings.soft_epochs, settings.gates_from
    hard = [e for e in numbers if e >= soft or soft >= settings.epochs1]
    meet = [e for e in hard if settings.lam == 0 and epochs[e][1] <= 1.1 * settings.budget]
    if settings.lam == 0:
        full = max(full, settings.full_from)
    under = [e for e in hard if (e + 1) / settings.epochs1 > full]
    candidates = (meet or under) if gated else numbers
    return max(candidates, key=lambda e: (epochs[e][0], -epochs[e][1], e))


def rate_by_hand(name, settings, phase, step, steps) -> float | None:
    """The learning rate of a parameter of the toy's model in a step; None where it is frozen."""
    def factor(step, steps):
        rising = settings.warmup * steps
        if max(step, 1) < rising:
            return max(step, 1) / rising
        return min((steps - step) / ((1 - settings.warmup) * steps), 1.0)
    part, start = name.split(".")[0], 0
    if phase == 2:
        return settings.lr_new * factor(step, steps) if name[:7] in EARLY else None
    resting = {"smartbert": (), "exits": ("gates",), "bert": ("gates", "projections")}
    if name[:7] in EARLY or part in resting[settings.method]:
        return None
    while start < settings.gates_from * steps and settings.method == "smartbert":
        start += 1
    if step < start and part == "gates":
        return 0.0
    peak = {"bert": settings.lr, "gates": settings.lr_gates}.get(part, settings.lr_new)
    if step < start:
        return peak * factor(step, start)
    return peak * factor(step - start, steps - start)


def loss_by_hand(model, batch, settings, phase, progress, epoch) -> torch.Tensor:
    inputs = (*batch.inputs, batch.labels)
    if settings.method == "bert":
        return F.cross_entropy(model(*batch.inputs), batch.labels)
    if phase == 2:
        return phase2_loss(model, *inputs, eta2=settings.eta2)["loss"]
    lam, budget = 0.0, 1.0
    if settings.method == "smartbert" and progress >= settings.gates_from:
        lam = settings.lam
        if lam == 0:
            way = (progress - settings.gates_from) / (settings.full_from - settings.gates_from)
            budget = 1 + (settings.budget - 1) * min(way, 1)
    return phase1_loss(model, *inputs, hard=epoch >= settings.soft_epochs, lam=lam, budget=budget,
                       eta1=settings.eta1)["loss"]


def decay_by_hand(model) -> dict[str, float]:
    """Of each parameter: 0 for biases and LayerNorm."""
    norms = tuple(name for name, module in model.named_modules()
                  if isinstance(module, nn.LayerNorm))
    return {name: 0.0 if name.endswith("bias") or name.startswith(norms) else 0.01
            for name, _ in model.named_parameters()}


def by_hand(arguments, world: int = 1) -> dict:
    """The weights at the end of training on the toy. Of `world` processes each takes every
    world-th row of a batch, and all step on the mean of their gradients."""
    settings, tokenizer = train.parse(arguments), data.toy_tokenizer()
    split = data.encode(tokenizer, data.toy()["train"])
    rows, held = data.hold_out(split, settings.held_out, settings.seed, settings.limit)
    torch.manual_seed(settings.seed)
    bert = Bert(BertConfig(vocab_size=tokenizer.get_vocab_size(), **data.TOY_BERT))
    gated = settings.method == "smartbert"
    model = SmartBert(bert, 3, settings.gate_bias if gated else -30.0)
    decays, epochs, weights, seed = decay_by_hand(model), [], [], settings.seed
    for phase, count in (1, settings.epochs1), (2, settings.epochs2):
        if (phase, settings.method) == (2, "bert"):
            break
        groups = [{"params": [p], "name": name, "weight_decay": decays[name]}
                  for name, p in model.named_parameters()
                  if rate_by_hand(name, settings, phase, 0, 99) is not None]
        optimizer = torch.optim.AdamW(groups, fused=True)
        for epoch in range(count):
            order = data.training_batches(rows, settings.batch_size, seed)
            order = [batch for batch in order if len(batch) >= world]
            seed += 1
            for step, batch in enumerate(order, start=epoch * len(order)):
                steps = count * len(order)
                for group in optimizer.param_groups:
                    group["lr"] = rate_by_hand(group["name"], settings, phase, step, steps)
                model.zero_grad()
                model.train(phase == 1)
                for rank in range(world):
                    shard = data.collate(rows, batch[rank::world])
                    loss_by_hand(model, shard, settings, phase, step / steps, epoch).backward()
                learns = [p for p in model.parameters() if p.grad is not None]
                for p in learns:
                    p.grad /= world
                nn.utils.clip_grad_norm_(learns, 1.0)
                optimizer.step()
            if phase == 1:
                epochs.append(judged(model, held))
                weights.append(copy.deepcopy(model.state_dict()))
        if phase == 1:
            model.load_state_dict(weights[kept(epochs, settings, gated)])
    return dict(model.state_dict())


@pytest.mark.parametrize("more", [
    "--lr-gates 0.02 --budget 0.8", "--warmup 0.3 --lam 0.04 --soft-epochs 1",
    "--method exits --warmup 0.3", "--method bert --warmup 0.4 --batch-size 1 --epochs1 1"])
def test_training_by_hand(tmp_path, more):
    """Both phases and the baseline end at the weights of `by_hand`."""
    run = trained([*HAND, *more.split()], tmp_path / "run")
    hand = by_hand([*HAND, *more.split()])
    torch.testing.assert_close(stored(run)["weights"], hand, rtol=0, atol=1e-6)


# --- A whole training, watched ------------------------------------------------------------------

def watched(arguments, folder) -> SimpleNamespace:
    """Train, and note of each step how the loss was called, whether it would be the same without
    dropout (encoder, gates, last head, first head), the rows, the rates by group, the weight
    decays by name, the weights after it and the parts of the loss; of each store the weights."""
    steps, stores, noted = [], [], {"asked": {}}
    update, save_run, collate = train.update, train.save_run, train.collate
    def noting(phase, loss):
        def call(model, *inputs, **more):
            noted.update(asked=more, bf16=torch.is_autocast_enabled("cpu"))
            return loss(model, *inputs, **more)
        return call
    def noting_rows(split, rows, *more):
        noted.update(split=split, rows=rows)
        return collate(split, rows, *more)
    def noting_update(model, parts, optimizer):
        inputs = collate(noted["split"], noted["rows"]).inputs
        a, b = (gated_forward(model, *inputs, hard=False) for _ in range(2))
        steady = [torch.equal(a.last, b.last), torch.equal(a.g_soft, b.g_soft)]
        for head in model.heads[-1], model.heads[0]:
            steady.append(torch.equal(head(a.last, inputs[2])[0], head(a.last, inputs[2])[0]))
        names = {id(p): name for name, p in model.named_parameters()}
        decays = {names[id(p)]: group["weight_decay"]
                  for group in optimizer.param_groups for p in group["params"]}
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        parts = update(model, parts, optimizer)
        steps.append(SimpleNamespace(**noted, parts=parts, rates=rates, decays=decays,
                                     weights=copy.deepcopy(model.state_dict()),
                                     steady=tuple(steady)))
        return parts
    def noting_save(run, model):
        save_run(run, model)
        stores.append(copy.deepcopy(model.state_dict()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "phase1_loss", noting(1, phase1_loss))
        patch.setattr(train, "phase2_loss", noting(2, phase2_loss))
        patch.setattr(train, "collate", noting_rows)
        patch.setattr(train, "update", noting_update)
        patch.setattr(train, "save_run", noting_save)
        trained(arguments, folder)
    return SimpleNamespace(steps=steps, stores=stores, folder=folder)


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> SimpleNamespace:
    """Four epochs of phase 1 and two of phase 2, each of 5 steps of 20 rows."""
    line = ("--limit 109 --batch-size 20 --epochs1 4 --epochs2 2 --gates-from 0.5 --full-from .75 "
            "--budget 0.5 --soft-epochs 1 --warmup 0.2 --lr 0.001 --lr-new 0.002 --lr-gates 0.01 "
            "--device cpu")
    return watched(line.split(), tmp_path_factory.mktemp("runs") / "seen")


def test_rates_rise_and_fall_twice_in_phase_1_and_once_in_phase_2(seen):
    """Ten steps without gates, ten with them, and ten of phase 2, each round warms up in a fifth
    of its steps, and falls to 0."""
    once = [0.5, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    first, second = seen.steps[:20], seen.steps[20:]
    for name, peak in ("encoder", 0.001), ("head", 0.002), ("projections", 0.002):
        assert [step.rates[name] for step in first] == pytest.approx([peak * f for f in once * 2])
    gates = [0] * 10 + [0.01 * f for f in once]
    assert [step.rates["gates"] for step in first] == pytest.approx(gates)
    assert [step.rates for step in second] == [{"heads": pytest.approx(0.002 * f)} for f in once]


def test_the_budget_falls_and_the_gates_harden(seen):
    """Nothing is penalised in the first ten steps; the budget falls over five and holds. The first
    epoch's gates are soft. Toy's share of rows in full is the task's, in both phases."""
    asked = [step.asked for step in seen.steps]
    first, second = asked[:20], asked[20:]
    budgets = [1] * 11 + [0.9, 0.8, 0.7, 0.6] + [0.5] * 5
    assert [more["budget"] for more in first] == pytest.approx(budgets)
    assert [more["hard"] for more in first] == [False] * 5 + [True] * 15
    assert {(more["lam"], more["eta1"], more["full_share"]) for more in first} == {(0, 0.01, 0.25)}
    assert {(more["eta2"], more["full_share"]) for more in second} == {(0.05, 0.25)}


@pytest.mark.parametrize("line, expected", [
    ("--gates-from 0.4 --lam 0.3", [(0, 1)] * 4 + [(0.3, 1)] * 6),
    ("--recipe release", [(0.04, 1)] * 10), ("--method exits --budget 0.1", [(0, 1)] * 10),
    ("--gates-from 0.7 --full-from 0.2 --budget 0.25", [(0, 1)] * 8 + [(0, 0.25)] * 2),
    ("--recipe release --budget 0.25", [(0, 1)] + [(0, 0.25)] * 9)])
def test_the_penalty_at_ten_points(line, expected):
    """lambda holds at once; without gates nothing is penalised; a budget that should be met before
    the gates learn holds one step after they begin."""
    settings = train.parse(line.split())
    run = train.Run(Path("x"), settings, "", gates=settings.method == "smartbert", exits=True)
    assert [train.penalty_at(run, step / 10) for step in range(10)] == expected


def test_each_phase_trains_its_own_parts(seen):
    """Everything else stays to the bit, and is not in the optimizer. Gates rest until they are
    penalised. Weights decay, but not biases and LayerNorm."""
    decays = decay_by_hand(train.load_run(seen.folder, "cpu")[1])
    first = {name: decay for name, decay in decays.items() if name[:7] not in EARLY}
    second = {name: decay for name, decay in decays.items() if name[:7] in EARLY}
    assert [step.decays for step in seen.steps] == [first] * 20 + [second] * 10
    before, end = seen.stores[0], seen.stores[-1]
    for number, step in enumerate(seen.steps[:20]):
        parts = {"bert", "heads.5", "projections"} | ({"gates"} if number >= 10 else set())
        assert moved(before, step.weights) == parts
        before = step.weights
    before, = (weights for weights in seen.stores[1:5] if moved(weights, end) == EARLY)
    for step in seen.steps[20:]:
        assert moved(before, step.weights) == EARLY
        before = step.weights


def test_every_epoch_takes_all_rows_in_an_order_of_its_own(seen):
    """The first --limit rows of train, less those that are held out; no row twice."""
    whole = data.toy()["train"].select(range(109))
    _, held = data.hold_out(whole, 0.1, 50)
    rest = [text for text in whole.texts if text not in held.texts]
    orders = [sum((step.rows for step in seen.steps[i:i + 5]), []) for i in range(0, 30, 5)]
    assert len(rest) == 97 and all(step.split.texts == rest for step in seen.steps)
    assert all(sorted(order) == list(range(97)) for order in orders)
    assert len(set(map(tuple, orders))) == 6


def test_the_log_holds_means_and_what_was_judged(seen):
    """An entry an epoch, the same in model.pt and run.json: the means of the parts of the loss,
    and score and layers on the held-out rows, as `judged` finds them."""
    log = readable(seen.folder)["log"]
    assert log == stored(seen.folder)["log"] 
    assert [(entry["phase"], entry["epoch"]) for entry in log] == [
        (1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2)]
    for number, entry in enumerate(log):
        steps = seen.steps[5 * number:5 * number + 5]
        parts = {"loss", "task", "contrast"} | ({"penalty", "run"} if number < 4 else set())
        assert entry.keys() == {"phase", "epoch", "held-out"} | parts
        for part in parts:
            mean = sum(step.parts[part] for step in steps) / 5
            torch.testing.assert_close(torch.tensor(entry[part]), mean)
        assert len(entry.get("run", [0] * 6)) == 6
    model = train.load_run(seen.folder, "cpu")[1]
    split = data.encode(data.toy_tokenizer(), data.toy()["train"].select(range(109)))
    _, held = data.hold_out(split, 0.1, 50)
    for entry, store in zip(log[:4], seen.stores[1:]):
        model.load_state_dict(store)
        score, share = judged(model, held)
        assert entry["held-out"] == pytest.approx({"accuracy": score, "layers": 6 * share})


def test_dropout_acts_on_what_is_trained(tmp_path):
    """On encoder, gates and last head, and in phase 2 on the heads before it alone."""
    arguments = [*sentences(tmp_path, dropout=0.5), "--epochs1", "2", "--epochs2", "1"]
    steps = watched(arguments, tmp_path / "run").steps
    bert = watched([*arguments, "--method", "bert"], tmp_path / "bert").steps
    assert {step.steady for step in steps[:4] + bert} == {(False, False, False, False)}
    assert {step.steady for step in steps[4:]} == {(True, True, True, False)}


# --- Which epoch is kept ------------------------------------------------------------------------

def test_the_held_out_rows_choose_the_epoch_not_dev(tmp_path):
    """dev has the opposite labels: it would choose another epoch. And the run does not differ
    where dev does."""
    arguments = [*sentences(tmp_path), *"--budget 1 --held-out 0.3 --epochs1 6 --epochs2 0 "
                 "--batch-size 16 --lr 0.01 --lr-new 0.01".split()]
    seen = watched(arguments, tmp_path / "run")
    tokenizer, splits = data.load_tokenizer(tmp_path / "run"), data.load_task("sst2", tmp_path)
    _, held = data.hold_out(splits["train"], 0.3, 50)
    model, settings = train.load_run(tmp_path / "run", "cpu")[1], train.parse(arguments)
    chosen = []
    for split in held, splits["dev"]:
        epochs, split = [], data.encode(tokenizer, split, 20)
        for store in seen.stores[1:7]:
            model.load_state_dict(store)
            epochs.append(judged(model, split))
        chosen.append(kept(epochs, settings))
    assert chosen[0] != chosen[1]
    best = seen.stores[1 + chosen[0]]
    assert not moved(best, stored(tmp_path / "run")["weights"])
    (tmp_path / "SST-2/dev.tsv").write_text("sentence\tlabel\nother\t1\n")
    other = trained(arguments, tmp_path / "other")
    assert not moved(best, stored(other)["weights"])
    assert readable(other)["log"] == readable(tmp_path / "run")["log"]


def test_of_equal_epochs_the_last_is_kept(tmp_path):
    """Rates so low that no answer changes: the weights are those of the third epoch."""
    line = "--budget 1 --epochs1 3 --lr 1e-6 --lr-new 1e-6 --lr-gates 1e-6"
    seen = watched([*QUICK, *line.split()], tmp_path / "run")
    run = stored(tmp_path / "run")
    first, second, third, _ = [entry["held-out"] for entry in run["log"]]
    equal = [moved(store, run["weights"]) == EARLY for store in seen.stores[1:4]]
    assert first == second == third and equal == [False, False, True]


@pytest.mark.parametrize("line, gated", [
    ("--gates-from 0 --full-from 0.5", True), ("--gates-from 0.3 --full-from 0.9", True),
    ("--gates-from 0.5 --full-from 0.2", True), ("--gates-from 0.5 --lam 0.1", True),
    ("--gates-from 0 --lam 0.1 --soft-epochs 1", True), ("--full-from 0.9 --soft-epochs 2", True),
    ("--full-from 0.4 --soft-epochs 3", True), ("--full-from 0.4", False)])
def test_which_epoch_is_kept(line, gated):
    """All runs of three epochs with two scores and three numbers of layers, the middle one just
    within a tenth of the budget, against `kept`."""
    settings = train.parse(["--task", "mrpc", "--epochs1", "3", *line.split()])
    for epochs in itertools.product(itertools.product((0.7, 0.8), (2, 2.2, 4)), repeat=3):
        weight = torch.zeros(1)
        model = SimpleNamespace(gates=[None] * 4, state_dict=lambda: {"epoch": weight})
        run = train.Run(Path("x"), settings, "", gates=gated, exits=True)
        for score, layers in epochs:
            train.keep_best(run, model, {"f1": score, "accuracy": 1 - score, "layers": layers})
            run.epoch += 1
            weight += 1         # in place, as an optimizer does
        expected = kept([(score, layers / 4) for score, layers in epochs], settings, gated)
        assert run.best["weights"]["epoch"].item() == expected, epochs


@pytest.mark.parametrize("line, gates, exits, parts", [
    ("--method exits", False, True, {"bert", "heads.5", "projections"} | EARLY),
    ("--method bert", False, False, {"bert", "heads.5"}),
    ("--epochs2 0 --gates-from 0", True, False, {"bert", "heads.5", "projections", "gates"})])
def test_other_methods(tmp_path, line, gates, exits, parts):
    """SmartBERT without gates runs every layer, and nothing is penalised; plain BERT has neither
    gates nor exits; with no epoch of phase 2 there are gates alone."""
    seen = watched([*QUICK, *line.split()], tmp_path / "run")
    run = stored(tmp_path / "run")
    assert (run["gates"], run["exits"], run["finished"]) == (gates, exits, True)
    assert moved(seen.stores[0], run["weights"]) == parts
    assert [entry["phase"] for entry in run["log"]] == ([1, 2] if exits else [1])
    if not gates:
        assert all(entry["held-out"]["layers"] == 6 for entry in run["log"])
        assert all(step.parts.get("penalty", 0) == 0 for step in seen.steps)
        assert all(step.parts["run"].min() > 0.9999 for step in seen.steps if "run" in step.parts)


def test_bfloat16_and_nothing_held_out(tmp_path, capsys):
    """The losses compute in it, the weights are stored in fp32; dev judges, and that is said."""
    steps = watched([*QUICK, "--bf16", "--held-out", "0"], tmp_path / "run").steps
    run = stored(tmp_path / "run")
    assert all(step.bf16 for step in steps)
    assert {value.dtype for value in run["weights"].values()} == {torch.float32}
    assert "warning: nothing is held out: dev selects" in capsys.readouterr().out
    assert all(entry["dev"].keys() == {"accuracy", "layers"} for entry in run["log"])


# --- A run's folder, and resuming ---------------------------------------------------------------

@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"]])
@pytest.mark.parametrize("files", [
    {"settings.json": b"{}", "model.pt": b"of another project"}, {"notes.txt": b""},
    {"run.json": b'{"made_by": "SmartBERT, version 5", "log": []}', "model.pt": b"old"},
    {"run.json": b"{}"}, {"run.json": b"\xff\xfe{\0}\0"}])
def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, refused, files, more):
    """Of another project, or of an older version of this one."""
    (tmp_path / "mine").mkdir()
    for name, content in files.items():
        (tmp_path / "mine" / name).write_bytes(content)
    refused(train.main, [*QUICK, *more, "--out", "mine"], "mine", "not empty", "another")
    assert {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == files


def test_overwrite_takes_our_files_alone(tmp_path, monkeypatch, refused):
    """The former evaluation goes, and what a kill left; the user's files stay. Without it a run is
    not touched, not even by a training that found no run when it started."""
    run = trained(QUICK, tmp_path / "run")
    before = (run / "model.pt").read_bytes()
    refused(train.main, [*QUICK, "--out", run], "--resume", "--overwrite")
    with monkeypatch.context() as patch:
        patch.setattr(train, "check_folder", lambda *_: False)
        refused(train.main, [*QUICK, "--out", run], "run.json")
    assert (run / "model.pt").read_bytes() == before
    theirs = {"notes.txt", "x.tmp", "model.pt.bak"}
    for name in theirs | {"eval.json", "eval-dev_mismatched.json", "page.html", "model.pt.9.tmp"}:
        (run / name).write_text("mine")
    trained([*QUICK, "--overwrite", "--seed", "51"], run)
    ours = {"model.pt", "run.json", "tokenizer.json"}
    assert {path.name for path in run.iterdir()} == theirs | ours
    assert {(run / name).read_text() for name in theirs} == {"mine"}
    assert stored(run)["settings"]["seed"] == 51


@pytest.mark.parametrize("start", ["", data.MADE_BY])
def test_what_a_crash_leaves_is_ours(tmp_path, refused, start):
    """An empty run.json, one without a model.pt, a model.pt that is damaged or of an older
    version: refused in one line; --overwrite replaces them."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(start)
    for more in [], ["--resume"]:
        refused(train.main, [*QUICK, *more, "--out", run], "--overwrite")
    torch.save({"version": 5, "model": {}}, run / "model.pt")
    for content in (run / "model.pt").read_bytes(), b"", b"half a model":
        (run / "model.pt").write_bytes(content)
        refused(train.main, [*QUICK, "--resume", "--out", run], "model.pt", "version")
    assert (run / "run.json").read_text() == start
    assert stored(trained([*QUICK, "--overwrite"], run))["finished"]


def test_of_two_trainings_one_is_refused(whole, tmp_path):
    """Two processes, started 0.3 s apart: one line and status 2 before it has trained; the other
    ends as if it had been alone."""
    command = [*SMALL, "--out", tmp_path / "run"]
    first = process(command)
    time.sleep(0.3)
    second = process(command)
    said = sorted((each.wait(), *each.communicate()) for each in (first, second))
    assert [words[0] for words in said] == [0, 2]
    assert said[1][1] == "" and len(said[1][2].splitlines()) == 1 and "run" in said[1][2]
    assert not moved(stored(tmp_path / "run")["weights"], stored(whole)["weights"])


def test_resume_takes_the_same_settings_and_data(tmp_path, refused):
    """Any other setting is refused, except those that change no result: another device, or the
    same files elsewhere."""
    arguments = [*sentences(tmp_path / "glue"), "--epochs1", "1", "--epochs2", "1"]
    run = trained(arguments, tmp_path / "run")
    end, arguments = stored(run)["weights"], [*arguments, "--out", str(run), "--resume"]
    rest = {action.dest for action in FLAGS if action.option_strings[0] not in OTHER}
    assert rest == train.FREE | {"task", "bf16"}
    refused(train.main, [*arguments, "--bf16"], "was started with bf16")
    for flag, value in zip(OTHER[::2], OTHER[1::2]):
        name = flag[2:].replace("-", "_").replace("recipe", "")     # that changes several
        refused(train.main, [*arguments, flag, value], f"was started with {name}")
    content = torch.load(run / "model.pt", weights_only=True)
    content["run"]["settings"]["device"] = "cuda"
    torch.save(content, run / "model.pt")
    (tmp_path / "glue").rename(tmp_path / "moved")
    arguments[arguments.index("--data-dir") + 1] = str(tmp_path / "moved")
    train.main(arguments)
    assert not moved(stored(run)["weights"], end)
    with open(tmp_path / "moved/SST-2/train.tsv", "a") as file:
        file.write("one more\t1\n")
    refused(train.main, arguments, "another train.tsv")


def test_a_run_stopped_in_every_epoch(whole, tmp_path, monkeypatch):
    """Each of seven attempts stops in its second epoch; at the end are the weights of `whole`."""
    update, folder = train.update, tmp_path / "run"
    for attempt in range(1, 8):
        monkeypatch.setattr(train, "update", fails_in_call(7, update, EOFError()))
        try:
            trained([*SMALL, "--resume"], folder)
        except EOFError:
            assert attempt < 7 and len(stored(folder)["log"]) == attempt
    assert stored(folder)["finished"]
    assert not moved(stored(folder)["weights"], stored(whole)["weights"])
    assert readable(folder)["log"] == readable(whole)["log"]


def test_kill_9_anywhere(whole, tmp_path):
    """Of real processes: while model.pt is being written in either phase, and at another moment.
    What is there is whole, and the run goes on to the same weights."""
    folder = tmp_path / "run"
    def epochs() -> int:
        try:
            return len(readable(folder)["log"])
        except (OSError, ValueError):       # nothing there, or claimed a moment ago
            return 0
    for writes in True, False, True:
        before = epochs()
        going = process([*SMALL, "--resume", "--out", folder], subprocess.DEVNULL)
        while epochs() == before and going.poll() is None:
            time.sleep(0.01)
        if not writes:
            time.sleep(random.random() / 10)
        while writes and going.poll() is None and not list(folder.glob("model.pt.*.tmp")):
            time.sleep(0.0005)
        going.kill()
        assert going.wait() == -signal.SIGKILL
        run = train.load_run(folder, "cpu")[0]
        assert before < len(run.log) and len(run.log) - epochs() in (0, 1)
        assert not run.finished and run.log == stored(whole)["log"][:len(run.log)]
    (folder / "model.pt.1.tmp").write_bytes(b"half a model")
    for _ in range(2):              # a finished run stays as it is
        trained([*SMALL, "--resume"], folder)
        assert not moved(stored(folder)["weights"], stored(whole)["weights"])
        assert readable(folder)["log"] == readable(whole)["log"]
    assert not list(folder.glob("*.tmp"))   # what kills left is gone


# --- What goes wrong on the way -----------------------------------------------------------------

@pytest.mark.parametrize("error, words", [
    (pytest.raises(RuntimeError, torch.empty, 1 << 50).value, ["--batch-size", "memory"]),
    (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nmore"), ["--batch-size"]),
    (MemoryError(), ["--batch-size"]), (MemoryError("Unable to allocate 8 PiB"), ["8 PiB"])])
def test_memory_runs_out(tmp_path, monkeypatch, refused, error, words):
    """In the second epoch: one line; the first is stored. Other errors are not hidden."""
    monkeypatch.setattr(train, "update", fails_in_call(5, train.update, error))
    refused(train.main, [*STEPS, "--out", "run"], *words)
    assert len(stored("run")["log"]) == len(readable("run")["log"]) == 1
    monkeypatch.setattr(train, "update", lambda *more: torch.ones(2) + torch.ones(3))
    with pytest.raises(RuntimeError, match="size of tensor"):
        trained([*STEPS, "--resume"], "run")


def test_training_that_diverges(tmp_path, monkeypatch, refused):
    """One line, and what was stored before stays; nothing that is not a number is stored."""
    refused(train.main, [*STEPS, "--lr", "1e9", "--out", "high"], "diverged", "--lr")
    monkeypatch.setattr(train, "phase2_loss", lambda *more, **others: {
        "loss": phase2_loss(*more, **others)["loss"] * torch.inf})
    refused(train.main, [*STEPS, "--out", "run"], "diverged", "--lr")
    assert len(stored("run")["log"]) == 2
    for value in [*stored("high")["weights"].values(), *stored("run")["weights"].values()]:
        assert value.isfinite().all()


@pytest.mark.parametrize("call, name", [(6, "model.pt"), (7, "run.json")])
def test_a_full_disk(tmp_path, monkeypatch, refused, call, name):
    """In the second epoch: one line with the file's name, nothing half-written."""
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(data.os, "fsync", fails_in_call(call, os.fsync, full))
    refused(train.main, [*STEPS, "--out", "run"], name, "No space left")
    assert len(readable("run")["log"]) == 1 and len(stored("run")["log"]) == call - 5
    assert len(list(Path("run").iterdir())) == 3
    trained([*STEPS, "--resume"], "run")


def test_a_full_disk_as_torch_meets_it(tmp_path, refused):
    """A limit on the size of files makes torch.save raise RuntimeError, as a full disk does."""
    resource = pytest.importorskip("resource")      # not on Windows
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        refused(train.main, [*STEPS, "--out", "run"], "model.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stored("run")["log"] == [] and len(list(Path("run").iterdir())) == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_behind_stdout(tmp_path):
    """One line; what could not be printed is stored."""
    with open("/dev/full", "w") as full:
        going = process([*STEPS, "--out", tmp_path / "run"], full)
        error = going.communicate()[1]
    assert going.returncode == 2 and len(error.splitlines()) == 1 and "No space left" in error
    assert len(readable(tmp_path / "run")["log"]) == 1


# --- Several processes --------------------------------------------------------------------------

DIES = """
import os, train
real = train.end_epoch
def end_epoch(run, *more):
    os.kill(os.getpid(), 9) if len(run.log) == 2 else real(run, *more)
train.end_epoch = end_epoch
train.main()
"""


def test_two_processes_step_on_the_mean_of_their_gradients(tmp_path):
    """torchrun with two on the CPU, killed in the third epoch and resumed, against `by_hand`. The
    epoch's batch of a single row is left out."""
    (tmp_path / "dies.py").write_text(DIES)
    said = []
    for script in tmp_path / "dies.py", ROOT / "train.py":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc_per_node=2", script, *HAND, "--resume", "--out", tmp_path / "run"]
        said.append(subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True))
        assert len(readable(tmp_path / "run")["log"]) == (2 if script.name == "dies.py" else 5)
    assert said[0].returncode and said[1].returncode == 0, said[1].stderr
    assert said[1].stdout.count("phase 2 epoch 1 ") == said[1].stdout.count("now:") == 1
    run, hand = stored(tmp_path / "run"), by_hand(HAND, world=2)
    torch.testing.assert_close(run["weights"], hand, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank, gpus, backend", [(0, 0, "gloo"), (1, 1, "gloo"), (1, 2, "nccl")])
def test_nccl_needs_a_gpu_for_every_process(monkeypatch, rank, gpus, backend):
    joined, chosen = [], []
    monkeypatch.setattr(train, "WORLD", 4)
    monkeypatch.setattr(train, "RANK", rank)
    monkeypatch.setattr(os, "environ", {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank)})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(train.distributed, "init_process_group", lambda name: joined.append(name))
    monkeypatch.setattr(sys, "stdout", sys.stdout)      # so that it is put back
    train.join_processes()
    assert joined == [backend] and chosen == ([rank] if backend == "nccl" else [])
    assert (sys.stdout.name == os.devnull) == (rank == 1)


@pytest.mark.parametrize("variables, expected", [
    ({}, (1, 0)), ({"RANK": "1", "LOCAL_RANK": "1"}, (1, 0)),
    ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, (4, 3))])
def test_a_rank_left_over_means_nothing(monkeypatch, refused, variables, expected):
    """And of every batch each process must get a row."""
    monkeypatch.setattr(os, "environ", variables)
    spec = importlib.util.spec_from_file_location("again", train.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert (again.WORLD, again.RANK) == expected
    refused(again.parse, ["--batch-size", again.WORLD - 1], "--batch-size")
