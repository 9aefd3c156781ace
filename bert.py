"""BERT's encoder, from its weights on disk to its hidden states.

SmartBERT is built on it: embeddings and a stack of L identical layers (Devlin et al. 2019, section
3; Vaswani et al. 2017, section 3). Gates and exits are not in this file. Unlike most
BERT code it has no pooler, and each layer can be run alone, on any subset of the rows.

    bert = load_bert("path/to/bert-base-uncased")   # a folder from the hub, or one of Google's
    hiddens = bert(ids, segment_ids, mask)          # [h_0, h_1, ..., h_L], each (B, S, H)

Dimensions: B rows (examples), S tokens, H hidden size, I intermediate size (usually 4H),
A attention heads, D = H / A, L layers.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


# --- The encoder --------------------------------------------------------------------------------

@dataclass
class BertConfig:
    """A BERT's shape, named as in Hugging Face's config.json; the defaults are bert-base's."""

    vocab_size: int = 30522
    hidden_size: int = 768                      # H
    num_hidden_layers: int = 12                 # L
    num_attention_heads: int = 12               # A
    intermediate_size: int = 3072               # I
    max_position_embeddings: int = 512          # the longest S
    type_vocab_size: int = 2                    # first sentence, second sentence
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02             # standard deviation of fresh weights

    def __post_init__(self):
        check_config(self)                      # raises ValueError for a value out of range


