"""bert.py against Hugging Face's BertModel (fixtures/bert.npz, by make_bert_fixture.py)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bert import Bert, BertConfig, load_bert
from conftest import save_tiny_weights
from data import load_tokenizer

FIXTURE = dict(np.load(Path(__file__).parent / "fixtures/bert.npz"))
CONFIG = {name[7:]: value.item() for name, value in FIXTURE.items() if name[:7] == "config/"}
WEIGHTS = {name[8:]: torch.tensor(x) for name, x in FIXTURE.items() if name[:8] == "weights/"}
BATCH = [torch.tensor(FIXTURE[name]) for name in ("ids", "types", "mask")]
NAMES = ["model.safetensors", "pytorch_model.bin"]


def folder(path: Path, weights: dict = WEIGHTS, old: bool = False, **config) -> Path:
    """A weights folder in the hub's layout; old: with pytorch_model.bin."""
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    (torch.save if old else save_file)(weights, path / NAMES[old])
    return path


# --- The encoder --------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("old, start, gamma, beta, dtype, tolerance", [
    (False, "", "weight", "bias", torch.float32, 1e-5),
    (True, "bert.", "gamma", "beta", torch.float32, 1e-5),      # as in the oldest files
    (False, "", "weight", "bias", torch.float16, 2e-2)])
def test_every_layer_equals_huggingface(tmp_path, old, start, gamma, beta, dtype, tolerance):
    """With padding in the batch, and with tensors and settings that are ignored by name. Of two
    files model.safetensors is read, whatever the other holds."""
    tensors = {"embeddings.position_ids": torch.arange(13)[None]}
    for name in "cls", "classifier", "pooler.dense", "qa_outputs", "dropout", "dense":
        tensors[f"{name}.bias"] = torch.zeros(2)
    for name, value in WEIGHTS.items():
        name = name.replace("Norm.weight", f"Norm.{gamma}").replace("Norm.bias", f"Norm.{beta}")
        tensors[start + name] = value.to(dtype)
    usual = {"model_type": "bert", "is_decoder": False, "hidden_act": "gelu", "use_cache": True}
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even tensors")
    bert = load_bert(folder(tmp_path, tensors, old, **usual))
    assert {p.dtype for p in bert.parameters()} == {torch.float32}
    assert {m.eps for m in bert.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-7}
    hiddens, mask = bert.eval()(*BATCH), BATCH[2]
    assert len(hiddens) == CONFIG["num_hidden_layers"] + 1
    for i, h in enumerate(hiddens):
        expected = torch.tensor(FIXTURE[f"hidden{i}"])
        torch.testing.assert_close(h[mask], expected[mask], rtol=0, atol=tolerance)


@torch.no_grad()
def test_a_layer_runs_on_any_rows(tmp_path):
    """Rows do not see each other, and nobody sees what stands in padding."""
    bert = load_bert(folder(tmp_path)).eval()
    layer, hiddens, mask = bert.layers[1], bert(*BATCH), BATCH[2]
    torch.testing.assert_close(layer(hiddens[1][[2, 0]], mask[[2, 0]]), hiddens[2][[2, 0]])
    rubbish = hiddens[1].masked_fill(~mask[..., None], 77.0)
    torch.testing.assert_close(layer(rubbish, mask)[mask], hiddens[2][mask])
    assert mask[0].all()  # without padding no mask is needed
    torch.testing.assert_close(layer(hiddens[1][:1], None), layer(hiddens[1][:1], mask[:1]))


@torch.no_grad()
@pytest.mark.parametrize("hidden, attention", [(0.5, 0.0), (0.0, 0.5), (0.0, 0.0)])
def test_dropout_acts_in_training_only(tmp_path, hidden, attention):
    rates = {"hidden_dropout_prob": hidden, "attention_probs_dropout_prob": attention}
    bert = load_bert(folder(tmp_path, **rates))
    assert torch.equal(bert.eval()(*BATCH)[-1], bert(*BATCH)[-1])
    h = bert.train()(*BATCH)
    assert torch.equal(h[-1], bert(*BATCH)[-1]) == (hidden + attention == 0)
    assert torch.equal(h[0], bert(*BATCH)[0]) == (hidden == 0)  # of the embeddings
    layer = bert.layers[1]
    layer.dropout.p = bert.embeddings.dropout.p = 1.0  # all that attention and the network add
    assert not bert.embeddings(*BATCH[:2]).any()
    torch.testing.assert_close(layer(h[1], None), layer.norm2(layer.norm1(h[1])))


