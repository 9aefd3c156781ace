"""The methods before SmartBERT: their losses by hand, what each trains, and where they start."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import tiny_batch, tiny_model

import eval as evaluation
import smartbert
import train
from smartbert import METHODS, infer, kept_layers
from train import Settings

TOY = "--limit 90 --epochs1 1 --batch-size 16 --device cpu".split()


def probabilities() -> tuple:
    """A model, its inputs, labels, and by one layer after the other p[i, b, c] of each head."""
    model, inputs = tiny_model(layers=4), tiny_batch()
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    h, answers = model.bert.embeddings(*inputs[:2]), []
    with torch.no_grad():
        for layer, head in zip(model.bert.layers, model.heads):
            h = layer(h, inputs[2])
            answers.append(head(h, inputs[2])[0].double().softmax(-1).numpy())
    return model, inputs, labels, np.stack(answers)


def cross_entropies(p: np.ndarray, labels: torch.Tensor) -> list[float]:
    """The mean of -ln p[label] of each head."""
    return [-np.log(answers[range(9), labels.tolist()]).mean() for answers in p]


def test_losses_by_hand():
    model, inputs, labels, p = probabilities()
    ce = cross_entropies(p, labels)
    kl = [np.sum(p[3] * (np.log(p[3]) - np.log(p[i]))) / 9 for i in range(3)]
    expected = {
        "bert": ce[3],
        "deebert": ce[0] + ce[1] + ce[2],
        "fastbert": kl[0] + kl[1] + kl[2],
        "pabee": (ce[0] + 2 * ce[1] + 3 * ce[2] + 4 * ce[3]) / 10,
    }
    for name, value in expected.items():
        loss = METHODS[name][-1](model, inputs, labels)
        assert loss.item() == pytest.approx(value, rel=1e-5), name
    for step, value in ((0, ce[3]), (1, sum(ce)), (2, ce[3])):
        loss = smartbert.berxit_loss(model, inputs, labels, step)
        assert loss.item() == pytest.approx(value, rel=1e-5)


def test_fastbert_needs_no_labels_and_does_not_teach_the_teacher():
    model, inputs, labels, _ = probabilities()
    loss = smartbert.fastbert_loss(model, inputs, labels)
    assert torch.equal(loss, smartbert.fastbert_loss(model, inputs, 0 * labels))
    loss.backward()
    assert all(p.grad is None for p in model.heads[-1].parameters())


def test_layerdrop_leaves_out_layers(monkeypatch):
    """A layer is left out where its random number is below the rate; the rest are plain BERT."""
    model, inputs, labels, _ = probabilities()
    draws = iter([.19, .2, .9, .0])
    monkeypatch.setattr(torch, "rand", lambda *_: torch.tensor(next(draws)))
    loss = smartbert.layerdrop_loss(model, inputs, labels)
    h = model.bert.embeddings(*inputs[:2])
    for layer in (model.bert.layers[1], model.bert.layers[2]):
        h = layer(h, inputs[2])
    p = model.heads[-1](h, inputs[2])[0].softmax(-1)
    assert loss.item() == pytest.approx(-p[range(9), labels].log().mean().item(), rel=1e-5)


@pytest.mark.parametrize("depth, kept", [(12, list(range(12))), (6, [1, 3, 5, 7, 9, 11]),
                                         (4, [2, 5, 8, 11]), (1, [11]), (5, [2, 4, 7, 9, 11])])
def test_kept_layers_are_evenly_spaced(depth, kept):
    assert kept_layers(depth, 12) == kept


def test_inference_at_a_smaller_depth():
    """Only the kept layers run, and they give what they give one after the other."""
    model, (ids, segment_ids, mask) = tiny_model(layers=5), tiny_batch()
    kept = kept_layers(3, 5)
    outcome = infer(model, ids, segment_ids, mask, skip=False, layers=kept)
    with torch.no_grad():
        h = model.bert.embeddings(ids, segment_ids)
        for i in kept:
            h = model.bert.layers[i](h, mask)
        logits, _ = model.heads[-1](h, mask)
    assert torch.allclose(outcome.logits, logits, atol=1e-5)
    assert (outcome.ran == torch.tensor([i in kept for i in range(5)])).all()


# Which parts move in each stage: the encoder, the last head, the other heads.
@pytest.mark.parametrize("method, phase, moves", [
    ("bert", 1, "encoder last"), ("deebert", 1, "encoder last"), ("deebert", 2, "others"),
    ("fastbert", 1, "encoder last"), ("fastbert", 2, "others"),
    ("pabee", 1, "encoder last others"), ("berxit", 1, "encoder last others"),
    ("layerdrop", 1, "encoder last")])
def test_what_each_stage_trains(method, phase, moves):
    """Every trained part moves, frozen parts stay to the bit, and gates always rest."""
    from test_training import Run
    run = Run(phase, model=tiny_model(layers=3), method=method, lr=1e-2)
    last = f"heads.{len(run.model.heads) - 1}."
    for name, before in run.start.items():
        if name.startswith("bert."):
            part = "encoder"
        elif name.startswith("heads.") and "project" not in name:
            part = "last" if name.startswith(last) else "others"
        else:
            part = "rest"
        same = torch.equal(before, run.after[-1][name])
        if part in moves.split():
            assert not same or "qkv.bias" in name, name     # softmax does not see a key's bias
        else:
            assert same, name


def test_all_methods_train_and_evaluate(tmp_path, monkeypatch):
    """With the rows that each of them has."""
    monkeypatch.chdir(tmp_path)
    modes = {"deebert": {"plain", "exit"}, "fastbert": {"plain", "exit"},
             "pabee": {"plain", "exit"}, "berxit": {"plain", "exit"},
             "layerdrop": {"plain", "pruned"}}
    for method, expected in modes.items():
        train.main(["--method", method, *TOY])
        evaluation.main([f"runs/toy-{method}", "--repeats", "0", "--device", "cpu"])
        result = json.loads((tmp_path / f"runs/toy-{method}/eval.json").read_text())
        assert {row["mode"] for row in result["rows"]} == expected
        assert {row["criterion"] for row in result["rows"] if row["mode"] == "exit"} <= {
            "patience" if method == "pabee" else "entropy"}
        assert len(result["curve"]) >= 5


def test_a_plain_bert_is_the_first_stage_of_others(tmp_path, capsys, refused):
    """DeeBERT and FastBERT from a finished BERT train no phase 1; encoder and last head stay the
    BERT's to the bit."""
    bert = tmp_path / "bert"
    train.main(["--method", "bert", *TOY, "--out", str(bert)])
    for method in ("deebert", "fastbert"):
        capsys.readouterr()
        out = tmp_path / method
        train.main(["--method", method, *TOY, "--weights", str(bert), "--out", str(out)])
        assert "phase 1" not in capsys.readouterr().out
        before, after = (torch.load(run / "model.pt", weights_only=True)["model"]
                         for run in (bert, out))
        kept = [name for name in before if name.startswith(("bert.", "heads.5."))]
        assert kept and all(torch.equal(before[name], after[name]) for name in kept)
        assert not torch.equal(before["heads.0.out.weight"], after["heads.0.out.weight"])
    train.main([*TOY, "--epochs2", "1", "--weights", str(bert), "--out", str(tmp_path / "smart")])
    assert "phase 1 epoch 1/1" in capsys.readouterr().out
    refused(train.main, ["--method", "deebert", *TOY, "--weights", bert, "--seed", "51",
                         "--out", tmp_path / "other"], "held out other rows")
    assert not (tmp_path / "other").exists()


