"""What several test files share: a tiny model of odd sizes, and the folder with real data where
there is one."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bert import Bert, BertConfig, name_table
from smartbert import SmartBert

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it gives


@pytest.fixture
def shared() -> Path:
    """The folder with real GLUE data and weights."""
    folder = os.environ.get("SMARTBERT_SHARED")
    if not folder:
        pytest.skip("SMARTBERT_SHARED is not set: no real data and weights to test with")
    return Path(folder)


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """refused(main, arguments, *words): the script ends with status 2, one line on stderr, and the
    words that help."""

    def check(main, arguments, *words: str) -> None:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:  # any other exception would be a traceback
            main([str(argument) for argument in arguments])
        said = capsys.readouterr().err.strip().splitlines()
        above = [line for line in said[:-1] if not line.startswith(("usage:", "warning:"))]
        line = said[-1]
        assert stop.value.code == 2 and not above
        for word in words:
            assert word in line

    monkeypatch.chdir(tmp_path)
    return check


def tiny_model(
    seed: int = 0, classes: int = 3, layers: int = 5, dropout: float = 0.0
) -> SmartBert:
    """5 layers, 20 wide, random enough that gates and heads disagree from row to row."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=41,
        hidden_size=20,
        num_hidden_layers=layers,
        num_attention_heads=5,
        intermediate_size=28,
        max_position_embeddings=17,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.4,
    )
    model = SmartBert(Bert(config), classes, gate_bias=0.0)
    with torch.no_grad():
        for gate in model.gates:  # far from 1/2, so that no rounding flips a decision
            gate.out.weight.mul_(30)
        for head in model.heads:
            head.out.weight.mul_(3)
    return model.eval()


def tiny_batch(
    seed: int = 0, rows: int = 9, longest: int = 13
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, segment_ids, mask (rows, longest), of all lengths from 2 on, with rubbish in the
    padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 41, (rows, longest), generator=generator)
    segment_ids = torch.randint(0, 2, (rows, longest), generator=generator)
    lengths = torch.randint(2, longest + 1, (rows,), generator=generator)
    lengths[0] = longest
    return ids, segment_ids, torch.arange(longest) < lengths[:, None]


def save_tiny_weights(folder: Path) -> Path:
    """A weights folder in the hub's layout: two layers, 8 wide, an alphabet of word pieces."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz0123456789",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789"),
    ]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=24,
    )
    parts, tensors = Bert(config).state_dict(), {}
    for ours, theirs in name_table(config).items():
        tensors |= dict(zip(theirs, (part.clone() for part in parts[ours].chunk(len(theirs)))))
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder
