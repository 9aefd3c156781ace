"""Train SmartBERT in its two phases, or plain BERT with the same recipe.

    python train.py                                                        # the toy task, offline, to runs/toy
    python train.py --task rte --weights google-bert/bert-base-uncased     # GLUE and weights are downloaded once
    python train.py --task cola --weights ~/e5-small --data_dir ~/glue     # or come from folders of yours
    python train.py --task cola --weights ~/e5-small --method bert         # the baseline

Phase 1 trains backbone, gates, last head and projections; phase 2 freezes them and trains the other heads (the paper's
two training phases; the release's main.py:60-130). The best epoch is picked on a part of the training set that is held
out; the dev set is only reported. A run's folder holds settings.json, log.jsonl, vocab.txt and, at the end, model.pt.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import eval as evaluation
from bert import Bert, BertConfig, WeightsError, load_bert
from data import DataError
from eval import RunError
from smartbert import SmartBert, budget_push, lambda_push, phase1_loss, phase2_loss


def flag(default, help: str):
    """A setting that is also a command-line flag; the help says why this value, with the paper's symbol."""
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
    budget: float = flag(0.5, "share of the layers to run: the gates are pushed until the average meets it")
    budget_weight: float = flag(10.0, "how hard the budget pushes")
    lam: float | None = flag(None, "lambda, the paper's push, instead of a budget (the release's value for RTE: 0.04)")
    gate_bias: float = flag(-2.0, "where the gates start: g = .12, layers run at first; the release starts at 0")
    push_start: float = flag(0.2, "share of phase 1 before the budget pushes: first the task, then the saving")
    push_full: float = flag(0.6, "share of phase 1 after which the budget is the full one")
    soft_epochs: int = flag(0, "epochs of phase 1 with soft gates; the release: 3 of 5")
    # the contrast
    eta1: float = flag(0.01, "eta_1, weight of phase 1's contrast")
    eta2: float = flag(0.05, "eta_2, weight of phase 2's contrast")
    tau1: float = flag(0.5, "tau_1, temperature of phase 1's contrast")
    tau2: float = flag(0.55, "tau_2, temperature of phase 2's contrast")
    # the optimisation
    epochs1: int = flag(5, "epochs of phase 1")
    epochs2: int = flag(3, "epochs of phase 2")
    batch_size: int = flag(32, "rows a step")
    lr: float = flag(1e-4, "learning rate of the backbone")
    lr_new: float = flag(1e-3, "learning rate of what starts from nothing: gates, heads, projections")
    warmup: float = flag(0.06, "share of a phase's steps in which the learning rate rises; then it falls to 0")
    weight_decay: float = flag(0.01, "AdamW's; not on biases and LayerNorm")
    clip: float = flag(1.0, "largest norm of the gradient")
    dropout: float = flag(0.1, "of hidden states and attention")
    max_length: int = flag(128, "tokens of an example; longer ones are cut")
    held_out: float = flag(0.1, "share of the training set on which the best epoch is picked")
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


# What a task wants otherwise than the defaults above.
RECIPES = {
    "toy": dict(lr=1e-3, batch_size=64, epochs1=10, epochs2=4, dropout=0.0),
}
