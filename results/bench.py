"""How fast: each ratio side by side in one process, in turn, the median of several rounds.

    python results/bench.py --weights FOLDER --data-dir FOLDER          # FOLDER/RTE, FOLDER/SST-2
    python results/bench.py --weights FOLDER --data-dir FOLDER --runs runs/rte runs/sst2

Hugging Face's transformers is the peer where it is installed; without it those rows are left out.
A ratio above 1 means that ours is faster. With --runs: dynamic inference of trained runs, speed-up
in seconds over speed-up in FLOPs, both against plain BERT here. Run it on an idle machine; it
takes some ten minutes on two cores.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from bert import load_bert, read_tensors
from data import (TASKS, UserError, collate, encode, load_task, load_tokenizer, one_line_errors,
                  pools, training_batches, write_text)
from eval import Point, full_passes, measure_all, seconds
from smartbert import SmartBert, infer, phase1_loss, phase2_loss
from train import DEVICES, load_run

figures = {}                # all that was measured, for --json
BATCH = 32                  # examples of a batch, in training and for the peer


def in_turn(*functions, rounds):
    """Median seconds of each function, called in turn, after a round to warm up."""
    times = []
    for _ in range(rounds + 1):
        times.append([])
        for function in functions:
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[-1].append(time.perf_counter() - start)
    return [statistics.median(column) for column in zip(*times[1:])]


def note(name, ours, other):
    """Print and keep a pair of seconds and their ratio."""
    figures[name] = {"seconds": ours, "against": other, "ratio": other / ours}
    print(f"{name:<74} {ours:8.3f} s  {other:8.3f} s  {other / ours:6.2f}", flush=True)


def machine():
    """The processor's name, where the system tells it."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


# --- The peers ----------------------------------------------------------------------------------

def peer_of(folder, device):
    """transformers' BERT with the same weights, or None where the package is not installed."""
    try:
        from transformers import BertConfig, BertForSequenceClassification
    except ImportError:
        return None
    peer = BertForSequenceClassification(BertConfig.from_pretrained(folder, num_labels=2))
    tensors = {name: value.float() for name, value in read_tensors(folder).items()}
    peer.bert.load_state_dict(tensors, strict=False)
    return peer.to(device)


def theirs(peer, batch):
    return peer(batch.ids, attention_mask=batch.mask.long(), token_type_ids=batch.segment_ids)


# --- What is measured ---------------------------------------------------------------------------

def bench_forward(model, peer, tokenizer, asked):
    """Plain inference against the peer's, on two dev sets."""
    model.eval()
    peer.eval()
    for task in ("rte", "sst2"):
        dev = encode(tokenizer, load_task(task, asked.data_dir)["dev"])
        positions = list(range(len(dev)))
        given = [collate(dev, positions[i:i + BATCH], asked.device)
                 for i in range(0, len(dev), BATCH)]
        pooled = pools(dev, asked.device)
        with torch.inference_mode():
            other, same, plain = in_turn(
                lambda: [theirs(peer, batch) for batch in given],
                lambda: [model(*batch.inputs) for batch in given],
                lambda: [infer(model, *batch.inputs, skip=False) for batch in pooled],
                rounds=asked.rounds)
        note(f"{task}: plain forward, identical batches of 32 / transformers", same, other)
        note(f"{task}: whole dev set as each would run it / transformers", plain, other)


