"""How fast: each ratio side by side in one process, in turn, the median of several rounds.

    python results/bench.py --weights FOLDER --data-dir FOLDER          # FOLDER/RTE, FOLDER/SST-2
    python results/bench.py --weights FOLDER --data-dir FOLDER --runs runs/rte runs/sst2
    python results/bench.py --weights FOLDER --data-dir FOLDER --scale  # 392,702 rows of MNLI

Hugging Face's transformers is the peer where it is installed; without it those rows are left out.
A ratio above 1 means that ours is faster. With --runs: dynamic inference of trained runs, speed-up
in seconds over speed-up in FLOPs, both against plain BERT here, and their evaluation by two walks
against one pass for each threshold. Run it on an idle machine; it takes some ten minutes on two
cores.
"""

import argparse
import platform
import resource
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
from eval import OperatingPoint
from smartbert import SmartBert, entropy_below, infer, phase1_loss, phase2_loss

figures = {}                # all that was measured, for --json


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


def note(name: str, ours: float, other: float) -> None:
    """Print and keep a pair of seconds and their ratio."""
    figures[name] = {"seconds": ours, "against": other, "ratio": other / ours}
    print(f"{name:<74} {ours:8.3f} s  {other:8.3f} s  {other / ours:6.2f}", flush=True)


def machine() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = open("/proc/cpuinfo").read().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peer_of(folder: Path, classes: int, device: torch.device):
    """transformers' BERT with the same weights, or None where the package is not installed."""
    try:
        from transformers import BertConfig, BertForSequenceClassification
    except ImportError:
        return None
    peer = BertForSequenceClassification(BertConfig.from_pretrained(folder, num_labels=classes))
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    tensors = {name: value.float() for name, value in tensors.items()}
    peer.bert.load_state_dict(tensors, strict=False)
    return peer.to(device)


def theirs(peer, batch):
    return peer(batch.ids, attention_mask=batch.mask.long(), token_type_ids=batch.segment_ids)


class Products:
    """The matrix products of all layers and nothing else: what is left when all the rest is
    free."""

    def __init__(self, model: SmartBert, device: torch.device):
        H, I = model.bert.config.hidden_size, model.bert.config.intermediate_size
        self.L, self.I = len(model.gates), I
        shapes = (H, 3 * H), (H, H), (H, I), (I, H)
        self.matrices = [torch.randn(*shape, device=device) for shape in shapes]
        self.x, self.y = torch.randn(4096, H, device=device), torch.randn(4096, I, device=device)

    def __call__(self, tokens: int) -> None:
        for matrix in self.matrices * self.L:
            inputs = self.y if len(matrix) == self.I else self.x
            torch.addmm(matrix[0], inputs[:tokens], matrix)


def bench_forward(model: SmartBert, peer, tokenizer, arguments, device: torch.device) -> None:
    """Plain inference: against the products alone, and against the peer on two dev sets."""
    model.eval()
    H, products, rounds = model.bert.config.hidden_size, Products(model, device), arguments.rounds
    ids = torch.randint(1000, 20000, (32, 128), device=device)
    full = (ids, torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool))
    with torch.inference_mode():
        ours, peak = in_turn(lambda: model(*full), lambda: products(ids.numel()), rounds=rounds)
    # The products leave out attention's own, so they are scaled to what the forward multiplies.
    note("plain forward, 32 x 128 tokens / the same products alone", ours,
         peak * (24 * H * H + 4 * 128 * H) / (24 * H * H))
    for task in ("rte", "sst2") if peer else ():
        dev = data.encode(tokenizer, data.load_task(task, arguments.data_dir)["dev"])
        rows = [list(range(i, min(i + 32, len(dev)))) for i in range(0, len(dev), 32)]
        given = [data.collate(dev, some).to(device) for some in rows]
        pooled = train.pools(dev, device)
        peer.eval()
        with torch.inference_mode():
            other, same, floor, plain = in_turn(
                lambda: [theirs(peer, b) for b in given],
                lambda: [model(b.ids, b.segment_ids, b.mask) for b in given],
                lambda: [products(b.ids.numel()) for b in given],
                lambda: [infer(model, b.ids, b.segment_ids, b.mask, skip=False) for b in pooled],
                rounds=rounds)
        note(f"{task}: plain forward, identical batches of 32 / transformers", same, other)
        note(f"{task}: those batches' products alone / transformers", floor, other)
        note(f"{task}: whole dev set as each would run it / transformers", plain, other)


def bench_training(model: SmartBert, peer, tokenizer, arguments, device: torch.device) -> None:
    """A step of each phase against the peer's plain fine-tuning, on the same batches, with
    dropout."""
    training = data.encode(tokenizer, data.load_task("rte", arguments.data_dir)["train"])
    order = data.batch_indices(training, 32, seed=1)[:6]
    some = [data.collate(training, rows).to(device) for rows in order]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, fused=True)
    penalty = {"budget": 0.5, "budget_weight": 10.0}

    def step(loss, optimizer) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def phase1() -> None:
        model.train()
        for b in some:
            result = phase1_loss(model, b.ids, b.segment_ids, b.mask, b.labels, hard=True,
                                 penalty=penalty)
            step(result.loss, optimizer)

    def phase2() -> None:
        model.eval()
        for b in some:
            step(phase2_loss(model, b.ids, b.segment_ids, b.mask, b.labels), optimizer)

    timed = [phase1, phase2]
    if peer:
        peers_optimizer = torch.optim.AdamW(peer.parameters(), 1e-6)

        def fine_tune() -> None:
            peer.train()
            for b in some:
                step(F.cross_entropy(theirs(peer, b).logits, b.labels), peers_optimizer)
        timed.append(fine_tune)
    first, second, *other = in_turn(*timed, rounds=arguments.rounds)
    if peer:
        note("rte: phase 1, 6 steps of 32 / transformers' plain fine-tuning", first, other[0])
    note("rte: phase 2, 6 steps of 32 / phase 1", second, first)


