"""Earlier methods and other exit criteria against loops written anew; the study's scripts."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import save_tiny_weights, tiny_batch, tiny_model

import train
from data import TASKS, Split, collate, encode, hold_out, load_task, load_tokenizer, write_text
from eval import apply_exits, auxiliary_flops, layer_flops, plain_flops
from results import bench, ceiling, criteria, rivals, run_study, study
from smartbert import infer

RESULTS = Path(study.__file__).parent
TOY = "--limit 120 --epochs1 1 --epochs2 1 --device cpu".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished BERT and a PABEE that has learned a little, so that its heads disagree."""
    folder = tmp_path_factory.mktemp("runs")
    train.main([*TOY, "--method", "bert", "--out", str(folder / "bert")])
    flags = "--method pabee --limit 600 --epochs1 2 --lr 2e-3 --device cpu --out".split()
    rivals.main([*flags, str(folder / "pabee")])
    return folder


def weights_of(folder):
    return torch.load(folder / "model.pt", weights_only=True)["weights"]


def test_losses_by_hand():
    """p[i] (9, 3): what head i says, by one layer after the other."""
    model, inputs, p = tiny_model(layers=4), tiny_batch(), []
    h, labels = model.bert.embeddings(*inputs[:2]), torch.arange(9) % 3
    for layer, head in zip(model.bert.layers, model.heads):
        h = layer(h, inputs[2])
        p.append(head(h, inputs[2])[0].double().softmax(-1).detach().numpy())
    ce = [-np.log(answers[range(9), labels.tolist()]).mean() for answers in p]
    kl = [np.sum(p[3] * (np.log(p[3]) - np.log(p[i]))) / 9 for i in range(3)]
    expected = [("deebert", 0, sum(ce[:3])), ("deebert", 1, sum(ce[:3])), ("fastbert", 0, sum(kl)),
                ("pabee", 0, (ce[0] + 2 * ce[1] + 3 * ce[2] + 4 * ce[3]) / 10),
                ("berxit", 0, ce[3]), ("berxit", 1, sum(ce)), ("berxit", 2, ce[3])]
    for name, step, value in expected:
        loss = rivals.LOSSES[name](model, inputs, labels, step)
        assert loss.item() == pytest.approx(value, rel=1e-5), (name, step)
    loss = rivals.fastbert_loss(model, inputs, 0 * labels, 0)
    assert loss.item() == pytest.approx(sum(kl), rel=1e-5)              # needs no labels
    loss.backward()
    assert all(p.grad is None for p in model.heads[-1].parameters())    # nor does p_L learn


# Which parts move: the encoder, the last head, the other heads.
@pytest.mark.parametrize("flags, phase, moves", [
    ("deebert", 2, "others"), ("fastbert", 2, "others"), ("pabee", 1, "encoder last others"),
    ("berxit", 1, "encoder last others"), ("berxit --lr 0", 1, "last others"),
    ("pabee --lr-new 0", 1, "encoder")])
