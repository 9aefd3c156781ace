"""tools/convert_google.py on fixtures/google.zip, which TensorFlow wrote from the tensors of
fixtures/bert.npz (make_google_fixture.py)."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from bert import load_bert

HERE = Path(__file__).parent
GOOGLE = HERE / "fixtures/google.zip"
STORED = dict(np.load(HERE / "fixtures/bert.npz"))
INDEX = "bert_model.ckpt.index"
DATA = "bert_model.ckpt.data-00000-of-00001"

sys.path.append(str(HERE.parent / "tools"))
import convert_google as tool  # noqa: E402

with zipfile.ZipFile(GOOGLE) as archive:
    FILES = {Path(name).name: archive.read(name) for name in archive.namelist()}
MAC = {"__MACOSX/a/b/._bert_config.json": b"x"} | {f"a/b/{name}": FILES[name] for name in FILES}
SAVED = {name.replace("bert_model.ckpt", "variables/variables"): FILES[name] for name in FILES}


def write(path: Path, files: dict[str, bytes]) -> Path:
    """A folder with these files, or a zip."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as made:
            for name, content in files.items():
                made.writestr(name, content)
        return path
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def flip(content: bytes, at: int) -> bytes:
    """The content with one bit of one byte flipped."""
    return content[:at] + bytes([content[at] ^ 4]) + content[at:][1:]


def assert_equals_stored(folder: Path) -> None:
    """The folder's tensors are bert.npz's and two that only Google's file has; no optimizer's."""
    expected = {"global_step": np.array(7), "cls.predictions.output_bias": np.zeros(37)}
    for name, value in STORED.items():
        if name.startswith("weights/"):
            name = name.replace("weights/", "bert.").replace("Norm.weight", "Norm.gamma")
            expected[name.replace("Norm.bias", "Norm.beta")] = value
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    config = json.loads((folder / "config.json").read_bytes())
    assert config == json.loads(FILES["bert_config.json"]) | {"model_type": "bert"}
    assert len(os.listdir(folder)) == 4


def masked_crc(content: bytes) -> int:
    """CRC-32C by a division bit by bit, masked as TensorFlow and LevelDB do."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


@torch.no_grad()
def test_a_zip_becomes_a_folder_of_the_hub(tmp_path):
    """Whose hidden states equal Hugging Face's."""
    folder = tmp_path / "new" / "folder"
    tool.main([str(GOOGLE), str(folder)])
    assert_equals_stored(folder)
    assert (folder / "vocab.txt").read_bytes() == FILES["vocab.txt"]
    assert b'{"format":"pt"}' in (folder / "model.safetensors").read_bytes()
    ids, segment_ids, mask = (torch.from_numpy(STORED[name]) for name in ("ids", "types", "mask"))
    hiddens = load_bert(folder).eval()(ids, segment_ids, mask)
    for i, h in zip(range(4), hiddens, strict=True):
        expected = torch.from_numpy(STORED[f"hidden{i}"])
        torch.testing.assert_close(h[mask], expected[mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, files, lower", [
    ("mac.zip", MAC, True), ("folder", FILES, True), ("saved model", SAVED, True),
    ("cased", FILES | {"vocab.txt": b"[CLS]\nthe\nThe\n"}, False),
    ("told", FILES | {"tokenizer_config.json": b'{"do_lower_case": false}'}, False)])
def test_other_sources(tmp_path, name, files, lower):
    """Google's zips do not say whether a model reads lower-case texts."""
    tool.main([str(write(tmp_path / name, files)), str(tmp_path / "new")])
    assert_equals_stored(tmp_path / "new")
    stated = (tmp_path / "new/tokenizer_config.json").read_text()
    assert json.loads(stated) == {"do_lower_case": lower}
    assert set(os.listdir(tmp_path)) == {name, "new"}  # nothing is unpacked


