"""Train SmartBERT in its two phases, plain BERT, or an earlier method.

    python train.py                                                      # the toy task, offline
    python train.py --task rte --weights google-bert/bert-base-uncased   # downloaded once
    python train.py --task cola --weights ~/e5-small --data-dir ~/glue   # from your own folders
    python train.py --task cola --weights ~/e5-small --method bert       # the baseline

Phase 1 trains the encoder, the gates, the last head and the projections. Phase 2 freezes them and
trains the other heads (the paper's two training phases; the release's main.py:71-149). PABEE and
BERxiT train all heads in phase 1. The best epoch of phase 1 is picked on a held-out part of the
training set; the dev set is left to eval.py.

A run's folder holds settings.json, data.json, log.jsonl, the vocabulary and, at the end, model.pt;
until then checkpoint.pt. Functions raise UserError for errors that the user can fix.
"""

import argparse
import copy
import errno
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C before main: no traceback
# Set before torch is imported: in bf16 on a CPU, oneDNN caches kernels for each shape of batch, on
# RTE more than a gigabyte.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
import torch
from tokenizers.implementations import BertWordPieceTokenizer
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from bert import Bert, BertConfig, load_bert, read_torch_file
from data import Batch, Split, Task, UserError
from smartbert import (METHODS, Criterion, Outcome, SmartBert, entropy_below, infer,
                       global_mean, phase1_loss, phase2_loss)

VERSION = 5             # of the files in a run's folder; another number means another layout
DEFAULT_WEIGHTS = "google-bert/bert-base-uncased"
POOL = 1024             # examples that go through inference together: enough for full batches


# --- Settings -----------------------------------------------------------------------------------

def flag(default, help: str, low: float = -math.inf, high: float = math.inf):
    """A setting that is also a command-line flag. A number must lie between low and high."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass
class Settings:
    """All settings. Each help says what it does; Greek names are the paper's symbols."""
    task: str = flag("toy", f"one of {', '.join(data.TASKS)}")
    method: str = flag("smartbert", f"one of {', '.join(METHODS)}; bert is the baseline")
    recipe: str = flag("ours", "default settings: ours, or release for the authors'")
    weights: str | None = flag(None, "BERT: a folder, a finished run, or a name on the hub "
                                     f"(default for a GLUE task: {DEFAULT_WEIGHTS})")
    data_dir: str | None = flag(None, "folder with GLUE's files; without it they are downloaded")
    cache: str | None = flag(None, "folder for downloads (or set SMARTBERT_CACHE)")
    out: str | None = flag(None, "the run's folder (default: runs/TASK or runs/TASK-METHOD)")
    # what makes the gates skip
    budget: float = flag(0.4, "share of the layers to run; more than that is penalised", 0, 1)
    budget_weight: float = flag(10.0, "weight of the budget's penalty", 0, 1e9)
    lam: float | None = flag(None, "lambda of the paper's penalty, in place of the budget", 0, 1e9)
    gate_bias: float = flag(-2.0, "bias of the gates at the start: at -2, g = .12", -100, 100)
    penalty_start: float = flag(0.3, "share of phase 1 before the gates are trained", 0, 0.99)
    penalty_full: float = flag(0.6, "share of phase 1 after which the full budget holds", 0, 0.99)
    full_share: float = flag(0.0, "share of examples that run every layer in training", 0, 1)
    soft_epochs: int = flag(0, "epochs of phase 1 with soft gates", 0, 10_000)
    # the contrast
    eta1: float = flag(0.01, "eta_1, weight of phase 1's contrast", 0, 1)
    eta2: float = flag(0.05, "eta_2, weight of phase 2's contrast", 0, 1)
    tau1: float = flag(0.5, "tau_1, temperature of phase 1's contrast", 1e-3, 1e9)
    tau2: float = flag(0.55, "tau_2, temperature of phase 2's contrast", 1e-3, 1e9)
    # the optimisation
    epochs1: int = flag(5, "epochs of phase 1", 1, 10_000)
    epochs2: int = flag(2, "epochs of phase 2; 0: gates only", 0, 10_000)
    batch_size: int = flag(32, "examples in a step", 1, 1_000_000)
    lr: float | None = flag(None, "the encoder's learning rate (default: 1e-4, 3e-5 if H > 384)",
                            0, 1e9)
    lr_new: float = flag(1e-3, "learning rate of gates, heads and projections", 0, 1e9)
    lr_gates: float | None = flag(None, "learning rate of the gates (default: --lr-new)", 0, 1e9)
    warmup: float = flag(0.06, "share of each schedule in which learning rates rise", 0, 0.99)
    weight_decay: float = flag(0.01, "AdamW's; not on biases and LayerNorm", 0, 1e9)
    clip: float = flag(1.0, "largest norm of the gradient", 1e-3, 1e9)
    dropout: float = flag(0.1, "of hidden states and attention", 0, 0.99)
    max_length: int = flag(128, "tokens of an example; longer ones are cut", 8, 1_000_000)
    held_out: float = flag(0.1, "share of the training set that selects epoch, threshold", 0, 0.99)
    limit: int | None = flag(None, "use only the first N training examples", 1, 1e9)
    seed: int = flag(50, "of weights, order, dropout and the held-out rows", 0, 1e9)
    # the paper's ablations
    no_skipping: bool = flag(False, "ablation: gates that never skip; exits only")
    no_contrast: bool = flag(False, "ablation: eta_1 = eta_2 = 0")
    soft_gates: bool = flag(False, "ablation: no hard weight, gates stay soft through phase 1")
    # the machine
    device: str = flag("auto", "auto, cpu, cuda or mps")
    bf16: bool = flag(False, "bfloat16: faster on GPUs; on CPUs only with AMX or AVX512-BF16")
    resume: bool = flag(False, "continue a run that was stopped, from the end of its last epoch")
    overwrite: bool = flag(False, "start over in a folder that already holds a run")

    @property
    def has_gates(self) -> bool:
        return self.method == "smartbert" and not self.no_skipping

    @property
    def has_phase2(self) -> bool:
        return self.method in ("smartbert", "deebert", "fastbert") and self.epochs2 > 0

    @property
    def has_exits(self) -> bool:
        return self.has_phase2 or self.method in ("pabee", "berxit")


