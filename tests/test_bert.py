"""bert.py against Hugging Face's BertModel (fixtures/bert.npz, made by make_bert_fixture.py), and
its files' traps."""

import json
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bert import (
    Bert,
    BertConfig,
    check_crc,
    convert_names,
    load_bert,
    read_config,
    unsnap,
)

FIXTURE = {
    name: torch.from_numpy(value)
    for name, value in np.load(Path(__file__).parent / "fixtures/bert.npz").items()
}
CONFIG = {
    name.removeprefix("config/"): value.item()
    for name, value in FIXTURE.items()
    if name.startswith("config/")
}
WEIGHTS = {
    name.removeprefix("weights/"): value
    for name, value in FIXTURE.items()
    if name.startswith("weights/")
}
BATCH = FIXTURE["ids"], FIXTURE["types"], FIXTURE["mask"]


def folder(path: Path, weights: dict = WEIGHTS, **config) -> Path:
    """A weights folder in the hub's layout."""
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    torch.save(weights, path / "pytorch_model.bin")
    return path


def assert_equals_huggingface(bert: Bert, tolerance: float = 1e-5) -> None:
    hiddens = bert.eval()(*BATCH)
    assert len(hiddens) == CONFIG["num_hidden_layers"] + 1
    for i, h in enumerate(hiddens):
        torch.testing.assert_close(
            h[BATCH[2]], FIXTURE[f"hidden{i}"][BATCH[2]], rtol=0, atol=tolerance
        )


@torch.no_grad()
def test_every_layer_equals_huggingface(tmp_path):
    """With padding in the batch, a pooler in the file, and a buffer and pre-training heads to be
    ignored by name."""
    extra = {
        "embeddings.position_ids": torch.arange(13)[None],
        "cls.predictions.bias": torch.zeros(37),
    }
    assert any(name.startswith("pooler.") for name in WEIGHTS)
    assert_equals_huggingface(load_bert(folder(tmp_path, WEIGHTS | extra)))


@torch.no_grad()
def test_other_names_for_the_same_tensors(tmp_path):
    """With "bert." in front, and LayerNorm as gamma and beta, as in Google's files."""
    old = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in WEIGHTS.items()
    }
    assert_equals_huggingface(load_bert(folder(tmp_path, old)))


@torch.no_grad()
def test_half_precision_files_are_read_as_fp32(tmp_path):
    bert = load_bert(folder(tmp_path, {name: value.half() for name, value in WEIGHTS.items()}))
    assert {p.dtype for p in bert.parameters()} == {torch.float32}
    assert_equals_huggingface(bert, tolerance=2e-2)


def test_every_tensor_is_accounted_for(tmp_path):
    """Missing, unexpected or misshapen: the error names the tensor."""
    name = "encoder.layer.1.attention.self.key.weight"
    with pytest.raises(ValueError, match=name):
        load_bert(folder(tmp_path, {n: v for n, v in WEIGHTS.items() if n != name}))
    with pytest.raises(ValueError, match="encoder.layer.7.new"):
        load_bert(folder(tmp_path, WEIGHTS | {"encoder.layer.7.new": torch.zeros(1)}))
    with pytest.raises(ValueError, match="intermediate.dense.weight"):
        load_bert(folder(tmp_path, intermediate_size=30))
    with pytest.raises(ValueError, match="encoder.layer.2"):
        load_bert(folder(tmp_path, num_hidden_layers=2))


