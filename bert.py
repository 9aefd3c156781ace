"""BERT's encoder, and its weights from a folder.

Embeddings and a stack of L identical layers (Devlin et al. 2019, section 3; Vaswani et al. 2017,
section 3), without a pooler. Each layer can be run alone, on any subset of the rows.

    bert = load_bert("path/to/bert-base-uncased")   # a folder in the hub's layout
    hiddens = bert(ids, segment_ids, mask)          # [h_0, h_1, ..., h_L], each (B, S, H)

Dimensions: B rows (examples), S tokens, H hidden size, I intermediate size (usually 4H),
A attention heads (n_heads), D = H / A, L layers.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
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


class Embeddings(nn.Module):
    """The sum of a token's word, position and segment embeddings, normalised."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.segment = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, ids: Tensor, segment_ids: Tensor) -> Tensor:
        """ids, segment_ids (B, S) -> h_0 (B, S, H)."""
        h = self.word(ids) + self.segment(segment_ids)                      # (B, S, H)
        h = h + self.position.weight[:ids.shape[1]]                         # (S, H), for all rows
        return self.dropout(self.norm(h))


def attend(q: Tensor, k: Tensor, v: Tensor, n_heads: int, mask: Tensor | None, dropout: float,
           training: bool) -> Tensor:
    """Attention of T queries over S tokens in several heads. q is (B, T, H), k and v (B, S, H).
    mask (B, S) is True at real tokens; None means that all are. Returns (B, T, H)."""
    B, T, H = q.shape
    D = H // n_heads
    q = q.view(B, -1, n_heads, D).transpose(1, 2)                           # (B, A, T, D)
    k = k.view(B, -1, n_heads, D).transpose(1, 2)                           # (B, A, S, D)
    v = v.view(B, -1, n_heads, D).transpose(1, 2)                           # (B, A, S, D)
    # Attention without a mask is faster, so leave it out where nothing is padded.
    mask = None if mask is None or mask.all() else mask[:, None, None, :]   # (B, 1, 1, S)
    a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask,
                                       dropout_p=dropout if training else 0.0)
    return a.transpose(1, 2).reshape(B, T, H)                               # heads side by side