# Where a task's settings differ from the defaults; GLUE's as measured with encoders of 12 x 384.
RECIPES = {
    "toy": dict(lr=5e-4, epochs1=16, epochs2=4, dropout=0.0, budget=0.65, penalty_start=0.4,
                penalty_full=0.75, full_share=0.25),
    "cola": dict(batch_size=16, epochs1=8, budget=0.5, lr_gates=3e-4, penalty_start=0.4,
                 penalty_full=0.7),
    "sst2": dict(epochs1=3, epochs2=1, penalty_start=0.25),
    "mrpc": dict(batch_size=16, budget=0.5),
    "qnli": dict(batch_size=16, budget=0.5),
    "mnli": dict(batch_size=16, epochs1=3, epochs2=1, penalty_start=0.25, budget=0.5),
    "rte": dict(lr=5e-5, batch_size=16, epochs1=8, budget=0.5, lr_gates=3e-4, penalty_start=0.4,
                penalty_full=0.7),
    "wnli": dict(batch_size=16),
}
# The authors' settings (run.sh; for RTE a warm-up of 10 steps is .014 of phase 1).
RELEASE = dict(lam=0.04, soft_epochs=3, gate_bias=0.0, penalty_start=0.0, lr=2e-5, lr_new=2e-5,
               batch_size=16, warmup=0.014, epochs1=5, epochs2=4)
# Settings that only SmartBERT has, and settings that change no result.
SMARTBERT_ONLY = {"budget", "budget_weight", "lam", "gate_bias", "penalty_start", "penalty_full",
                  "full_share", "soft_epochs", "eta1", "eta2", "tau1", "tau2", "lr_gates",
                  "no_skipping", "no_contrast", "soft_gates"}
NOT_IN_RESULT = {"data_dir", "cache", "out", "device", "resume", "overwrite"}


def check(settings: Settings) -> None:
    """Raise UserError for a setting of a wrong type, out of range, or unknown."""
    for f in fields(settings):
        value, low, high = getattr(settings, f.name), f.metadata["low"], f.metadata["high"]
        name = f"--{f.name.replace('_', '-')} {value!r:.60}"
        kinds = getattr(f.type, "__args__", (f.type,))          # str | None: (str, NoneType)
        if type(value) not in kinds and not (type(value) is int and float in kinds):
            raise UserError(f"{name}: give a value of type {getattr(f.type, '__name__', f.type)}")
        if type(value) in (int, float) and not low <= value <= high:    # false for NaN as well
            raise UserError(f"{name}: give a number from {low:g} to {high:g}")
    for name, options in (("method", METHODS), ("recipe", ("ours", "release"))):
        if getattr(settings, name) not in options:
            raise UserError(f"--{name} {getattr(settings, name)!r:.60}: use one of "
                            f"{', '.join(options)}")
    data.find_task(settings.task)


# --- What training starts from ------------------------------------------------------------------

