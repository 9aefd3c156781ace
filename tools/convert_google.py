"""Converts a BERT that Google published into a folder laid out as on the Hugging Face hub.

    python tools/convert_google.py uncased_L-2_H-128_A-2.zip FOLDER

The source is Google's zip or a folder with its files: bert_config.json, vocab.txt and the two of a
TensorFlow checkpoint, bert_model.ckpt.index and bert_model.ckpt.data-00000-of-00001 (or those of a
SavedModel, in its subfolder variables). FOLDER receives config.json, vocab.txt, model.safetensors
and tokenizer_config.json: the source's, or one that says whether the vocabulary is lower-case.
TensorFlow is not needed.
"""

import argparse
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save


class UserError(Exception):
    """An error that the user can fix; the message is one line."""


# --- Files --------------------------------------------------------------------------------------

def convert(source: Path, folder: Path) -> None:
    """Read all, then write all. Raises UserError, and OSError where it cannot write."""
    if (folder / "model.safetensors").exists():
        raise UserError(f"{folder} holds model.safetensors already: name another folder")
    root = open_source(source)
    config = read_config(root / "bert_config.json")
    files = {"config.json": json.dumps(config, indent=1).encode()}
    files["vocab.txt"] = read_file(root / "vocab.txt")
    if (root / "tokenizer_config.json").is_file():
        files["tokenizer_config.json"] = read_file(root / "tokenizer_config.json")
    else:
        words = [word for word in files["vocab.txt"].decode().split() if word[0] != "["]
        lower = all(word == word.lower() for word in words)     # [CLS] and its like aside
        files["tokenizer_config.json"] = json.dumps({"do_lower_case": lower}).encode()
    files["model.safetensors"] = save(read_checkpoint(root), metadata={"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write(folder / name, content)


def open_source(source: Path) -> Path | zipfile.Path:
    """The folder with Google's files, which may be inside a zip: nothing is unpacked to disk."""
    if source.is_dir():
        return source
    name = "bert_config.json"
    try:
        archive = zipfile.ZipFile(source)
        path = next(path for path in archive.namelist() if Path(path).name == name)
        return zipfile.Path(archive, path).parent
    except Exception:                           # a damaged zip may raise nearly anything
        raise UserError(f"{source} is missing, or damaged, or no zip that holds {name}: name "
                        f"Google's zip, or a folder with its files")


def read_file(path: Path | zipfile.Path) -> bytes:
    """The file's content. Raises UserError."""
    try:
        return path.read_bytes()
    except Exception:                           # as above
        raise UserError(f"{path} is missing or damaged: download the model again")


def read_config(path: Path | zipfile.Path) -> dict:
    """The values of bert_config.json, and Hugging Face's name of the architecture."""
    try:
        return json.loads(read_file(path)) | {"model_type": "bert"}
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{path} is not a JSON object: download the model again")


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a temporary file beside it takes its name at the end."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)       # it is there only after an error


# --- The checkpoint -----------------------------------------------------------------------------

# The data file holds the bytes of all tensors; the index says which are where. It is a table of
# LevelDB (its doc/table_format.md), not compressed, with protocol buffers (TensorFlow's
# tensor_bundle.proto). All of it is little-endian.

def read_checkpoint(root: Path | zipfile.Path) -> dict[str, np.ndarray]:
    """The tensors under Hugging Face's names. Kernels are transposed, the optimizer's moments left
    out, all checksums checked."""
    saved_model = (root / "variables/variables.index").is_file()
    prefix = "variables/variables" if saved_model else "bert_model.ckpt"
    index, data = root / f"{prefix}.index", root / f"{prefix}.data-00000-of-00001"
    table, content = read_file(index), np.frombuffer(read_file(data), np.uint8)
    tensors = {}
    try:
        for name, entry in read_index(table):
            if name.endswith(("/adam_m", "/adam_v")):
                continue
            tensor = read_entry(entry, content)
            # bert/encoder/layer_0/output/dense/kernel -> bert.encoder.layer.0.output.dense.weight
            name = name.replace("/layer_", "/layer.").replace("/", ".")
            if name.endswith(".kernel"):
                name = name.removesuffix("kernel") + "weight"
                tensor = np.ascontiguousarray(tensor.T)
            if name.endswith("_embeddings"):
                name += ".weight"
            tensors[name] = tensor
    except (ValueError, TypeError, IndexError, KeyError):
        raise UserError(f"{index} or {data.name} is damaged or of another kind (a checksum or a "
                        f"number is wrong): download the model again")
    return tensors


def read_entry(entry: dict[int, list], content: np.ndarray) -> np.ndarray:
    """The tensor of a BundleEntryProto: 1 type, 2 shape, 4 offset, 5 size in bytes, 6 checksum.
    Numbers that are 0 are left out of a protocol buffer."""
    shape = [message(size).get(1, [0])[0] for size in message(entry[2][0]).get(2, [])]
    offset, size = entry.get(4, [0])[0], entry[5][0]
    values = content[offset:offset + size]
    check_crc(values, entry[6][0])
    kinds = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}     # TensorFlow's types.proto
    return values.view(kinds[entry[1][0]]).reshape(shape)


def read_index(table: bytes) -> Iterator[tuple[str, dict[int, list]]]:
    """The name and the BundleEntryProto of each tensor."""
    footer = table[-48:]                        # two handles, padding, this number:
    if footer[-8:] != bytes.fromhex("57fb808b247547db"):
        raise ValueError
    at = varint(footer, varint(footer, 0)[1])[1]        # past the first handle, two varints
    for _, handle in entries(table, footer[at:]):       # the second is of the list of blocks
        for name, value in entries(table, handle):
            if name:                            # the empty name is the header's
                yield name, message(value)


def entries(table: bytes, handle: bytes) -> Iterator[tuple[str, bytes]]:
    """Key and value of each entry of one block of the table. handle: the block's offset and size,
    two varints. A key stores only what differs from the key before it."""
    offset, at = varint(handle, 0)
    size, _ = varint(handle, at)
    kind = offset + size                        # the position of a byte: 0, not compressed
    check_crc(table[offset:kind + 1], number(table, kind + 1, 4))
    block = table[offset:kind]
    key, at = b"", 0
    end = len(block) - 4 - 4 * number(block, len(block) - 4, 4)     # an array of offsets
    while at < end:
        shared, at = varint(block, at)
        added, at = varint(block, at)
        size, at = varint(block, at)
        key = key[:shared] + block[at:at + added]
        at += added + size
        yield key.decode("latin-1"), block[at - size:at]


def varint(content: bytes, at: int) -> tuple[int, int]:
    """The number at this position, 7 bits a byte, the lowest first; and the next position."""
    value = shift = 0
    while content[at] >= 128:                   # more bytes follow
        value += content[at] - 128 << shift
        at, shift = at + 1, shift + 7
    return value + (content[at] << shift), at + 1


def number(content: bytes, at: int, size: int) -> int:
    """The number in `size` bytes at this position."""
    return int.from_bytes(content[at:at + size], "little")


def message(content: bytes) -> dict[int, list]:
    """A protocol buffer: a field's number -> its values, numbers or bytes."""
    fields, at = {}, 0
    while at < len(content):
        tag, at = varint(content, at)
        if tag & 7 == 5:                        # four bytes
            value, at = number(content, at, 4), at + 4
        else:
            value, at = varint(content, at)
        if tag & 7 == 2:                        # a length, then so many bytes
            value, at = content[at:at + value], at + value
        fields.setdefault(tag >> 3, []).append(value)
    return fields


# --- Checksums ----------------------------------------------------------------------------------

CRC_TABLE = np.arange(256, dtype=np.uint32)     # what CRC-32C (RFC 3720) makes of each byte
for _ in range(8):
    CRC_TABLE = CRC_TABLE >> 1 ^ (CRC_TABLE & 1) * np.uint32(0x82F63B78)


def check_crc(content: bytes | np.ndarray, stored: int) -> None:
    """Raise ValueError where the CRC-32C of these bytes (4 or more) is not the stored one, which
    TensorFlow rotates and shifts ("masked").

    The checksum is a remainder of polynomials over GF(2), so it is linear: all rows of a matrix of
    the bytes are divided at once, and then joined with their neighbours, two by two:
    remainder(left + right) = remainder(left + as many zero bytes as right has) ^ remainder(right).
    """
    content = np.frombuffer(content, np.uint8).copy()
    content[:4] ^= 255                          # starts with 32 ones
    width = 2 ** (len(content).bit_length() // 2)
    rows = np.pad(content, (-len(content) % width, 0)).reshape(-1, width)   # 0 in front: no effect
    rest, zeros = np.zeros(len(rows), np.uint32), 1 << np.arange(32, dtype=np.uint32)
    for column in np.ascontiguousarray(rows.T):
        rest = CRC_TABLE[(rest ^ column) & 255] ^ rest >> 8
        zeros = CRC_TABLE[zeros & 255] ^ zeros >> 8     # what `width` zero bytes do to each bit
    while len(rest) > 1:
        rest = np.pad(rest, (len(rest) % 2, 0))
        rest, zeros = after_zeros(rest[::2], zeros) ^ rest[1::2], after_zeros(zeros, zeros)
    crc = int(rest[0]) ^ 0xFFFFFFFF
    if ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF != stored:
        raise ValueError


def after_zeros(rest: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    """The remainders after zero bytes that do `zeros` to each of the 32 bits."""
    bits = rest[:, None] >> np.arange(32, dtype=np.uint32) & 1
    return np.bitwise_xor.reduce(bits * zeros, axis=1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="convert_google.py", description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="Google's zip, or a folder with its files")
    parser.add_argument("folder", type=Path, help="what to write; created where it is missing")
    options = parser.parse_args(arguments)
    try:
        convert(options.source, options.folder)
    except (UserError, OSError, UnicodeDecodeError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
