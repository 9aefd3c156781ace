"""BERT's encoder, from its weights on disk to its hidden states.

This is the ground SmartBERT stands on: embeddings and a stack of L identical layers (Devlin et al., 2019,
section 3; Vaswani et al., 2017, section 3). Nothing here knows of gates or exits. The one thing that differs from
other BERTs is that a layer can be run alone, on whichever rows of a batch want it.

    bert = load_bert("path/to/bert-base-uncased")        # config.json, vocab.txt, pytorch_model.bin
    hiddens = bert(ids, segment_ids, mask)                     # [h_0, h_1, ..., h_L], each (B, S, H)

Dimensions: B rows (examples), S tokens, H hidden size, I intermediate size (4H), A attention heads, D = H / A, L layers.
"""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# Tokens that a layer takes at once on a CPU where no gradient is wanted (evaluation, a frozen encoder): then the (tokens, I)
# tensor in its middle stays in memory that the processor has just used.
PIECE = 1024


# What a number in config.json may be: from, to. Others that are whole: 1 to 10^7, the rest 0 to 1.
LIMITS = {"num_hidden_layers": (1, 1000), "initializer_range": (0, 1000)}


@dataclass
class BertConfig:
    """The shape of a BERT, under the names of Hugging Face's config.json. The defaults are bert-base-uncased's."""

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
        for field in fields(self):
            value, whole = getattr(self, field.name), field.type is int
            low, high = LIMITS.get(field.name, (1, 10**7) if whole else (0, 1))
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise ValueError(f"{field.name} {value!r:.60} is no {'whole ' * whole}number: "
                                   f"correct config.json, or download it again")
            below = field.name.endswith("_prob")        # dropout of 1 would leave nothing
            if not low <= value <= high or below and value == high:                     # NaN too
                raise ValueError(f"{field.name} {value!r:.60} is out of range, from {low} to "
                                   f"{'below ' * below}{high}: correct config.json, "
                                   f"or download it again")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of "
                               f"num_attention_heads {self.num_attention_heads}")


class Dropout(nn.Module):
    """nn.Dropout, with p rounded to 1 / 65536. On a CPU that one draws a random number for every value, a fifth of a
    training step; here one draw of 64 bits serves four values."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return F.dropout(x, self.p, self.training)
        n, dropped = x.numel(), round(self.p * 2**16)
        # each 64 bits as four numbers, uniform in [-2^15, 2^15): the `dropped` lowest of the 2^16 values are dropped
        bits = torch.empty(n // 4 + 1, dtype=torch.int64).random_(-2**63, None).view(torch.int16)[:n].view(x.shape)
        return x.masked_fill(bits < dropped - 2**15, 0.0) * (2**16 / (2**16 - dropped))


class Embeddings(nn.Module):
    """What a token is + where it stands + which sentence it is in, normalised."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.segment = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, ids: Tensor, segment_ids: Tensor) -> Tensor:
        h = self.word(ids) + self.position.weight[:ids.shape[1]] + self.segment(segment_ids)     # (B, S, H)
        return self.dropout(self.norm(h))


