"""Training by several processes: torchrun with two on the CPU against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train

ROOT = Path(train.__file__).parent
TINY = ["--limit", "301", "--epochs1", "2", "--epochs2", "1", "--full-share", "0"]
# What each process sees of the held-out data goes into a file of its own. STOP: in epoch 2.
SCRIPT = """
import json, os, sys, train
real = train.validate
def validate(*arguments):
    seen = real(*arguments)
    if "STOP" in os.environ and os.path.exists("part/checkpoint.pt"):
        raise KeyboardInterrupt
    with open(f"seen-{os.environ['RANK']}.jsonl", "a") as file:
        file.write(json.dumps(seen) + "\\n")
    return seen
train.validate = validate
train.main(sys.argv[1:])
"""


def start(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    (folder / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc_per_node=2", "script.py", *arguments]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(
        command, check=False, cwd=folder, env=os.environ | environment, capture_output=True
    )


def losses(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize("more", [[], ["--lam", "0.04", "--soft-epochs", "1"]])
def test_two_processes_train_like_one(tmp_path, more):
    """One batch of an epoch has 15 rows, and rows have different lengths, so neither rows nor
    tokens are shared out evenly."""
    assert start(tmp_path, *TINY, *more, "--out", "two").returncode == 0
    train.main([*TINY, *more, "--out", str(tmp_path / "one")])
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(
                torch.tensor(a[name]), torch.tensor(b[name]), rtol=0, atol=1e-4
            )
    seen = [(tmp_path / f"seen-{rank}.jsonl").read_text() for rank in (0, 1)]
    assert seen[0] == seen[1] != ""


def test_two_processes_resume_to_the_same_weights(tmp_path, refused):
    """With dropout: each process goes on with its own random numbers."""
    settings = [*TINY, "--dropout", "0.1"]
    assert start(tmp_path, *settings, "--out", "whole").returncode == 0
    assert start(tmp_path, *settings, "--out", "part", STOP="1").returncode != 0
    part = tmp_path / "part"
    assert {"checkpoint.pt"} == {path.name for path in part.glob("*.pt")}
    refused(train.main, [*settings, "--out", part, "--resume"], "number of processes")
    assert start(tmp_path, *settings, "--out", "part", "--resume").returncode == 0
    a, b = (torch.load(tmp_path / name / "model.pt")["model"] for name in ("whole", "part"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    done = start(tmp_path, *TINY, "--batch-size", "1", "--out", "run")
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    assert "--batch-size 1 of 271 examples cannot be shared by 2 processes" in done.stderr.decode()
