"""Training as a user starts it: what its steps change, which epoch it keeps, and what its folder
holds after a kill or on a full disk. `by_hand` is a whole training, written out once more."""

import copy
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import save_tiny_weights, tiny_batch
from torch import nn

import data
import eval as evaluation
import train
from bert import Bert, BertConfig, Embeddings, load_bert
from lesson import page
from results import criteria
from smartbert import SmartBert, infer_one, phase1_loss, phase2_loss

ROOT = Path(train.__file__).parent
# The processes' environment; without torchrun, what another launcher left means nothing.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RANK": "1",
                            "WORLD_SIZE": "2", "PYTHONWARNINGS": "ignore"}
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
OUTSIDE = ("--epochs1 0 --epochs2 -1 --limit 0 --batch-size 2.5 --budget 1.01 --budget -0.1 "
           "--lam -1 --lr -0.1 --eta1 1.5 --gates-from 1 --held-out 1 --seed -1 --warmup 1 "
           "--full-share 2 --max-length 3").split()
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A small run of the toy that was never stopped."""
    return trained(SMALL, tmp_path_factory.mktemp("runs") / "whole")


def sentences(folder: Path) -> list[str]:
    """Files like SST-2's, easy to learn, a third of them too long, and tiny weights with dropout;
    the arguments to train on them."""
    glue = folder / "SST-2"
    glue.mkdir(parents=True)
    rows = [f"{i // 2 % 10} {'yes' * (i % 2)} {'x ' * (i % 3 * 12)}\t{i % 2}" for i in range(59)]
    for name in "train", "dev":
        (glue / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    weights = save_tiny_weights(folder / "weights")
    return ["--task", "sst2", "--data-dir", str(folder), "--weights", str(weights),
            "--max-length", "20", "--device", "cpu"]


# --- The command line ---------------------------------------------------------------------------

def test_the_defaults():
    """The paper's and the authors', and the toy's; a given budget replaces the authors' lambda."""
    names = {action.dest for action in FLAGS}
    assert len(names) <= 34
    assert names >= set().union(train.AUTHORS, train.FREE, *train.BY_TASK.values())
    assert train.BY_TASK.keys() <= data.TASKS.keys()
    expected = {
        "": dict(task="toy", method="smartbert", out="runs/toy", lr=5e-4, budget=0.65, epochs1=16),
        "--task rte": dict(out="runs/rte", lr=3e-5, seed=50),   # the others: test_results
        "--task mrpc --method bert": dict(out="runs/mrpc-bert", epochs1=5, lr_gates=1e-3),
        "--task rte --recipe release": dict(lam=0.04, budget=1, lr=2e-5, epochs1=5),
        "--task cola --epochs1 9": dict(epochs1=9, lr_gates=3e-4), "--lam 0.3": dict(lam=0.3),
        "--recipe release --lam 0.3": dict(lam=0.3), "--recipe release --budget .4": dict(lam=0)}
    for line, values in expected.items():
        assert vars(train.parse(line.split())).items() >= values.items()


@pytest.mark.parametrize("line", ["", "--task mnli --method exits", "--task rte --recipe release"])
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
        for value in ["", "nan", "inf", "-inf", "1e99", "x"] if action.type else [""]:
            refused(train.parse, ["--task", "rte", action.option_strings[0], value])
    for flag, value in zip(OUTSIDE[::2], OUTSIDE[1::2]):
        refused(train.parse, [flag, value], flag, value)


@pytest.mark.parametrize("line, words", [
    ("--task sst-2", ["--task", "sst-2", "sst2"]), ("--method magic", ["magic", "exits"]),
    ("--device tpu", ["tpu", "cpu"]), ("--lim 1", ["unrecognized"]), ("rte", ["rte"]),
    ("--lam 0 --budget 0.5", ["--budget", "--lam", "not allowed"]),
    ("--data-dir .", ["--data-dir", "--task"]), ("--weights x", ["--weights", "--task"]),
    ("--max-length 129", ["--max-length", "128"]),
    ("--task rte --data-dir nowhere --weights nowhere", ["nowhere", "train.tsv"]),
    ("--task sst2 --data-dir glue --weights ./nowhere", ["--weights", "./nowhere"]),
    ("--task sst2 --data-dir glue --weights glue/weights --max-length 25", ["be 24"])])
def test_mistakes_leave_no_folder(tmp_path, refused, line, words):
    """One line, status 2."""
    sentences(tmp_path / "glue")
    refused(train.main, [*QUICK, *line.split(), "--out", "run"], *words)
    assert not (tmp_path / "run").exists()


# --- A whole training, by hand ------------------------------------------------------------------

def judged(model, split, threshold=-1.0) -> tuple[float, float]:
    """Accuracy with gates, and the share of the layers that ran; below 0: no exits."""
    right = ran = 0
    model.eval()
    for ids, segments, label in zip(split.ids, split.segment_ids, split.labels):
        inputs = torch.tensor([ids.tolist()]), torch.tensor([segments.tolist()])
        logits, layers, _ = infer_one(model, *inputs, threshold)
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
        return phase2_loss(model, *inputs, eta2=settings.eta2,
                           full_share=settings.full_share)["loss"]
    gated = settings.method == "smartbert"
    lam, budget = train.penalty_at(SimpleNamespace(settings=settings, gates=gated), progress)
    return phase1_loss(model, *inputs, hard=epoch >= settings.soft_epochs, lam=lam, budget=budget,
                       eta1=settings.eta1, full_share=settings.full_share)["loss"]


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


@pytest.mark.parametrize("more, phases", [
    ("--lr-gates 0.02 --budget 0.8 --epochs2 0", [1, 1, 1]),        # no exits
    ("--warmup 0.3 --lam 0.04 --soft-epochs 1 --lr-new 0.002", [1, 1, 1, 2, 2]),
    ("--full-share 1 --gate-bias 1 --eta1 0.2 --eta2 0.2 --epochs2 1", [1, 1, 1, 2]),
    ("--method exits --warmup 0.3", [1, 1, 1, 2, 2]),
    ("--method bert --warmup 0.4 --batch-size 1 --epochs1 2 --lr-new 0.002", [1, 1])])
def test_training_by_hand(tmp_path, monkeypatch, more, phases):
    """Both phases and the baseline end at the weights of `by_hand`, stopped or not (1 thread)."""
    torch.set_num_threads(2)
    with monkeypatch.context() as patch, pytest.raises(EOFError):       # in the second epoch
        patch.setattr(train, "end_epoch", fails_in_call(2, train.end_epoch, EOFError()))
        trained([*HAND, *more.split()], tmp_path / "run")
    assert torch.get_num_threads() == 1
    run = stored(trained([*HAND, *more.split(), "--resume"], tmp_path / "run"))
    torch.testing.assert_close(run["weights"], by_hand([*HAND, *more.split()]), rtol=0, atol=1e-6)
    assert [entry["phase"] for entry in run["log"]] == phases and run["finished"]
    assert run["gates"] == ("--method" not in more) and run["exits"] == (2 in phases)


@pytest.mark.parametrize("line, expected", [
    ("--gates-from 0.4 --lam 0.3", [(0, 1)] * 4 + [(0.3, 1)] * 6),
    ("--recipe release", [(0.04, 1)] * 10), ("--method exits --budget 0.1", [(0, 1)] * 10),
    ("--gates-from 0.5 --full-from 0.75 --budget 0.5",
     [(0, 1)] * 6 + [(0, pytest.approx(0.8)), (0, pytest.approx(0.6)), (0, 0.5), (0, 0.5)]),
    ("--gates-from 0.7 --full-from 0.2 --budget 0.25", [(0, 1)] * 8 + [(0, 0.25)] * 2),
    ("--recipe release --budget 0.25", [(0, 1)] + [(0, 0.25)] * 9),
    ("--recipe release --budget 1", [(0, 1)] * 10)])
def test_the_penalty_at_ten_points(line, expected):
    """lambda holds at once; without gates nothing is penalised; a budget that should be met before
    the gates learn holds one step after they begin."""
    settings = train.parse(line.split())
    run = train.Run(Path("x"), settings, "", gates=settings.method == "smartbert", exits=True)
    assert [train.penalty_at(run, step / 10) for step in range(10)] == expected


# --- A whole training, watched ------------------------------------------------------------------

@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> SimpleNamespace:
    """Four epochs of phase 1 and two of phase 2, each of 5 steps: of each optimizer the weight
    decays by name, of each step the parts of the loss, of each store the weights."""
    noted = SimpleNamespace(decays=[], steps=[], stores=[])
    make_optimizer, update, save_run = train.make_optimizer, train.update, train.save_run
    def noting_optimizer(model, *more):
        optimizer = make_optimizer(model, *more)
        names = {p: name for name, p in model.named_parameters()}
        noted.decays.append({names[p]: group["weight_decay"]
                             for group in optimizer.param_groups for p in group["params"]})
        return optimizer
    def noting_update(*more):
        noted.steps.append(update(*more))
        return noted.steps[-1]
    def noting_save(run, model):
        save_run(run, model)
        noted.stores.append(copy.deepcopy(model.state_dict()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_optimizer", noting_optimizer)
        patch.setattr(train, "update", noting_update)
        patch.setattr(train, "save_run", noting_save)
        line = "--limit 109 --batch-size 20 --epochs1 4 --epochs2 2 --gates-from .5 --device cpu"
        noted.folder = trained(line.split(), tmp_path_factory.mktemp("runs") / "seen")
    return noted


def test_each_phase_trains_its_own_parts(seen):
    """Nothing else is in its optimizer. Weights decay, but not biases and LayerNorm."""
    decays = decay_by_hand(train.load_run(seen.folder, "cpu")[1])
    early = {name: decay for name, decay in decays.items() if name[:7] in EARLY}
    assert seen.decays == [{name: decays[name] for name in decays.keys() - early}, early]


def test_the_log_holds_means_and_what_was_judged(seen):
    """Means of the parts of the loss; score and layers on the held-out rows, as in `judged`."""
    run, model = train.load_run(seen.folder, "cpu")
    assert run.log == readable(seen.folder)["log"]
    assert [entry["epoch"] for entry in run.log] == [1, 2, 3, 4, 1, 2]
    for number, entry in enumerate(run.log):
        steps = seen.steps[5 * number:5 * number + 5]
        parts = {"loss", "task", "contrast"} | ({"penalty", "run"} if number < 4 else set())
        assert entry.keys() == {"phase", "epoch", "held-out"} | parts
        for part in parts:
            mean = sum(step[part] for step in steps) / 5
            torch.testing.assert_close(torch.tensor(entry[part]), mean)
    split = data.encode(data.toy_tokenizer(), data.toy()["train"].select(range(109)))
    _, held = data.hold_out(split, 0.1, 50)
    for entry, store in zip(run.log, seen.stores[1:]):
        model.load_state_dict(store)
        threshold = {1: -1.0, 2: 0.5493}[entry["phase"]]        # half of ln 3
        score, share = judged(model, held, threshold)
        assert entry["held-out"] == pytest.approx({"accuracy": score, "layers": 6 * share})


def test_dropout_acts_on_what_is_trained(tmp_path, monkeypatch):
    """On encoder, gates and last head, and in phase 2 on the heads before it alone."""
    seeds = set()
    (*inputs, mask), h, update, steady = tiny_batch(), torch.randn(9, 13, 8), train.update, []
    def noting(model, *more):
        parts = (lambda: model.bert(*inputs, mask)[-1], lambda: model.gates[0](h, mask),
                 lambda: model.heads[-1](h, mask)[0], lambda: model.heads[0](h, mask)[0])
        steady.append(tuple(torch.equal(part(), part()) for part in parts))
        seeds.add(torch.initial_seed())
        return update(model, *more)
    monkeypatch.setattr(train, "update", noting)
    arguments = [*sentences(tmp_path), *"--epochs1 2 --epochs2 2 --lr 0".split()]
    trained([*arguments, "--method", "bert"], tmp_path / "bert")
    end = stored(trained(arguments, tmp_path / "run"))["weights"]
    assert steady == [(False, False, False, False)] * 8 + [(True, True, True, False)] * 4
    assert len(seeds) == 4      # of each epoch its own; the baseline's are phase 1's
    for name, value in load_bert(tmp_path / "weights").state_dict().items():
        assert torch.equal(end[f"bert.{name}"], value), name    # at rate 0: what the folder holds


# --- Which epoch is kept ------------------------------------------------------------------------

def test_dev_chooses_nothing(tmp_path):
    """With another dev set a run ends at the same weights and has the same log."""
    arguments, ends = [*sentences(tmp_path), "--epochs1", "4", "--lr-new", "0.01"], []
    for name in "one", "other":
        ends.append(stored(trained(arguments, tmp_path / name)))
        (tmp_path / "SST-2/dev.tsv").write_text("sentence\tlabel\nother\t1\n")
    assert not moved(ends[0]["weights"], ends[1]["weights"])
    assert ends[0]["log"] == ends[1]["log"]


@pytest.mark.parametrize("line, gated", [("--gates-from 0 --full-from 0.5", True),
    ("--gates-from 0.3 --full-from 0.6666666666666666", True),
    ("--gates-from 0.5 --full-from 0.2", True), ("--gates-from 0.5 --lam 0.1", True),
    ("--gates-from 0 --lam 0.1 --soft-epochs 1", True), ("--full-from 0.9 --soft-epochs 2", True),
    ("--full-from 0.4 --soft-epochs 3", True), ("--full-from 0.4", False)])
def test_which_epoch_is_kept(line, gated):
    """All runs of three epochs with two scores and three numbers of layers, the middle one just
    within a tenth of the budget, against `kept`."""
    settings = train.parse(["--task", "mrpc", "--epochs1", "3", *line.split()])
    for epochs in itertools.product(itertools.product((0.7, 0.8), (2, 2.2, 2.3)), repeat=3):
        weight = torch.zeros(1)
        model = SimpleNamespace(gates=[None] * 4, state_dict=lambda: {"epoch": weight})
        run = train.Run(Path("x"), settings, "", gates=gated, exits=True)
        for score, layers in epochs:
            train.keep_best(run, model, {"f1": score, "accuracy": 1 - score, "layers": layers})
            run.epoch += 1
            weight += 1         # in place, as an optimizer does
        expected = kept([(score, layers / 4) for score, layers in epochs], settings, gated)
        assert run.best["weights"]["epoch"].item() == expected, epochs


@pytest.mark.parametrize("more", ["--held-out 0", "--held-out 0 --method bert"])
def test_bfloat16_and_nothing_held_out(tmp_path, monkeypatch, capsys, more):
    """The model computes in it, the weights are stored in fp32; dev judges, and that is said."""
    forward, seen = Embeddings.forward, []
    def noting(*inputs):
        seen.append(torch.mm(torch.eye(2), torch.eye(2)).dtype)
        return forward(*inputs)
    monkeypatch.setattr(Embeddings, "forward", noting)
    run = stored(trained([*QUICK, "--bf16", *more.split()], tmp_path / "run"))
    assert set(seen) == {torch.bfloat16}
    evaluation.main([str(tmp_path / "run"), "--repeats", "0", "--device", "cpu"])
    for script in [page, criteria][:1 + run["exits"]]:
        script.main([str(tmp_path / "run")])
    assert set(seen) == {torch.bfloat16}
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
    before = stored(run)["weights"]
    refused(train.main, [*QUICK, "--out", run], "--resume", "--overwrite")
    with monkeypatch.context() as patch:
        patch.setattr(train, "check_folder", lambda *_: False)
        refused(train.main, [*QUICK, "--out", run], "run.json")
    assert not moved(stored(run)["weights"], before)
    theirs = {"notes.txt", "x.v2.tmp", "model.pt.bak", "eval-before.json", "eval_mine.json"}
    for name in theirs | {"eval.json", "eval-dev_mismatched.json", "page.html", "model.pt.9.tmp"}:
        (run / name).write_text("mine")
    trained([*QUICK, "--overwrite", "--seed", "51"], run)
    names = {path.name for path in run.iterdir()}
    assert names == theirs | {"model.pt", "run.json", "tokenizer.json"}
    assert {(run / name).read_text() for name in theirs} == {"mine"}
    assert stored(run)["settings"]["seed"] == 51


def test_what_a_crash_leaves_is_ours(tmp_path, refused):
    """An empty run.json, one without a model.pt, a model.pt that is damaged or of an older
    version: refused in one line; --overwrite replaces them."""
    run = tmp_path / "run"
    for start in "", data.MADE_BY:
        data.write_text(run / "run.json", start)
        for more in [], ["--resume"]:
            refused(train.main, [*QUICK, *more, "--out", run], "--overwrite")
    torch.save({"version": 5, "model": {}}, run / "model.pt")
    for content in (run / "model.pt").read_bytes(), b"", b"half a model":
        (run / "model.pt").write_bytes(content)
        refused(train.main, [*QUICK, "--resume", "--out", run], "model.pt", "version")
    torch.save({"run": Path("x")}, run / "model.pt")        # a class is not read, but refused
    refused(train.main, [*QUICK, "--resume", "--out", run], "UnpicklingError")
    assert (run / "run.json").read_text() == start
    assert stored(trained([*QUICK, "--overwrite"], run))["finished"]


def test_resume_takes_the_same_settings_and_data(tmp_path, refused):
    """Any other setting is refused, except those that change no result, as where the files are."""
    arguments = [*sentences(tmp_path / "glue"), "--epochs1", "1", "--epochs2", "1"]
    run = trained(arguments, tmp_path / "run")
    end, arguments = stored(run)["weights"], [*arguments, "--out", str(run), "--resume"]
    rest = {action.dest for action in FLAGS if action.option_strings[0] not in OTHER}
    assert rest == train.FREE | {"task", "bf16"}
    refused(train.main, [*arguments, "--bf16"], "was started with bf16")
    for flag, value in zip(OTHER[::2], OTHER[1::2]):
        name = flag[2:].replace("-", "_").replace("recipe", "")     # that changes several
        refused(train.main, [*arguments, flag, value], f"was started with {name}")
    (tmp_path / "glue").rename(tmp_path / "moved")
    arguments[arguments.index("--data-dir") + 1] = str(tmp_path / "moved")
    train.main(arguments)
    refused(train.main, ["--out", run, "--resume"], "was started with task = sst2, not toy")
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


KILLED = """
import os, sys, train
left, real = int(sys.argv.pop()), os.fsync
def fsync(file):
    global left
    left -= 1
    os.kill(os.getpid(), 9) if left == 0 else real(file)
