"""Train an earlier method of early exit, to compare SmartBERT with: DeeBERT, FastBERT, PABEE or
BERxiT. Encoder, heads, data, learning rates and the choice of the epoch are SmartBERT's.

    python results/rivals.py --method deebert                       # the toy; then eval.py its run
    python results/rivals.py --method fastbert --from-run runs/toy-bert
    python results/rivals.py --method pabee     # then results/criteria.py RUN --criterion patience

Flags are train.py's, and --from-run RUN: encoder and last head are those of a finished BERT
(train.py --method bert) of the same task and data. DeeBERT and FastBERT then skip phase 1, which
is a plain BERT's.
"""

import argparse
import sys
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import UserError, load_task, one_line_errors
from smartbert import SmartBert
from train import (autocast, check_data, draw_batches, end_epoch, join_processes, load_run,
                   make_optimizer, parse, prepare, save_run, set_rates, train_bert, update,
                   warmup_decay)


# --- The losses ---------------------------------------------------------------------------------

# inputs: ids, segment_ids, mask, each (B, S); labels (B,); step: from 0, for BERxiT alone. Each
# loss is a scalar. CE_i: the cross-entropy of head i, which reads h_i.

def every_head(model: SmartBert, inputs: tuple) -> list[Tensor]:
    """The logits of all heads without gates, each (B, C)."""
    _, *hiddens = model.bert(*inputs)                                       # h_1 .. h_L
    return [head(h, inputs[2])[0] for head, h in zip(model.heads, hiddens)]


def deebert_loss(model, inputs, labels, step):
    """sum_i CE_i for i < L: the second stage of DeeBERT (Xin et al. 2020; castorini/DeeBERT), with
    encoder and last head frozen. SmartBERT's phase 2 adds the contrast, and its gates choose the
    path."""
    *early, _ = every_head(model, inputs)
    return sum(F.cross_entropy(logits, labels) for logits in early)


def fastbert_loss(model, inputs, labels, step):
    """sum_i KL( p_L || p_i ) for i < L: FastBERT's self-distillation (Liu et al. 2020), in the
    direction of its code (autoliuweijie/FastBERT, run_fastbert.py). The heads learn the last
    head's answer p_L; labels are not used."""
    *early, last = every_head(model, inputs)
    teacher = last.detach().log_softmax(-1)
    return sum(F.kl_div(logits.log_softmax(-1), teacher, reduction="batchmean", log_target=True)
               for logits in early)


def pabee_loss(model, inputs, labels, step):
    """sum_i i CE_i / sum_i i: one stage for encoder and heads, later heads weigh more (PABEE, Zhou
    et al. 2020; JetRunner/PABEE, modeling_bert.py)."""
    losses = [F.cross_entropy(logits, labels) for logits in every_head(model, inputs)]
    weighted = sum(i * loss for i, loss in enumerate(losses, start=1))
    return weighted / sum(range(1, len(losses) + 1))


def berxit_loss(model, inputs, labels, step):
    """CE_L in even steps, sum_i CE_i in odd ones: one stage, in which alternating keeps the other
    heads from disturbing the last one (BERxiT, Xin et al. 2021; castorini/berxit,
    modeling_highway_bert.py, strategy "alternate")."""
    if step % 2 == 0:
        return F.cross_entropy(model(*inputs), labels)
    return sum(F.cross_entropy(logits, labels) for logits in every_head(model, inputs))


LOSSES = {"deebert": deebert_loss, "fastbert": fastbert_loss, "pabee": pabee_loss,
          "berxit": berxit_loss}
TWO_STAGES, ONE_STAGE = ("deebert", "fastbert"), ("pabee", "berxit")


# --- Training -----------------------------------------------------------------------------------

def train_heads(run, model, training, validation):
    """The stage in which heads learn, from the run's last whole epoch on: together with the
    encoder in phase 1, or in phase 2 alone, those before the last."""
    settings, loss_of = run.settings, LOSSES[run.settings.method]
    rates, epochs = {"heads": (model.heads[:-1], settings.lr_new)}, settings.epochs2
    if run.phase == 1:
        rates = {"encoder": (model.bert, settings.lr), "heads": (model.heads, settings.lr_new)}
        epochs = settings.epochs1
    optimizer = make_optimizer(model, rates, run.optimizer)
    while run.epoch < epochs:
        model.eval()                                    # no dropout in what is frozen
        for module, _ in rates.values():
            module.train()
        log = []
        for step, steps, batch in draw_batches(run, training, epochs):
            set_rates(optimizer, warmup_decay(step, steps, settings.warmup))
            with autocast(settings):
                loss = loss_of(model, batch.inputs, batch.labels, step)
            log.append(update(model, {"loss": loss}, optimizer))
        end_epoch(run, model, optimizer, log, validation)


def finished_bert(settings):
    """The run of --from-run and its model. Raises UserError unless it is a BERT that has seen
    neither other data than this run will, nor what is held out here."""
    former, model = load_run(settings.from_run, settings.device)
    if former.settings.method != "bert" or not former.finished:
        raise UserError(f"--from-run {settings.from_run} is not a finished BERT: train one with "
                        f"train.py --method bert")
    for name in ("task", "held_out", "seed", "limit"):
        theirs, ours = getattr(former.settings, name), getattr(settings, name)
        if theirs != ours:
            raise UserError(f"--from-run {settings.from_run} has {name} = {theirs}, not {ours}: "
                            f"it held out other rows, so take the same")
    check_data(former, load_task(settings.task, settings.data_dir)["train"])
    return former, model


def train(settings):
    """All stages of a method; returns the run's folder."""
    method, former = settings.method, None
    criterion = "entropy"
    if settings.from_run is not None:
        former, bert = finished_bert(settings)
        settings.weights = former.settings.weights      # for the tokenizer
    if method == "pabee":
        criterion = "patience"
    exits = method in ONE_STAGE or settings.epochs2 > 0
    run, model, training, validation = prepare(settings, gates=False, exits=exits,
                                               criterion=criterion)
    if former is not None and (run.phase, run.epoch) == (1, 0):
        model.bert.load_state_dict(bert.bert.state_dict())
        model.heads[-1].load_state_dict(bert.heads[-1].state_dict())
        if method in TWO_STAGES:
            run.phase = 2                               # the BERT's training is their phase 1
    if run.phase == 1:
        if method in TWO_STAGES:
            train_bert(run, model, training, validation)
        else:
            train_heads(run, model, training, validation)
        model.load_state_dict(run.best["weights"])
        run.phase, run.epoch, run.optimizer, run.best = 2, 0, None, {}
    if method in TWO_STAGES:
        train_heads(run, model, training, validation)
    run.finished, run.optimizer = True, None
    save_run(run, model)
    return run.folder


def parse_all(arguments):
    """train.py's settings, and from_run."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from-run", metavar="RUN", help="a finished BERT")
    own, others = parser.parse_known_args(arguments)
    settings = parse(others, methods=tuple(LOSSES))
    settings.from_run = own.from_run
    return settings


def main(arguments=sys.argv[1:]):
    settings = parse_all(arguments)
    with one_line_errors("rivals.py"):
        join_processes(settings.device)
        folder = train(settings)
        evaluate = "eval.py"
        if settings.method == "pabee":
            evaluate = "results/criteria.py --criterion patience"
        print(f"now: python {evaluate} {folder}")


if __name__ == "__main__":
    main()
