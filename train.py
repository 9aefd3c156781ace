"""Train SmartBERT in its two phases, or plain BERT.

    python train.py                                                      # the toy task, offline
    python train.py --task rte --weights google-bert/bert-base-uncased   # downloaded once
    python train.py --task cola --weights ~/e5-small --data-dir ~/glue --lr 1e-4    # own folders
    python train.py --task cola --weights ~/e5-small --lr 1e-4 --method bert        # the baseline

Phase 1 trains encoder, gates, last head and projections; phase 2 only the other heads.

A run's folder: model.pt (settings, log, weights), run.json (settings, log), tokenizer.json.
Below, run is a Run, model a SmartBert; training and validation are encoded Splits.
"""

import argparse
import copy
import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

# oneDNN caches kernels for each batch shape: for RTE in bf16 on a CPU, over a gigabyte.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
import torch
from torch import distributed, nn
from tqdm import tqdm

from bert import Bert, BertConfig, load_bert
from data import (MADE_BY, TASKS, TOY_BERT, UserError, atomic_write, check_folder, claim_folder,
                  collate, digest, encode, fetch_weights, hold_out, in_words, load_task,
                  load_tokenizer, one_line_errors, pools, scores, toy_tokenizer,
                  training_batches, write_text)
from smartbert import SmartBert, infer_pools, phase1_loss, phase2_loss


# --- Settings -----------------------------------------------------------------------------------

# Each task's changes to `make_parser`'s defaults. GLUE's were tuned with 12 layers of width 384.
BY_TASK = {
    # The toy starts from random weights, so it gets a higher rate, more epochs, a larger budget.
    "toy": dict(batch_size=32, lr=5e-4, epochs1=16, epochs2=4, budget=0.65, gates_from=0.4,
                full_from=0.75, full_share=0.25),
    # Both are learned late, so they get more epochs, and gates that start later and learn slowly.
    "cola": dict(epochs1=8, lr_gates=3e-4, gates_from=0.4, full_from=0.7),
    "rte": dict(epochs1=8, lr_gates=3e-4, gates_from=0.4, full_from=0.7),
    # Both are large, so they get fewer epochs; SST-2 also gets a smaller budget. (QQP: not tuned.)
    "sst2": dict(batch_size=32, epochs1=3, epochs2=1, gates_from=0.25, budget=0.4),
    "mnli": dict(epochs1=3, epochs2=1, gates_from=0.25),
}
# `--recipe release` replaces our values by these, from the authors' run.sh and main.py for RTE.
AUTHORS = dict(
    lam=0.04, budget=1.0,               # the paper's penalty instead of our budget
    soft_epochs=3,                      # our gates are hard from the start, as in inference
    gate_bias=0.0,                      # g starts near 1/2, so no layer's output counts fully
    gates_from=0.0, full_from=0.0,      # gates learn at once, before the task is learned
    full_share=0.0,                     # every example obeys its gates
    lr=2e-5, lr_new=2e-5, lr_gates=2e-5,    # all modules learn at the same rate
    warmup=0.014,                       # the rates rise for 10 steps of RTE
    epochs2=4,                          # our default is 2
)
FREE = {"data_dir", "out", "device", "resume", "overwrite"}     # these change no result
WEIGHTS = "google-bert/bert-base-uncased"
METHODS = ("smartbert", "exits", "bert")
# Under torchrun: how many processes there are, and which one this is.
LAUNCH = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {"WORLD_SIZE": 1, "RANK": 0}
WORLD, RANK = int(LAUNCH["WORLD_SIZE"]), int(LAUNCH["RANK"])
DEVICES = [name for name, gpu in (("cuda", torch.cuda), ("mps", torch.backends.mps))
           if gpu.is_available()] + ["cpu"]


# --- A run --------------------------------------------------------------------------------------

