"""tools/convert_google.py on fixtures/google.zip, which TensorFlow wrote from the tensors of
fixtures/bert.npz (make_google_fixture.py)."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from bert import load_bert

HERE = Path(__file__).parent
GOOGLE = HERE / "fixtures/google.zip"
STORED = dict(np.load(HERE / "fixtures/bert.npz"))
SCRIPT = HERE.parent / "tools/convert_google.py"
INDEX = "bert_model.ckpt.index"
DATA = "bert_model.ckpt.data-00000-of-00001"
FOUR = ["config.json", "model.safetensors", "tokenizer_config.json", "vocab.txt"]

spec = importlib.util.spec_from_file_location("convert_google", SCRIPT)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

with zipfile.ZipFile(GOOGLE) as archive:
    FILES = {Path(name).name: archive.read(name) for name in archive.namelist()}


def write_folder(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as made:
        for name, content in files.items():
            made.writestr(name, content)
    return path


def flip(content: bytes, at: int) -> bytes:
    """The content with one bit of one byte flipped."""
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_equals_stored(folder: Path) -> None:
    """The folder's tensors are those of bert.npz and the two that only Google's file has: none is
    missing, none is an optimizer's."""
    expected = {
        "global_step": np.array(7),
        "cls.predictions.output_bias": np.zeros(37, np.float32),
    }
    for name, value in STORED.items():
        if name.startswith("weights/"):
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            name = name.replace("LayerNorm.bias", "LayerNorm.beta")
            expected[name.replace("weights/", "bert.")] = value
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.fixture
def refused(capsys, tmp_path):
    """refused(source, *words): status 2, one line with these words, and nothing written."""

    def check(source: Path, *words: str) -> None:
        folder = tmp_path / "converted"
        with pytest.raises(SystemExit) as stop:
            tool.main([str(source), str(folder)])
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == ""
        assert err.startswith("convert_google.py: ") and err.find("\n") == len(err) - 1
        for word in words:
            assert word in err
        assert not folder.exists()

    return check


# --- What is written ----------------------------------------------------------------------------