@pytest.mark.parametrize(
    "spoil, word",
    [
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not a JSON object"),
        (lambda f: (f / "pytorch_model.bin").unlink(), "neither"),
        (
            lambda f: (f / "pytorch_model.bin").write_bytes(
                (f / "pytorch_model.bin").read_bytes()[:-3000]
            ),
            "truncated",
        ),
        (lambda f: (f / "pytorch_model.bin").write_bytes(b""), "truncated"),
        (
            lambda f: (f / "pytorch_model.bin").write_bytes(b"Repository not found"),
            "not a dict",
        ),
        (lambda f: torch.save([1, 2], f / "pytorch_model.bin"), "not a dict"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, spoil, word):
    spoil(folder(tmp_path))
    with pytest.raises(ValueError, match=word) as caught:
        load_bert(tmp_path)
    assert "\n" not in str(caught.value)


KEY = "encoder.layer.1.attention.self.key.weight"
PLAIN = "is not a plain dense floating-point tensor"
SPOILT = WEIGHTS[KEY].clone().index_fill_(0, torch.tensor([3]), torch.nan)


@pytest.mark.parametrize(
    "value, word",
    [
        (WEIGHTS[KEY].to(torch.int8), PLAIN),
        (WEIGHTS[KEY] > 0, PLAIN),
        (WEIGHTS[KEY].to(torch.complex64), PLAIN),
        (WEIGHTS[KEY].to_sparse(), PLAIN),
        (WEIGHTS[KEY].to("meta"), PLAIN),
        (WEIGHTS[KEY].tolist(), PLAIN),
        (np.float32(1), PLAIN),
        (None, PLAIN),
        (SPOILT, "NaN"),
        (WEIGHTS[KEY].double() * 1e300, "infinite"),
    ],
)
def test_tensors_of_other_kinds_are_refused_by_name(value, word):
    bert = Bert(BertConfig(**CONFIG))
    with pytest.raises(ValueError, match=f"{KEY} .*{word}") as caught:
        convert_names(WEIGHTS | {KEY: value}, bert)
    assert "\n" not in str(caught.value) and "download" not in str(caught.value)
    others = {
        "classifier.weight": value,
        "qa_outputs.bias": value,
        "bert.dropout.x": value,
        "bert.pooler.x": value,
    }
    assert set(convert_names(WEIGHTS | others, bert)) == set(bert.state_dict())


@pytest.mark.parametrize(
    "extra, word",
    [
        ({"bert." + KEY: WEIGHTS[KEY]}, f"{KEY} twice"),
        ({7: WEIGHTS[KEY]}, "also hold '7'"),
        ({"embeddings.LayerNorm.gamma": torch.ones(20)}, "embeddings.LayerNorm.weight twice"),
    ],
)
def test_names_that_are_in_doubt(extra, word):
    with pytest.raises(ValueError, match=word):
        convert_names(WEIGHTS | extra, Bert(BertConfig(**CONFIG)))


def test_sharded_weights_are_told(tmp_path):
    (folder(tmp_path) / "pytorch_model.bin").rename(tmp_path / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(ValueError, match=f"{tmp_path} holds neither .*as one file"):
        load_bert(tmp_path)


@pytest.mark.parametrize(
    "name, value",
    [
        ("hidden_act", "relu"),
        ("model_type", "roberta"),
        ("hidden_size", "20"),
        ("num_attention_heads", 0),
        ("layer_norm_eps", None),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("num_hidden_layers", 1001),
        ("num_hidden_layers", True),
        ("vocab_size", 10**7 + 1),
        ("vocab_size", None),
        ("hidden_size", 10**400),
        ("type_vocab_size", 2.0),
        ("layer_norm_eps", True),
        ("layer_norm_eps", float("nan")),
        ("layer_norm_eps", 1.5),
        ("layer_norm_eps", -1e-12),
        ("layer_norm_eps", float("inf")),
        ("hidden_dropout_prob", 1),
        ("attention_probs_dropout_prob", 1.0),
        ("hidden_dropout_prob", -0.1),
        ("hidden_dropout_prob", float("nan")),
        ("initializer_range", -0.02),
        ("initializer_range", float("nan")),
        ("initializer_range", float("inf")),
        ("initializer_range", 10**400),
    ],
)
def test_configs_out_of_range_are_refused_by_name(tmp_path, name, value):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {name: value}))
    with pytest.raises(ValueError) as caught:
        read_config(tmp_path)
    assert f"{name} " in str(caught.value) and repr(value)[:60] in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "more",
    [
        {"hidden_size": 10**6, "num_hidden_layers": 1000},
        {"vocab_size": 10**7, "hidden_size": 5000},
        {"intermediate_size": 10**7, "num_hidden_layers": 900},
    ],
)
def test_configs_of_impossible_sizes_are_refused(tmp_path, more):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | more))
    with pytest.raises(ValueError, match="parameters is too large: correct config.json"):
        read_config(tmp_path)


