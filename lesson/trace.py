"""One example layer by layer, or answers for a file of examples.

    python lesson/trace.py runs/toy "king coin b ab"                # layer by layer
    python lesson/trace.py runs/mrpc "It rains ." "Rain falls ."    # a pair of texts
    python lesson/trace.py runs/toy --file sentences.txt            # label, probability, layers

The file holds one example a line, with a tab between the texts of a pair; - is standard input.
The threshold is --threshold, or the one that eval.py chose (its *), or else 0.3 nats. FLOPs are
counted up to the end of a layer, as a share of plain BERT's for the same example.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

from data import (TASKS, Split, UserError, encode, load_tokenizer, one_line_errors, pools,
                  split_lines)
from eval import flops, plain_flops
from lesson.page import stars
from smartbert import entropy, infer_pools
from train import autocast, load_run


def find_threshold(run, threshold):
    """This threshold, or the chosen one, or 0.3, in nats; None for a run without exits. Raises
    UserError for a run that is not finished or exits by another criterion."""
    if not run.finished or run.criterion != "entropy":
        raise UserError(f"{run.folder} is not finished, or does not exit by entropy: name another")
    if not run.exits:
        return None
    if threshold is None:
        mode = "both" if run.gates else "exit"
        threshold = stars(run).get(mode, 0.3)
    return threshold


def read_examples(task, lines):
    """The user's own examples, one a line, as a Split. Raises UserError for the wrong number of
    texts."""
    wanted, texts = 2 - task.columns.count(None), []
    for number, line in enumerate(lines, 1):
        parts = [part for part in line.split("\t") if part.strip()]
        if len(parts) != wanted:
            raise UserError(f"example {number} is {line!r:.60}: {task.name} takes {wanted} text(s)"
                            f" (in a file, a tab separates two)")
        texts.append((*parts, None)[:2])                # the second one is None in most tasks
    return Split("own", texts, [0] * len(texts))        # zeros, because no label is known


def warn_of_unknown_words(tokenizer, lines):
    """Name the words that are not in the vocabulary, on stderr."""
    for line in lines:
        row = tokenizer.encode(line)
        for token, place in zip(row.tokens, row.offsets):
            if token == "[UNK]":
                print("warning: not in the vocabulary:", line[slice(*place)], file=sys.stderr)


def trace(model, tokens, outcome, labels):
    """What happened to a single example in each layer, as text. tokens (1,): its length."""
    share = flops(model, tokens, outcome)[0].cumsum(0) / plain_flops(model, tokens)     # (L,)
    probability, answer = outcome.history[0].softmax(1).max(1)                  # (L,), (L,)
    uncertain = entropy(outcome.history[0])                                     # (L,)
    L, exit = len(share), outcome.exit.item()
    lines = ["layer  gate   what         head's answer        entropy   FLOPs so far"]
    for i in range(exit):
        what, gate, said = "skipped", "", ""
        if outcome.ran[0, i]:
            what = "ran, exited" if i + 1 == exit < L else "ran"
        if outcome.gate_asked[0, i]:
            gate = f"{outcome.gates[0, i]:.3f}"
        if outcome.head_asked[0, i]:
            said = f"{labels[answer[i]]:<14} {probability[i]:>4.0%} {uncertain[i]:>8.3f}"
        lines.append(f"{i + 1:>5}  {gate:<5}  {what:<11}  {said:<28} {share[i]:>7.1%}")
    lines += [f"{i + 1:>5}         not reached" for i in range(exit, L)]
    return "\n".join(lines)


def main(arguments=sys.argv[1:]):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("run", help="the folder of a run that train.py made")
    add("texts", nargs="*", metavar="TEXT", help="a sentence, or a pair, each in quotes")
    add("--file", help="answer every line of this file instead; - is standard input")
    add("--threshold", type=float, help="exit below this entropy (nats)")
    asked = parser.parse_intermixed_args(arguments)
    with one_line_errors("trace.py"):
        run, model = load_run(asked.run, "cpu")
        threshold, task = find_threshold(run, asked.threshold), TASKS[run.settings.task]
        lines, tokenizer = ["\t".join(asked.texts)], load_tokenizer(run.folder)
        if asked.file is not None:
            with open(0 if asked.file == "-" else asked.file, "rb") as file:
                lines = split_lines(file.read(), asked.file)
        split = read_examples(task, lines)
        warn_of_unknown_words(tokenizer, lines)
        split = encode(tokenizer, split, run.settings.max_length)
        with autocast(run.settings):
            outcome = infer_pools(model, pools(split), skip=run.gates, threshold=threshold)
        if asked.file is None:
            print(trace(model, torch.tensor([len(split.ids[0])]), outcome, task.labels))
            print(f"label, probability, layers run (threshold: {threshold}):")
        for p, ran in zip(outcome.logits.softmax(1), outcome.ran):      # (C,), (L,)
            print(f"{task.labels[p.argmax()]}\t{p.max():.3f}\t{ran.sum()}")


if __name__ == "__main__":
    main()
