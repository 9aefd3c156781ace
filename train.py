"""Train SmartBERT in its two phases, or plain BERT with the same recipe.

    python train.py                                                        # the toy task, offline, to runs/toy
    python train.py --task rte --weights google-bert/bert-base-uncased     # GLUE and weights are downloaded once
    python train.py --task cola --weights ~/e5-small --data-dir ~/glue     # or come from folders of yours
    python train.py --task cola --weights ~/e5-small --method bert         # the baseline

Phase 1 trains backbone, gates, last head and projections; phase 2 freezes them and trains the other heads (the paper's
two training phases; the release's main.py:60-130). Phase 1's best epoch is picked on a part of the training set that is
held out; the dev set is left to eval.py. A run's folder holds settings.json, log.jsonl, vocab.txt and, at the end, model.pt.
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

# Before torch is there: its bf16 products on a CPU keep kernels for each shape of batch seen, on RTE more than a gigabyte.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
from bert import Bert, BertConfig, WeightsError, load_bert, read_file
from data import Batch, DataError, Split
from smartbert import (Criterion, Outcome, SmartBert, budget_push, entropy_below, infer, lambda_push,
                       phase1_loss, phase2_loss)

VERSION = 1             # of the files in a run's folder; another number means another layout
POOL = 1024             # rows that wait at a layer together: full batches, and little memory
# Settings that change no result, those that a plain BERT does not have, and what eval.py reads besides.
OF_A_MACHINE = {"data_dir", "cache", "out", "device", "resume", "overwrite"}
OF_SMARTBERT = set("budget budget_weight lam gate_bias push_start push_full soft_epochs eta1 eta2 tau1 tau2 epochs2 "
                   "no_skipping no_contrast soft_gates".split())
NEEDED = set("task method weights data_dir cache max_length limit held_out seed bf16".split())


class RunError(ValueError):
    """A run's folder or a setting that cannot be used; the message is one line that says what to do."""


def flag(default, help: str):
    """A setting that is also a command-line flag; the help says what it does, and its symbol in the paper."""
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    task: str = flag("toy", f"one of {', '.join(data.TASKS)}")
    method: str = flag("smartbert", "smartbert, or bert for the baseline: no gates, no exits, the same recipe")
    weights: str | None = flag(None, "pre-trained BERT: a local folder, or one of Google's names on the hub")
    data_dir: str | None = flag(None, "folder with GLUE's files; downloaded into the cache where not given")
    cache: str | None = flag(None, "where downloads go; default SMARTBERT_CACHE, else the user's cache folder")
    out: str | None = flag(None, "the run's folder; default runs/TASK or runs/TASK-bert")
    # what drives the gates
    budget: float = flag(0.4, "share of the layers to run: the gates are pushed until the average meets it")
    budget_weight: float = flag(10.0, "how hard the budget pushes")
    lam: float | None = flag(None, "lambda, the paper's push, instead of a budget (the release's value for RTE: 0.04)")
    gate_bias: float = flag(-2.0, "where the gates start: g = .12, layers run at first; the release starts at 0")
    push_start: float = flag(0.3, "share of phase 1 in which the gates rest: first the task, then the saving")
    push_full: float = flag(0.6, "share of phase 1 after which the budget is the full one")
    soft_epochs: int = flag(0, "epochs of phase 1 with soft gates; the release: 3 of 5")
    # the contrast
    eta1: float = flag(0.01, "eta_1, weight of phase 1's contrast")
    eta2: float = flag(0.05, "eta_2, weight of phase 2's contrast")
    tau1: float = flag(0.5, "tau_1, temperature of phase 1's contrast")
    tau2: float = flag(0.55, "tau_2, temperature of phase 2's contrast")
    # the optimisation
    epochs1: int = flag(5, "epochs of phase 1")
    epochs2: int = flag(2, "epochs of phase 2; 0: gates only")
    batch_size: int = flag(32, "rows a step")
    lr: float = flag(1e-4, "learning rate of the backbone; tried at H = 384, take less for a wider one (BERT-base: 3e-5)")
    lr_new: float = flag(1e-3, "learning rate of what starts from nothing: gates, heads, projections")
    warmup: float = flag(0.06, "share of a phase's steps in which the learning rate rises; then it falls to 0")
    weight_decay: float = flag(0.01, "AdamW's; not on biases and LayerNorm")
    clip: float = flag(1.0, "largest norm of the gradient")
    dropout: float = flag(0.1, "of hidden states and attention")
    max_length: int = flag(128, "tokens of an example; longer ones are cut")
    held_out: float = flag(0.1, "share of the training set on which epoch and threshold are picked; 0: dev picks the epoch")
    limit: int | None = flag(None, "use only so many training rows")
    seed: int = flag(50, "of weights, order and dropout")
    # the paper's ablations
    no_skipping: bool = flag(False, "ablation: gates that never skip; exits only")
    no_contrast: bool = flag(False, "ablation: eta_1 = eta_2 = 0")
    soft_gates: bool = flag(False, "ablation: no hard weight, gates stay soft through phase 1")
    # the machine
    device: str = flag("auto", "auto, cpu, cuda or mps")
    bf16: bool = flag(False, "autocast to bfloat16: faster on GPUs and on CPUs with AMX, a little less exact")
    resume: bool = flag(False, "continue a run that was stopped, from the end of its last epoch")
    overwrite: bool = flag(False, "start over in a folder that already holds a run")