class Embeddings(nn.Module):
    """The sum of word, position and segment embedding of each token, normalised."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.segment = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, ids: Tensor, segment_ids: Tensor) -> Tensor:
        """ids, segment_ids (B, S) -> h_0 (B, S, H)."""
        position = self.position.weight[:ids.shape[1]]                      # (S, H)
        h = self.word(ids) + position + self.segment(segment_ids)           # (B, S, H)
        return self.dropout(self.norm(h))


class Layer(nn.Module):
    """One layer: attention mixes the tokens, then a feed-forward network transforms each one."""

    def __init__(self, config: BertConfig):
        super().__init__()
        H, I = config.hidden_size, config.intermediate_size
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(H, 3 * H)          # query, key and value in one product
        self.attention_dropout = config.attention_probs_dropout_prob
        self.out = nn.Linear(H, H)
        self.norm1 = nn.LayerNorm(H, config.layer_norm_eps)
        self.up = nn.Linear(H, I)
        self.down = nn.Linear(I, H)
        self.norm2 = nn.LayerNorm(H, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """h (B, S, H); mask (B, S), True at real tokens, or None when all are -> (B, S, H)."""
        B, S, H = h.shape
        # q, k, v each (B, A, S, D)
        q, k, v = self.qkv(h).view(B, S, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        # softmax(q k^T / sqrt(D)) v, where no token sees the padding
        mask = None if mask is None else mask[:, None, None, :]             # (B, 1, 1, S)
        p = self.attention_dropout if self.training else 0.0
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)    # (B, A, S, D)
        a = self.out(a.transpose(1, 2).reshape(B, S, H))                    # (B, S, H)
        h = self.norm1(h + self.dropout(a))
        f = self.down(F.gelu(self.up(h)))                                   # feed-forward
        return self.norm2(h + self.dropout(f))


class Bert(nn.Module):
    """The encoder. `forward` runs all layers; SmartBERT calls `embeddings` and `layers[i]`."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.apply(self.initialise)

    def initialise(self, module: nn.Module) -> None:
        """Fresh weights as in BERT: normal with a small deviation, biases zero."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor, segment_ids: Tensor, mask: Tensor) -> list[Tensor]:
        """ids, segment_ids (B, S); mask (B, S), True at real tokens -> h_0 .. h_L, (B, S, H)."""
        hiddens = [self.embeddings(ids, segment_ids)]
        mask = mask_or_none(mask)
        for layer in self.layers:
            hiddens.append(layer(hiddens[-1], mask))
        return hiddens


def mask_or_none(mask: Tensor) -> Tensor | None:
    """None for a batch without padding: attention without a mask is faster."""
    return None if mask.all() else mask


# --- Weights from disk --------------------------------------------------------------------------

def load_bert(folder: str | Path, **changes) -> Bert:
    """The pre-trained encoder, in fp32, in a folder laid out as on the Hugging Face hub or as
    Google published it (also a SavedModel's). changes: values that replace those of the folder's
    config.json (Google's bert_config.json), such as hidden_dropout_prob.

    This and the other functions of this section raise ValueError, with a message of one line, for
    files that are missing, damaged or not a BERT's, and for tensors that do not fit config.json.
    """
    folder = Path(folder)
    bert = Bert(replace(read_config(folder), **changes))
    bert.load_state_dict(convert_names(read_tensors(folder), bert))     # sets every parameter
    return bert


# Our name of each part of a layer -> its names in Hugging Face's files. Our qkv is their query,
# key and value, concatenated in this order.
LAYER_PARTS = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "out": ("attention.output.dense",),
    "norm1": ("attention.output.LayerNorm",),
    "up": ("intermediate.dense",),
    "down": ("output.dense",),
    "norm2": ("output.LayerNorm",),
}
EMBEDDINGS = {"word.weight": "word_embeddings.weight", "norm.weight": "LayerNorm.weight",
              "position.weight": "position_embeddings.weight", "norm.bias": "LayerNorm.bias",
              "segment.weight": "token_type_embeddings.weight"}
# Tensors that a file may hold but the encoder does not use: the pooler, the heads of pre-training
# and of tasks under their usual names, the position ids (0, 1, 2, ...), the count of steps.
IGNORED = ("pooler.", "cls.", "classifier.", "qa_outputs.", "dropout.", "embeddings.position_ids",
           "dense.", "global_step")


def name_table(config: BertConfig) -> dict[str, tuple[str, ...]]:
    """Our parameter's name -> the file's names of its parts, concatenated along dimension 0."""
    table = {f"embeddings.{ours}": (f"embeddings.{theirs}",)
             for ours, theirs in EMBEDDINGS.items()}
    for i in range(config.num_hidden_layers):
        for ours, parts in LAYER_PARTS.items():
            for kind in ("weight", "bias"):
                theirs = tuple(f"encoder.layer.{i}.{part}.{kind}" for part in parts)
                table[f"layers.{i}.{ours}.{kind}"] = theirs
    return table


def convert_names(tensors: dict[str, Tensor], bert: Bert) -> dict[str, Tensor]:
    """A file's tensors -> a state dict for this encoder, in fp32. Every tensor must be used or
    ignored by name. Names may start with "bert.", and LayerNorm may have gamma and beta."""
    found = {}
    for name, tensor in tensors.items():
        name = str(name).removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if name in found:
            raise ValueError(f"the weights hold {name} twice, under two names: save them with one")
        if not name.startswith(IGNORED):
            found[name] = tensor
    table, state = name_table(bert.config), bert.state_dict()
    expected = set().union(*table.values())
    missing, unknown = expected - found.keys(), found.keys() - expected
    if missing or unknown:
        fault = f"lack {min(missing)}" if missing else f"also hold {min(unknown)!r:.60}"
        raise ValueError(f"the weights {fault}: use a BERT's weights and their own config.json")
    for ours, theirs in table.items():
        shapes = [part.shape for part in state[ours].chunk(len(theirs))]
        parts = [check_tensor(name, found[name], size) for name, size in zip(theirs, shapes)]
        state[ours] = torch.cat(parts)
    return state


def check_tensor(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """The tensor in fp32, checked."""
    if not (isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.is_meta
            and tensor.layout == torch.strided and not tensor.is_nested):
        raise ValueError(f"{name} is not a plain dense floating-point tensor: save it in fp32")
    if tensor.shape != shape:
        raise ValueError(f"the tensor {name} has shape {tuple(tensor.shape)}, but config.json "
                         f"requires {tuple(shape)}: use the weights' own config.json")
    tensor = tensor.float()
    if not tensor.isfinite().all():
        raise ValueError(f"the tensor {name} holds NaN or infinite values: use other weights")
    return tensor


def read_config(folder: Path) -> BertConfig:
    """config.json of a weights folder, or Google's bert_config.json."""
    path = folder / "config.json"
    if not path.is_file() and path.with_name("bert_config.json").is_file():
        path = path.with_name("bert_config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is missing or not a JSON object: a weights folder holds "
                         f"config.json, vocab.txt and pytorch_model.bin, download it again")
    required = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute",
                "is_decoder": False, "add_cross_attention": False}
    for name, value in required.items():
        given = value if values.get(name) is None else values[name]     # null is the default
        if given != value:
            raise ValueError(f"{path}: {name} is {given!r:.60}, but this code supports only "
                             f"{value!r}: use other weights")
    known = {field.name for field in fields(BertConfig)}
    return BertConfig(**{name: value for name, value in values.items() if name in known})


# The range of each number in config.json; of those not listed 1 to 10^7.
LIMITS = {"num_hidden_layers": (1, 1000), "layer_norm_eps": (0, 1), "initializer_range": (0, 1000),
          "hidden_dropout_prob": (0, 0.99), "attention_probs_dropout_prob": (0, 0.99)}


def check_config(config: BertConfig) -> None:
    """Raise ValueError for a value of a wrong type or out of range, and for an impossible size."""
    advice = "correct config.json, or download it again"
    for field in fields(config):
        value = getattr(config, field.name)
        low, high = LIMITS.get(field.name, (1, 10**7))
        kind, types = ("whole number", int) if field.type is int else ("number", (int, float))
        fits = isinstance(value, types) and not isinstance(value, bool)
        if not fits or not low <= value <= high:                # NaN is refused as well
            raise ValueError(f"{field.name} {value!r:.60} is not a {kind} from {low} to {high}: "
                             f"{advice}")
    H, I, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    if H % heads:
        raise ValueError(f"hidden_size {H} is not a multiple of num_attention_heads {heads}: "
                         f"{advice}")
    rows = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    parameters = rows * H + config.num_hidden_layers * (4 * H * H + 2 * H * I)
    if parameters > 5 * 10**9:                                  # 20 GB in fp32
        raise ValueError(f"a BERT of {parameters:.0e} parameters is too large: {advice}")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of pytorch_model.bin, of model.safetensors, or of Google's checkpoint."""
    path, advice = folder / "pytorch_model.bin", "remove it and download it again"
    if path.is_file():
        return read_torch_file(path, advice)
    path = folder / "model.safetensors"
    if not path.is_file():
        for index in "bert_model.ckpt.index", "variables/variables.index":
            if (folder / index).is_file():
                return read_checkpoint(folder / index)
        raise ValueError(f"{folder} holds neither pytorch_model.bin nor model.safetensors nor "
                         f"bert_model.ckpt.index: download one of them, or save weights in "
                         f"several parts as one file")
    try:
        from safetensors.torch import load_file
        return load_file(path)
    except ImportError:
        raise ValueError(f"{path} needs the package safetensors: pip install safetensors")
    except Exception:                           # as in read_torch_file
        raise ValueError(f"{path} is truncated or not a safetensors file: {advice}")


def read_torch_file(path: Path, advice: str) -> dict:
    """Load a dict written by torch.save, without running code that the file may contain."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:                           # a damaged file may raise nearly anything
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is missing, truncated or not a dict from torch.save: {advice}")
    return content


# --- Google's own checkpoints -------------------------------------------------------------------

# Google published BERT as TensorFlow checkpoints: bert_model.ckpt.data-00000-of-00001 holds the
# bytes of all tensors, bert_model.ckpt.index says which are where. The index is a LevelDB table
# (LevelDB's doc/table_format.md) of protocol buffers (TensorFlow's tensor_bundle.proto), whose
# blocks may be compressed (snappy's format_description.txt). All of them are little-endian.

CRC_TABLE = np.arange(256, dtype=np.uint32)             # what crc32c makes of each byte
for _ in range(8):
    CRC_TABLE = CRC_TABLE >> 1 ^ (CRC_TABLE & 1) * np.uint32(0x82F63B78)


def read_checkpoint(index: Path) -> dict[str, Tensor]:
    """The tensors of a TensorFlow checkpoint with one data file, under Hugging Face's names. Its
    matrices (kernels) are transposed, the optimizer's moments left out, all checksums checked."""
    tensors, path = {}, index.with_suffix(".data-00000-of-00001")
    try:
        table, content = index.read_bytes(), np.memmap(path, np.uint8, "r")
        footer = table[-48:]                            # two handles, padding, this number:
        if footer[-8:] != bytes.fromhex("57fb808b247547db"):
            raise ValueError
        at = varint(footer, varint(footer, 0)[1])[1]    # the second: of the list of blocks
        for _, handle in entries(table, footer[at:]):
            for name, value in entries(table, handle):
                # the empty name is the header's
                if name and not name.endswith(("/adam_m", "/adam_v")):
                    tensor = read_entry(message(value), content)
                    # bert/encoder/layer_0/output/dense/kernel
                    name = name.replace("/layer_", "/layer.").replace("/", ".")
                    if name.endswith(".kernel"):
                        name, tensor = name.removesuffix("kernel") + "weight", tensor.T
                    tensors[name + ".weight" * name.endswith("_embeddings")] = tensor
    except (OSError, ValueError, TypeError, IndexError, KeyError):
        raise ValueError(f"{index} or {path.name} is missing, damaged, or one of several parts: "
                         f"download both again")
    return tensors


def read_entry(entry: dict[int, list], content: np.ndarray) -> Tensor:
    """The tensor of a BundleEntryProto: 1 type, 2 shape, 4 offset, 5 size in bytes, 6 checksum."""
    shape = [message(size).get(1, [0])[0] for size in message(entry[2][0]).get(2, [])]
    offset, size = entry.get(4, [0])[0], entry[5][0]    # numbers that are 0 are left out
    values = content[offset:offset + size]
    check_crc(values, entry[6][0])
    kind = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}[entry[1][0]]
    return torch.from_numpy(np.frombuffer(bytearray(values), kind).reshape(shape))