def test_what_each_stage_trains(tmp_path, monkeypatch, flags, phase, moves):
    """Trained parts move by their own rates, which rise and fall; only they have dropout."""
    flags = f"--out {tmp_path}/run --batch-size 27 --warmup 0.5 --method {flags}".split()
    settings = rivals.parse_all([*TOY, *flags])
    run, model, training, held = train.prepare(settings, gates=False, exits=True)
    run.phase, loss, seen, factors = phase, rivals.LOSSES[settings.method], [], []

    def spy(model, inputs, labels, step):
        parts = (model.bert.layers[0], model.heads[0], model.heads[-1])
        seen.append([step] + [part.training for part in parts])
        return loss(model, inputs, labels, step)
    monkeypatch.setitem(rivals.LOSSES, settings.method, spy)
    monkeypatch.setattr(rivals, "set_rates", lambda optimizer, factor: (
        factors.append(factor), train.set_rates(optimizer, factor)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rivals.train_heads(run, model, training, held)
    assert seen == [[step, phase == 1, True, phase == 1] for step in range(4)]  # 108 examples
    assert factors == [.5, .5, 1, .5]
    for name, value in model.state_dict().items():
        part = {"bert": "encoder", "head": "others"}.get(name[:4], "rest")
        if name.startswith("heads.5."):
            part = "last"
        # softmax does not see a key's bias; a word that does not occur stays
        if not any(word in name for word in ("word", "qkv.bias", "project")):
            assert torch.equal(before[name], value) == (part not in moves.split()), name


def test_runs_from_a_finished_bert(tmp_path, runs, refused):
    """A DeeBERT becomes what it becomes without, to the bit."""
    flags, bert = [*TOY, "--method", "deebert", "--out"], runs / "bert"
    rivals.main([*flags, str(tmp_path / "whole")])
    rivals.main([*flags, str(tmp_path / "half"), "--from-run", str(bert)])
    assert len(json.loads((tmp_path / "half/run.json").read_text())["log"]) == 1
    whole, half, start = map(weights_of, (tmp_path / "whole", tmp_path / "half", bert))
    assert all(torch.equal(value, half[name]) for name, value in whole.items())
    assert not torch.equal(start["heads.0.out.weight"], half["heads.0.out.weight"])
    for folder, flag, value, words in (
            (bert, "--seed", 51, "seed = 50"), (bert, "--held-out", .2, "held_out = 0.1"),
            (bert, "--limit", 99, "limit = 120"), (tmp_path / "half", "--seed", 50, "not a fin")):
        refused(rivals.main, [*flags, tmp_path / "x", "--from-run", folder, flag, value], words)
        assert not (tmp_path / "x").exists()
    refused(criteria.main, [tmp_path / "half", "--criterion", "patience"], "trained for entropy")


def test_a_stopped_run_goes_on_the_same_way(tmp_path, monkeypatch, runs):
    """BERxiT's steps count on; PABEE does not start from the BERT anew."""
    def stop(*arguments):
        train.end_epoch(*arguments)
        raise EOFError
    for method, flags in (("berxit", ["--epochs1", "2", "--batch-size", "36"]),
                          ("pabee", ["--epochs1", "2", "--from-run", str(runs / "bert")])):
        whole, half = tmp_path / method / "whole", tmp_path / method / "half"
        flags = [*TOY, "--method", method, *flags, "--out"]
        rivals.main([*flags, str(whole)])
        with monkeypatch.context() as patch, pytest.raises(EOFError):
            patch.setattr(rivals, "end_epoch", stop)
            rivals.main([*flags, str(half)])
        first = weights_of(half)
        rivals.main([*flags, str(half), "--resume"])
        half = weights_of(half)
        assert all(torch.equal(value, half[name]) for name, value in weights_of(whole).items())
        with monkeypatch.context() as patch:
            patch.setattr(train, "gate_rank", lambda run, share: -run.epoch)    # the first is best
            rivals.main([*flags, str(tmp_path / method / "best")])
        best = weights_of(tmp_path / method / "best")
        assert all(torch.equal(value, best[name]) for name, value in first.items())


def agreeing(answers):
    """How many of the answers right before the last one equal it."""
    count = 0
    while count + 1 < len(answers) and answers[-2 - count] == answers[-1]:
        count += 1
    return count


LABELS = torch.arange(60) % 3
# As rules: row, answers of the heads asked so far, the last one's probabilities, its layer.
RULES = [(criteria.entropy_below, .7, lambda n, said, p, i: -(p * p.log()).sum() < .7),
         (criteria.probability_above, .7, lambda n, said, p, i: p.max() > .7),
         (criteria.first_correct, LABELS, lambda n, said, p, i: said[-1] == LABELS[n]),
         (criteria.patience, 1, lambda n, said, p, i: agreeing(said) >= 1),
         (criteria.patience, 2, lambda n, said, p, i: agreeing(said) >= 2),
         (criteria.fixed_layer, 3, lambda n, said, p, i: i >= 3)]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("criterion, number, rule", RULES)
def test_criteria_by_loops(criterion, number, rule, skip):
    """Also along the gates' paths, where the heads of skipped layers do not count."""
    full = infer(tiny_model(), *tiny_batch(rows=60), skip=skip, all_heads=True)
    said, expected = [[] for _ in range(60)], [5] * 60
    for n, i in full.ran[:, :4].nonzero().tolist():
        said[n].append(full.history[n, i].argmax().item())
        if expected[n] == 5 and rule(n, said[n], full.history[n, i].softmax(0), i + 1):
            expected[n] = i + 1
    assert apply_exits(full, criterion(full, number)).exit.tolist() == expected
    assert len(set(expected)) > 1 or criterion is criteria.fixed_layer


def test_comparison():
    """A fixed layer costs its layers and one head; no criterion beats the oracle."""
    model, inputs = tiny_model(), tiny_batch(rows=60)
    lengths = inputs[2].sum(1)
    split = Split("dev", [], LABELS.tolist(), ids=[range(n) for n in lengths])
    full = infer(model, *inputs, skip=False, all_heads=True)
    rows = criteria.compare(model, split, TASKS["mnli"], full)
    assert [row["threshold"] for row in rows[100:]] == [1, 2, 3, 4, 1, 2, 3, 4, 5, None]
    for row in rows:
        if row["criterion"] == "layer":
            cost = row["threshold"] * layer_flops(model, lengths)
            cost = cost + auxiliary_flops(model.heads[0], lengths)
            assert row["flops"] == pytest.approx(cost.sum() / plain_flops(model, lengths).sum())
        assert row["score"] <= rows[-1]["score"]
    points = [(row["flops"], row["score"]) for row in rows if row["criterion"] == "layer"]
    table = criteria.comparison_table(rows).splitlines()
    assert len(table) == 6 and table[4].split()[3] == f"{study.at_cost(points, .4):.3f}"


def test_pabee_by_loops(runs, refused):
    """eval.json by patience: every figure computed anew, and the choice on held-out data."""
    pabee = runs / "pabee"
    criteria.main([str(pabee), "--criterion", "patience", "--device", "cpu"])
    result = json.loads((pabee / "eval.json").read_text())
    (run, model), splits, expected = train.load_run(pabee, "cpu"), load_task("toy"), {}
    _, held = hold_out(splits["train"], run.settings.held_out, run.settings.seed, 600)
    for split in (held, splits["dev"]):
        batch = collate(encode(load_tokenizer(pabee), split), range(len(split)))
        with torch.inference_mode():
            answers = [logits.argmax(1) for logits in rivals.every_head(model, batch.inputs)]
        for times in (1, 2, 3, 4, 5, 99):
            right, layers, cost = 0, 0, 0
            for n, tokens in enumerate(batch.mask.sum(1)):
                said = [answers[i][n].item() for i in range(6)]
                exit = min([i + 1 for i in range(6) if agreeing(said[:i + 1]) >= times] + [6])
                right, layers = right + (said[exit - 1] == split.labels[n]), layers + exit
                heads = 1 if times == 99 else exit
                cost += (exit * layer_flops(model, tokens)
                         + heads * auxiliary_flops(model.heads[0], tokens))
            share = cost / plain_flops(model, batch.mask.sum(1)).sum()
            expected[split.name, times] = (right / len(split), layers / len(split), share.item())
    rows = result["rows"]
    assert rows[0]["mode"] == "plain" and {row["criterion"] for row in rows} == {"patience"}
    for row in rows:
        times = 99 if row["threshold"] is None else row["threshold"]
        assert (row["score"], row["layers"], row["flops"]) == pytest.approx(expected["dev", times])
        score, _, share = expected["held-out", times]
        assert (row["held_out"], row["held_out_flops"]) == pytest.approx((score, share))
    score, _, share = expected["held-out", 99]
    good = [times for times in (1, 2, 3, 4, 5) if expected["held-out", times][0] >= score - .005]
    good = [times for times in good[:1] if expected["held-out", times][2] < share]
    assert [row["threshold"] for row in rows if row["chosen"]] == good
    points = {point["threshold"]: (point["score"], point["flops"]) for point in result["curve"]}
    assert points == {row["threshold"]: (row["score"], row["flops"]) for row in rows[1:]}
    criteria.main([str(pabee), "--device", "cpu"])
    refused(criteria.main, [runs / "bert"], "no exit heads")


def write_result(path, method, seed, rows, **settings):
    """rows: mode, threshold, score, FLOPs, whether chosen; held out, all is .1 better."""
    rows = [{"mode": mode, "threshold": threshold, "score": score, "flops": cost, "chosen": star,
             "held_out": score + .1, "held_out_flops": cost}
            for mode, threshold, score, cost, star in rows]
    settings = {"recipe": "ours", "method": method, "seed": seed, "weights": "x/gte"} | settings
    path.write_text(json.dumps({"task": "cola", "split": "dev", "partial": False, "rows": rows,
                                "curve": [], "settings": settings}))
    return str(path)


def test_the_tables_of_two_seeds(tmp_path, refused):
    files, plain = [], ("plain", None, .4, 1, False)
    for seed, plus in (50, 0), (51, .02):
        files.append(write_result(tmp_path / f"a{seed}", "bert", seed,
                                  [("plain", None, .5 + plus, 1, False)]))
        files.append(write_result(tmp_path / f"b{seed}", "smartbert", seed, [
            plain, ("skip", None, .38, .5, False),
            ("exit", .1, .3 + plus, .6, False), ("exit", .2, .2 + plus, .2, True),
            ("both", .1, .3, .4, True), ("both", .3, .1, .2, False)]))
    odd = [plain, ("exit", .2, .25, .2, False), ("exit", .1, .3, .6, True)]
    files += [write_result(tmp_path / "c", "exits", 50, odd, budget=.1),
              write_result(tmp_path / "d", "deebert", 50, odd, from_run="runs/a50", eta1=0),
              write_result(tmp_path / "e", "smartbert", 51, [*odd, ("both", .2, .25, .3, False)],
                           eta1=0, gates_from=.1)]
    read = study.read_study(files)
    for table, expected in ((study.summary(read), (
            "smartbert exit 2 0.210 +- 0.014 0.200 +- 0.000 -30.0",
            "smartbert both 2 0.300 +- 0.000 0.400 +- 0.000 -21.0",
            "smartbert gates_from=0.1 eta1=0 exit 1 0.300 0.600 -21.0",
            "exits exit 1 0.300 0.600 -21.0", "deebert exit 1 0.300 0.600 -21.0")),
            (study.at_costs(read, [.3, .9]), (
            "smartbert exit 2 0.235 +- 0.014 (+3.5 +- 1.4) -", "deebert exit 1 0.263 (+6.3) -",
            "smartbert gates_from=0.1 eta1=0 both 1 0.250 (+5.0) -"))):
        lines = [" ".join(line.split()) for line in table.splitlines()]
        assert {"cola dev gte " + line for line in expected} <= set(lines)
    (tmp_path / "f").write_text("{}")
    refused(study.main, [tmp_path / "f"], "not an eval.json of this version")
    stored = study.read_study(RESULTS.glob("*-5?.json"))
    assert "both       3 0.347 +- 0.030 0.332 +- 0.032    +1.8" in study.summary(stored)
    lines = {" ".join(line.split()) for line in study.at_costs(stored, [.1, .4]).splitlines()}
    assert lines >= {"toy dev pabee exit 3 - 1.000 +- 0.000 (+0.3 +- 0.3)", "cola dev gte-small "
                     "berxit exit 3 0.133 +- 0.024 (-1.2 +- 2.0) 0.376 +- 0.019 (+2.4 +- 0.9)"}
    free = {"lr", "weights", "seed", "limit", "bf16", *train.FREE}
    for (_, _, method, words), [run, *_] in stored.items():     # made by today's defaults
        if method == "smartbert" and words in ("", " recipe=release"):
            assert {x for x in run.usual if run.settings[x] != run.usual[x]} <= free, run.kind
    pytest.importorskip("matplotlib")
    study.main([*files, "--plot"])
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_the_study_makes_what_is_missing(tmp_path, monkeypatch, refused):
    """Its commands are what train.py and rivals.py take. A BERT is trained once, before the runs
    that start from it; a run that fails is named, and the next call makes the rest."""
    asked, said, broken = dict(weights="w", data_dir="g", runs="r", folder="f"), [], ["sst2-52"]
    for name, command in run_study.COMMANDS.items():
        script, *words = [word.format(**asked) for word in command.split()]
        settings = (train.parse if script == "train.py" else rivals.parse_all)(words)
        assert name.startswith(settings.task) and name.endswith(str(settings.seed))
        if (RESULTS / f"{name}.json").is_file():
            made = json.loads((RESULTS / f"{name}.json").read_text())["settings"]
            free = {"from_run", "weights"} | (study.OF_GATES if "-bert-" in name else set())
            assert {x for x in made if made[x] != getattr(settings, x)} <= free, name
            assert settings.weights == f"w/{made['weights']}"
    def run(words, stdout, stderr):
        trains = "--out" in words
        folder = Path(words[words.index("--out") + 1] if trains else words[2])
        said.append((words[1].name, folder.name))
        folder.mkdir(parents=True, exist_ok=True)
        if not trains:
            (folder / "eval.json").write_text(folder.name)
        return SimpleNamespace(returncode=int(folder.name in broken))
    monkeypatch.setattr(run_study, "RESULTS", tmp_path)
    monkeypatch.setattr(run_study.subprocess, "run", run)
    (tmp_path / "sst2-51.json").write_text("there")
    flags = "--weights w --data-dir g --runs runs --only sst2*".split()
    refused(run_study.main, flags, "sst2-52 failed: runs/sst2-52.log")
    broken.clear()
    run_study.main(flags)
    made = {path.stem: path.read_text() for path in tmp_path.glob("sst2*.json")}
    expected = {name: name for name in run_study.COMMANDS if "sst2" in name}
    assert made == expected | {"sst2-51": "there"}
    assert len(said) == len(set(said)) + 1              # sst2-52 was trained twice
    assert said.index(("eval.py", "sst2-bert-50")) < said.index(("rivals.py", "sst2-deebert-50"))
    assert ("criteria.py", "sst2-pabee-50") in said and ("eval.py", "sst2-pabee-50") not in said


def test_a_row_beside_the_stored_seeds(tmp_path, monkeypatch, capsys, refused):
    def content(score, flops):
        row = dict(mode="both", threshold=.3, chosen=True, score=score, flops=flops)
        return json.dumps({"rows": [row, row | {"chosen": False, "score": 9}]})
    for seed, score in (50, .7), (51, .8), (52, .9):
        (tmp_path / f"cola-{seed}.json").write_text(content(score, .3))
    monkeypatch.setattr(run_study, "RESULTS", tmp_path)
    monkeypatch.setattr(run_study, "make", lambda name, *more: content(.99, .4))
    monkeypatch.setattr(run_study.os, "rename", lambda old, new: print(old))
    flags = ["--weights", "w", "--data-dir", "g", "--runs", str(tmp_path)]
    run_study.main([*flags, "--check", "cola-50"])
    assert capsys.readouterr().out == ("both score 0.990 in 0.800 +- 0.200\nboth flops 0.400 NOT "
                                       f"in 0.300 +- 0.000\n{tmp_path}/check-cola-50\n")
    refused(run_study.main, [*flags, "--check", "mrpc-50"], "fewer than two stored seeds")


def test_ceiling(tmp_path, runs, refused, monkeypatch):
    """Gates and plain are what `infer` gives; examples are shuffled; greedy drops what hurts
    least."""
    folder, seen, score_of = tmp_path / "run", [], ceiling.score_of
    monkeypatch.setattr(ceiling, "score_of", lambda *of: seen.append(of[3]) or score_of(*of))
    train.main([*TOY, "--gate-bias", "0", "--gates-from", "0", "--out", str(folder)])
    ceiling.main([str(folder), "--json", str(tmp_path / "x")])
    *shuffled, gates = [ran for ran in seen if len(ran) == 900][:6]
    for ran in shuffled:
        assert sorted(ran.tolist()) == sorted(gates.tolist()) and not ran.equal(gates)
    found, = json.loads((tmp_path / "x").read_text())
    _, model = train.load_run(folder, "cpu")
    dev, every = encode(load_tokenizer(folder), load_task("toy")["dev"]), set(range(6))
    batch, toy = collate(dev, range(len(dev))), TASKS["toy"]
    held = encode(load_tokenizer(folder), hold_out(load_task("toy")["train"], .1, 50, 120)[1])
    kept = ceiling.greedy(model, held, toy, found["depth"])
    assert found["greedy_layers"] == [i + 1 for i in sorted(kept)]
    often = infer(model, *batch.inputs).ran.sum(0).sort(descending=True).indices.tolist()
    often = ceiling.one_path(often[:found["depth"]], 900, 6)
    assert found["most_run"] == ceiling.score_of(model, dev, toy, often)
    for name, skip in ("gates", True), ("plain", False):
        answers = infer(model, *batch.inputs, skip=skip).logits.argmax(1)
        assert found[name] == pytest.approx((answers == batch.labels).float().mean().item())
    assert found["patterns"] > 1 and found["shuffled_spread"] > 0
    assert len(found["greedy_layers"]) == found["depth"] == round(found["layers"])
    dev = dev.select(range(99))
    while len(every) > 4:
        without = {i: ceiling.score_of(model, dev, toy, ceiling.one_path(every - {i}, 99, 6))
                   for i in every}
        every = every - {max(without, key=without.get)}
    assert ceiling.greedy(model, dev, toy, 4) == every
    refused(ceiling.main, [runs / "pabee"], "no gates")


def test_bench(tmp_path, monkeypatch):
    """Every function runs, on tiny weights, data and a tiny run."""
    weights, toy = save_tiny_weights(tmp_path / "w"), tmp_path / "toy"
    pairs = "index\tsentence1\tsentence2\tlabel" + 40 * "\n1\ta\tb c\tentailment"
    for name, text in ("RTE", pairs), ("SST-2", "sentence\tlabel" + 40 * "\na b c\t1"):
        for split in ("train", "dev"):
            write_text(tmp_path / name / f"{split}.tsv", text)
    train.main([*TOY, "--out", str(toy)])
    monkeypatch.setattr(bench, "load_task", lambda *of: {
        name: split.select(range(40)) for name, split in load_task(*of).items()})
    flags = f"--weights {weights} --data-dir {tmp_path} --runs {toy} --rounds 1 --device cpu"
    bench.main([*flags.split(), "--json", str(tmp_path / "x.json")])
    figures = json.loads((tmp_path / "x.json").read_text())
    assert sum("x in FLOPs / in seconds" in name for name in figures) == 11
    plain = []
    for name, value in figures.items():
        if "x in FLOPs" in name:
            plain.append(value["against"] * float(name.split(": ")[1].split("x")[0]))
            assert value["ratio"] == value["against"] / value["seconds"]
    assert plain == pytest.approx(11 * plain[:1], rel=.02)