def pick_device(name: str) -> torch.device:
    """auto takes the best device that is there."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    there.append("cpu")
    if name not in ("auto", *there):
        raise UserError(f"--device {name}: not found on this machine; use one of auto, "
                        f"{', '.join(there)}")
    return torch.device(there[0] if name == "auto" else name)


def build_model(settings: Settings, folder: Path | None, vocabulary: int, task: Task) -> SmartBert:
    """A SmartBert around the weights in a folder (a finished run of the same task gives its last
    head too), or around a small fresh encoder for the toy. vocabulary: the number of words of the
    tokenizer."""
    dropout = {"hidden_dropout_prob": settings.dropout,
               "attention_probs_dropout_prob": settings.dropout}
    former_model = None
    if folder is None:
        # A model this narrow stays at chance with BERT's std of 0.02; 1 / sqrt(H) trains. The
        # inner layer is narrow too: a wide one learns two swaps by heart, and depth is not needed.
        bert = Bert(BertConfig(vocab_size=vocabulary, hidden_size=64, num_hidden_layers=6,
                               num_attention_heads=4, intermediate_size=128,
                               max_position_embeddings=128, initializer_range=64**-0.5, **dropout))
    elif is_run(folder):
        former, former_model = load_run(folder, torch.device("cpu"))
        bert = Bert(replace(former_model.bert.config, **dropout))
        bert.load_state_dict(former_model.bert.state_dict())
    else:
        try:
            bert = load_bert(folder, **dropout)
        except ValueError as error:
            raise UserError(error)
    config = bert.config
    if config.vocab_size < vocabulary:                  # spare rows beyond the vocabulary are fine
        raise UserError(f"{folder}: vocab.txt has {vocabulary} words, but the weights have only "
                        f"{config.vocab_size}: they do not belong together")
    if settings.max_length > config.max_position_embeddings:
        raise UserError(f"--max-length {settings.max_length} is more than the "
                        f"{config.max_position_embeddings} positions of these weights")
    if task.columns and task.columns[1] and config.type_vocab_size < 2:
        raise UserError(f"{folder} has {config.type_vocab_size} segment embedding, but "
                        f"{task.name} has sentence pairs: take other weights, or another task")
    if settings.method != "bert" and config.num_hidden_layers < 2:
        raise UserError(f"{folder} has a single layer, so nothing can be skipped: take deeper "
                        f"weights")
    # No skipping: gates that start at g = sigmoid(-30), about 0, and are not trained.
    bias = -30.0 if settings.no_skipping else settings.gate_bias
    model = SmartBert(bert, len(task.labels), bias)
    if former_model and former.task == task.name:
        model.heads[-1].load_state_dict(former_model.heads[-1].state_dict())
    return model


def split_training_set(split: Split, settings: Settings) -> tuple[Split, Split, dict]:
    """Split a training set (up to --limit) into a part to train on and a held-out part. The
    digests identify the examples; a run keeps them in data.json."""
    whole = split.select(range(len(split))[:settings.limit])
    training, held = data.hold_out(whole, settings.held_out, settings.seed)
    if len(set(training.labels)) < 2:
        raise UserError("all examples to train on have the same label: mix the rows of train.tsv, "
                        "or raise --limit")
    identity = {"train": data.digest(whole), "held_out": data.digest(held),
                "partial": whole.partial}
    return training, held, identity


def set_up(settings: Settings) -> tuple:
    """What a run starts from: model, tokenizer, the encoded training set, the encoded split that
    judges epochs and its name, what identifies the data, and how many epochs of phase 1 are left
    out, because a plain BERT has done them. Completes the settings."""
    device, task = pick_device(settings.device), data.find_task(settings.task)
    if not settings.weights and task.name != "toy":
        settings.weights = DEFAULT_WEIGHTS
    splits = data.load_task(task.name, settings.data_dir, settings.cache)   # before the large file
    folder = data.fetch_weights(settings.weights, settings.cache) if settings.weights else None
    tokenizer = data.load_tokenizer(folder) if folder else data.toy_tokenizer()
    training, validation, identity = split_training_set(splits["train"], settings)
    name, done = "held-out", 0
    if not validation:
        name, validation = task.devs[0], splits[task.devs[0]]
        say(f"warning: nothing is held out, so {name} both selects the epoch and is reported",
            sys.stderr)
    former = read_settings(folder) if folder and is_run(folder) else None
    if former and former.task == task.name:
        check_data(folder, identity)        # or it may have been trained on what is held out here
        if former.method == "bert" and settings.method in ("deebert", "fastbert"):
            done = settings.epochs1         # a plain BERT is their phase 1
    torch.manual_seed(settings.seed)
    model = build_model(settings, folder, tokenizer.get_vocab_size(), task).to(device)
    if model.bert.config.hidden_size <= 64:     # so tiny that a second thread would only cost time
        torch.set_num_threads(1)
    rank, _ = processes()
    if rank:                                            # so that each draws its own dropout
        torch.manual_seed(settings.seed + rank)
    if settings.lr is None:
        settings.lr = 1e-4 if model.bert.config.hidden_size <= 384 else 3e-5
    training, validation = [data.encode(tokenizer, split, settings.max_length)
                            for split in (training, validation)]
    return model, tokenizer, training, validation, name, identity, done


def make_optimizer(model: SmartBert, settings: Settings, phase: int) -> torch.optim.AdamW:
    """AdamW over what the phase trains; everything else is frozen.

    The release gives it every parameter in both phases, even the frozen ones (main.py:80-88;
    deviation 6).
    """
    model.requires_grad_(False)
    if phase == 2:
        groups = [(model.heads[:-1], settings.lr_new)]
    elif settings.method in ("pabee", "berxit"):        # all heads in one stage
        groups = [(model.bert, settings.lr), (model.heads, settings.lr_new)]
    else:
        groups = [(model.bert, settings.lr), (model.heads[-1], settings.lr_new)]
    if phase == 1 and settings.method == "smartbert":
        groups.append((model.projections, settings.lr_new))
    if phase == 1 and settings.has_gates:
        lr_gates = settings.lr_new if settings.lr_gates is None else settings.lr_gates
        groups.append((model.gates, lr_gates))
    parameters = []
    for module, lr in groups:
        module.requires_grad_(True)
        for decayed in (True, False):                   # biases and LayerNorm have one dimension
            chosen = [p for p in module.parameters() if (p.dim() > 1) == decayed]
            parameters.append({"params": chosen, "lr": lr, "peak_lr": lr,
                               "gates": module is model.gates,
                               "weight_decay": settings.weight_decay if decayed else 0.0})
    return torch.optim.AdamW(parameters, fused=True)


# --- Inference over a whole split, for the log and for eval.py ----------------------------------

def pools(split: Split, device: str | torch.device = "cpu") -> list[Batch]:
    """An encoded split as a few large padded batches of about one size, sorted by length."""
    size = math.ceil(len(split) / math.ceil(len(split) / POOL))
    return [batch.to(device) for batch in data.batches(split, size)]


def predict(model: SmartBert, batches: list[Batch], skip: bool, criterion: Criterion | None,
            layers: list[int] | None = None) -> Outcome:
    """The outcome of a whole split, in its order (N rows), on the CPU. Sets eval mode. The
    criterion must not use row numbers, because they count from 0 in each pool."""
    model.eval()
    parts = [vars(infer(model, batch.ids, batch.segment_ids, batch.mask, skip=skip,
                        criterion=criterion, layers=layers)).values() for batch in batches]
    order = torch.cat([batch.index for batch in batches]).argsort().cpu()
    return Outcome(*(torch.cat(values).cpu()[order] for values in zip(*parts)))


# --- One epoch ----------------------------------------------------------------------------------

def penalty_now(settings: Settings, progress: float) -> dict:
    """The skip penalty at this point of phase 1 (progress 0..1): the paper's lambda, or a budget
    that starts as "all layers" and tightens once the task is being learned (deviation 11)."""
    if settings.no_skipping or progress < settings.penalty_start:
        return {}
    if settings.lam is not None:
        return {"lam": settings.lam}
    span = max(settings.penalty_full - settings.penalty_start, 1e-9)
    part = min((progress - settings.penalty_start) / span, 1.0)
    return {"budget": 1 - (1 - settings.budget) * part, "budget_weight": settings.budget_weight}


def set_rates(optimizer: torch.optim.Optimizer, settings: Settings, step: int, steps: int) -> None:
    """Linear warm-up, then linear decay to 0. With gates, phase 1 has two such rounds: up to
    penalty_start without them, then with them. The first step takes the rate of the second,
    because its own would be 0."""
    gates = any(group["gates"] for group in optimizer.param_groups)
    start = math.ceil(settings.penalty_start * steps) if gates else 0   # of the second round
    done, length = (step, start) if step < start else (step - start, steps - start)
    rising = max(done, 1) / max(settings.warmup * length, 1e-9)
    falling = (length - done) / ((1 - settings.warmup) * length)
    for group in optimizer.param_groups:
        waits = group["gates"] and step < start
        group["lr"] = 0.0 if waits else group["peak_lr"] * min(rising, falling, 1.0)


class StepLoss(nn.Module):
    """The loss of one step; a module, because DistributedDataParallel wraps modules."""

    def __init__(self, model: SmartBert, settings: Settings, phase: int):
        super().__init__()
        self.model, self.settings, self.phase = model, settings, phase

    def forward(self, batch: Batch, step: int, progress: float, hard: bool) -> dict[str, Tensor]:
        """The loss and its parts: scalars; and run (L,), the mean of 1 - g of each layer."""
        model, settings, labels = self.model, self.settings, batch.labels
        inputs = (batch.ids, batch.segment_ids, batch.mask)
        if settings.method != "smartbert":
            loss = METHODS[settings.method][self.phase - 1]
            more = [step] if settings.method == "berxit" else []
            return {"loss": global_mean(loss(model, inputs, labels, *more), len(labels))}
        eta1, eta2 = (0.0, 0.0) if settings.no_contrast else (settings.eta1, settings.eta2)
        if self.phase == 2:
            return {"loss": phase2_loss(model, *inputs, labels, eta2=eta2, tau2=settings.tau2,
                                        full_share=settings.full_share)}
        penalty = penalty_now(settings, progress)
        parts = vars(phase1_loss(model, *inputs, labels, hard=hard, penalty=penalty, eta1=eta1,
                                 tau1=settings.tau1, full_share=settings.full_share))
        parts["run"] = global_mean(parts["run"].mean(0), len(labels))
        return {name: part if name == "loss" else part.detach() for name, part in parts.items()}


def train_epoch(model: SmartBert, optimizer: torch.optim.Optimizer, training: Split,
                settings: Settings, phase: int, epoch: int) -> list[dict]:
    """One pass over the training set. Returns the log: means over every 20 steps."""
    model.train()
    if phase == 2:                                  # no dropout in what is frozen (deviation 5)
        model.eval()
        model.heads[:-1].train()
    device = next(model.parameters()).device
    epochs = settings.epochs1 if phase == 1 else settings.epochs2
    number = epoch if phase == 1 else settings.epochs1 + epoch          # of the whole run
    order = data.batch_indices(training, settings.batch_size, seed=settings.seed + number)
    step_loss, (rank, world) = StepLoss(model, settings, phase), processes()
    if world > 1:           # row r goes to process r % world; smaller batches are left out
        order = [indices for indices in order if len(indices) >= world]
        step_loss = DistributedDataParallel(step_loss, find_unused_parameters=True,
                                            gradient_as_bucket_view=True)
    hard = epoch >= settings.soft_epochs and not settings.soft_gates
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    log, recent = [], []
    bar = tqdm(order, desc=f"phase {phase} epoch {epoch + 1}/{epochs}", leave=False,
               disable=True if rank else None)      # None: shown where stderr is a terminal
    for step, indices in enumerate(bar):
        batch = data.collate(training, indices[rank::world]).to(device)
        done, steps = epoch * len(order) + step, epochs * len(order)    # of the phase
        set_rates(optimizer, settings, done, steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
            parts = step_loss(batch, done, done / steps, hard)
        parts["loss"].backward()
        nn.utils.clip_grad_norm_(trained, settings.clip)
        optimizer.step()
        optimizer.zero_grad()       # called here so that gradients take no memory between steps
        recent.append({name: value.detach() for name, value in parts.items()})
        if len(recent) == 20 or step + 1 == len(order):
            log.append({"phase": phase, "epoch": epoch + 1, "step": step + 1})
            for name in parts:
                log[-1][name] = torch.stack([r[name] for r in recent]).float().mean(0).tolist()
            loss, recent = log[-1]["loss"], []
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} at step {step + 1} of phase {phase}, epoch "
                                f"{epoch + 1}: start over (--overwrite) with a lower --lr or "
                                f"--lr-new")
    return log


def validate(model: SmartBert, split: Split, batches: list[Batch], settings: Settings,
             phase: int) -> dict[str, float]:
    """Scores on a split and the mean of the layers that ran: by the gates alone in phase 1, with
    exits in phase 2."""
    task = data.find_task(settings.task)
    # For the log only, the threshold is half of the largest entropy; eval.py chooses the real one.
    criterion = entropy_below(0.5 * math.log(len(task.labels))) if phase == 2 else None
    outcome = predict(model, batches, settings.has_gates, criterion)
    scores = data.scores(task, outcome.logits.argmax(1).tolist(), split.labels)
    return scores | {"layers": outcome.ran.sum(1).float().mean().item()}


# --- The best epoch of phase 1 ------------------------------------------------------------------

def merit(settings: Settings, epoch: int, score: float, share: float) -> tuple:
    """What decides which epoch of phase 1 is kept, the most important first. share: of the layers
    run. Before the penalty every layer runs, and such an epoch would win by its score: so gates
    and budget decide first, then the score, then fewer layers. A budget counts as met up to
    10 % above it; with lambda there is no budget to meet."""
    free, by_budget = not settings.has_gates, settings.lam is None
    # whether this epoch had the gates that the last one has (hard ones, but for --soft-gates)
    hard = free or settings.soft_gates or epoch >= settings.soft_epochs
    met = free or (by_budget and share <= 1.1 * settings.budget)
    start = max(settings.penalty_start, settings.penalty_full if by_budget else 0)
    full_penalty = (epoch + 1) / settings.epochs1 > start
    return hard, met, met or full_penalty, score, -share


# --- Both phases --------------------------------------------------------------------------------

def train(settings: Settings) -> Path:
    """Both phases, or what the method has of them; returns the run's folder.

    After every epoch checkpoint.pt holds all that is needed to continue with the same result.
    """
    check(settings)
    out = find_folder(settings)
    model, tokenizer, training, validation, name, identity, done = set_up(settings)
    device, task = next(model.parameters()).device, data.find_task(settings.task)
    validation_pools, L = pools(validation, device), len(model.gates)
    rank, world = processes()                           # 0, 1 without torchrun
    if min(settings.batch_size, len(training)) < world:
        raise UserError(f"--batch-size {settings.batch_size} of {len(training)} examples cannot "
                        f"be shared by {world} processes: start fewer")
    epochs = {1: settings.epochs1, 2: settings.epochs2 * settings.has_phase2}
    schedule = [(phase, epoch) for phase in epochs for epoch in range(epochs[phase])]
    started, finished = ((out / name).is_file() for name in ("checkpoint.pt", "model.pt"))
    if settings.resume and (started or finished):
        check_same(out, settings, identity)
    else:
        if world > 1:
            distributed.barrier()               # wait until all have looked at the folder
        if rank == 0:
            start_over(out, settings, identity, tokenizer)
        started = finished = False
    if finished:
        load_run(out, device)                           # raises UserError if it is damaged
        (out / "checkpoint.pt").unlink(missing_ok=True)
        say(f"{out} is finished already")
        return out
    state, optimizer = {"done": done, "best": None, "best_model": None, "log": []}, None
    if started:
        state, optimizer = load_checkpoint(out, model, settings, schedule)
        say(f"resuming {out} after {state['done']} of {len(schedule)} epochs")

    for phase, epoch in schedule[state["done"]:]:
        if phase == 2 and state["best_model"]:
            model.load_state_dict(state["best_model"])
            state["best_model"] = None
        if epoch == 0:
            optimizer = make_optimizer(model, settings, phase)
        start = time.time()
        state["log"] += train_epoch(model, optimizer, training, settings, phase, epoch)
        loss = state["log"][-1]["loss"]
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
            # every process sees all of it, so that all choose the same epoch
            seen = validate(model, validation, validation_pools, settings, phase)
        score, seconds = seen[task.metrics[0]], time.time() - start
        state["log"].append({"phase": phase, "epoch": epoch + 1, "seconds": round(seconds, 1),
                             name: seen})
        first = int(settings.penalty_start * settings.epochs1)      # epoch with gates
        starts = phase == 1 and settings.has_gates and 0 < first == epoch
        say(f"phase {phase} epoch {epoch + 1}/{epochs[phase]}  loss {loss:.3f}  {name} "
            f"{task.metrics[0]} {score:.3f} with {seen['layers']:.1f} of {L} layers  "
            f"({seconds:.0f} s)" + ", gates begin to learn: scores may fall at first" * starts)
        if phase == 1:
            new = merit(settings, epoch, score, seen["layers"] / L)
            if state["best"] is None or new >= state["best"]:       # of equal ones the later
                state |= {"best": new, "best_model": copy.deepcopy(model.state_dict())}
        state["done"] += 1
        save_checkpoint(out, model, optimizer, state)

    if state["best_model"]:                             # there was no phase 2
        model.load_state_dict(state["best_model"])
    if rank == 0:
        save(out / "model.pt", model=model.state_dict(), config=asdict(model.bert.config),
             classes=len(task.labels))
        (out / "checkpoint.pt").unlink(missing_ok=True)     # a finished run needs it no longer
        for stale in out.glob("*.pt.*.tmp"):                # of a process killed while writing
            stale.unlink()
    return out


# --- A run's folder -----------------------------------------------------------------------------

def read_settings(folder: Path) -> Settings:
    """The settings of a run."""
    path = folder / "settings.json"
    if not path.is_file():
        raise UserError(f"{folder} is not there or has no settings.json, so it holds no run: name "
                        f"a folder that train.py made, such as runs/toy")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        settings = Settings(**values)
        missing = asdict(settings).keys() - values.keys()
        if missing:
            raise ValueError(f"it lacks {min(missing)}")
        check(settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged or of another version ({str(error)[:120]}): train "
                        f"again with --overwrite")
    return settings


def is_run(folder: Path) -> bool:
    """Whether train.py made this folder: it has settings.json, and either weights, too, or
    settings that can be read."""
    if any((folder / name).is_file() for name in ("model.pt", "checkpoint.pt")):
        return (folder / "settings.json").is_file()
    try:
        return bool(read_settings(folder))
    except UserError:
        return False


def find_folder(settings: Settings) -> Path:
    """The run's folder. Nothing in it changes yet."""
    suffix = "" if settings.method == "smartbert" else f"-{settings.method}"
    out = Path(os.path.expanduser(settings.out or f"runs/{settings.task}{suffix}"))
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    foreign = [name for name in names if not name.startswith(".") and not name.endswith(".tmp")]
    if foreign and not is_run(out):
        raise UserError(f"--out {out} is not empty and holds no run, but files such as "
                        f"{min(foreign)}: name a new folder, so that nothing of yours is lost")
    if settings.weights and Path(os.path.expanduser(settings.weights)).resolve() == out.resolve():
        raise UserError(f"--out {out} is also the run to start from: name another folder")
    there = {"checkpoint.pt", "model.pt"} & set(names)
    if there and not settings.resume and not settings.overwrite:
        raise UserError(f"{out} already holds a run: continue it with --resume, replace it with "
                        f"--overwrite, or name another folder with --out")
    if settings.resume and not there:
        say(f"nothing to resume in {out}: starting from the beginning", sys.stderr)
    return out


