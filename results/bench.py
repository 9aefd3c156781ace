"""How fast: every ratio side by side in one process, in turn, the median of several rounds.

    python results/bench.py --weights FOLDER --data-dir FOLDER             # FOLDER/RTE/dev.tsv, FOLDER/SST-2/dev.tsv, ...
    python results/bench.py --weights FOLDER --data-dir FOLDER --json bench.json --runs runs/rte runs/sst2

Hugging Face's transformers is the peer where it is installed; without it those rows are left out.
A ratio above 1 means that ours is faster. With --runs, the dynamic inference of trained runs:
speed-up in seconds over speed-up in FLOPs, both against plain BERT here. Run it on an idle
machine; it takes some ten minutes on two cores.
"""

import argparse
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
import train
from bert import load_bert
from smartbert import SmartBert, entropy_below, infer, phase1_loss, phase2_loss


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


def machine() -> str:
    """The processor's name, where the system tells it."""
    try:
        return next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


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
    parser.add_argument("--runs", nargs="*", default=[], help="finished runs, for dynamic inference")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", help="write the figures to this file as well")
    arguments = parser.parse_args()
    device, rounds, folder = train.pick_device(arguments.device), arguments.rounds, Path(arguments.weights)
    figures = {"machine": machine(), "threads": torch.get_num_threads(),
               "device": str(device), "torch": torch.__version__, "rounds": rounds}
    tokenizer = data.load_tokenizer(folder)
    model, peer = SmartBert(load_bert(folder), 2).to(device), peer_of(folder, 2, device)

    def note(name: str, ours: float, other: float) -> None:
        figures[name] = {"seconds": ours, "against": other, "ratio": other / ours}
        print(f"{name:<74} {ours:8.3f} s  {other:8.3f} s  {other / ours:6.2f}", flush=True)

    print(f"{figures['machine']}, {figures['threads']} threads, {device}, torch {torch.__version__}, fp32; seconds are medians of "
          f"{rounds} passes\nin turn; FLOPs count layers, attention, gates and heads on real tokens")
    print(f"{'what / against what':<74} {'ours':>8}    {'other':>8}    {'ratio':>6}")
    # The machine's peak: matrix products of a layer's sizes, against a plain forward of 32 x 128
    # real tokens.
    model.eval()
    H, I, L = model.bert.config.hidden_size, model.bert.config.intermediate_size, len(model.bert.layers)
    ids = torch.randint(1000, 20000, (32, 128), device=device)
    full = (ids, torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool))
    x, y = torch.randn(4096, H, device=device), torch.randn(4096, I, device=device)
    matrices = [torch.randn(*shape, device=device) for shape in ((H, 3 * H), (H, H), (H, I), (I, H))]

    def products():
        for matrix in matrices * L:
            torch.mm(y if len(matrix) == I else x, matrix)

    def products_of(batches):
        """The layers' four products on these batches as they are padded, biases added, and nothing
        else: what is left when everything else costs nothing."""
        for b in batches:
            for matrix in matrices * L:
                torch.addmm(matrix[0], (y if len(matrix) == I else x)[:b.ids.numel()], matrix)

    with torch.inference_mode():
        ours, peak = in_turn(lambda: model(*full), products, rounds=rounds)
        # the products leave out attention's own, so the share of the peak counts what the forward
        # really multiplies
        share = peak * (24 * H * H + 4 * 128 * H) / (24 * H * H)
        note("plain forward, 32 x 128 tokens / the same products in torch.mm", ours, share)
    for task in ("rte", "sst2"):
        splits = data.load_task(task, arguments.data_dir)
        dev = data.encode(tokenizer, splits["dev"])
        given = [data.collate(dev, list(range(i, min(i + 32, len(dev))))).to(device) for i in range(0, len(dev), 32)]
        pooled = train.pools(dev, device)
        if peer:
            peer.eval()
            with torch.inference_mode():
                theirs, same, floor, plain = in_turn(
                    lambda: [peer(b.ids, attention_mask=b.mask.long(), token_type_ids=b.segment_ids) for b in given],
                    lambda: [model(b.ids, b.segment_ids, b.mask) for b in given],
                    lambda: products_of(given),
                    lambda: [train.run_pool(model, b, False, None) for b in pooled], rounds=rounds)
            note(f"{task}: plain forward, identical padded batches of 32 / transformers", same, theirs)
            note(f"{task}: the bound, those batches' matrix products and nothing else / transformers", floor, theirs)
            note(f"{task}: whole dev set as each would run it / transformers", plain, theirs)
    # Training: a step of ours against plain fine-tuning of the peer, on the same batches, dropout
    # on in both.
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
            step(phase1_loss(model, b.ids, b.segment_ids, b.mask, b.labels, hard=True, penalty=dict(budget=0.5, budget_weight=10.0)).loss, optimizer)

    def phase2():
        model.eval()
        for b in some:
            step(phase2_loss(model, b.ids, b.segment_ids, b.mask, b.labels), optimizer)

    timed = [phase1, phase2]
    if peer:
        theirs_optimizer = torch.optim.AdamW(peer.parameters(), 1e-6)

        def fine_tune():
            peer.train()
            for b in some:
                step(F.cross_entropy(peer(b.ids, attention_mask=b.mask.long(), token_type_ids=b.segment_ids).logits, b.labels),
                     theirs_optimizer)
        timed.append(fine_tune)
    first, second, *theirs = in_turn(*timed, rounds=rounds)
    if peer:
        note("rte: phase 1, 6 steps of 32 / transformers' plain fine-tuning", first, theirs[0])
    note("rte: phase 2, 6 steps of 32 / phase 1", second, first)

    for run in arguments.runs:
        settings, trained = train.load_run(run, device)
        task = data.find_task(settings["task"])
        split = data.load_task(task.name, arguments.data_dir)[task.devs[0]]
        split = data.encode(data.load_tokenizer(run), split, settings["max_length"])
        ways = [evaluation.OperatingPoint("plain"), evaluation.OperatingPoint("skip")]
        ways += [evaluation.OperatingPoint(mode, e) for mode in ("exit", "both") for e in (0.03, 0.07, 0.14, 0.28, 0.42)]
        walks = evaluation.walk(trained, split, ways)
        rows = [evaluation.measure(trained, split, task, walks, way) for way in ways]
        evaluation.clock(trained, split, rows, rounds)
        for row in rows[1:]:
            note(f"{task.name} {row}: {1 / row.flops:.2f}x in FLOPs / in seconds", row.seconds, rows[0].seconds * row.flops)
        every = evaluation.fine_grid(walks, [evaluation.OperatingPoint("exit"), evaluation.OperatingPoint("both")])
        some_ways = [way for mode in ("exit", "both") for way in [w for w in every if w.mode == mode][::10]]

        def by_walks():
            walks = evaluation.walk(trained, split, some_ways)
            for way in some_ways:
                evaluation.measure(trained, split, task, walks, way)

        def by_passes():
            for way in some_ways:
                train.predict(trained, pooled, way.mode == "both", entropy_below(way.threshold))

        pooled, leave = train.pools(split, device), entropy_below(0.28)
        note(f"{task.name}: {len(some_ways)} thresholds by two walks / by one pass each",
             *in_turn(by_walks, by_passes, rounds=min(rounds, 3)))
        singly = [data.collate(split, [i]).to(device) for i in range(len(split))]
        many = lambda: [train.run_pool(trained, b, True, leave) for b in pooled]
        one = lambda: [infer(trained, b.ids, b.segment_ids, b.mask, criterion=leave, batch_tokens=1) for b in singly]
        note(f"{task.name} both at threshold 0.28 / one example at a time", *in_turn(many, one, rounds=min(rounds, 3)))
    if arguments.json:
        data.write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
