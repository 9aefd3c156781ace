"""Remakes fixtures/bert.npz: a tiny random Hugging Face BertModel, and its hidden states on a
padded batch. For developers; needs the package transformers: python tests/make_bert_fixture.py
"""

from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel

torch.manual_seed(0)
sizes = dict(vocab_size=37, hidden_size=20, num_hidden_layers=3, num_attention_heads=5,
             intermediate_size=28, max_position_embeddings=13, type_vocab_size=2,
             layer_norm_eps=1e-7)
model = BertModel(BertConfig(**sizes, initializer_range=0.3, attn_implementation="eager")).eval()
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # fresh biases are 0 and norms 1: mixing them up would not show
            parameter.add_(torch.randn_like(parameter) * 0.3)
    ids = torch.randint(0, 37, (3, 9))
    types = (torch.arange(9) >= torch.tensor([[4], [3], [9]])).long()
    mask = torch.arange(9) < torch.tensor([[9], [6], [2]])
    hiddens = model(ids, attention_mask=mask.long(), token_type_ids=types,
                    output_hidden_states=True).hidden_states
np.savez_compressed(Path(__file__).parent / "fixtures/bert.npz", ids=ids, types=types, mask=mask,
    **{f"config/{name}": value for name, value in sizes.items()},
    **{f"weights/{name}": value.numpy() for name, value in model.state_dict().items()},
    **{f"hidden{i}": h.numpy() for i, h in enumerate(hiddens)})