class Layer(nn.Module):
    """One layer: every token looks at the others (attention), then thinks alone (feed-forward)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        H, I = config.hidden_size, config.intermediate_size
        self.heads = config.num_attention_heads
        self.attention_dropout = Dropout(config.attention_probs_dropout_prob)
        self.qkv = nn.Linear(H, 3 * H)          # query, key and value in one product: one large one beats three
        self.out = nn.Linear(H, H)
        self.norm1 = nn.LayerNorm(H, config.layer_norm_eps)
        self.up = nn.Linear(H, I)
        self.down = nn.Linear(I, H)
        self.norm2 = nn.LayerNorm(H, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """h (B, S, H), mask (B, S) True at real tokens or None when all are -> (B, S, H)."""
        B, S, H = h.shape
        if B * S > PIECE and not torch.is_grad_enabled() and h.device.type == "cpu" and B > 1:
            n = max(PIECE // S, 1)                      # for speed only: the same rows, a few at a time
            return torch.cat([self(h[i:i + n], None if mask is None else mask[i:i + n]) for i in range(0, B, n)])
        q, k, v = self.qkv(h).view(B, S, 3, self.heads, -1).permute(2, 0, 3, 1, 4)      # each (B, A, S, D)
        if mask is not None:
            mask = mask[:, None, None, :]                                               # (B, 1, 1, S)
        # softmax(q k^T / sqrt(D)) v, with nothing seen of the padding
        p = self.attention_dropout.p if self.training else 0.0
        if p and h.device.type == "cpu":                # in full: there our Dropout beats the one built into attention
            scores = (q * q.shape[-1]**-0.5) @ k.transpose(2, 3)                        # (B, A, S, S)
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            a = self.attention_dropout(scores.softmax(-1)) @ v                          # (B, A, S, D)
        else:
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)    # the same, never whole in memory
        a = a.transpose(1, 2).reshape(B, S, H)
        h = self.norm1(h + self.dropout(self.out(a)))
        return self.norm2(h + self.dropout(self.down(F.gelu(self.up(h)))))


class Bert(nn.Module):
    """The encoder. `forward` runs every layer on every row; SmartBERT calls `embeddings` and `layers[i]` itself."""

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
        """ids, segment_ids (B, S) long, mask (B, S) bool, True at real tokens -> [h_0 .. h_L], each (B, S, H)."""
        hiddens = [self.embeddings(ids, segment_ids)]
        mask = mask_or_none(mask)
        for layer in self.layers:
            hiddens.append(layer(hiddens[-1], mask))
        return hiddens


def mask_or_none(mask: Tensor) -> Tensor | None:
    """None for a batch without padding: attention without a mask takes a faster path to the same numbers."""
    return None if bool(mask.all()) else mask


# --- Weights from disk ------------------------------------------------------------------------------------------------

# Hugging Face's names for the parts of one layer, and ours. Three parts of theirs make one of ours, in this order.
LAYER_PARTS = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "out": ("attention.output.dense",),
    "norm1": ("attention.output.LayerNorm",),
    "up": ("intermediate.dense",),
    "down": ("output.dense",),
    "norm2": ("output.LayerNorm",),
}
EMBEDDING_PARTS = {"word": "word_embeddings", "position": "position_embeddings", "segment": "token_type_embeddings",
                   "norm": "LayerNorm"}
# In a file for pre-training or a task, but not in the encoder: the pooler, the heads, and a buffer
# that counts 0 1 2 ...
IGNORED = ("pooler.", "cls.", "classifier.", "qa_outputs.", "dropout.", "embeddings.position_ids")


def name_table(config: BertConfig) -> dict[str, tuple[str, ...]]:
    """Our parameter's name -> the names in the file whose tensors, one below the other, fill it."""
    table = {f"embeddings.{ours}.weight": (f"embeddings.{theirs}.weight",) for ours, theirs in EMBEDDING_PARTS.items()}
    table["embeddings.norm.bias"] = ("embeddings.LayerNorm.bias",)
    for i in range(config.num_hidden_layers):
        for ours, parts in LAYER_PARTS.items():
            for kind in ("weight", "bias"):
                table[f"layers.{i}.{ours}.{kind}"] = tuple(f"encoder.layer.{i}.{part}.{kind}" for part in parts)
    return table


def unusable(tensor) -> str | None:
    """Why this is no tensor of weights, or None where it is one."""
    if not isinstance(tensor, Tensor):
        return f"is no tensor but of type {type(tensor).__name__}"
    if tensor.is_meta:
        return "is on the meta device, without values"
    if tensor.layout != torch.strided or tensor.is_nested:
        return "is sparse or nested"
    return None if tensor.is_floating_point() else f"is of {tensor.dtype}, not floating point"


