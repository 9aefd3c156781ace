"""Training and evaluation as a user runs them: whole runs of the toy task, killed runs, bad
input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

import eval as evaluation
import train
from results import study

ROOT = Path(__file__).parent.parent
SMALL = "--limit 240 --epochs1 3 --epochs2 2 --batch-size 16 --dropout 0.1 --device cpu".split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a small run that went through without a break."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train.main([*SMALL, "--out", str(folder)])
    return folder


def weights(folder: Path) -> dict:
    return torch.load(folder / "model.pt", weights_only=True)["model"]


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_resume_gives_the_same_weights(finished, tmp_path, monkeypatch, stop_after):
    """Killed after an epoch of either phase, and in the middle of the next, a run ends where it
    would have ended."""
    written = []

    def save_then_die(path, **content):
        save(path, **content)
        written.append(path.name)
        if written.count("checkpoint.pt") == stop_after:
            monkeypatch.setattr(train.data, "collate", die_soon)

    def die_soon(split, indices, calls=[]):
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError
        return collate(split, indices)

    save, collate, out = train.save, train.data.collate, str(tmp_path / "run")
    monkeypatch.setattr(train, "save", save_then_die)
    with pytest.raises(MemoryError):
        train.main([*SMALL, "--out", out])
    monkeypatch.undo()
    (tmp_path / "run/checkpoint.pt.0.tmp").touch()  # as a kill while writing leaves it
    train.main([*SMALL, "--out", out, "--resume"])
    theirs = weights(tmp_path / "run")
    assert all(torch.equal(value, theirs[name]) for name, value in weights(finished).items())
    assert not list((tmp_path / "run").glob("checkpoint.pt*"))
    ours, same = ((f / "log.jsonl").read_text().splitlines() for f in (finished, tmp_path / "run"))
    assert len(ours) == len(same)  # no step is logged twice


def test_resume_after_the_last_epoch(finished, tmp_path, monkeypatch):
    """Stopped between the last checkpoint and model.pt: nothing is trained again, nothing is
    lost."""

    def no_model(path, **content):
        if path.name == "model.pt":
            raise MemoryError
        save(path, **content)

    save = train.save
    monkeypatch.setattr(train, "save", no_model)
    with pytest.raises(MemoryError):
        train.main([*SMALL, "--out", str(tmp_path / "run")])
    monkeypatch.undo()
    train.main([*SMALL, "--out", str(tmp_path / "run"), "--resume"])
    theirs = weights(tmp_path / "run")
    assert all(torch.equal(value, theirs[name]) for name, value in weights(finished).items())


def test_kill_9_loses_at_most_an_epoch(tmp_path, refused):
    """A real kill -9; the checkpoint that is there is whole, and nothing half-written bears a good
    name."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *SMALL, "--epochs1", "200", "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 60
    while not (out / "checkpoint.pt").exists() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = train.load_file(out / "checkpoint.pt")["state"]
    assert (
        state["done"] >= 1
        and sum("held-out" in record for record in state["log"]) == state["done"]
    )
    assert not (out / "model.pt").exists()
    refused(evaluation.main, [out], "model.pt")


@pytest.mark.parametrize(
    "more, starts",
    [
        ({}, (0, 40)),
        ({"method": "bert"}, (0,)),
        ({"no_skipping": True}, (0,)),
        ({"penalty_start": 0.0}, (0,)),
    ],
)
def test_learning_rates_rise_and_fall_for_the_task_and_then_for_the_gates(more, starts):
    """A part begins low and ends low, with one peak in it; the gates' rate is 0 in the task's
    part."""
    settings = train.Settings(**{"lr": 1e-4, "penalty_start": 0.4, "warmup": 0.1} | more)
    optimizer = train.make_optimizer(tiny_model(), settings, 1)
    encoder, gates = [], []
    for step in range(100):
        train.set_rates(optimizer, settings, step, 100)
        encoder.append(optimizer.param_groups[0]["lr"])
        gates += [group["lr"] for group in optimizer.param_groups[-1:] if group["gates"]]
    for start, end in zip(starts, (*starts[1:], 100)):
        part, peak = encoder[start:end], max(encoder[start:end])
        assert peak == pytest.approx(settings.lr) and part.index(peak) == round(
            0.1 * (end - start)
        )
        assert 0 < part[0] <= peak / 3 and 0 < part[-1] < peak / 30
    if len(starts) == 2:
        assert not any(gates[:40]) and gates[40:] == pytest.approx(
            [rate * 10 for rate in encoder[40:]]
        )