def test_a_start_from_a_run_has_its_weights(tmp_path):
    """Not only DeeBERT: any method takes encoder and last head from the run."""
    bert = tmp_path / "bert"
    train.main(["--method", "bert", *TOY, "--out", str(bert)])
    model, *_ = train.set_up(Settings(weights=str(bert), limit=90, device="cpu", dropout=.25))
    former = train.load_run(bert, torch.device("cpu"))[1]
    for part, other in ((model.bert, former.bert), (model.heads[-1], former.heads[-1])):
        theirs = copy.deepcopy(other.state_dict())
        assert all(torch.equal(value, theirs[name]) for name, value in part.state_dict().items())
    assert model.bert.config.hidden_dropout_prob == .25


def test_a_run_that_starts_from_another_without_phase_2(tmp_path):
    """Nothing is left to train: the model is the BERT."""
    bert, out = tmp_path / "bert", tmp_path / "out"
    train.main(["--method", "bert", *TOY, "--out", str(bert)])
    train.main(["--method", "deebert", *TOY, "--epochs2", "0", "--weights", str(bert),
                "--out", str(out)])
    theirs, ours = (torch.load(run / "model.pt", weights_only=True)["model"]
                    for run in (bert, out))
    kept = [name for name in theirs if name.startswith(("bert.", "heads.5."))]
    assert len(kept) > 50 and all(torch.equal(theirs[name], ours[name]) for name in kept)