def test_the_command_line_alone(tmp_path):
    """In a process that does not see this repository's modules. Weights are not written over."""
    command = [sys.executable, "-I", tool.__file__, str(GOOGLE), "folder"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert_equals_stored(tmp_path / "folder")
    write(tmp_path, {"folder/config.json": b"mine"})
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(
        "convert_google.py: folder holds model.safetensors already")
    assert (tmp_path / "folder/config.json").read_bytes() == b"mine"


@pytest.fixture
def unwritten(refused, tmp_path):
    """unwritten(source, *words): one line with these words, and nothing is written."""
    def check(source: Path, *words: str) -> None:
        refused(tool.main, [source, "converted"], *words)
        assert not (tmp_path / "converted").exists()
    return check


@pytest.mark.parametrize("name", FILES)
def test_missing_files(tmp_path, unwritten, name):
    """In a folder, and in a zip."""
    rest = {other: content for other, content in FILES.items() if other != name}
    unwritten(write(tmp_path / "source", rest), name, "missing")
    unwritten(write(tmp_path / "mine.zip", rest), name, "missing")


@pytest.mark.parametrize("name", ["bert_config.json", INDEX, DATA])
def test_damaged_files(tmp_path, unwritten, name):
    """Empty, truncated, of another kind."""
    words = (INDEX, DATA, "damaged", "(a checksum or", "download the model again")
    if name == "bert_config.json":
        words = (name, "is not a JSON object")
    for content in (b"", FILES[name][:-7], b"[1]", b"\xff\xfe{"):
        unwritten(write(tmp_path / "source", FILES | {name: content}), *words)


def test_flipped_bits(tmp_path):
    """In the index's blocks, handles and last number; at both ends of two tensors."""
    places = [*range(0, 5502, 250), *range(5515, 5535), *range(5538, 5541), *range(5575, 5583)]
    for name, positions in {INDEX: places, DATA: [0, 79, -8, -1]}.items():
        for at in positions:
            write(tmp_path, FILES | {name: flip(FILES[name], at)})
            with pytest.raises(tool.UserError):
                tool.read_checkpoint(tmp_path)


def test_damaged_zips(tmp_path, unwritten):
    """Missing, truncated, no zip; or a bit flipped within one of its files."""
    whole, source = GOOGLE.read_bytes(), tmp_path / "mine.zip"
    unwritten(source, f"{source} is missing")
    for content in whole[:1000], whole[:-30], b"a b\n" * 999:
        source.write_bytes(content)
        unwritten(source, str(source), "damaged, or no zip that holds bert_config.json")
    for member in archive.infolist():
        at = member.header_offset + 30 + len(member.filename) + member.compress_size // 2
        source.write_bytes(flip(whole, at))
        unwritten(source, Path(member.filename).name, "damaged")


def test_a_folder_that_cannot_be_written(tmp_path, refused, monkeypatch):
    """It is a file; or the disk is full: no part of a file stays, and then it goes on."""
    write(tmp_path, {"file": b"mine", "folder/config.json": b"old"})
    refused(tool.main, [GOOGLE, "file"], "file")
    assert (tmp_path / "file").read_bytes() == b"mine"
    def full(path: Path, content: bytes) -> None:
        with open(path, "wb") as file:
            file.write(content[:100])
        raise OSError("No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        refused(tool.main, [GOOGLE, "folder"], "No space left")
    assert os.listdir(tmp_path / "folder") == ["config.json"]
    assert (tmp_path / "folder/config.json").read_bytes() == b"old"
    tool.main([str(GOOGLE), "folder"])
    assert_equals_stored(tmp_path / "folder")


def test_checksums_equal_a_division_bit_by_bit():
    assert masked_crc(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) % 2**32
    generator = np.random.default_rng(0)
    for size in [*range(4, 70), 127, 128, 129, 1000, 4095]:
        content = generator.bytes(size)
        crc = masked_crc(content)
        tool.check_crc(content, crc)
        with pytest.raises(ValueError):
            tool.check_crc(flip(content, size - 1), crc)