@dataclass
class Run:
    """What model.pt holds besides the weights: what is trained, and how far training is."""
    folder: Path
    settings: argparse.Namespace
    digest: str                         # of the training set
    gates: bool                         # whether the run has gates
    exits: bool                         # whether the run has exits
    criterion: str = "entropy"          # by which examples exit
    config: dict | None = None          # the encoder's shape: BertConfig's fields
    phase: int = 1
    epoch: int = 0                      # finished epochs of this phase
    finished: bool = False
    log: list[dict] = field(default_factory=list)
    best: dict = field(default_factory=lambda: dict(rank=-1, score=0, layers=0, weights={}))
    optimizer: dict | None = None       # its state, while a phase lasts


# --- The baseline -------------------------------------------------------------------------------

def train_bert(run, model, training, validation):
    """Fine-tune plain BERT with the same small head; the validation split selects the epoch."""
    settings = run.settings
    rates = {"encoder": (model.bert, settings.lr), "head": (model.heads[-1], settings.lr_new)}
    optimizer = make_optimizer(model, rates, run.optimizer)
    while run.epoch < settings.epochs1:
        model.train()
        log = []
        for step, steps, batch in draw_batches(run, training, settings.epochs1):
            set_rates(optimizer, warmup_decay(step, steps, settings.warmup))
            with autocast(settings):
                loss = nn.functional.cross_entropy(model(*batch.inputs), batch.labels)
            log.append(update(model, {"loss": loss}, optimizer))
        end_epoch(run, model, optimizer, log, validation)


# --- Phase 1: encoder, gates and last head ------------------------------------------------------

def train_phase1(run, model, training, validation):
    """Phase 1: encoder, last head and projections learn, and gates if the run has them."""
    settings = run.settings
    rates = {"encoder": (model.bert, settings.lr), "head": (model.heads[-1], settings.lr_new),
             "projections": (model.projections, settings.lr_new)}
    if run.gates:
        rates["gates"] = (model.gates, settings.lr_gates)
    optimizer = make_optimizer(model, rates, run.optimizer)
    while run.epoch < settings.epochs1:
        model.train()
        log = []
        for step, steps, batch in draw_batches(run, training, settings.epochs1):
            # The gates rest first and learn later. Each period has its own warm-up and decay.
            start = math.ceil(settings.gates_from * steps) if run.gates else 0
            if step < start:
                set_rates(optimizer, warmup_decay(step, start, settings.warmup), resting="gates")
            else:
                set_rates(optimizer, warmup_decay(step - start, steps - start, settings.warmup))
            lam, budget = penalty_at(run, step / steps)
            with autocast(settings):
                parts = phase1_loss(model, *batch.inputs, batch.labels, lam=lam, budget=budget,
                                    hard=run.epoch >= settings.soft_epochs, eta1=settings.eta1,
                                    full_share=settings.full_share)
            log.append(update(model, parts, optimizer))
        end_epoch(run, model, optimizer, log, validation)


def penalty_at(run, progress):
    """Return lambda and the budget at `progress`, from 0 to 1, of phase 1. Before `gates_from`
    there is no penalty, because gates that skip too early ruin the encoder. After it, lambda is
    constant. If lambda is 0, the budget falls linearly from 1 until `full_from` instead."""
    settings = run.settings
    if progress < settings.gates_from or not run.gates:
        return 0.0, 1.0
    if settings.lam > 0:
        return settings.lam, 1.0
    span = max(settings.full_from - settings.gates_from, 1e-9)
    part = min((progress - settings.gates_from) / span, 1.0)
    return 0.0, 1 - (1 - settings.budget) * part


def keep_best(run, model, result):
    """Keep this epoch's weights unless an earlier epoch has a higher rank or, at equal rank, a
    higher score or, at equal score, fewer layers."""
    best, layers = run.best, result["layers"]
    score = result[TASKS[run.settings.task].metrics[0]]
    rank = gate_rank(run, layers / len(model.gates))
    if rank != best["rank"]:
        better = rank > best["rank"]
    elif score != best["score"]:
        better = score > best["score"]
    else:
        better = layers <= best["layers"]
    if better:
        run.best = {"rank": rank, "score": score, "layers": layers,
                    "weights": copy.deepcopy(model.state_dict())}