def test_evaluation_writes_what_it_prints(finished, capsys):
    """eval.json holds every row of the table; layers, FLOPs and exits agree with each other."""
    evaluation.main(
        [str(finished), "--thresholds", "0.1", "0.5", "9", "--repeats", "1", "--device", "cpu"]
    )
    printed = capsys.readouterr().out
    result = json.loads((finished / "eval.json").read_text())
    assert (result["task"], result["metric"], result["examples"]) == ("toy", "accuracy", 900)
    assert [row["mode"] for row in result["rows"]] == ["plain", "skip"] + ["exit"] * 3 + [
        "both"
    ] * 3
    for row in result["rows"]:
        assert sum(row["exit_histogram"]) == 900 and len(row["skip_rate"]) == 6
        assert sum(level["examples"] for level in row["levels"]) == 900
        assert row["score"] == pytest.approx(
            sum(l["accuracy"] for l in row["levels"]) / 3, abs=1e-6
        )
        assert row["layers"] == pytest.approx(
            sum(l["layers"] for l in row["levels"]) / 3, abs=1e-5
        )
        assert row["seconds"] > 0 and f"{row['flops']:.3f}" in printed
    plain = result["rows"][0]
    assert (plain["flops"], plain["layers"], plain["threshold"]) == (1.0, 6.0, None)
    everybody = next(r for r in result["rows"] if r["mode"] == "exit" and r["threshold"] == 9)
    assert everybody["exit_histogram"] == [900, 0, 0, 0, 0, 0] and everybody["layers"] == 1
    assert "warning: exit at threshold 9: every example exits at layer 1" in printed


def test_plain_bert_and_ablations_run(tmp_path, capsys):
    """The baseline and each ablation train and evaluate."""
    tiny, two = ["--limit", "60", "--epochs1", "1", "--device", "cpu"], ["--epochs2", "1"]
    for name, flags in (
        ("bert", ["--method", "bert"]),
        ("none", ["--no-skipping", *two]),
        ("soft", ["--soft-gates", *two]),
        ("far", ["--no-contrast", "--lam", "0.04", "--gate-bias", "0", *two]),
        ("gates", ["--epochs2", "0"]),
    ):
        out = tmp_path / name
        train.main([*tiny, *flags, "--out", str(out)])
        at = [] if name in ("bert", "gates") else ["--thresholds", "0.5"]  # where nothing exits
        evaluation.main([str(out), "--repeats", "1", *at, "--device", "cpu"])
    rows = {
        name: [
            row["mode"] for row in json.loads((tmp_path / name / "eval.json").read_text())["rows"]
        ]
        for name in ("bert", "none", "soft", "gates")
    }
    assert rows == {
        "bert": ["plain"],
        "none": ["plain", "exit"],
        "soft": ["plain", "skip", "exit", "both"],
        "gates": ["plain", "skip"],
    }
    records = [json.loads(line) for line in (tmp_path / "none/log.jsonl").read_text().splitlines()]
    assert all(share == 1 for record in records if "run" in record for share in record["run"])


def test_an_existing_run_is_not_overwritten(finished, refused):
    before = (finished / "model.pt").read_bytes()
    refused(train.main, [*SMALL, "--out", finished], "--resume", "--overwrite")
    refused(train.main, [*SMALL, "--lr", "0.5", "--out", finished, "--resume"], "lr")
    assert (finished / "model.pt").read_bytes() == before