# What a task wants otherwise than the defaults above; GLUE's as measured with encoders of 12 layers x 384 (results/).
RECIPES = {
    "toy": dict(lr=5e-4, batch_size=64, epochs1=30, epochs2=6, dropout=0.0, budget=0.6),
    "cola": dict(batch_size=16, epochs1=8, budget=0.5),
    "sst2": dict(epochs1=3, epochs2=1, push_start=0.25),
    "mrpc": dict(batch_size=16, budget=0.5),
    "mnli": dict(batch_size=16, epochs1=3, epochs2=1, push_start=0.25, budget=0.5),
    "rte": dict(lr=5e-5, batch_size=16, epochs1=6, budget=0.6),
    "wnli": dict(batch_size=16),
}


# --- What training starts from ----------------------------------------------------------------------------------------

def check(settings: Settings) -> None:
    """Raises RunError for a setting that makes no sense."""
    if settings.method not in ("smartbert", "bert"):
        raise RunError(f"--method {settings.method}: known are smartbert and bert")
    for names, low, high in (("epochs1 batch_size limit", 1, 1e9), ("budget eta1 eta2", 0, 1), ("tau1 tau2 clip", 1e-3, 1e9),
                             ("held_out warmup push_start push_full dropout", 0, 0.99),
                             ("epochs2 soft_epochs seed lr lr_new lam budget_weight weight_decay", 0, 1e9)):
        for name in names.split():
            value = getattr(settings, name)
            if value is not None and not low <= value <= high:
                raise RunError(f"--{name.replace('_', '-')} {value}: give a number from {low:g} to {high:g}")


def build_model(settings: Settings, folder: Path | None, vocabulary: int, classes: int) -> SmartBert:
    """A SmartBert around the weights in folder, or around a small fresh BERT for the toy task."""
    dropout = dict(hidden_dropout_prob=settings.dropout, attention_probs_dropout_prob=settings.dropout)
    if folder is None:
        # From scratch the weights start at 1 / sqrt(H): with BERT's 0.02 so narrow a model stays at chance.
        bert = Bert(BertConfig(vocab_size=vocabulary, hidden_size=64, num_hidden_layers=6, num_attention_heads=4,
                               intermediate_size=256, max_position_embeddings=128, initializer_range=64**-0.5,
                               **dropout))
    else:
        bert = load_bert(folder, **dropout)
    if bert.config.vocab_size != vocabulary:
        raise DataError(f"{folder}: vocab.txt has {vocabulary} words, but the weights have {bert.config.vocab_size}: "
                        f"they do not belong together")
    if settings.max_length > bert.config.max_position_embeddings:
        raise DataError(f"--max-length {settings.max_length} is more than the {bert.config.max_position_embeddings} "
                        f"positions of these weights")
    if settings.method == "smartbert" and bert.config.num_hidden_layers < 2:
        raise RunError(f"{folder} has a single layer: there is nothing to skip or to leave early; take deeper weights")
    # No skipping: gates that start at g = sigmoid(-30), about 0, and are not trained.
    return SmartBert(bert, classes, -30.0 if settings.no_skipping else settings.gate_bias)