def bench_run(run: str, arguments, device: torch.device) -> None:
    """Dynamic inference and evaluation of a trained run."""
    settings, model = train.load_run(run, device)
    task, rounds = data.find_task(settings.task), arguments.rounds
    split = data.load_task(task.name, arguments.data_dir)[task.devs[0]]
    split = data.encode(data.load_tokenizer(run), split, settings.max_length)
    points = [OperatingPoint("plain"), OperatingPoint("skip")]
    points += [OperatingPoint(mode, threshold) for mode in ("exit", "both")
               for threshold in (0.03, 0.07, 0.14, 0.28, 0.42)]
    walks = evaluation.walk(model, split, points)
    rows = [evaluation.measure(model, split, task, walks, point) for point in points]
    evaluation.clock(model, split, rows, rounds)
    for row in rows[1:]:
        note(f"{task.name} {row}: {1 / row.flops:.2f}x in FLOPs / in seconds", row.seconds,
             rows[0].seconds * row.flops)

    # The rows of eval.py's table and of --criteria, as a user gets them.
    table = evaluation.plan(settings, len(task.labels), len(model.gates))
    pooled = train.pools(split, device)

    def by_walks() -> None:
        walks = evaluation.walk(model, split, table)
        for point in table:
            evaluation.measure(model, split, task, walks, point)
        evaluation.criteria(model, split, task, walks)

    def by_passes() -> None:
        for point in table + [OperatingPoint("exit", 0.3)] * 35:
            exits = None if point.threshold is None else entropy_below(point.threshold)
            train.predict(model, pooled, point.gated, exits)

    note(f"{task.name}: {len(table)} rows and 35 of --criteria by two walks / by a pass each",
         *in_turn(by_walks, by_passes, rounds=1))
    exits, singly = entropy_below(0.28), [data.collate(split, [i]).to(device)
                                          for i in range(len(split))]

    def one_by_one() -> None:
        for b in singly:
            infer(model, b.ids, b.segment_ids, b.mask, criterion=exits, batch_tokens=1)

    note(f"{task.name} both at threshold 0.28 / one example at a time",
         *in_turn(lambda: [infer(model, b.ids, b.segment_ids, b.mask, criterion=exits)
                           for b in pooled], one_by_one, rounds=min(rounds, 3)))


def bench_scale(arguments) -> None:
    """Memory and seconds to read, encode and batch as many rows as MNLI's training set has: the
    rows of its (partial) file, repeated."""
    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20           # GiB on Linux

    tokenizer, imported = data.load_tokenizer(arguments.weights), peak()
    start = time.perf_counter()
    split = data.load_task("mnli", arguments.data_dir)["train"]
    split = split.select([i % len(split) for i in range(392_702)])
    split, count = data.encode(tokenizer, split), 0
    for batch in data.batches(split, 32, seed=1):
        count += len(batch.labels)
    figures["scale"] = {"rows": count, "seconds": time.perf_counter() - start,
                        "GiB beyond importing": peak() - imported}
    print("{rows} rows read, encoded and batched: {seconds:.1f} s, {GiB beyond importing:.2f} GiB "
          "beyond importing".format(**figures["scale"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", required=True, help="folder with a pre-trained BERT")
    parser.add_argument("--data-dir", required=True, help="folder with GLUE's RTE and SST-2")
    parser.add_argument("--runs", nargs="*", default=[], help="finished runs")
    parser.add_argument("--scale", action="store_true", help="only the memory of 392,702 rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", help="write the figures to this file as well")
    arguments = parser.parse_args()
    device, folder = train.pick_device(arguments.device), Path(arguments.weights)
    figures.update(machine=machine(), threads=torch.get_num_threads(), device=str(device),
                   torch=torch.__version__, rounds=arguments.rounds)
    print(f"{figures['machine']}, {figures['threads']} threads, {device}, torch "
          f"{torch.__version__}, fp32; seconds are medians of {arguments.rounds} passes in turn")
    if arguments.scale:
        bench_scale(arguments)
    else:
        print(f"{'what / against what':<74} {'ours':>8}    {'other':>8}    {'ratio':>6}")
        model, peer = SmartBert(load_bert(folder), 2).to(device), peer_of(folder, 2, device)
        tokenizer = data.load_tokenizer(folder)
        bench_forward(model, peer, tokenizer, arguments, device)
        bench_training(model, peer, tokenizer, arguments, device)
        for run in arguments.runs:
            bench_run(run, arguments, device)
    if arguments.json:
        data.write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