def test_bad_input_of_training(tmp_path, refused):
    """Each with one line and status 2, and no folder left behind."""
    for arguments, words in (
        (["--task", "sst-2"], ["unknown task", "sst2"]),
        (["--weights", "bert-huge"], ["bert-huge"]),
        (["--task", "rte", "--data-dir", "nowhere"], ["nowhere"]),  # before weights are fetched
        (["--method", "magic"], ["magic", "smartbert"]),
        (["--epochs1", "0"], ["epochs1", "from 1"]),
        (["--budget", "2"], ["budget", "2", "to 1"]),
        (["--lr", "nan"], ["lr"]),
        (["--seed", "-1"], ["--seed", "from 0"]),
        (["--tau1", "0"], ["--tau1"]),
        (["--max-length", "4000"], ["4000", "128"]),
        (["--max-length", "3"], ["3"]),
        (["--device", "tpu"], ["tpu", "cpu"]),
        (["--lam", "0.04", "--budget", "0.5"], ["--lam", "--budget", "one of them"]),
        (["--data-dir", "."], ["--data-dir", "--task"]),  # --task forgotten
        (["--limit", "1"], ["same label", "--limit"]),
    ):
        refused(train.main, [*arguments, "--out", "run"], *words)
    if not torch.cuda.is_available():
        refused(train.main, ["--device", "cuda", "--out", "run"], "cuda")
    assert not (tmp_path / "run").exists()


def test_a_run_started_over_forgets_its_evaluation(finished, tmp_path):
    """Or --predict would take the threshold of another model."""
    settings, _ = train.load_run(finished, torch.device("cpu"))
    (tmp_path / "eval.json").touch()
    (tmp_path / "model.pt").touch()
    train.start_over(tmp_path, settings, {}, train.data.toy_tokenizer())
    assert not {"eval.json", "model.pt"} & {path.name for path in tmp_path.iterdir()}


def test_a_full_disk_costs_no_file(finished, tmp_path, refused):
    """A limit on the size of files acts as a full disk: one line, nothing is half-written, and the
    run started over ends at the weights of one that was never stopped."""
    resource = pytest.importorskip("resource")  # not on Windows
    out, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        refused(train.main, [*SMALL, "--out", out], "checkpoint.pt", "make room")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(out.glob("*.tmp")) and not (out / "checkpoint.pt").exists()
    train.main([*SMALL, "--out", str(out), "--overwrite"])
    pairs = zip(weights(out).values(), weights(finished).values())
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_gpu_that_is_too_small(monkeypatch, finished, refused):
    """It ends with one line that names the settings to lower."""

    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(train, "train_epoch", full)
    monkeypatch.setattr(evaluation, "evaluate", full)
    refused(train.main, [*SMALL, "--out", "run"], "--batch-size", "--max-length")
    refused(evaluation.main, [finished], "--device cpu")


def test_a_loss_that_explodes_is_no_run(tmp_path, refused):
    """It is said, no model is left, and the same folder takes the next try."""
    out = tmp_path / "run"
    refused(
        train.main,
        [*SMALL, "--lr", "1e9", "--weight-decay", "1e9", "--out", out],
        "the loss is",
        "--lr",
    )
    assert not (out / "model.pt").exists()
    train.main([*SMALL, "--out", str(out)])
    assert (out / "model.pt").is_file()


def test_weights_and_vocabulary_must_fit(tmp_path, refused):
    """A folder whose vocab.txt is not the weights' is refused before anything is written."""
    from dataclasses import asdict

    from bert import Bert, BertConfig, name_table

    config = BertConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    parts = Bert(config).state_dict()
    tensors = {}
    for ours, theirs in name_table(config).items():
        tensors |= dict(zip(theirs, parts[ours].chunk(len(theirs))))
    torch.save(
        {name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "pytorch_model.bin"
    )
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdef"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    refused(train.main, ["--weights", tmp_path, "--out", "run"], "10", "9", "vocab.txt")
    (tmp_path / "vocab.txt").write_text(
        "\n".join(words[:6]) + "\n"
    )  # spare rows of embeddings: no fault
    refused(train.main, ["--weights", tmp_path, "--out", "run"], "single layer")
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcde"]) + "\n"
    )
    refused(train.main, ["--weights", tmp_path, "--out", "run"], "single layer")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("budget, best", [("0.7", 2), ("0.4", 3), ("0", 2)])