def start_over(out: Path, settings: Settings, identity: dict,
               tokenizer: BertWordPieceTokenizer) -> None:
    """Make the folder of a new run; delete a run that is there."""
    pictures = [f"{name}.png" for name in "score criteria layers examples training".split()]
    for pattern in ["checkpoint.pt", "model.pt", "log.jsonl", "eval*.json", *pictures]:
        for stale in out.glob(pattern):
            stale.unlink()
    data.write_json(out / "settings.json", asdict(settings))    # first: it makes this folder a run
    data.write_json(out / "data.json", identity)
    data.write_vocabulary(tokenizer, out)


def check_same(out: Path, settings: Settings, identity: dict) -> None:
    """Raise UserError where the run to be resumed had other settings or data."""
    before, now = asdict(read_settings(out)), asdict(settings)
    for name in now:
        if name not in NOT_IN_RESULT and before[name] != now[name]:
            raise UserError(f"{out} was started with {name} = {before[name]}, not {now[name]}: "
                            f"resume with the same settings")
    check_data(out, identity)


def check_data(folder: Path, identity: dict) -> None:
    """Raise UserError where a run was made from other data than these."""
    path = folder / "data.json"
    try:
        same = json.loads(path.read_text()) == identity
    except (OSError, ValueError):
        raise UserError(f"{path} is missing or damaged: train again with --overwrite")
    if not same:
        raise UserError(f"{folder} was trained on another train.tsv, or held out other rows of it,"
                        f" so that it may have seen what is held out now: use the --data-dir, "
                        f"--seed, --limit and --held-out of that run")


