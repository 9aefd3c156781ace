"""What several test files share: a tiny model of odd sizes, and the folder with real data where there is one."""

import os
from pathlib import Path

import pytest
import torch

from bert import Bert, BertConfig
from smartbert import SmartBert

torch.set_num_threads(1)                # tiny tensors: a second thread costs more than it gives


@pytest.fixture
def shared() -> Path:
    """The folder with real GLUE data and weights."""
    folder = os.environ.get("SMARTBERT_SHARED")
    if not folder:
        pytest.skip("SMARTBERT_SHARED is not set: no real data and weights to test with")
    return Path(folder)


def tiny_model(seed: int = 0, classes: int = 3, layers: int = 5, dropout: float = 0.0) -> SmartBert:
    """5 layers, 20 wide, random enough that gates and heads disagree from row to row."""
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=41, hidden_size=20, num_hidden_layers=layers, num_attention_heads=5,
                        intermediate_size=28, max_position_embeddings=17, hidden_dropout_prob=dropout,
                        attention_probs_dropout_prob=dropout, initializer_range=0.4)
    model = SmartBert(Bert(config), classes, gate_bias=0.0)
    with torch.no_grad():
        for gate in model.gates:        # far from 1/2, so that no rounding flips a decision
            gate.out.weight.mul_(30)
        for head in model.heads:
            head.out.weight.mul_(3)
    return model.eval()


def tiny_batch(seed: int = 0, rows: int = 9, longest: int = 13) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, types, mask (rows, longest), of all lengths from 2 on, with rubbish in the padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 41, (rows, longest), generator=generator)
    types = torch.randint(0, 2, (rows, longest), generator=generator)
    lengths = torch.randint(2, longest + 1, (rows,), generator=generator)
    lengths[0] = longest
    return ids, types, torch.arange(longest) < lengths[:, None]