def test_a_zip_becomes_a_folder_of_the_hub(tmp_path):
    tool.main([str(GOOGLE), str(tmp_path / "new" / "folder")])
    folder = tmp_path / "new" / "folder"
    assert names_in(folder) == FOUR
    assert_equals_stored(folder)
    config = json.loads((folder / "config.json").read_bytes())
    assert config == json.loads(FILES["bert_config.json"]) | {"model_type": "bert"}
    assert (folder / "vocab.txt").read_bytes() == FILES["vocab.txt"]
    with safe_open(folder / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


@torch.no_grad()
def test_hidden_states_equal_huggingface(tmp_path):
    tool.main([str(GOOGLE), str(tmp_path)])
    bert = load_bert(tmp_path).eval()
    ids, segment_ids, mask = (torch.from_numpy(STORED[name]) for name in ("ids", "types", "mask"))
    hiddens = bert(ids, segment_ids, mask)
    assert len(hiddens) == 4
    for i, h in enumerate(hiddens):
        expected = torch.from_numpy(STORED[f"hidden{i}"])
        torch.testing.assert_close(h[mask], expected[mask], rtol=0, atol=1e-5)


def test_the_fixture_has_moments_to_leave_out():
    """Else the other tests would not show that they are left out."""
    names = [name for name, _ in tool.read_index(FILES[INDEX])]
    assert "bert/encoder/layer_2/output/dense/kernel/adam_m" in names
    assert "bert/embeddings/LayerNorm/gamma/adam_v" in names


def test_a_folder_with_the_settings_of_a_tokenizer(tmp_path):
    settings = b'{"do_lower_case": false}'
    source = write_folder(tmp_path / "source", FILES | {"tokenizer_config.json": settings})
    tool.main([str(source), str(tmp_path / "folder")])
    assert_equals_stored(tmp_path / "folder")
    assert (tmp_path / "folder/tokenizer_config.json").read_bytes() == settings


def test_a_cased_vocabulary_is_said_to_be_so(tmp_path):
    """Google's zips do not say it; without it a cased model would read lower-case texts."""
    for words, lower in ("[CLS]\nthe\n##s\n", True), ("[CLS]\nthe\nThe\n", False):
        source = write_folder(tmp_path / f"source-{lower}", FILES | {"vocab.txt": words.encode()})
        tool.convert(source, tmp_path / f"folder-{lower}")
        stated = (tmp_path / f"folder-{lower}/tokenizer_config.json").read_text()
        assert json.loads(stated) == {"do_lower_case": lower}


def test_a_saved_model(tmp_path):
    """Its checkpoint has other names, and lies in a subfolder."""
    files = {name.replace("bert_model.ckpt", "variables/variables"): FILES[name] for name in FILES}
    assert "variables/variables.index" in files
    source = write_folder(tmp_path / "source", files)
    tool.main([str(source), str(tmp_path / "folder")])
    assert_equals_stored(tmp_path / "folder")


def test_only_the_wanted_files_of_a_zip_are_read(tmp_path):
    """Wherever they lie; the others are neither read nor unpacked."""
    others = {"../evil": b"x", "__MACOSX/a/b/._bert_config.json": b"x", "a/b/big": b"spoilt"}
    inside = {f"a/b/{name}": content for name, content in FILES.items()}
    source = write_zip(tmp_path / "mine.zip", others | inside)
    source.write_bytes(source.read_bytes().replace(b"spoilt", b"SPOILT"))   # its checksum is wrong
    tool.main([str(source), str(tmp_path / "folder")])
    assert_equals_stored(tmp_path / "folder")
    assert names_in(tmp_path) == ["folder", "mine.zip"]
    assert names_in(tmp_path / "folder") == FOUR
    assert not (tmp_path.parent / "evil").exists()


def test_the_command_line_alone(tmp_path):
    """In a process that does not see this repository's modules."""
    command = [sys.executable, "-I", str(SCRIPT), str(GOOGLE), "folder"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert_equals_stored(tmp_path / "folder")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "convert_google.py: folder holds model.safetensors already: name another folder\n"
    )


# --- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_missing_files(tmp_path, refused, name):
    """In a folder, and in a zip."""
    rest = {other: content for other, content in FILES.items() if other != name}
    refused(write_folder(tmp_path / "source", rest), name, "missing")
    refused(write_zip(tmp_path / "mine.zip", rest), name, "missing")


@pytest.mark.parametrize("name", [INDEX, DATA])
@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "foreign"])
def test_damaged_checkpoints(tmp_path, refused, name, damage):
    whole = FILES[name]
    content = {
        "empty": b"",
        "truncated": whole[:-7],
        "flipped": flip(whole, len(whole) // 3),
        "foreign": b"a b\n" * (len(whole) // 4),
    }[damage]
    source = write_folder(tmp_path / "source", FILES | {name: content})
    refused(source, INDEX, DATA, "damaged", "(a checksum or", "download the model again")


def test_any_flipped_byte_of_the_index_is_noticed(tmp_path):
    """In its two blocks, in the handle of the second and in the footer's last number."""
    positions = [*range(0, 5502, 61), *range(5515, 5535), *range(5538, 5541), *range(5575, 5583)]
    assert len(FILES[INDEX]) == 5583
    for at in positions:
        write_folder(tmp_path, FILES | {INDEX: flip(FILES[INDEX], at)})
        with pytest.raises(tool.UserError):
            tool.read_checkpoint(tmp_path)


def test_a_flipped_byte_at_the_edge_of_a_tensor_is_noticed(tmp_path):
    entry = dict(tool.read_index(FILES[INDEX]))["bert/encoder/layer_1/output/dense/kernel"]
    offset, size = entry[4][0], entry[5][0]
    assert size == 28 * 20 * 4
    for at in offset, offset + size - 1:
        write_folder(tmp_path, FILES | {DATA: flip(FILES[DATA], at)})
        with pytest.raises(tool.UserError):
            tool.read_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe{", b"[" * 100_000])
def test_a_config_that_is_no_object(tmp_path, refused, content):
    source = write_folder(tmp_path / "source", FILES | {"bert_config.json": content})
    refused(source, "bert_config.json is not a JSON object")


def test_damaged_zips(tmp_path, refused):
    """Truncated; or a byte flipped within one of its files."""
    whole, source = GOOGLE.read_bytes(), tmp_path / "damaged.zip"
    for size in 0, 1000, len(whole) - 30:
        source.write_bytes(whole[:size])
        refused(source, str(source), "damaged, or no zip that holds bert_config.json")
    with zipfile.ZipFile(GOOGLE) as archive:
        members = archive.infolist()
    for member in members:
        content = member.header_offset + 30 + len(member.filename) + member.compress_size // 2
        source.write_bytes(flip(whole, content))
        refused(source, Path(member.filename).name, "damaged")


def test_wrong_sources(tmp_path, refused):
    refused(tmp_path / "nothing.zip", "nothing.zip is missing")
    foreign = write_zip(tmp_path / "foreign.zip", {"vocab.txt": b"x"})
    refused(foreign, "foreign.zip", "no zip that holds bert_config.json")
    text = write_folder(tmp_path, {"text.zip": b"a b\n" * 999}) / "text.zip"
    refused(text, "text.zip", "no zip that holds bert_config.json")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "bert_config.json is missing")


def test_a_folder_that_is_there(tmp_path, capsys):
    """With weights it is left as it is; what a stopped conversion left is replaced, not written
    over: another name of the old file keeps its content."""
    write_folder(tmp_path, {"config.json": b"old", "model.safetensors": b"mine"})
    with pytest.raises(SystemExit) as stop:
        tool.main([str(GOOGLE), str(tmp_path)])
    assert stop.value.code == 2 and "holds model.safetensors already" in capsys.readouterr().err
    assert names_in(tmp_path) == ["config.json", "model.safetensors"]
    assert (tmp_path / "config.json").read_bytes() == b"old"
    (tmp_path / "model.safetensors").unlink()
    os.link(tmp_path / "config.json", tmp_path / "old.json")
    tool.main([str(GOOGLE), str(tmp_path)])
    assert_equals_stored(tmp_path)
    assert b"model_type" in (tmp_path / "config.json").read_bytes()
    assert (tmp_path / "old.json").read_bytes() == b"old"


def test_a_folder_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    """It is a file; or the disk is full: no part of a file stays."""
    write_folder(tmp_path, {"file": b"mine"})
    with pytest.raises(SystemExit) as stop:
        tool.main([str(GOOGLE), str(tmp_path / "file")])
    assert stop.value.code == 2 and (tmp_path / "file").read_bytes() == b"mine"

    def full(path: Path, content: bytes) -> None:
        with open(path, "wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        tool.main([str(GOOGLE), str(tmp_path / "folder")])
    assert stop.value.code == 2 and "No space left" in capsys.readouterr().err
    assert names_in(tmp_path / "folder") == []


# --- Checksums and compression ------------------------------------------------------------------


def masked_crc(content: bytes) -> int:
    """CRC-32C by a division bit by bit, masked as TensorFlow and LevelDB do."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def test_checksums_equal_a_division_bit_by_bit():
    assert masked_crc(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) % 2**32
    generator = np.random.default_rng(0)
    for size in [*range(4, 70), 127, 128, 129, 1000, 4095]:
        content = generator.bytes(size)
        crc = masked_crc(content)
        tool.check_crc(content, crc)
        with pytest.raises(ValueError):
            tool.check_crc(flip(content, size - 1), crc)
        with pytest.raises(ValueError):
            tool.check_crc(content, crc ^ 1)


def test_a_block_that_the_snappy_library_compressed():
    """A long and a short literal, a copy that overlaps itself, a short copy."""
    text = bytes(range(70)) + b"abc" * 20 + bytes(range(9, 16)) + b"/layer" * 3
    compressed = "9b01f049" + text[:74].hex() + "de03000009097944" + text[-18:].hex()
    assert tool.unsnap(bytes.fromhex(compressed)) == text


def test_rarer_elements_of_snappy():
    """Written by hand from snappy's format_description.txt."""
    text = np.random.default_rng(0).bytes(600)
    literal = bytes([61 << 2]) + (599).to_bytes(2, "little") + text     # two bytes of length
    far = bytes([3 | 19 << 2]) + (600).to_bytes(4, "little")            # 20 bytes from 600 back
    near = bytes([1 | 5 << 2 | 1 << 5, 300 - 256])                      # 9 bytes from 300 back
    expected = text + text[:20] + text[320:329]
    assert tool.unsnap(varint(len(expected)) + literal + far + near) == expected


def varint(value: int) -> bytes:
    low = bytes([value & 127 | (128 if value > 127 else 0)])
    return low + varint(value >> 7) if value > 127 else low


def snap(content: bytes) -> bytes:
    """Compressed, badly: literals of one byte, and copies of four."""
    result, seen, at = varint(len(content)), {}, 0
    while at < len(content):
        four = content[at : at + 4]
        if len(four) == 4 and four in seen:
            result += bytes([2 | 3 << 2]) + (at - seen[four]).to_bytes(2, "little")
            at += 4
        else:
            seen[four] = at
            result += bytes([0, content[at]])
            at += 1
    return result


def index_pairs() -> list[tuple[bytes, bytes]]:
    """The keys and values of the fixture's index: its only block of them is its first."""
    handle = varint(0) + varint(5497)
    return [(key.encode(), value) for key, value in tool.entries(FILES[INDEX], handle)]


def append_block(table: bytearray, pairs: list[tuple[bytes, bytes]]) -> bytes:
    """Append a compressed block of these keys and values to the table, and return its handle."""
    block = b""
    for key, value in pairs:
        block += varint(0) + varint(len(key)) + varint(len(value)) + key + value
    block = snap(block + bytes(4) + (1).to_bytes(4, "little"))  # one restart, at 0
    handle = varint(len(table)) + varint(len(block))
    table += block + b"\1" + masked_crc(block + b"\1").to_bytes(4, "little")
    return handle


def compressed_index(*parts: list[tuple[bytes, bytes]]) -> bytes:
    """An index with one compressed block for each part."""
    table = bytearray()
    blocks = [(part[-1][0], append_block(table, part)) for part in parts]
    handles = append_block(table, []) + append_block(table, blocks)
    return bytes(table) + handles.ljust(40, b"\0") + FILES[INDEX][-8:]


def test_an_index_of_compressed_blocks(tmp_path):
    pairs = index_pairs()
    assert len(pairs) > 100
    index = compressed_index(pairs[:40], pairs[40:90], pairs[90:])
    source = write_folder(tmp_path / "source", FILES | {INDEX: index})
    tool.main([str(source), str(tmp_path / "folder")])
    assert_equals_stored(tmp_path / "folder")
    write_folder(source, {INDEX: flip(index, 3000)})
    with pytest.raises(tool.UserError):
        tool.read_checkpoint(source)


def test_checkpoints_of_other_kinds(tmp_path, refused):
    """Checksums are right, but a tensor is of texts (type 7), or its size is unknown (-1)."""
    pairs = dict(index_pairs())
    whole = pairs[b"global_step"]
    assert whole.startswith(b"\x08\x09\x12\x00")        # type 9, a shape without dimensions
    unknown = b"\x12\x0b\x08" + varint(2**64 - 1)
    for value in (
        b"\x08\x07" + whole[2:],
        b"\x08\x09\x12" + varint(len(unknown)) + unknown + whole[4:],
    ):
        index = compressed_index(sorted((pairs | {b"global_step": value}).items()))
        source = write_folder(tmp_path / "source", FILES | {INDEX: index})
        refused(source, INDEX, "of another kind")