def test_the_head_of_another_task_is_not_taken(tmp_path):
    """RTE's class 1 is not MRPC's."""
    bert = tmp_path / "bert"
    train.main(["--method", "bert", *TOY, "--out", str(bert)])
    settings = json.loads((bert / "settings.json").read_text()) | {"task": "mnli"}
    (bert / "settings.json").write_text(json.dumps(settings))
    model, *_ = train.set_up(Settings(weights=str(bert), limit=90, device="cpu"))
    former = train.load_run(bert, torch.device("cpu"))[1]
    assert torch.equal(model.bert.layers[0].up.weight, former.bert.layers[0].up.weight)
    assert not torch.equal(model.heads[-1].out.weight, former.heads[-1].out.weight)


def test_numbers_of_pabee_and_layerdrop_are_whole(tmp_path, refused):
    for method in ("pabee", "layerdrop"):
        out = tmp_path / method
        train.main(["--method", method, *TOY, "--out", str(out)])
        for wrong in ("0.5", "0", "6"):
            refused(evaluation.main, [out, "--thresholds", wrong], "whole numbers from 1 to 5")
        evaluation.main([str(out), "--thresholds", "2", "--repeats", "1", "--device", "cpu"])
        rows = json.loads((out / "eval.json").read_text())["rows"]
        assert [row["threshold"] for row in rows] == [None, 2]
    refused(evaluation.main, [out, "--criteria"], "no trained exit heads")
    assert rows[1]["layers"] == 2 and rows[1]["seconds"] > 0


@pytest.mark.parametrize("flags, named", [
    ("--resume --overwrite", "give one of them"), ("--weights x --out x", "another folder"),
    ("--method deebert --budget .5", "--budget"), ("--method bert --no-contrast", "--no-contrast"),
    ("--method pabee --epochs2 3", "--epochs2"), ("--method berxit --lam .1", "--lam"),
    ("--method elbert", "smartbert, bert, deebert")])
def test_flags_that_a_method_lacks_are_refused(refused, flags, named):
    refused(train.main, flags.split(), named)


def test_the_release_recipe():
    """The authors' settings; a flag still wins."""
    settings = train.parse("--recipe release --task rte --lr-new 1e-3".split())
    assert (settings.lam, settings.soft_epochs) == (.04, 3)
    assert (settings.epochs1, settings.epochs2) == (5, 4)
    assert (settings.gate_bias, settings.penalty_start, settings.lr) == (0, 0, 2e-5)
    assert (settings.batch_size, settings.eta1, settings.eta2) == (16, .01, .05)
    assert (settings.tau1, settings.tau2, settings.lr_new) == (.5, .55, 1e-3)
    settings = train.parse("--recipe release --budget .5".split())
    assert (settings.lam, settings.budget) == (None, .5)    # a budget replaces its lambda