def gate_rank(run, share):
    """Rank 2: the run has no gates, or lambda is 0 and the share of layers run <= 1.1 * budget.
    Rank 1: the penalty had full strength before the epoch ended. Rank 0: all else, and soft gates
    before hard ones. The rank counts before the score: epochs score best before gates skip."""
    settings = run.settings
    if not run.gates:
        return 2
    if run.epoch < settings.soft_epochs < settings.epochs1:     # hard gates are still to come
        return 0
    full_at = settings.gates_from                       # lambda is full at once
    if settings.lam == 0:
        full_at = max(settings.gates_from, settings.full_from)
        if share <= 1.1 * settings.budget:
            return 2
    return int((run.epoch + 1) / settings.epochs1 > full_at)


# --- Phase 2: the other exit heads --------------------------------------------------------------

def train_phase2(run, model, training, validation):
    """Phase 2: only heads 1 .. L-1 learn, the rest is frozen. The last epoch is kept."""
    settings, heads = run.settings, model.heads[:-1]
    optimizer = make_optimizer(model, {"heads": (heads, settings.lr_new)}, run.optimizer)
    while run.epoch < settings.epochs2:
        model.eval()                                    # no dropout in what is frozen
        heads.train()
        log = []
        for step, steps, batch in draw_batches(run, training, settings.epochs2):
            set_rates(optimizer, warmup_decay(step, steps, settings.warmup))
            with autocast(settings):
                parts = phase2_loss(model, *batch.inputs, batch.labels, eta2=settings.eta2,
                                    full_share=settings.full_share)
            log.append(update(model, parts, optimizer))
        end_epoch(run, model, optimizer, log, validation)


# --- What the training loops share --------------------------------------------------------------

def autocast(settings):
    """The context in which a model computes: bfloat16 with --bf16."""
    return torch.autocast(settings.device, torch.bfloat16, enabled=settings.bf16)