def save(path: Path, **content) -> None:
    """Write a .pt file whole or not at all."""
    def write(file) -> None:
        try:
            torch.save({"version": VERSION, **content}, file)
        except RuntimeError:                            # what torch makes of a full disk
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    data.atomic_write(path, write)


def load_file(path: Path) -> dict:
    """A .pt file that train.py wrote."""
    try:
        stopped = not path.is_file() and (path.parent / "checkpoint.pt").is_file()
        content = read_torch_file(path, "let train.py finish the run with --resume" if stopped
                                  else "train again with --overwrite")
    except ValueError as error:
        raise UserError(error)
    if content.get("version") != VERSION:
        raise UserError(f"{path} was written by another version of this project: train again with "
                        f"--overwrite")
    return content


def load_run(folder: str | Path, device: torch.device) -> tuple[Settings, SmartBert]:
    """Settings and trained model of a run."""
    settings, content = read_settings(Path(folder)), load_file(Path(folder) / "model.pt")
    try:
        model = SmartBert(Bert(BertConfig(**content["config"])), content["classes"])
        model.load_state_dict(content["model"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        raise UserError(f"{folder}/model.pt is of another version of this code, or is damaged: "
                        f"train again with --overwrite")
    return settings, model.to(device).eval()


def save_checkpoint(out: Path, model: SmartBert, optimizer: torch.optim.Optimizer,
                    state: dict) -> None:
    """Write log.jsonl and checkpoint.pt, which holds all that a run needs to continue. state: the
    epochs done (of both phases), the best of phase 1 and, until phase 2, its weights, the log. The
    first process writes for all."""
    rank, world = processes()
    random = [[source.get_rng_state() for source in random_sources(model)]] * world
    if world > 1:
        distributed.all_gather_object(random, random[0])
    if rank == 0:
        lines = "".join(json.dumps(record) + "\n" for record in state["log"])
        data.atomic_write(out / "log.jsonl", lambda file: file.write(lines.encode()))
        save(out / "checkpoint.pt", state=state, model=model.state_dict(), random=random,
             optimizer=optimizer.state_dict())


def random_sources(model: SmartBert) -> list:
    """Where dropout takes its random numbers from: the CPU and the model's GPU (torch.cuda or
    torch.mps)."""
    kind = next(model.parameters()).device.type
    return [torch] + [getattr(torch, kind)] * (kind != "cpu")


def load_checkpoint(out: Path, model: SmartBert, settings: Settings, schedule: list) -> tuple:
    """The state and the optimizer of a run; its weights go into the model."""
    checkpoint = load_file(out / "checkpoint.pt")
    try:
        state = checkpoint["state"]
        model.load_state_dict(checkpoint["model"])
        optimizer = make_optimizer(model, settings, schedule[state["done"] - 1][0])
        optimizer.load_state_dict(checkpoint["optimizer"])
        random, (rank, world) = checkpoint["random"], processes()
        if len(random) != world:
            raise ValueError
        for source, random_state in zip(random_sources(model), random[rank], strict=True):
            source.set_rng_state(random_state)
        return state, optimizer
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError):
        raise UserError(f"{out}/checkpoint.pt is damaged, or of another version, other weights, "
                        f"another device or number of processes: start over with --overwrite")


def of_result(settings: Settings) -> dict:
    """The settings that affect a run's result; of the weights only the folder's name."""
    kept = {name: value for name, value in vars(settings).items() if name not in NOT_IN_RESULT}
    return kept | {"weights": settings.weights and Path(settings.weights).name}


# --- From the command line ----------------------------------------------------------------------

def join_processes() -> None:
    """Join the process group if torchrun started this process (it sets LOCAL_RANK)."""
    if "LOCAL_RANK" not in os.environ or distributed.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    kinds = "cpu:gloo,cuda:nccl" if distributed.is_nccl_available() else "gloo"
    distributed.init_process_group(kinds)


def processes() -> tuple[int, int]:
    """The number of this process and how many there are; (0, 1) without torchrun."""
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def open_streams() -> None:
    """Discard output to a closed stream; replace what a console cannot print with a ?."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")


def say(text: str, file=None) -> None:
    """Print a line, from the first process. A run must not die because nobody reads it."""
    try:
        if processes()[0] == 0:
            print(text, file=file, flush=True)
    except BrokenPipeError:
        setattr(sys, "stdout" if file is None else "stderr", open(os.devnull, "w"))


def parse(arguments: list[str] | None) -> Settings:
    """The settings from the command line, over the task's recipe, over the defaults."""
    first = argparse.ArgumentParser(add_help=False)     # --task and --recipe decide the defaults
    first.add_argument("--task", default="toy")
    first.add_argument("--recipe")
    known = first.parse_known_args(arguments)[0]
    recipe = RELEASE if known.recipe == "release" else RECIPES.get(known.task, {})
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     usage="%(prog)s [--SETTING VALUE ...]   (--help lists them)",
                                     argument_default=argparse.SUPPRESS)
    for f in fields(Settings):
        name, help = "--" + f.name.replace("_", "-"), f.metadata["help"]
        kind, default = getattr(f.type, "__args__", (f.type,))[0], recipe.get(f.name, f.default)
        help = help.split(" (default")[0] if f.name in recipe else help
        if kind is bool:                                                # str | None: str
            parser.add_argument(name, action="store_true", help=help)
        else:
            default = "" if default is None else f" (default: {default})"
            parser.add_argument(name, type=kind, help=help + default)
    given = vars(parser.parse_args(arguments))
    settings = Settings(**recipe | given)
    if {"budget", "lam"} <= given.keys():
        raise UserError("--lam is the paper's penalty, --budget ours: give one of them")
    if "budget" in given:                               # --recipe release has a lambda
        settings.lam = None
    if settings.task == "toy" and settings.data_dir:
        raise UserError("--data-dir means nothing to the toy task: name a task with --task")
    if settings.resume and settings.overwrite:
        raise UserError("--resume continues a run, --overwrite replaces it: give one of them")
    foreign = set() if settings.method == "smartbert" else SMARTBERT_ONLY & given.keys()
    if given.get("epochs2") and settings.method in METHODS and not settings.has_phase2:
        foreign.add("epochs2")
    if foreign:
        raise UserError(f"--{min(foreign).replace('_', '-')} means nothing to --method "
                        f"{settings.method}: leave it out")
    return settings


def main(arguments: list[str] | None = None) -> None:
    open_streams()
    try:
        join_processes()
        out = train(parse(arguments))
        say(f"now: python eval.py {out}")
    except (UserError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.cuda.OutOfMemoryError:
        print("train.py: the GPU's memory is too small: lower --batch-size or --max-length",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ntrain.py: stopped; the same command with --resume, without --overwrite, "
              "continues after the last whole epoch", file=sys.stderr)
        sys.exit(130)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
