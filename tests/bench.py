"""How fast: every ratio side by side in one process, in turn, the median of several rounds.

    python tests/bench.py --weights FOLDER --data-dir FOLDER             # FOLDER/RTE/dev.tsv, FOLDER/SST-2/dev.tsv, ...
    python tests/bench.py --weights FOLDER --data-dir FOLDER --json bench.json --run runs/sst2

Hugging Face's transformers is the peer where it is installed; without it those rows are left out. A ratio above 1 means that
ours is faster. With --run, a trained run's dynamic inference: its speed-up in seconds over its speed-up in FLOPs.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import eval as evaluation
from bert import load_bert
from smartbert import SmartBert, budget_push, entropy_below, infer, phase1_loss, phase2_loss


def in_turn(*functions, rounds: int) -> list[float]:
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


def peer_of(folder: Path, classes: int, device):
    """transformers' BERT with the same weights, or None where the package is not installed."""
    try:
        from transformers import BertConfig, BertForSequenceClassification
    except ImportError:
        return None
    model = BertForSequenceClassification(BertConfig.from_pretrained(folder, num_labels=classes))
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    model.bert.load_state_dict({name: value.float() for name, value in tensors.items()}, strict=False)
    return model.to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", required=True, help="folder with a pre-trained BERT")
    parser.add_argument("--data-dir", required=True, help="folder with GLUE's RTE and SST-2")
    parser.add_argument("--run", help="a finished run, for dynamic inference")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", help="write the figures to this file as well")
    arguments = parser.parse_args()
    device, rounds, folder = evaluation.pick_device(arguments.device), arguments.rounds, Path(arguments.weights)
    figures = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
               "device": str(device), "torch": torch.__version__, "rounds": rounds}
    tokenizer = data.load_tokenizer(folder)
    model, peer = SmartBert(load_bert(folder), 2).to(device), peer_of(folder, 2, device)

    def note(name: str, ours: float, other: float) -> None:
        figures[name] = {"seconds": ours, "against": other, "ratio": other / ours}
        print(f"{name:<74} {ours:8.3f} s  {other:8.3f} s  {other / ours:6.2f}", flush=True)

    print(f"{'what / against what':<74} {'ours':>8}    {'other':>8}    {'ratio':>6}")
    # The machine's peak: matrix products of a layer's sizes, against a plain forward of 32 x 128 real tokens.
    model.eval()
    H, I, L = model.bert.config.hidden_size, model.bert.config.intermediate_size, len(model.bert.layers)
    ids = torch.randint(1000, 20000, (32, 128), device=device)
    full = (ids, torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool))
    x, y = torch.randn(4096, H, device=device), torch.randn(4096, I, device=device)
    matrices = [torch.randn(*shape, device=device) for shape in ((H, 3 * H), (H, H), (H, I), (I, H))]

    def products():
        for _ in range(L):
            for matrix in matrices:
                torch.mm(y if matrix.shape[0] == I else x, matrix)

    with torch.inference_mode():
        ours, peak = in_turn(lambda: model(*full), products, rounds=rounds)
        # the products leave out attention's own, so the share of the peak counts what the forward really multiplies
        share = peak * (24 * H * H + 4 * 128 * H) / (24 * H * H)
        note("plain forward, 32 x 128 tokens / the same products in torch.mm", ours, share)
    for task in ("rte", "sst2"):
        splits = data.load_task(task, arguments.data_dir)
        dev = data.encode(tokenizer, splits["dev"])
        given = [data.collate(dev, list(range(i, min(i + 32, len(dev))))).to(device) for i in range(0, len(dev), 32)]
        pooled = evaluation.pools(dev, device)
        with torch.inference_mode():
            if peer:
                peer.eval()
                theirs = lambda: [peer(b.ids, attention_mask=b.mask.long(), token_type_ids=b.types) for b in given]
                same = lambda: [model(b.ids, b.types, b.mask) for b in given]
                note(f"{task}: plain forward, identical padded batches / transformers", *in_turn(same, theirs, rounds=rounds))
                plain = lambda: [infer(model, b.ids, b.types, b.mask, skip=False) for b in pooled]
                note(f"{task}: whole dev set as each would run it / transformers", *in_turn(plain, theirs, rounds=rounds))
    # Training: a step of ours against plain fine-tuning of the peer, on the same batches, dropout on in both.
    training = data.encode(tokenizer, data.load_task("rte", arguments.data_dir)["train"])
    some = [data.collate(training, rows).to(device) for rows in data.batch_indices(training, 32, seed=1)[:6]]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, fused=True)

    def step(loss, optimizer):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def phase1():
        model.train()
        for b in some:
            step(phase1_loss(model, b.ids, b.types, b.mask, b.labels, hard=True, push=budget_push(0.5, 10.0)).loss, optimizer)

    def phase2():
        model.eval()
        for b in some:
            step(phase2_loss(model, b.ids, b.types, b.mask, b.labels), optimizer)

    if peer:
        theirs_optimizer = torch.optim.AdamW(peer.parameters(), 1e-6)

        def fine_tune():
            peer.train()
            for b in some:
                step(F.cross_entropy(peer(b.ids, attention_mask=b.mask.long(), token_type_ids=b.types).logits, b.labels),
                     theirs_optimizer)
        note("phase 1, 6 steps of 32 / transformers' plain fine-tuning", *in_turn(phase1, fine_tune, rounds=rounds))
    note("phase 2, 6 steps of 32 / phase 1", *in_turn(phase2, phase1, rounds=rounds))

    if arguments.run:
        settings, trained = evaluation.load_run(arguments.run, device)
        task = data.find_task(settings["task"])
        split = data.load_task(task.name, arguments.data_dir)[task.devs[0]]
        split = data.encode(data.load_tokenizer(arguments.run), split, settings["max_length"])
        thresholds = [0.07, 0.14, 0.28, 0.42, 0.55]
        rows = evaluation.sweep(trained, split, task, thresholds, device, repeats=rounds)
        for row in rows[1:]:
            name = f"{task.name} {row.mode} {row.threshold or ''}: speed-up in seconds / in FLOPs ({1 / row.flops:.2f})"
            note(name, row.seconds, rows[0].seconds * row.flops)
        pooled, leave = evaluation.pools(split, device), entropy_below(0.28)
        singly = [data.collate(split, [i]).to(device) for i in range(len(split))]
        many = lambda: [infer(trained, b.ids, b.types, b.mask, leave=leave) for b in pooled]
        one = lambda: [infer(trained, b.ids, b.types, b.mask, leave=leave, batch_size=1) for b in singly]
        note(f"{task.name} both at 0.28, batches of 32 / one at a time", *in_turn(many, one, rounds=min(rounds, 3)))
    if arguments.json:
        data.write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