def test_configs_in_range_are_taken(tmp_path):
    values = CONFIG | {
        "is_decoder": False,
        "add_cross_attention": None,
        "hidden_dropout_prob": 0,
        "initializer_range": 0,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path).hidden_dropout_prob == 0


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    (folder(tmp_path) / "pytorch_model.bin").rename(tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        load_bert(tmp_path)


@torch.no_grad()
def test_safetensors_with_the_package(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    folder(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    save_file(
        {name: value.contiguous() for name, value in WEIGHTS.items()},
        tmp_path / "model.safetensors",
    )
    assert_equals_huggingface(load_bert(tmp_path))


@torch.no_grad()
def test_a_layer_runs_on_any_rows(tmp_path):
    """Rows do not see each other, and nobody sees what stands in padding."""
    bert = load_bert(folder(tmp_path)).eval()
    hiddens, mask = bert(*BATCH), BATCH[2]
    alone = bert.layers[1](hiddens[1][[2, 0]], mask[[2, 0]])
    torch.testing.assert_close(alone, hiddens[2][[2, 0]])
    rubbish = hiddens[1].masked_fill(~mask[..., None], 77.0)
    torch.testing.assert_close(bert.layers[1](rubbish, mask)[mask], hiddens[2][mask])
    torch.testing.assert_close(
        bert.layers[1](hiddens[1][:1], None), bert.layers[1](hiddens[1][:1], mask[:1])
    )


def test_dropout_acts_in_training_only(tmp_path):
    bert = load_bert(folder(tmp_path), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    assert torch.equal(bert.eval()(*BATCH)[-1], bert(*BATCH)[-1])
    assert not torch.equal(bert.train()(*BATCH)[-1], bert(*BATCH)[-1])  # attention's alone


@pytest.mark.parametrize("name", ["gte-small", "e5-small"])
@torch.no_grad()
def test_real_weights(shared, name):
    """Real 12-layer weights load; with the package transformers at hand, every layer equals its
    BertModel."""
    path = shared / "weights" / name
    if not path.is_dir():
        pytest.skip(f"{path} is not there")
    bert = load_bert(path).eval()
    assert bert.config.num_hidden_layers == 12
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertModel(transformers.BertConfig.from_pretrained(path)).eval()
    tensors = torch.load(path / "pytorch_model.bin", weights_only=True)
    theirs.load_state_dict({n: v.float() for n, v in tensors.items()}, strict=False)
    ids = torch.randint(1000, 20000, (3, 17), generator=torch.Generator().manual_seed(0))
    segment_ids, mask = (
        (torch.arange(17) > 8).long().expand(3, 17),
        torch.arange(17) < torch.tensor([[17], [11], [5]]),
    )
    expected = theirs(
        ids, attention_mask=mask.long(), token_type_ids=segment_ids, output_hidden_states=True
    ).hidden_states
    for ours, h in zip(bert(ids, segment_ids, mask), expected, strict=True):
        torch.testing.assert_close(ours[mask], h[mask], rtol=0, atol=1e-5)


# --- Google's checkpoints: fixtures/google.zip was written by TensorFlow (make_google_fixture.py)

DATA = "bert_model.ckpt.data-00000-of-00001"


def google(path: Path) -> Path:
    with zipfile.ZipFile(Path(__file__).parent / "fixtures/google.zip") as files:
        files.extractall(path)
    return next(path.iterdir())


@torch.no_grad()
def test_googles_checkpoint_equals_huggingface(tmp_path):
    """Also under the names of a SavedModel."""
    folder = google(tmp_path)
    assert_equals_huggingface(load_bert(folder))
    (folder / "variables").mkdir()
    for name in ("bert_model.ckpt.index", DATA):
        shutil.move(folder / name, folder / name.replace("bert_model.ckpt", "variables/variables"))
    assert_equals_huggingface(load_bert(folder))


@pytest.mark.parametrize("file", ["bert_model.ckpt.index", DATA])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "flipped", "foreign"])
def test_damaged_checkpoints_are_refused(tmp_path, file, damage):
    folder = google(tmp_path)
    whole = (folder / file).read_bytes()
    middle = len(whole) // 3
    flipped = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
    bad = {"empty": b"", "truncated": whole[:-7], "flipped": flipped, "foreign": b"a b\n" * 999}
    if damage == "missing":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(bad[damage])
    with pytest.raises(ValueError) as caught:
        load_bert(folder)
    missing_index = damage == "missing" and file != DATA
    word = "neither pytorch_model.bin" if missing_index else "download both again"
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_checksums_equal_a_division_bit_by_bit():
    generator = np.random.default_rng(0)
    for size in [*range(4, 70), 127, 128, 129, 1000, 4095]:
        content, crc = generator.bytes(size), 0xFFFFFFFF
        for byte in content:
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
        crc ^= 0xFFFFFFFF
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32
        check_crc(content, masked)
        with pytest.raises(ValueError):
            check_crc(content[:-1] + bytes([content[-1] ^ 1]), masked)


def test_blocks_are_decompressed():
    """Compressed by the snappy library: a long and a short literal, a copy that overlaps itself,
    a short copy."""
    text = bytes(range(70)) + b"abc" * 20 + bytes(range(9, 16)) + b"/layer" * 3
    compressed = "9b01f049" + text[:74].hex() + "de03000009097944" + text[-18:].hex()
    assert unsnap(bytes.fromhex(compressed)) == text
