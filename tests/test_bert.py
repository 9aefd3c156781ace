"""bert.py against Hugging Face's BertModel (fixtures/bert.npz, by make_bert_fixture.py)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bert import Bert, BertConfig, load_bert, read_config
from conftest import save_tiny_weights
from data import load_tokenizer

FIXTURE, CONFIG, WEIGHTS = np.load(Path(__file__).parent / "fixtures/bert.npz"), {}, {}
for name, value in FIXTURE.items():
    if name.startswith("config/"):
        CONFIG[name.removeprefix("config/")] = value.item()
    if name.startswith("weights/"):
        WEIGHTS[name.removeprefix("weights/")] = torch.from_numpy(value)
BATCH = [torch.from_numpy(FIXTURE[name]) for name in ("ids", "types", "mask")]
KEY = "encoder.layer.1.attention.self.key.weight"


def folder(path: Path, weights: dict = WEIGHTS, old: bool = False, **config) -> Path:
    """A weights folder in the hub's layout; old: with pytorch_model.bin."""
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    if old:
        torch.save(weights, path / "pytorch_model.bin")
    else:
        save_file(weights, path / "model.safetensors")
    return path


def assert_equals_huggingface(bert: Bert, tolerance: float = 1e-5) -> None:
    hiddens, mask = bert.eval()(*BATCH), BATCH[2]
    assert len(hiddens) == CONFIG["num_hidden_layers"] + 1
    for i, h in enumerate(hiddens):
        expected = torch.from_numpy(FIXTURE[f"hidden{i}"])
        torch.testing.assert_close(h[mask], expected[mask], rtol=0, atol=tolerance)


# --- The encoder --------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("old", [False, True])
def test_every_layer_equals_huggingface(tmp_path, old):
    """With padding in the batch, a pooler in the file, and what is ignored by name. Of two files
    model.safetensors is read, whatever the other holds."""
    extra = {"embeddings.position_ids": torch.arange(13)[None], "classifier.bias": torch.zeros(2),
             "cls.predictions.bias": torch.zeros(37)}
    assert any(name.startswith("pooler.") for name in WEIGHTS)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even tensors")
    bert = load_bert(folder(tmp_path, WEIGHTS | extra, old))
    assert_equals_huggingface(bert)
    assert {m.eps for m in bert.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-7}


@torch.no_grad()
@pytest.mark.parametrize("start", ["", "bert."])
@pytest.mark.parametrize("gamma, beta, dtype, tolerance", [
    ("weight", "bias", torch.float16, 2e-2), ("gamma", "beta", torch.float32, 1e-5),
])
def test_other_names_and_half_precision(tmp_path, start, gamma, beta, dtype, tolerance):
    """With "bert." in front, and LayerNorm as gamma and beta, as in the oldest files."""
    renamed = {}
    for name, value in WEIGHTS.items():
        name = name.replace("LayerNorm.weight", f"LayerNorm.{gamma}")
        renamed[start + name.replace("LayerNorm.bias", f"LayerNorm.{beta}")] = value.to(dtype)
    bert = load_bert(folder(tmp_path, renamed))
    assert {p.dtype for p in bert.parameters()} == {torch.float32}
    assert_equals_huggingface(bert, tolerance)


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
    layer.dropout.p = 1.0  # all that attention and the feed-forward network add
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
    "e5-small": [[-0.2804, -0.1761], [0.039, 0.0144], [0.0737, -0.1673]],
}


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

def test_every_tensor_is_accounted_for(tmp_path):
    """Missing, unexpected or misshapen: the error names the tensor."""
    with pytest.raises(ValueError, match=f"1 tensors are missing.*{KEY}"):
        load_bert(folder(tmp_path, {n: v for n, v in WEIGHTS.items() if n != KEY}))
    with pytest.raises(ValueError, match="encoder.layer.7.new"):
        load_bert(folder(tmp_path, WEIGHTS | {"encoder.layer.7.new": torch.zeros(1)}))
    with pytest.raises(ValueError, match="encoder.layer.2"):
        load_bert(folder(tmp_path, num_hidden_layers=2))
    with pytest.raises(RuntimeError, match="layers.1.up.weight"):
        load_bert(folder(tmp_path, intermediate_size=30))


@pytest.mark.parametrize("name, value", [
    ("model_type", "roberta"), ("hidden_act", "relu"), ("is_decoder", True),
    ("position_embedding_type", "relative_key"), ("add_cross_attention", True),
])
def test_what_is_not_supported_is_refused_by_name(tmp_path, name, value):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG | {name: value}))
    with pytest.raises(ValueError, match=f"config.json: {name} is {value!r}"):
        read_config(path)
    usual = {"model_type": "bert", "is_decoder": False, "hidden_act": "gelu", "use_cache": True}
    path.write_text(json.dumps(CONFIG | usual))
    assert read_config(path) == BertConfig(**CONFIG)


def test_what_is_missing_is_said(tmp_path, weights_refused):
    """Also where the weights are there in several parts."""
    path = save_tiny_weights(tmp_path / "tiny")
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    weights_refused(path, "No such file", str(path / "pytorch_model.bin"))
    (path / "config.json").unlink()
    weights_refused(path, "No such file", str(path / "config.json"))


@pytest.mark.parametrize("start", ["module.", "model.", "model.bert."])
def test_names_with_a_foreign_prefix_are_shown(tmp_path, weights_refused, start):
    """The first name found, and the first expected."""
    path, first = save_tiny_weights(tmp_path / "tiny", old=True), "embeddings.LayerNorm.bias"
    tensors = torch.load(path / "pytorch_model.bin")
    torch.save({start + n: v for n, v in tensors.items()}, path / "pytorch_model.bin")
    weights_refused(path, str(path), f"'{first}'", f"'{start}{first}'")
    torch.save({"state_dict": tensors}, path / "pytorch_model.bin")
    weights_refused(path, str(path), f"'{first}'", "'state_dict'")


def test_a_pickled_model_is_said(tmp_path, weights_refused):
    """In one line with the class that the file holds, and without advice to run it. A file in
    place of its folder is told as well."""
    path = save_tiny_weights(tmp_path / "tiny", old=True) / "pytorch_model.bin"
    torch.save(load_bert(path.parent), path)
    line = weights_refused(path.parent, str(path.parent), "bert.Bert", "UnpicklingError")
    assert "weights_only=False" not in line
    weights_refused(path, f"{path} is ", "folder")


@pytest.mark.parametrize("old, file", [(False, "model.safetensors"), (True, "pytorch_model.bin")])
@pytest.mark.parametrize("size", [0, 20, 3000, -300])
def test_broken_weights_are_named(tmp_path, weights_refused, lock, old, file, size):
    """What may not be read is not damaged: that is said in the system's own words."""
    path = save_tiny_weights(tmp_path / "tiny", old) / file
    path.write_bytes(path.read_bytes()[:size])
    weights_refused(path.parent, f"{path.parent}: ", "Error:")
    for path in (path, path.with_name("config.json")):
        lock(path)
        weights_refused(path.parent, "Permission denied", str(path))