def make_optimizer(model, rates, state):
    """Make AdamW for the modules in rates, which maps a name to (module, learning rate). All other
    parameters are frozen. A resumed run passes the state of its optimizer."""
    model.requires_grad_(False)
    groups = []
    for name, (module, lr) in rates.items():
        module.requires_grad_(True)
        matrices = [p for p in module.parameters() if p.dim() > 1]
        vectors = [p for p in module.parameters() if p.dim() == 1]      # biases and LayerNorm
        groups.append({"params": matrices, "name": name, "peak": lr, "weight_decay": 0.01})
        groups.append({"params": vectors, "name": name, "peak": lr, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, fused=True)
    if state is not None:
        optimizer.load_state_dict(state)
    return optimizer


def warmup_decay(step, steps, warmup):
    """The factor of all learning rates. It rises linearly over a share `warmup` of the steps, then
    falls. Step 0 takes the factor of step 1, because its own would be 0."""
    rising = max(step, 1) / max(warmup * steps, 1e-9)
    falling = (steps - step) / ((1 - warmup) * steps)
    return min(rising, falling, 1.0)


def set_rates(optimizer, factor, resting=None):
    """Set each learning rate to `factor` times its peak, or to 0 in groups named `resting`."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if group["name"] == resting else factor * group["peak"]


def draw_batches(run, training, epochs):
    """Yield (step, steps, batch) for each batch of the next epoch. The step counts from the start
    of the phase, which has `steps` steps. Under torchrun a batch holds this process's rows only.
    The seeds set here fix all randomness of the epoch, so resuming does not change the result."""
    settings = run.settings
    seed = settings.seed + run.epoch + settings.epochs1 * (run.phase - 1)
    torch.manual_seed(1000 * seed + RANK)
    order = training_batches(training, settings.batch_size, seed)
    order = [rows[RANK::WORLD] for rows in order if len(rows) >= WORLD]
    bar = tqdm(order, desc=f"phase {run.phase} epoch {run.epoch + 1}", leave=False, disable=None)
    for step, rows in enumerate(bar, start=run.epoch * len(order)):
        yield step, epochs * len(order), collate(training, rows, settings.device)


def update(model, parts, optimizer):
    """Take one optimizer step on parts["loss"] and return the parts for the log. Under torchrun
    the processes average their gradients. Raises UserError if the gradient is not finite."""
    parts["loss"].backward()
    trained = [p for p in model.parameters() if p.grad is not None]
    if WORLD > 1:
        for p in trained:
            distributed.all_reduce(p.grad)
            p.grad /= WORLD
    norm = nn.utils.clip_grad_norm_(trained, 1.0)
    if not norm.isfinite():
        raise UserError(f"training diverged, the gradient is {norm.item()}: start over with "
                        f"--overwrite and a lower --lr or --lr-new")
    optimizer.step()
    optimizer.zero_grad()
    return {name: part.detach() for name, part in parts.items()}


def end_epoch(run, model, optimizer, log, validation):
    """Judge the epoch on validation, log the result and the means over its steps, store the run,
    print a line. Under torchrun every process judges it, so all keep the same epoch."""
    settings = run.settings
    task = TASKS[settings.task]
    # The threshold is for the log only: eval.py chooses one.
    threshold = 0.5 * math.log(len(task.labels)) if run.phase == 2 else None
    with autocast(settings):
        outcome = infer_pools(model, pools(validation, settings.device), skip=run.gates,
                              threshold=threshold)
    result = scores(task, outcome.logits.argmax(1).tolist(), validation.labels)
    result["layers"] = outcome.ran.sum(1).float().mean().item()
    if run.phase == 1:
        keep_best(run, model, result)
    run.epoch += 1
    entry = {"phase": run.phase, "epoch": run.epoch, validation.name: result}
    for part in log[0]:
        entry[part] = torch.stack([parts[part] for parts in log]).mean(0).tolist()
    run.log.append(entry)
    run.optimizer = optimizer.state_dict()
    save_run(run, model)
    metric = task.metrics[0]
    print(f"phase {run.phase} epoch {run.epoch}  loss {entry['loss']:.3f}  {validation.name} "
          f"{metric} {result[metric]:.3f} with {result['layers']:.1f} of {len(model.gates)} "
          f"layers", flush=True)


# --- A run's folder: a student may stop reading here --------------------------------------------

def start_run(run):
    """Write a run of 0 epochs into its folder, which no other run may use."""
    settings = run.settings
    task = TASKS[settings.task]
    torch.manual_seed(settings.seed)
    if task.name == "toy":
        tokenizer = toy_tokenizer()
        bert = Bert(BertConfig(vocab_size=tokenizer.get_vocab_size(), **TOY_BERT))
    else:
        folder = fetch_weights(settings.weights)
        try:
            tokenizer, bert = load_tokenizer(folder), load_bert(folder)
        except Exception as error:                      # ours, and what the libraries raise
            raise UserError(f"{folder}: {in_words(error)}") from error
    words, config = max(tokenizer.get_vocab().values()) + 1, bert.config
    if words > config.vocab_size or settings.max_length > config.max_position_embeddings:
        raise UserError(f"these weights have {config.vocab_size} words, the tokenizer {words}; "
                        f"--max-length can be {config.max_position_embeddings} at most")
    # A run without gates still has the modules. Their bias makes g almost 0, so every layer runs.
    model = SmartBert(bert, len(task.labels), settings.gate_bias if run.gates else -30.0)
    run.config = vars(config)
    claim_folder(run.folder, settings.overwrite)
    write_text(run.folder / "tokenizer.json", tokenizer.to_str())
    save_run(run, model)


def save_run(run, model):
    """Write model.pt, then run.json, each whole or not at all. The first process does it."""
    stored = vars(run) | {"settings": vars(run.settings), "folder": str(run.folder)}
    content = {"run": stored, "weights": model.state_dict()}
    shown = json.dumps(stored | {"best": None, "optimizer": None}, indent=1).removeprefix("{")
    if RANK == 0:
        atomic_write(run.folder / "model.pt", lambda file: torch.save(content, file))
        write_text(run.folder / "run.json", f"{MADE_BY}, {shown}\n")   # MADE_BY has the brace


def load_run(folder, device):
    """A run and its model, in eval mode. Raises UserError."""
    path = Path(folder) / "model.pt"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        run = Run(**content["run"])
        run.folder, run.settings = Path(folder), argparse.Namespace(**run.settings)
        run.settings.device = device
        classes = len(TASKS[run.settings.task].labels)
        model = SmartBert(Bert(BertConfig(**run.config)), classes)
        model.load_state_dict(content["weights"])
    except Exception as error:              # of the system, or of what reads a damaged file
        raise UserError(f"no run of this version in {path}: {in_words(error)}") from error
    return run, model.to(device).eval()


def check_data(run, whole):
    """Raise UserError if the run was trained on a different training set."""
    if run.digest != digest(whole):
        raise UserError(f"{run.folder} was made from another train.tsv: restore it, or start over")


# --- From the command line ----------------------------------------------------------------------

def within(kind, low, high):
    """An argparse type: a number from low to high."""
    def number(text):
        if not low <= kind(text) <= high:               # true for NaN as well
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)
    return number


def make_parser(methods):
    """All settings. Greek names are the paper's symbols."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False,
        usage="%(prog)s [--SETTING VALUE ...]   (--help lists them)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    either = parser.add_mutually_exclusive_group().add_argument
    fraction, under_1, rate = within(float, 0, 1), within(float, 0, 0.99), within(float, 0, 1e9)
    count, positive = within(int, 0, 10**9), within(int, 1, 10**9)
    add("--task", default="toy", choices=TASKS, help="a task of GLUE, or the toy")
    add("--method", default=methods[0], choices=methods, help="exits: SmartBERT without gates")
    add("--recipe", default="ours", choices=["ours", "release"], help="our or the authors' values")
    add("--weights", default=WEIGHTS, help="a folder, or a name on the hub")
    add("--data-dir", help="folder with GLUE's files; without it they are downloaded")
    add("--out", help="the run's folder")
    # what makes the gates skip: either the budget or lambda
    either("--budget", type=fraction, default=0.5, help="share of layers allowed without penalty")
    either("--lam", type=rate, default=0.0, help="lambda of the paper's penalty; 0: the budget")
    add("--gate-bias", type=within(float, -100, 100), default=-2.0, help="initial; -2: g = .12")
    add("--gates-from", type=under_1, default=0.3, help="share of phase 1 before the gates learn")
    add("--full-from", type=under_1, default=0.6, help="share of phase 1 until --budget holds")
    add("--full-share", type=fraction, default=0.0, help="share of rows that ignore their gates")
    add("--soft-epochs", type=count, default=0, help="epochs of phase 1 with soft gates")
    # the contrast; 0: none
    add("--eta1", type=fraction, default=0.01, help="eta_1, weight of phase 1's contrast")
    add("--eta2", type=fraction, default=0.05, help="eta_2, weight of phase 2's contrast")
    # the optimisation
    add("--epochs1", type=positive, default=5, help="epochs of phase 1")
    add("--epochs2", type=count, default=2, help="epochs of phase 2; 0: no exits")
    add("--batch-size", type=within(int, WORLD, 10**9), default=16, help="examples per step")
    add("--lr", type=rate, default=3e-5, help="the encoder's learning rate (1e-4 suits H = 384)")
    add("--lr-new", type=rate, default=1e-3, help="learning rate of heads and projections")
    add("--lr-gates", type=rate, default=1e-3, help="learning rate of the gates")
    add("--warmup", type=under_1, default=0.06, help="share of a schedule in which rates rise")
    add("--max-length", type=within(int, 8, 10**9), default=128, help="tokens per example")
    add("--held-out", type=under_1, default=0.1, help="share of train kept for validation")
    add("--limit", type=positive, help="use only the first LIMIT training examples")
    add("--seed", type=count, default=50, help="of weights, order, dropout, held-out rows")
    # the machine
    add("--device", default=DEVICES[0], choices=DEVICES, help="where to run")
    add("--bf16", action="store_true", help="bfloat16: for GPUs, and CPUs with AMX or AVX512-BF16")
    add("--resume", action="store_true", help="continue a stopped run after its last whole epoch")
    add("--overwrite", action="store_true", help="replace the run in the folder")
    return parser


def parse(arguments, methods=METHODS):
    """The settings. The command line overrides the task or recipe, which override the defaults."""
    parser = make_parser(methods)
    # --task, --method and --recipe decide the defaults, which --help should show.
    known = parser.parse_args([word for word in arguments if word not in ("-h", "--help")])
    changes = AUTHORS if known.recipe == "release" else BY_TASK.get(known.task, {})
    out = f"runs/{known.task}-{known.method}".removesuffix("-smartbert")
    parser.set_defaults(out=out, **changes)
    settings = parser.parse_args(arguments)             # again, over the task's defaults
    if settings.budget is not parser.get_default("budget"):     # it is named
        settings.lam = 0.0                                      # and replaces the authors' lambda
    if "" in vars(settings).values():
        parser.error("a flag has an empty value: leave it out, or set the variable it takes")
    if settings.task == "toy" and (settings.data_dir, settings.weights) != (None, WEIGHTS):
        parser.error("--data-dir and --weights mean nothing to the toy: name a task with --task")
    return settings


def join_processes(device):
    """Join torchrun's process group, if there is one; only the first writes to stdout."""
    if WORLD > 1:
        backend = "gloo"
        if device == "cuda" and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
            backend = "nccl"                            # a GPU for every process
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group(backend)
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")


def prepare(settings, **kind):
    """The run in the folder (a new one, unless it is resumed), its model, the encoded training set
    and the encoded split that judges epochs. kind: Run's fields gates, exits, criterion."""
    folder = Path(settings.out).expanduser()
    # Under torchrun only the first process checks and makes the folder; the others wait below.
    exists = RANK > 0 or check_folder(folder, settings.resume, settings.overwrite)
    splits = load_task(settings.task, settings.data_dir)
    training, validation = hold_out(splits["train"], settings.held_out, settings.seed,
                                    settings.limit)
    if not validation:
        validation = splits[TASKS[settings.task].devs[0]]
        print(f"warning: nothing is held out: {validation.name} selects the epoch and is reported")
    if not exists:
        start_run(Run(folder, settings, digest(splits["train"]), **kind))
    if WORLD > 1:
        distributed.barrier()
    run, model = load_run(folder, settings.device)
    before, now = vars(run.settings), vars(settings)
    changed = [name for name in now if name not in FREE and before.get(name) != now[name]]
    if changed:
        raise UserError(f"{folder} was started with {changed[0]} = {before.get(changed[0])}, "
                        f"not {now[changed[0]]}: resume with the same settings")
    check_data(run, splits["train"])
    if model.bert.config.hidden_size <= 64:     # so tiny that a second thread gains nothing
        torch.set_num_threads(1)                # (one gives the same sums on every machine)
    tokenizer = load_tokenizer(folder)
    training = encode(tokenizer, training, settings.max_length)
    return run, model, training, encode(tokenizer, validation, settings.max_length)


def train(settings):
    """Both phases, or the baseline; returns the run's folder."""
    run, model, training, validation = prepare(
        settings, gates=settings.method == "smartbert",
        exits=settings.method != "bert" and settings.epochs2 > 0)
    if run.phase == 1:
        if settings.method == "bert":
            train_bert(run, model, training, validation)
        else:
            train_phase1(run, model, training, validation)
        model.load_state_dict(run.best["weights"])
        run.phase, run.epoch, run.optimizer, run.best = 2, 0, None, {}
    if run.exits:
        train_phase2(run, model, training, validation)
    run.finished, run.optimizer = True, None
    save_run(run, model)
    return run.folder


def main(arguments=sys.argv[1:]):
    settings = parse(arguments)
    with one_line_errors("train.py"):
        join_processes(settings.device)
        folder = train(settings)
        print(f"now: python eval.py {folder}")


if __name__ == "__main__":
    main()