def test_fresh_weights_and_defaults():
    """Normal, but biases 0 and LayerNorm 1. The defaults are bert-base's: many a config.json
    leaves out what is usual."""
    for name, p in Bert(BertConfig(**CONFIG | {"initializer_range": 0.3})).named_parameters():
        if "norm" in name or "bias" in name:
            assert torch.equal(p, torch.full_like(p, float("norm" in name and "weight" in name)))
        else:
            assert 0.2 < p.std() < 0.4, name
    sizes = [30522, 768, 12, 12, 3072, 512, 2]
    assert list(vars(BertConfig()).values()) == [*sizes, 1e-12, 0.1, 0.1, 0.02]


REAL = {  # of the last token in h_0, h_6 and h_12, by transformers' BertModel
    "gte-small": [[0.1499, -0.1588], [-0.0269, -0.0264], [-0.1755, -0.1094]],
    "e5-small": [[-0.2804, -0.1761], [0.039, 0.0144], [0.0737, -0.1673]]}


@torch.no_grad()
@pytest.mark.parametrize("name", REAL)
def test_real_encoders(shared, name):
    pair = load_tokenizer(shared / "weights" / name).encode("The c\u00e4t SAT", "it slept")
    assert pair.ids == [101, 1996, 4937, 2938, 102, 2009, 7771, 102]
    assert pair.type_ids == [0, 0, 0, 0, 0, 1, 1, 1]
    inputs = torch.tensor([[pair.ids], [pair.type_ids]])
    hiddens = load_bert(shared / "weights" / name).eval()(*inputs, torch.ones(1, 8).bool())
    assert len(hiddens) == 13
    ours = torch.stack([hiddens[i][0, -1, :2] for i in (0, 6, 12)])
    torch.testing.assert_close(ours, torch.tensor(REAL[name]), rtol=0, atol=1e-4)


# --- Weights that do not fit --------------------------------------------------------------------

@pytest.mark.parametrize("more, config, words", [
    ({"encoder.layer.7.new": torch.zeros(1)}, {}, "1 are unknown.*encoder.layer.7.new"),
    ({}, {"num_hidden_layers": 2}, "encoder.layer.2"),
    ({}, {"num_hidden_layers": 9}, "tensors are missing.*encoder.layer"),
    ({}, {"intermediate_size": 30}, "layers.1.up.weight")])
def test_every_tensor_is_accounted_for(tmp_path, more, config, words):
    """Missing, unexpected or misshapen: the error names the tensor."""
    with pytest.raises((ValueError, RuntimeError), match=words):
        load_bert(folder(tmp_path, WEIGHTS | more, **config))


@pytest.mark.parametrize("name, value", [
    ("model_type", "roberta"), ("hidden_act", "relu"), ("is_decoder", True),
    ("position_embedding_type", "relative_key"), ("add_cross_attention", True)])
def test_what_is_not_supported_is_refused_by_name(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"config.json: {name} is {value!r}"):
        load_bert(folder(tmp_path, **{name: value}))


def test_foreign_names_are_shown(tmp_path, weights_refused):
    """The first name found, and the first expected."""
    path, first = save_tiny_weights(tmp_path / "tiny", old=True), "embeddings.LayerNorm.bias"
    tensors = torch.load(path / NAMES[1])
    for start in "module.", "model.bert.":
        torch.save({start + name: value for name, value in tensors.items()}, path / NAMES[1])
        weights_refused(path, str(path), f"'{first}'", f"'{start}{first}'")
    torch.save({"state_dict": tensors}, path / NAMES[1])
    weights_refused(path, str(path), f"'{first}'", "'state_dict'")


def test_a_pickled_model_is_said(tmp_path, weights_refused):
    """In one line with the class that the file holds, and without advice to run it. A file in
    place of its folder is told as well, and what is missing."""
    path = save_tiny_weights(tmp_path / "tiny", old=True) / NAMES[1]
    torch.save(load_bert(path.parent), path)
    line = weights_refused(path.parent, str(path.parent), "bert.Bert", "UnpicklingError")
    assert "weights_only=False" not in line
    weights_refused(path, f"{path} is ", "folder")
    for path in path, path.with_name("config.json"):
        path.unlink()
        weights_refused(path.parent, "No such file", str(path))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("size", [0, 20, 3000, -300])
def test_broken_weights_are_named(tmp_path, weights_refused, old, size):
    path = save_tiny_weights(tmp_path / "tiny", old) / NAMES[old]
    path.write_bytes(path.read_bytes()[:size])
    weights_refused(path.parent, f"{path.parent}: ", "Error:")