def entries(table: bytes, handle: bytes) -> Iterator[tuple[str, bytes]]:
    """Key and value of each entry of one block of the table. handle: the block's offset and size,
    two varints. A key stores only what differs from the key before it."""
    offset, at = varint(handle, 0)
    size, _ = varint(handle, at)
    block, kind = table[offset:offset + size], table[offset + size]     # kind 1: compressed
    stored = table[offset + size + 1:offset + size + 5]
    check_crc(table[offset:offset + size + 1], int.from_bytes(stored, "little"))
    block = unsnap(block) if kind == 1 else block
    key, at = b"", 0
    end = len(block) - 4 - 4 * int.from_bytes(block[-4:], "little")     # an array of offsets
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
    while True:
        value |= (content[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if content[at - 1] < 128:
            return value, at


def message(content: bytes) -> dict[int, list]:
    """A protocol buffer: a field's number -> its values, numbers or bytes."""
    values, at = {}, 0
    while at < len(content):
        tag, at = varint(content, at)
        if tag & 7 == 5:                                # four bytes
            value, at = int.from_bytes(content[at:at + 4], "little"), at + 4
        else:
            value, at = varint(content, at)
            if tag & 7 == 2:                            # a length, then so many bytes
                value, at = content[at:at + value], at + value
        values.setdefault(tag >> 3, []).append(value)
    return values


def unsnap(content: bytes) -> bytes:
    """Decompress a block: literal bytes, and copies of bytes that came before."""
    _, at = varint(content, 0)                          # the size
    result = bytearray()
    while at < len(content):
        tag, kind, at = content[at] >> 2, content[at] & 3, at + 1
        if kind == 0:
            more = max(tag - 59, 0)                     # bytes that give the length
            length = int.from_bytes(content[at:at + more], "little") if more else tag
            at += more + length + 1
            result += content[at - length - 1:at]
            continue
        more = (1, 2, 4)[kind - 1]                      # bytes that give the distance
        length = (tag & 7) + 4 if kind == 1 else tag + 1
        back = int.from_bytes(content[at:at + more], "little") + (tag >> 3 << 8) * (kind == 1)
        at += more
        for _ in range(length):                         # a copy may reach into itself
            result.append(result[-back])
    return bytes(result)


def check_crc(content: bytes | np.ndarray, stored: int) -> None:
    """Raise ValueError where the CRC-32C (RFC 3720) of these bytes (4 or more) is not the stored
    one, which TensorFlow rotates and shifts ("masked").

    The checksum is a remainder of polynomials over GF(2), so it is linear: all rows of a matrix of
    the bytes are divided at once, and then joined with their neighbours, two by two:
    remainder(left + right) = remainder(left + as many zero bytes as right has) ^ remainder(right).
    """
    content = np.frombuffer(content, np.uint8).copy()
    content[:4] ^= 255                                  # starts with 32 ones
    width = 2 ** (len(content).bit_length() // 2)
    rows = np.pad(content, (-len(content) % width, 0)).reshape(-1, width)   # 0 in front: no effect
    rest, zeros = np.zeros(len(rows), np.uint32), 1 << np.arange(32, dtype=np.uint32)
    for column in np.ascontiguousarray(rows.T):
        rest = CRC_TABLE[(rest ^ column) & 255] ^ rest >> 8
        zeros = CRC_TABLE[zeros & 255] ^ zeros >> 8     # what `width` zero bytes do to each bit

    def after_zeros(rest: np.ndarray) -> np.ndarray:
        bits = rest[:, None] >> np.arange(32, dtype=np.uint32) & 1
        return np.bitwise_xor.reduce(bits * zeros, axis=1)
    while len(rest) > 1:
        rest = np.concatenate([rest[:len(rest) % 2] * 0, rest])
        rest, zeros = after_zeros(rest[::2]) ^ rest[1::2], after_zeros(zeros)
    crc = int(rest[0]) ^ 0xFFFFFFFF
    if ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF != stored:
        raise ValueError