def take_step(loss, optimizer):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def bench_training(model, peer, tokenizer, asked):
    """Six steps of each phase against the peer's plain fine-tuning, on the same batches, with
    dropout wherever train.py has it."""
    training = encode(tokenizer, load_task("rte", asked.data_dir)["train"])
    order = training_batches(training, BATCH, seed=1)[:6]
    batches = [collate(training, rows, asked.device) for rows in order]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, fused=True)

    def phase1():
        model.train()
        for batch in batches:
            parts = phase1_loss(model, *batch.inputs, batch.labels, hard=True, budget=0.5)
            take_step(parts["loss"], optimizer)

    def phase2():
        model.eval()
        model.heads[:-1].train()
        for batch in batches:
            parts = phase2_loss(model, *batch.inputs, batch.labels)
            take_step(parts["loss"], optimizer)

    timed = [phase1, phase2]
    if peer is not None:
        peers_optimizer = torch.optim.AdamW(peer.parameters(), 1e-6, fused=True)

        def fine_tune():
            peer.train()
            for batch in batches:
                loss = F.cross_entropy(theirs(peer, batch).logits, batch.labels)
                take_step(loss, peers_optimizer)
        timed.append(fine_tune)
    first, second, *other = in_turn(*timed, rounds=asked.rounds)
    if peer is not None:
        note("rte: phase 1, 6 steps of 32 / transformers' plain fine-tuning", first, other[0])
    note("rte: phase 2, 6 steps of 32 / phase 1", second, first)


def bench_run(folder, asked):
    """Dynamic inference of a trained run."""
    run, model = load_run(folder, asked.device)
    if not run.gates or not run.exits:
        raise UserError(f"{folder} has no gates or no exits: name a run of SmartBERT")
    task = TASKS[run.settings.task]
    split = load_task(task.name, asked.data_dir)[task.devs[0]]
    split = encode(load_tokenizer(run.folder), split, run.settings.max_length)
    batches = pools(split, asked.device)
    points = [Point("plain"), Point("skip")]
    points += [Point(mode, threshold) for mode, threshold in
               product(("exit", "both"), (0.03, 0.07, 0.14, 0.28, 0.42))]
    results = measure_all(model, split, task, full_passes(run, model, split), points)
    timed = seconds(run, model, split, points, asked.rounds)
    for point in points[1:]:
        share, name = results[point].flops, point.mode
        if point.threshold is not None:
            name += f" at threshold {point.threshold:g}"
        note(f"{run.folder.name} {name}: {1 / share:.2f}x in FLOPs / in seconds", timed[point],
             timed[points[0]] * share)

    singly = [collate(split, [i], asked.device) for i in range(len(split))]

    def in_pools():
        for batch in batches:
            infer(model, *batch.inputs, threshold=0.28)

    def one_by_one():
        for batch in singly:
            infer(model, *batch.inputs, threshold=0.28)

    note(f"{run.folder.name} both at threshold 0.28 / one example at a time",
         *in_turn(in_pools, one_by_one, rounds=asked.rounds))


def main(arguments=sys.argv[1:]):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--weights", type=Path, required=True, help="folder with a pre-trained BERT")
    add("--data-dir", required=True, help="folder with GLUE's RTE and SST-2")
    add("--runs", nargs="*", default=[], help="finished runs of SmartBERT")
    add("--rounds", type=int, default=5)
    add("--device", default=DEVICES[0], choices=DEVICES)
    add("--json", type=Path, help="write the figures to this file as well")
    asked = parser.parse_args(arguments)
    figures.update(machine=machine(), threads=torch.get_num_threads(), device=asked.device,
                   torch=torch.__version__, rounds=asked.rounds)
    print(f"{figures['machine']}, {figures['threads']} threads, {asked.device}, torch "
          f"{torch.__version__}, fp32; seconds are medians of {asked.rounds} passes in turn")
    print(f"{'what / against what':<74} {'ours':>8}    {'other':>8}    {'ratio':>6}")
    with one_line_errors("bench.py"):
        model = SmartBert(load_bert(asked.weights), 2).to(asked.device)
        peer, tokenizer = peer_of(asked.weights, asked.device), load_tokenizer(asked.weights)
        if peer is not None:
            bench_forward(model, peer, tokenizer, asked)
        bench_training(model, peer, tokenizer, asked)
        for folder in asked.runs:
            bench_run(folder, asked)
        if asked.json is not None:
            write_text(asked.json, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