def convert_names(tensors: dict[str, Tensor], bert: Bert) -> dict[str, Tensor]:
    """A file's tensors -> a state dict for this encoder, in fp32.

    Accepts names with and without "bert." in front and LayerNorm as gamma/beta or weight/bias.
    Raises ValueError naming the tensor that is missing, of another shape or kind, not finite,
    there twice, or that no part of the encoder would use.
    """
    found = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise ValueError(f"the weights hold {name!r:.60} in place of a tensor's name: "
                               f"save a model's state_dict() instead")
        name = name.removeprefix("bert.")
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if name.startswith(IGNORED):
            continue
        if name in found:
            raise ValueError(f"the weights hold the tensor {name} twice, under two names: "
                               f"save them with one")
        found[name] = tensor
    state, shapes = {}, {name: parameter.shape for name, parameter in bert.named_parameters()}
    for ours, theirs in name_table(bert.config).items():
        shape = (shapes[ours][0] // len(theirs), *shapes[ours][1:])                     # of each part
        for name in theirs:
            if name not in found:
                raise ValueError(f"the weights lack the tensor {name}: they are not a BERT encoder with "
                                   f"{bert.config.num_hidden_layers} layers, as config.json says")
            why = unusable(found[name])
            if why:
                raise ValueError(f"the tensor {name} {why}: "
                                   f"save the weights as plain fp32 tensors")
            if found[name].shape != shape:
                raise ValueError(f"the tensor {name} has shape {tuple(found[name].shape)}, but config.json makes it {shape}")
            found[name] = found[name].float()
            if not found[name].isfinite().all():
                raise ValueError(f"the tensor {name} holds NaN or infinite values: "
                                   f"use weights whose training did not diverge")
        state[ours] = torch.cat([found.pop(name) for name in theirs])
    if found:
        raise ValueError(f"the weights hold a tensor that config.json does not account for: {min(found)}")
    return state


def read_config(folder: Path) -> BertConfig:
    """config.json of a weights folder. Raises ValueError where it is missing, broken or of another architecture."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{path} is not there: a weights folder holds config.json, vocab.txt and pytorch_model.bin")
    except ValueError:
        raise ValueError(f"{path} is not JSON: remove it and download it again")
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object: remove it and download it again")
    if values.get("model_type", "bert") != "bert":
        raise ValueError(f"{path}: the weights are of a {values['model_type']!r}, not of a BERT")
    if values.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{path}: hidden_act is {values['hidden_act']!r}, but this BERT knows only 'gelu'")
    if values.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"{path}: only absolute position embeddings are known")
    for name in ("is_decoder", "add_cross_attention"):
        if values.get(name):
            raise ValueError(f"{path}: {name} is {values[name]!r:.60}, but this BERT is an "
                               f"encoder: use the weights of one")
    known = {field.name for field in fields(BertConfig)}
    return BertConfig(**{name: value for name, value in values.items() if name in known})


def read_file(path: Path, advice: str) -> dict:
    """What torch.save wrote, without running any code that may stand in it. Raises ValueError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:                                   # a damaged file raises nearly anything
        raise ValueError(f"{path} is missing, truncated or no PyTorch file: {advice}")
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no table of tensors: {advice}")
    return content


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of pytorch_model.bin, or of model.safetensors where the package safetensors is installed."""
    path = folder / "pytorch_model.bin"
    if path.is_file():
        return read_file(path, "remove it and download it again")
    path = folder / "model.safetensors"
    if not path.is_file():
        for index in ("pytorch_model.bin.index.json", "model.safetensors.index.json"):
            if (folder / index).is_file():
                raise ValueError(f"{folder} holds sharded weights ({index}): save them "
                                   f"as one file, pytorch_model.bin or model.safetensors")
        raise ValueError(f"{folder} holds neither pytorch_model.bin nor model.safetensors")
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError(f"{path} needs the package safetensors: pip install safetensors")
    try:
        return load_file(path)
    except (SafetensorError, OSError):
        raise ValueError(f"{path} is truncated or no safetensors file: remove it and download it again")


def load_bert(folder: str | Path, **changes) -> Bert:
    """A pre-trained encoder from a local folder in the hub's layout, as fp32. changes: other values for its config,
    such as hidden_dropout_prob.

    Raises ValueError, one line, for a missing or truncated file and for every tensor that is missing, unexpected or
    of another shape than config.json makes it.
    """
    bert = Bert(replace(read_config(Path(folder)), **changes))
    bert.load_state_dict(convert_names(read_tensors(Path(folder)), bert))
    return bert