class Layer(nn.Module):
    """One layer: attention mixes the tokens, then a feed-forward network transforms each one."""

    def __init__(self, config: BertConfig):
        super().__init__()
        H, I = config.hidden_size, config.intermediate_size
        self.n_heads = config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.qkv = nn.Linear(H, 3 * H)          # query, key and value in one product
        self.out = nn.Linear(H, H)
        self.norm1 = nn.LayerNorm(H, config.layer_norm_eps)
        self.up = nn.Linear(H, I)
        self.down = nn.Linear(I, H)
        self.norm2 = nn.LayerNorm(H, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """h (B, S, H); mask (B, S), True at real tokens, or None when all are -> (B, S, H)."""
        # Attention: softmax(q k^T / sqrt(D)) v in every head, where no token sees the padding.
        q, k, v = self.qkv(h).chunk(3, dim=2)                               # each (B, S, H)
        a = attend(q, k, v, self.n_heads, mask, self.attention_dropout, self.training)  # (B, S, H)
        h = self.norm1(h + self.dropout(self.out(a)))
        # Feed-forward network.
        f = self.down(F.gelu(self.up(h)))                                   # (B, S, H)
        return self.norm2(h + self.dropout(f))


class Bert(nn.Module):
    """The encoder. `forward` runs all layers; smartbert.py calls `embeddings` and `layers[i]`."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.apply(self.initialise)

    def initialise(self, module: nn.Module) -> None:
        """Fresh weights: normal with deviation initializer_range, biases zero."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor, segment_ids: Tensor, mask: Tensor) -> list[Tensor]:
        """ids, segment_ids (B, S); mask (B, S), True at real tokens -> h_0 .. h_L, (B, S, H)."""
        hiddens = [self.embeddings(ids, segment_ids)]
        for layer in self.layers:
            hiddens.append(layer(hiddens[-1], mask))
        return hiddens


# --- Weights from a folder ----------------------------------------------------------------------

def load_bert(folder: str | Path) -> Bert:
    """Load the encoder, in fp32, from a folder. Raises ValueError if it does not fit this code."""
    bert = Bert(read_config(Path(folder) / "config.json"))
    bert.load_state_dict(to_our_names(read_tensors(Path(folder)), bert.config))
    return bert


# Our parameters of the embeddings -> their names in Hugging Face's files.
EMBEDDING_NAMES = {
    "embeddings.word.weight": ["embeddings.word_embeddings.weight"],
    "embeddings.position.weight": ["embeddings.position_embeddings.weight"],
    "embeddings.segment.weight": ["embeddings.token_type_embeddings.weight"],
    "embeddings.norm.weight": ["embeddings.LayerNorm.weight"],
    "embeddings.norm.bias": ["embeddings.LayerNorm.bias"],
}
# Our parts of a layer -> theirs. Our qkv is their query, key and value, stacked.
LAYER_NAMES = {
    "qkv": ["attention.self.query", "attention.self.key", "attention.self.value"],
    "out": ["attention.output.dense"],
    "norm1": ["attention.output.LayerNorm"],
    "up": ["intermediate.dense"],
    "down": ["output.dense"],
    "norm2": ["output.LayerNorm"],
}
# Tensors of a file that the encoder does not use: the pooler, heads, position ids, a step count.
IGNORED = ("pooler.", "cls.", "classifier.", "qa_outputs.", "dropout.", "embeddings.position_ids",
           "dense.", "global_step")


def name_table(config: BertConfig) -> dict[str, list[str]]:
    """Our parameter's name -> the file's names of its parts, which are stacked."""
    table = dict(EMBEDDING_NAMES)
    for i in range(config.num_hidden_layers):
        for ours, parts in LAYER_NAMES.items():
            for kind in ("weight", "bias"):
                theirs = [f"encoder.layer.{i}.{part}.{kind}" for part in parts]
                table[f"layers.{i}.{ours}.{kind}"] = theirs
    return table


def to_our_names(tensors: dict[str, Tensor], config: BertConfig) -> dict[str, Tensor]:
    """A file's tensors -> a state dict for Bert(config), in fp32. Names may start with "bert.",
    and LayerNorm may have gamma and beta. Raises ValueError where a tensor is missing, or is
    neither used nor ignored by name."""
    found = {}
    for name, tensor in tensors.items():
        name = str(name).removeprefix("bert.")
        name = name.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")
        if not name.startswith(IGNORED):
            found[name] = tensor
    table = name_table(config)
    expected = set().union(*table.values())
    missing, unknown = sorted(expected - found.keys()), sorted(found.keys() - expected)
    if missing + unknown:
        raise ValueError(f"{len(missing)} tensors are missing, first {missing[:1]}; "
                         f"{len(unknown)} are unknown, first {unknown[:1]}")
    return {ours: torch.cat([found[name].float() for name in theirs])
            for ours, theirs in table.items()}


def read_config(path: Path) -> BertConfig:
    """config.json of a weights folder. Values that this code does not read are left out."""
    values = json.loads(path.read_text(encoding="utf-8"))
    supported = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute",
                 "is_decoder": False, "add_cross_attention": False}
    for name, value in supported.items():
        if values.get(name, value) != value:
            raise ValueError(f"{path}: {name} is {values[name]!r}, but this code supports only "
                             f"{value!r}: use other weights")
    return BertConfig(**{name: values[name] for name in vars(BertConfig()) if name in values})


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors or of pytorch_model.bin, whose pickled code is not run."""
    path = folder / "model.safetensors"
    if path.is_file():
        return safetensors.torch.load(path.read_bytes())
    return torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