def test_the_best_epoch_keeps_the_budget(tmp_path, monkeypatch, budget, best):
    """Of the epochs that keep it, that of the best score; where none does, the best of those
    with the penalty in full."""
    epochs, kept, save = iter([(0.9, 6.0), (0.8, 4.0), (0.7, 2.0)]), [], train.save

    def noted(path, **content):
        if path.name == "checkpoint.pt":
            kept.append(content["state"]["best"][3])
        save(path, **content)

    monkeypatch.setattr(
        train, "validate", lambda *_: dict(zip(("accuracy", "layers"), next(epochs)))
    )
    monkeypatch.setattr(train, "save", noted)
    train.main(
        [
            "--limit",
            "40",
            "--epochs1",
            "3",
            "--epochs2",
            "0",
            "--budget",
            budget,
            "--penalty-full",
            "0.6",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    assert kept[-1] == [0.9, 0.8, 0.7][best - 1]


def test_bad_input_of_evaluation(finished, tmp_path, refused):
    """Once as a process of its own, to see the status; then each in turn."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "eval.py"), str(tmp_path)], capture_output=True, text=True
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    refused(evaluation.main, [tmp_path], "no run")
    refused(evaluation.main, [finished, "--thresholds", "low"], "low", "--thresholds")
    refused(evaluation.main, [finished, "--thresholds", "nan"], "number")
    refused(evaluation.main, [finished, "--target-speedup", "0"], "--target-speedup: 0", "from 1")
    refused(evaluation.main, [finished, "--max-drop", "nan"], "--max-drop")
    refused(evaluation.main, [finished, "--predict", "x", "--criteria"], "--criteria")
    refused(evaluation.main, [finished, "--predict", "x", "--trace", "y"], "--trace")
    refused(evaluation.main, [], "run")
    train.main(
        [
            "--method",
            "bert",
            "--limit",
            "40",
            "--epochs1",
            "1",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "bert"),
        ]
    )
    refused(evaluation.main, [tmp_path / "bert", "--criteria"], "no trained exit heads")
    for look in ([], ["--trace", "king coin b"]):
        refused(evaluation.main, [tmp_path / "bert", "--thresholds", "0.3", *look], "has no exits")
    refused(evaluation.main, [tmp_path / "bert", "--target-speedup", "2"], "has no exits")
    model = (finished / "model.pt").read_bytes()
    for content, word in ((model[: len(model) // 2], "truncated"), (b"", "truncated")):
        copy = tmp_path / "copy"
        copy.mkdir(exist_ok=True)
        for name in "settings.json", "data.json":
            (copy / name).write_bytes((finished / name).read_bytes())
        (copy / "model.pt").write_bytes(content)
        refused(evaluation.main, [copy], word)
        refused(
            train.main, [*SMALL, "--out", copy, "--resume"], word, "--overwrite"
        )  # nor is it finished already
    torch.save({"version": 99}, copy / "model.pt")
    refused(evaluation.main, [copy], "another version")
    content = torch.load(finished / "model.pt", weights_only=True)
    content["model"].pop("gates.0.out.bias")
    torch.save(content, copy / "model.pt")
    refused(evaluation.main, [copy], "another version", "--overwrite")
    refused(evaluation.main, [finished, "--trace", "x", "--target-speedup", "2"], "--thresholds")
    refused(study.main, ["x"], "x cannot be read")
    (tmp_path / "file").touch()
    refused(train.main, [*SMALL, "--out", tmp_path / "file" / "run"], "file/run", "change folder")
    torch.save(torch.load(finished / "model.pt", weights_only=True), copy / "model.pt")
    for content in ("[]", "{}", "{"):
        (copy / "settings.json").write_text(content)
        refused(evaluation.main, [copy], "--overwrite")
    refused(train.main, [*SMALL, "--out", copy, "--resume"], "settings.json", "--overwrite")


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"]])
def test_a_folder_of_the_users_is_left_alone(tmp_path, refused, more):
    """Not empty and no run: refused, also with --overwrite, and not a byte in it changes."""
    for name in "vocab.txt", "settings.json", "eval-notes.json":
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / name).write_text('{"font": 12}')
    refused(train.main, [*SMALL, *more, "--out", tmp_path / "mine"], "not empty", "new folder")
    assert {
        path.name: path.read_text() for path in (tmp_path / "mine").iterdir()
    } == dict.fromkeys(("vocab.txt", "settings.json", "eval-notes.json"), '{"font": 12}')


def test_other_data_than_the_runs_are_noticed(tmp_path, refused):
    """A row more, another order or another label in train.tsv: neither --resume nor eval.py goes
    on."""
    glue = tmp_path / "glue" / "SST-2"
    glue.mkdir(parents=True)
    rows = [f"the film number {i} is {'good' if i % 2 else 'bad'}\t{i % 2}" for i in range(40)]

    def write(rows):
        (glue / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")

    write(rows)
    (glue / "dev.tsv").write_text("\n".join(["sentence\tlabel", *rows[:10]]) + "\n")
    from conftest import save_tiny_weights

    arguments = [
        "--task",
        "sst2",
        "--weights",
        save_tiny_weights(tmp_path / "weights"),
        "--data-dir",
        glue.parent,
        "--epochs1",
        "1",
        "--epochs2",
        "1",
        "--max-length",
        "12",
        "--device",
        "cpu",
        "--out",
        tmp_path / "run",
    ]
    train.main([str(argument) for argument in arguments])
    evaluation.main([str(tmp_path / "run"), "--repeats", "0", "--device", "cpu"])
    for other in rows + [rows[0]], rows[::-1], [rows[0].replace("\t0", "\t1"), *rows[1:]]:
        write(other)
        refused(
            evaluation.main,
            [tmp_path / "run", "--device", "cpu"],
            "another train.tsv",
            "--data-dir",
        )
        refused(train.main, [*arguments, "--resume"], "another train.tsv")
    write(rows)
    evaluation.main([str(tmp_path / "run"), "--repeats", "0", "--device", "cpu"])


@pytest.mark.parametrize(
    "name, value",
    [
        ("task", 5),
        ("max_length", "abc"),
        ("max_length", 64.5),
        ("held_out", None),
        ("seed", True),
        ("bf16", "yes"),
        ("lr", float("inf")),
        ("gate_bias", float("nan")),
        ("epochs1", 10**9),
        ("weights", 7),
        ("method", "magic"),
    ],
)
def test_settings_are_not_trusted(finished, tmp_path, refused, name, value):
    """A value of another type or out of range: one line for --resume and for eval.py."""
    for file in "settings.json", "data.json", "model.pt", "vocab.txt":
        (tmp_path / file).write_bytes((finished / file).read_bytes())
    settings = json.loads((tmp_path / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps(settings | {name: value}))
    refused(evaluation.main, [tmp_path], "settings.json", "--overwrite")
    refused(train.main, [*SMALL, "--resume", "--out", tmp_path], "settings.json", "--overwrite")


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_an_interrupt_while_importing_is_quiet(tmp_path, script):
    """Ctrl-C before the program has begun: no page of traceback."""
    (tmp_path / "numpy.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    result = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert result.returncode in (-signal.SIGINT, 130) and not result.stderr


def test_nobody_need_read_what_training_prints(tmp_path):
    """Into a pipe that is closed, and with closed streams, a run is finished all the same."""
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--limit",
        "40",
        "--epochs1",
        "2",
        "--epochs2",
        "1",
        "--device",
        "cpu",
        "--out",
    ]
    head = subprocess.Popen(
        [*command, str(tmp_path / "a")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    head.stdout.close()
    assert b"Traceback" not in head.stderr.read() and head.wait() == 0
    closed = subprocess.run(" ".join([*command, str(tmp_path / "b"), "<&- >&- 2>&-"]), shell=True)
    assert closed.returncode == 0
    assert all((tmp_path / name / "model.pt").is_file() for name in "ab")


def test_a_run_killed_before_it_tidied_up_is_tidied_by_resume(finished, tmp_path):
    for file in finished.iterdir():
        if file.suffix != ".png":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "checkpoint.pt").write_bytes(b"left over")
    train.main([*SMALL, "--resume", "--out", str(tmp_path)])
    assert not (tmp_path / "checkpoint.pt").exists()
    assert (tmp_path / "model.pt").read_bytes() == (finished / "model.pt").read_bytes()