os.fsync = fsync
train.main(sys.argv[1:])
"""


def test_kill_9(whole, tmp_path):
    """Of real processes: while model.pt is being written, run.json, and model.pt in phase 2. What
    is there is whole, and the run goes on to the same weights."""
    folder = tmp_path / "run"
    for written, epochs, shown in (6, 1, 1), (2, 2, 1), (5, 4, 4):
        command = [sys.executable, "-c", KILLED, *SMALL, "--resume", "--out", folder, str(written)]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True)
        assert done.returncode == -signal.SIGKILL
        run = train.load_run(folder, "cpu")[0]
        assert not run.finished and run.log == stored(whole)["log"][:epochs]
        assert len(readable(folder)["log"]) == shown and len(list(folder.glob("*.tmp"))) > 0
    trained([*SMALL, "--resume"], folder)
    assert not moved(stored(folder)["weights"], stored(whole)["weights"])
    assert readable(folder)["log"] == readable(whole)["log"]
    assert not list(folder.glob("*.tmp"))   # what kills left is gone


# --- What goes wrong on the way -----------------------------------------------------------------

def test_training_that_diverges(tmp_path, monkeypatch, refused):
    """One line, and what was stored before stays; nothing that is not a number is stored."""
    refused(train.main, [*STEPS, "--lr", "1e9", "--out", "high"], "diverged", "--lr")
    monkeypatch.setattr(train, "phase2_loss", lambda *more, **others: {
        "loss": phase2_loss(*more, **others)["loss"] * torch.inf})
    refused(train.main, [*STEPS, "--out", "run"], "diverged", "--lr")
    assert len(stored("run")["log"]) == 2
    for folder in "high", "run":
        assert all(value.isfinite().all() for value in stored(folder)["weights"].values())


@pytest.mark.parametrize("call, name", [(6, "model.pt"), (7, "run.json")])
def test_a_full_disk(tmp_path, monkeypatch, refused, call, name):
    """In the second epoch: one line with the file's name, nothing half-written."""
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(data.os, "fsync", fails_in_call(call, os.fsync, full))
    refused(train.main, [*STEPS, "--out", "run"], name, "No space left")
    assert len(readable("run")["log"]) == 1 and len(stored("run")["log"]) == call - 5
    assert len(list(Path("run").iterdir())) == 3
    trained([*STEPS, "--resume"], "run")


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
    """torchrun on the CPU, killed in the third epoch; a batch of a single row is left out."""
    (tmp_path / "dies.py").write_text(DIES)
    said = []
    for script in tmp_path / "dies.py", ROOT / "train.py":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc_per_node=2", script, *HAND, "--resume", "--out", tmp_path / "run"]
        said.append(subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True))
        assert len(readable(tmp_path / "run")["log"]) == (2 if script.name == "dies.py" else 5)
    assert said[0].returncode and said[1].returncode == 0, said[1].stderr
    assert said[1].stdout.count("phase 2 epoch 1 ") == said[1].stdout.count("now:") == 1
    run, hand = stored(tmp_path / "run"), by_hand(HAND, world=2)
    torch.testing.assert_close(run["weights"], hand, rtol=0, atol=1e-6)


@pytest.mark.parametrize("device, rank, gpus, backend", [
    ("cpu", 0, 0, "gloo"), ("cuda", 1, 1, "gloo"), ("cuda", 1, 2, "nccl"), ("cpu", 1, 2, "gloo")])
def test_nccl_needs_a_gpu_for_every_process(monkeypatch, refused, device, rank, gpus, backend):
    """And of every batch each process must get a row."""
    joined, chosen = [], []
    monkeypatch.setattr(train, "WORLD", 4)
    monkeypatch.setattr(train, "RANK", rank)
    monkeypatch.setattr(os, "environ", {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank)})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(train.distributed, "init_process_group", lambda name: joined.append(name))
    before = sys.stdout
    monkeypatch.setattr(sys, "stdout", before)          # so that it is put back
    train.join_processes(device)
    assert joined == [backend] and chosen == ([rank] if backend == "nccl" else [])
    assert (sys.stdout is before) == (rank == 0)
    refused(train.parse, ["--batch-size", "3"], "--batch-size")