def make_optimizer(model: SmartBert, settings: Settings, phase: int) -> torch.optim.AdamW:
    """AdamW over what the phase trains; everything else is frozen. The release gives it every parameter in both phases
    (main.py:80-88), frozen ones as well (README, deviation 6)."""
    model.requires_grad_(False)
    if phase == 1:
        groups = [(model.bert, settings.lr), (model.heads[-1], settings.lr_new), (model.projections, settings.lr_new)]
        groups += [] if settings.no_skipping else [(model.gates, settings.lr_new)]
    else:
        groups = [(model.heads[:-1], settings.lr_new)]
    parameters = []
    for module, lr in groups:
        module.requires_grad_(True)
        for decayed in (True, False):                       # biases and LayerNorm have one dimension, matrices two
            chosen = [p for p in module.parameters() if (p.dim() > 1) == decayed]
            parameters.append({"params": chosen, "lr": lr, "top": lr, "gates": module is model.gates,
                               "weight_decay": settings.weight_decay if decayed else 0.0})
    return torch.optim.AdamW(parameters, fused=True)


def is_run(folder: Path) -> bool:
    """Whether train.py made this folder: by its settings, or where these are damaged by its model."""
    try:
        return NEEDED <= json.loads((folder / "settings.json").read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return (folder / "settings.json").is_file() and (
            (folder / "model.pt").is_file() or (folder / "checkpoint.pt").is_file())


def open_folder(settings: Settings) -> Path:
    """The run's folder, ready to be written: new, or one to resume or to start over. Raises RunError."""
    out = Path(os.path.expanduser(settings.out or f"runs/{settings.task}{'' if settings.method == 'smartbert' else '-bert'}"))
    path = out / "settings.json"
    if out.exists() and not out.is_dir():
        raise RunError(f"--out {out} is a file; name a folder")
    files = [file.name for file in out.iterdir() if not file.name.startswith(".")] if out.is_dir() else []
    if any(not name.endswith(".tmp") for name in files) and not is_run(out):
        raise RunError(f"--out {out} is not empty and holds no run, but files such as {min(files)}: name a new "
                       f"folder, so that nothing of yours is lost")
    if path.is_file() and settings.resume:
        try:
            before, now = dict(json.loads(path.read_text())), asdict(settings)
        except (ValueError, TypeError):
            raise RunError(f"{path} is damaged: start over with --overwrite")
        for name in now.keys() - OF_A_MACHINE:
            if before.get(name) != now[name]:
                raise RunError(f"{out} was started with {name} = {before.get(name)}, not {now[name]}: resume with the "
                               f"same settings")
        return out
    if settings.resume:
        print(f"nothing to resume in {out}: starting from the beginning", file=sys.stderr)
    if any((out / name).is_file() for name in ("checkpoint.pt", "model.pt")) and not settings.overwrite:
        raise RunError(f"{out} already holds a run: continue it with --resume, replace it with --overwrite, or name "
                       f"another folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {out} cannot be made ({error.strerror}): name another folder")
    for pattern in ("checkpoint.pt", "phase1.pt", "model.pt", "log.jsonl", "data.json", "eval*.json"):
        for stale in out.glob(pattern):
            stale.unlink()
    data.write_json(path, asdict(settings))
    return out


# --- A run's folder ---------------------------------------------------------------------------------------------------

def pick_device(name: str) -> torch.device:
    """auto takes the best that is there. Raises RunError for a device that is not."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name not in ("auto", *there):
        raise RunError(f"--device {name}: there is none here; use one of auto, {', '.join(there)}")
    return torch.device(there[0] if name == "auto" else name)


def load_file(path: Path) -> dict:
    """A .pt file that train.py wrote. Raises WeightsError where it is missing or truncated, RunError where it is of
    another version."""
    content = read_file(path, "let train.py finish the run with --resume, or start over with --overwrite")
    if content.get("version") != VERSION:
        raise RunError(f"{path} was written by another version of this project: train again with --overwrite")
    return content


def identify(training: Split, held: Split) -> dict:
    """What a run remembers of its data, in data.json: digests of the training set (as far as --limit goes) and of the
    held-out part, and whether the file was a partial one."""
    return {"train": data.digest(training), "held_out": data.digest(held), "partial": training.partial}


def check_data(folder: Path, identity: dict) -> None:
    """Raises RunError where a run was made from other data than these. An older run, without data.json, passes."""
    path = folder / "data.json"
    if not path.is_file():
        return
    try:
        same = json.loads(path.read_text()) == identity
    except ValueError:
        raise RunError(f"{path} is damaged: train again with --overwrite")
    if not same:
        raise RunError(f"{folder} was trained on another train.tsv than the one that is there now, so the rows it held "
                       f"out are not known: name the folder of the former one with --data-dir")


def load_run(folder: str | Path, device: torch.device) -> tuple[dict, SmartBert]:
    """Settings and trained model of a run. Raises RunError, and WeightsError for a model.pt that is missing or truncated."""
    path = Path(folder) / "settings.json"
    if not path.is_file():
        raise RunError(f"{folder} holds no run, for it has no settings.json: name a folder that train.py made, such as runs/toy")
    content = load_file(Path(folder) / "model.pt")
    try:
        settings = json.loads(path.read_text())
        if not NEEDED | OF_SMARTBERT <= settings.keys():
            raise KeyError
        model = SmartBert(Bert(BertConfig(**content["config"])), content["classes"])
        model.load_state_dict(content["model"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        raise RunError(f"{folder} was trained by another version of this code, or is damaged: train again with --overwrite")
    return settings, model.to(device).eval()


# --- Inference over a whole split, for the log and for eval.py --------------------------------------------------------

def pools(split: Split, device: str | torch.device = "cpu") -> list[Batch]:
    """An encoded split as a few large padded batches of about one size, sorted by length."""
    size = math.ceil(len(split) / math.ceil(len(split) / POOL))
    return [batch.to(device) for batch in data.batches(split, size)]


def run_pool(model: SmartBert, batch: Batch, skip: bool, leave: Criterion | None) -> Outcome:
    """`infer` on one pool. On a GPU larger batches are full."""
    return infer(model, batch.ids, batch.types, batch.mask, skip=skip, leave=leave,
                 batch_tokens=1024 if batch.ids.device.type == "cpu" else 32768)


def predict(model: SmartBert, batches: list[Batch], skip: bool, leave: Criterion | None) -> Outcome:
    """Every pool; the outcome in the order of the split (N rows), on the CPU. Leaves the model in
    eval mode. The criterion must not look at the rows' places: each pool counts its own."""
    model.eval()
    parts = [vars(run_pool(model, batch, skip, leave)).values() for batch in batches]
    order = torch.cat([batch.index for batch in batches]).argsort().cpu()
    return Outcome(*(torch.cat(values).cpu()[order] for values in zip(*parts)))


# --- Both phases ------------------------------------------------------------------------------------------------------

def push_now(settings: Settings, progress: float):
    """What pushes the gates at this point of phase 1 (progress 0..1): the paper's lambda, or the budget, which starts
    as "all layers" and tightens only once the task is being learned (README, deviation 11)."""
    if settings.no_skipping or progress < settings.push_start:
        return lambda soft, used: soft.new_zeros(())
    if settings.lam is not None:
        return lambda_push(settings.lam)
    part = (progress - settings.push_start) / max(settings.push_full - settings.push_start, 1e-9)
    return budget_push(1 - (1 - settings.budget) * min(max(part, 0.0), 1.0), settings.budget_weight)


def save(path: Path, **content) -> None:
    data.write_whole(path, lambda file: torch.save({"version": VERSION, **content}, file))


def loss_of(model: SmartBert, batch: data.Batch, settings: Settings, phase: int, progress: float, hard: bool) -> dict:
    """The step's loss, and what it is made of (scalars; run: share of rows that ran each layer, (L,))."""
    inputs = (batch.ids, batch.types, batch.mask, batch.labels)
    if settings.method == "bert":
        return {"loss": F.cross_entropy(model(*inputs[:3]), batch.labels)}
    eta1, eta2 = (0.0, 0.0) if settings.no_contrast else (settings.eta1, settings.eta2)
    if phase == 2:
        return {"loss": phase2_loss(model, *inputs, eta2=eta2, tau2=settings.tau2)}
    result = phase1_loss(model, *inputs, hard=hard, push=push_now(settings, progress), eta1=eta1, tau1=settings.tau1)
    return vars(result) | {"run": result.run.mean(0)}


def observe(model: SmartBert, split: data.Split, batches: list[data.Batch], settings: Settings, phase: int) -> dict:
    """Scores on a split and the layers that ran: by the gates alone in phase 1, with exits in phase 2."""
    task = data.find_task(settings.task)
    skip = settings.method == "smartbert" and not settings.no_skipping
    # Half of the largest entropy is a threshold for the log; eval.py chooses the one to use.
    leave = entropy_below(0.5 * math.log(len(task.labels))) if phase == 2 else None
    outcome = predict(model, batches, skip, leave)
    return data.scores(task, outcome.logits.argmax(1).tolist(), split.labels) | {
        "layers": outcome.ran.sum(1).float().mean().item()}


def train(settings: Settings) -> Path:
    """Both phases (or the baseline), epoch by epoch; returns the run's folder. Raises DataError, WeightsError, RunError.

    After every epoch checkpoint.pt holds all that is needed to go on as if nothing had happened.
    """
    check(settings)
    device = pick_device(settings.device)
    task = data.find_task(settings.task)
    if task.name != "toy" and not settings.weights:
        raise RunError(f"--task {task.name} needs --weights: a folder with a pre-trained BERT, or a name such as "
                       f"google-bert/bert-base-uncased")
    folder = data.fetch_weights(settings.weights, settings.cache) if settings.weights else None
    tokenizer = data.load_tokenizer(folder) if folder else data.toy_tokenizer()
    splits = data.load_task(task.name, settings.data_dir, settings.cache)
    torch.manual_seed(settings.seed)
    model = build_model(settings, folder, tokenizer.get_vocab_size(), len(task.labels)).to(device)
    splits = {name: data.encode(tokenizer, split, settings.max_length) for name, split in splits.items()}
    splits["train"] = splits["train"].select(range(len(splits["train"]))[:settings.limit])
    training, held = data.hold_out(splits["train"], settings.held_out, settings.seed)
    judge, judged = ("held-out", held) if len(held) else (task.devs[0], splits[task.devs[0]])
    if judge != "held-out":
        print(f"warning: nothing is held out, so {judge} picks the epoch that it then judges", file=sys.stderr)
    judged_pools = pools(judged, device)

    out, identity = open_folder(settings), identify(splits["train"], held)
    if (out / "checkpoint.pt").is_file() or (out / "model.pt").is_file():
        check_data(out, identity)
    else:
        data.write_json(out / "data.json", identity)
    data.write_vocabulary(tokenizer, out)
    if (out / "model.pt").is_file():
        load_run(out, device)                    # or says what is wrong with it
        print(f"{out} is finished already")
        return out
    schedule = [(1, epoch) for epoch in range(settings.epochs1)]
    schedule += [(2, epoch) for epoch in range(settings.epochs2) if settings.method == "smartbert"]
    log, best, done, before = [], None, 0, None
    if (out / "checkpoint.pt").is_file():
        before = load_file(out / "checkpoint.pt")
        done, best, log = before["done"], before["best"], before["log"]
        model.load_state_dict(before["model"])
        print(f"resuming {out} after {done} of {len(schedule)} epochs")
    describe = dict(config=asdict(model.bert.config), classes=len(task.labels))

    optimizer = None
    for number, (phase, epoch) in list(enumerate(schedule))[done:]:
        # A phase begins (epoch 0; the second from the first one's best), or a stopped run goes on in the middle of one.
        if optimizer is None or epoch == 0:
            if phase == 2 and epoch == 0:
                model.load_state_dict(load_file(out / "phase1.pt")["model"])
            optimizer = make_optimizer(model, settings, phase)
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            if before:
                if epoch > 0:
                    optimizer.load_state_dict(before["optimizer"])
                torch.set_rng_state(before["rng"])
                if before["cuda_rng"] is not None and device.type == "cuda":
                    torch.cuda.set_rng_state(before["cuda_rng"])
                before = None
        model.train()
        if phase == 2:                                      # no dropout in what is frozen (deviation 5)
            model.eval()
            model.heads[:-1].train()
        hard = epoch >= settings.soft_epochs and not settings.soft_gates
        order = data.batch_indices(training, settings.batch_size, seed=settings.seed + number)
        epochs = settings.epochs1 if phase == 1 else settings.epochs2
        start, recent = time.time(), []
        bar = tqdm(order, desc=f"phase {phase} epoch {epoch + 1}/{epochs}", disable=None, leave=False)
        for step, indices in enumerate(bar):
            batch = data.collate(training, indices).to(device)
            progress = (epoch + step / len(order)) / epochs                             # of the phase, 0..1
            # Up for a while, then down to nothing; the first step has the rate that the second rises to, not 0.
            risen = max(progress, 1 / (epochs * len(order)))
            rate = min(risen / max(settings.warmup, 1e-9), (1 - progress) / (1 - settings.warmup))
            # Gates rest until they are pushed, or the task alone would move them.
            for group in optimizer.param_groups:
                resting = group["gates"] and progress < settings.push_start
                group["lr"] = 0.0 if resting else group["top"] * rate
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
                parts = loss_of(model, batch, settings, phase, progress, hard)
            parts["loss"].backward()
            nn.utils.clip_grad_norm_(trained, settings.clip)
            optimizer.step()
            optimizer.zero_grad()                           # now: no gradients beside the next step's activations
            recent.append({name: value.detach() for name, value in parts.items()})
            if (step + 1) % 20 == 0 or step + 1 == len(order):
                means = {name: torch.stack([r[name] for r in recent]).float().mean(0).tolist() for name in recent[0]}
                log.append({"phase": phase, "epoch": epoch + 1, "step": step + 1} | means)
                recent = []
                if not math.isfinite(means["loss"]):
                    raise RunError(f"the loss is {means['loss']} at step {step + 1} of phase {phase}, epoch {epoch + 1}: try a "
                                   f"lower --lr or --lr-new")
                bar.set_postfix(loss=f"{means['loss']:.3f}", run=f"{np.mean(means.get('run', 1)):.2f}", refresh=False)

        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
            seen = observe(model, judged, judged_pools, settings, phase)
        score, seconds = seen[task.metrics[0]], time.time() - start
        log.append({"phase": phase, "epoch": epoch + 1, "seconds": round(seconds, 1), judge: seen})
        print(f"phase {phase} epoch {epoch + 1}/{epochs}  loss {means['loss']:.3f}  {judge} {score:.3f} with "
              f"{seen['layers']:.1f} of {len(model.gates)} layers  ({seconds:.0f} s)", flush=True)
        if phase == 1:
            # Before the push every layer runs, and such an epoch would win on score. So first come hard gates, then a budget
            # met within a tenth, or at least pushed in full, then the score, then fewer layers; of equals the later.
            share, ungated = seen["layers"] / len(model.gates), settings.no_skipping or settings.method == "bert"
            met = ungated or settings.lam is None and share <= 1.1 * settings.budget
            pushed = (epoch + 1) / epochs > (settings.push_full if settings.lam is None else settings.push_start)
            rank = [hard or settings.soft_gates, met or pushed / 2, score, -share]
            if best is None or rank >= best:
                best = rank
                save(out / "phase1.pt", model=model.state_dict(), **describe)
        data.write_whole(out / "log.jsonl", lambda file: file.writelines(json.dumps(r).encode() + b"\n" for r in log))
        save(out / "checkpoint.pt", done=number + 1, best=best, log=log, model=model.state_dict(),
             optimizer=optimizer.state_dict(), rng=torch.get_rng_state(),
             cuda_rng=torch.cuda.get_rng_state() if device.type == "cuda" else None)

    if schedule[-1][0] == 1:
        model.load_state_dict(load_file(out / "phase1.pt")["model"])
    save(out / "model.pt", model=model.state_dict(), **describe)
    (out / "checkpoint.pt").unlink()
    (out / "phase1.pt").unlink()
    return out


def main(arguments: list[str] | None = None) -> None:
    task = argparse.ArgumentParser(add_help=False)          # first the task alone: it decides on the other defaults
    task.add_argument("--task", default="toy")
    recipe = RECIPES.get(task.parse_known_args(arguments)[0].task, {})
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(Settings):
        kind = getattr(f.type, "__args__", (f.type,))[0]                                # of str | None: str
        if kind is bool:
            parser.add_argument("--" + f.name.replace("_", "-"), action="store_true", help=f.metadata["help"])
        else:
            parser.add_argument("--" + f.name.replace("_", "-"), type=kind, default=f.default, help=f.metadata["help"])
    parser.set_defaults(**recipe)
    settings = Settings(**vars(parser.parse_args(arguments)))
    try:
        out = train(settings)
    except (DataError, WeightsError, RunError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ntrain.py: stopped; the same command with --resume goes on after the last whole epoch", file=sys.stderr)
        sys.exit(130)
    print(f"now: python eval.py {out}")


if __name__ == "__main__":
    main()
