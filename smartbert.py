"""SmartBERT: a BERT that passes by layers it does not need and stops as soon as it is sure.

Hu, Zhu, Li, Tang: "SmartBERT: A Promotion of Dynamic Early Exiting Mechanism for Accelerating BERT Inference",
IJCAI 2023. Every layer gets two small companions: a *skipping gate* that reads what enters the layer and says whether
to run it for this example, and an *exit head* that reads what leaves it and says whether the answer is already sure.

This file follows the paper's order: gate and exit head, hard weight, cross-layer contrast, the losses of the two training
phases, dynamic inference, its cost. "Release" means the authors' code, github HuBoren99/SmartBert, and SmartBert.py:98 is
a line of its models/SmartBert.py, never of this file.

Dimensions: B rows (examples), S tokens, H hidden size, W width of gates and heads, L layers, C classes, N rows of a pool
(the examples that one call of `infer` gets).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert import Bert, mask_or_none


# --- Skipping gate and exit head --------------------------------------------------------------------------------------

def width(hidden_size: int) -> int:
    """W = H / 6, in steps of 8: 128 for bert-base, as in the release, and the same share of a layer at any size
    (README, deviation 12); at least 16, or four attention heads would have too few numbers each."""
    return max(16, 8 * round(hidden_size / 48))


class ClsAttention(nn.Module):
    """The body that gates and heads share: shrink the tokens to W, then look at them from [CLS].

    The release computes the attention of every token (models/MultiheadAttention.py:33-66) and then reads [CLS] alone
    (models/Gate.py:19). The queries of the other tokens change nothing, so only [CLS] asks here: S times fewer scores.
    """

    def __init__(self, hidden_size: int, width: int, heads: int, dropout: float):
        super().__init__()
        self.inner = nn.Linear(hidden_size, width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.heads, self.dropout = heads, dropout

    def forward(self, h: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """h (B, S, H), mask (B, S) or None -> what [CLS] saw (B, W), the shrunken tokens z (B, S, W)."""
        B, S, _ = h.shape
        z = torch.tanh(self.inner(h))                                                   # z = tanh(W_in h)
        q = self.query(z[:, :1]).view(B, 1, self.heads, -1).transpose(1, 2)             # (B, heads, 1, W / heads)
        k, v = self.key_value(z).view(B, S, 2, self.heads, -1).permute(2, 0, 3, 1, 4)   # (B, heads, S, W / heads)
        a = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if mask is None else mask[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0)                           # (B, heads, 1, W / heads)
        return a.transpose(1, 2).reshape(B, -1), z


class Gate(nn.Module):
    """g = P(skip this layer), read from what would enter it (models/Gate.py)."""

    def __init__(self, hidden_size: int, width: int, dropout: float, bias: float):
        super().__init__()
        self.body = ClsAttention(hidden_size, width, heads=2, dropout=dropout)
        self.out = nn.Linear(width, 1)
        nn.init.constant_(self.out.bias, bias)      # below 0: layers run at first (README, deviation 11)

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """h (B, S, H) -> g (B,)."""
        a, _ = self.body(h, mask)
        return torch.sigmoid(self.out(a)).squeeze(1)                                    # g = sigmoid(w a + b)


def projection(inputs: int, width: int) -> nn.Sequential:
    """Where the contrast compares tokens (models/SmartBert.py:22-27): a space of its own, so that neighbouring layers need
    not be made alike for it."""
    return nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, width))


class ExitHead(nn.Module):
    """The task's classifier after one layer, as small as a gate (models/Classifier.py)."""

    def __init__(self, hidden_size: int, width: int, classes: int, dropout: float):
        super().__init__()
        self.body = ClsAttention(hidden_size, width, heads=4, dropout=dropout)
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, classes)
        self.project = projection(width, width)     # phase 2's contrast only; not run at inference

    def forward(self, h: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """h (B, S, H) -> logits (B, C), the shrunken tokens z (B, S, W)."""
        a, z = self.body(h, mask)
        return self.out(torch.tanh(self.hidden(a))), z


class SmartBert(nn.Module):
    """BERT with a gate before and an exit head after each layer.

    bert: the encoder, used as it is; classes: C; gate_bias: where the gates start (0 is the release's even chance).
    """

    def __init__(self, bert: Bert, classes: int, gate_bias: float = -2.0):
        super().__init__()
        config = bert.config
        H, W, L = config.hidden_size, width(config.hidden_size), config.num_hidden_layers
        dropout = config.attention_probs_dropout_prob
        self.bert = bert
        self.gates = nn.ModuleList(Gate(H, W, dropout, gate_bias) for _ in range(L))
        self.heads = nn.ModuleList(ExitHead(H, W, classes, dropout) for _ in range(L))
        self.projections = nn.ModuleList(projection(H, W) for _ in range(L))             # phase 1's contrast
        for name, p in self.named_parameters():
            if not name.startswith("bert.") and name.endswith("weight") and p.dim() > 1:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)  # at the scale of what comes in (deviation 13)

    def forward(self, ids: Tensor, segment_ids: Tensor, mask: Tensor) -> Tensor:
        """Plain BERT: every layer, the last head. ids, segment_ids, mask (B, S) -> logits (B, C)."""
        logits, _ = self.heads[-1](self.bert(ids, segment_ids, mask)[-1], mask_or_none(mask))
        return logits


# --- Hard weight ------------------------------------------------------------------------------------------------------

def hard_weight(g: Tensor) -> Tensor:
    """1 where the layer is skipped, 0 where it runs; backwards as if nothing had been rounded (SmartBert.py:98-100).

    `hard` is a constant to autograd; the bracket is 0 in value and has the gradient of the soft g (a straight-through
    estimator). Written so, not as g + (hard - g).detach(), the value is exactly 0 or 1, with no rounding error.
    """
    hard = (g >= 0.5).to(g.dtype)
    return hard + (g - g.detach())


# --- Cross-layer contrast ---------------------------------------------------------------------------------------------

def contrast(u: Tensor, v: Tensor, mask: Tensor, tau: float) -> Tensor:
    """The loss of telling a token in the next layer from the others of its example (SmartBert.py:112-122).

        contrast = mean over tokens t of  -log( s[t,t] / sum_t' s[t,t'] ),   s[t,t'] = exp(cos(u_t, v_t') / tau)

    u, v (B, S, W): the tokens of two neighbouring layers, projected. mask (B, S): padding is neither a token to be
    found nor a negative (the release counts it: README, deviation 1). Returns a scalar.
    """
    log_s = F.normalize(u, dim=-1) @ F.normalize(v, dim=-1).transpose(1, 2) / tau       # (B, S, S)
    log_s = log_s.masked_fill(~mask[:, None, :], -torch.inf)
    losses = log_s.logsumexp(dim=-1) - log_s.diagonal(dim1=1, dim2=2)                   # (B, S)
    return losses[mask].mean()


# --- Phase 1: backbone, gates and last head ---------------------------------------------------------------------------

def gated_forward(model: SmartBert, ids: Tensor, segment_ids: Tensor, mask: Tensor, hard: bool, depth: int | None = None) -> tuple:
    """Run the layers (all, or layers[:depth]) and mix its output with its input as the gate says (SmartBert.py:91-103).

        h_i = (1 - g_i) * layer_i(h_{i-1}) + g_i * h_{i-1}

    Also a skipped layer is run here: its gate learns from what the layer would have changed.
    Returns inputs [h_0 .. h_{L-1}], raw outputs [layer_i(h_{i-1})], h_L (each (B, S, H)),
    soft gates (B, L) and the gates as they were used (B, L).
    """
    h, m = model.bert.embeddings(ids, segment_ids), mask_or_none(mask)
    inputs, outputs, soft, used = [], [], [], []
    for gate, layer in zip(model.gates[:depth], model.bert.layers[:depth]):
        inputs.append(h)
        outputs.append(layer(h, m))
        soft.append(gate(h, m))                                                         # (B,)
        used.append(hard_weight(soft[-1]) if hard else soft[-1])
        g = used[-1][:, None, None]                                                     # (B, 1, 1)
        h = (1 - g) * outputs[-1] + g * h
    return inputs, outputs, h, torch.stack(soft, 1), torch.stack(used, 1)


def skip_penalty(soft: Tensor, used: Tensor, lam: float = 0.0, budget: float = 1.0,
                 budget_weight: float = 0.0) -> Tensor:
    """What drives the gates to skip, from soft gates and gates as used (each (B, L)) to a scalar.

        paper:  lambda / sum_i mean_batch(g_i)               small when layers are skipped (SmartBert.py:110)
        ours:   weight * max(0, share of layers run - budget)^2    0 once no more layers run than asked for

    The paper's sum stays soft when the gates are hard (SmartBert.py:96); ours counts what runs.
    """
    paper = lam / soft.mean(0).sum() if lam else soft.new_zeros(())
    ours = budget_weight * F.relu((1 - used).mean() - budget) ** 2
    return paper + ours


@dataclass
class Phase1:
    """What phase 1's loss is made of: scalars, and run: 1 - g as used, for each row and layer (B, L)."""
    loss: Tensor
    task: Tensor
    penalty: Tensor
    contrast: Tensor
    run: Tensor


def phase1_loss(model: SmartBert, ids: Tensor, segment_ids: Tensor, mask: Tensor, labels: Tensor, *,
                hard: bool, penalty: dict, eta1: float = 0.01, tau1: float = 0.5) -> Phase1:
    """loss1 = (1 - eta1) * ( CE(last head) + penalty ) + eta1 * sum_i contrast(u_i, u_{i+1})

    (SmartBert.py:105-123.) u_i = project_i(h_{i-1}): the contrast sees what enters the layers, L - 1 pairs
    of neighbours, and is their sum. penalty: lam, budget and budget_weight of `skip_penalty`; {} is none.
    ids, segment_ids, mask (B, S), labels (B,).
    """
    inputs, _, h, soft, used = gated_forward(model, ids, segment_ids, mask, hard)
    logits, _ = model.heads[-1](h, mask_or_none(mask))
    task = F.cross_entropy(logits, labels)
    penalised = skip_penalty(soft, used, **penalty)
    contrasted = task.new_zeros(())
    if eta1:
        u = [project(x) for project, x in zip(model.projections, inputs)]               # L tensors (B, S, W)
        contrasted = sum(contrast(a, b, mask, tau1) for a, b in zip(u, u[1:]))
    loss = (1 - eta1) * (task + penalised) + eta1 * contrasted
    return Phase1(loss, task, penalised, contrasted, 1 - used)


# --- Phase 2: the exit heads ------------------------------------------------------------------------------------------

def phase2_loss(model: SmartBert, ids: Tensor, segment_ids: Tensor, mask: Tensor, labels: Tensor, *,
                eta2: float = 0.05, tau2: float = 0.55) -> Tensor:
    """loss2 = (1 - eta2) * sum_i CE(head_i) + eta2 * mean_i contrast(u_i, u_{i+1})   (SmartBert.py:125-155)

    For heads 1 .. L-1; u_i = project_i(z_i), the tokens as head i has shrunk them. Unlike phase 1's it is a mean over pairs.
    Walks the hard-gated path with everything but these heads frozen, and shows each head its layer's raw output, also
    where the layer was skipped. ids, segment_ids, mask (B, S), labels (B,). Returns a scalar.
    """
    with torch.no_grad():
        _, outputs, _, _, _ = gated_forward(model, ids, segment_ids, mask, hard=True, depth=-1)
    m = mask_or_none(mask)
    results = [head(h, m) for head, h in zip(model.heads[:-1], outputs)]
    task = sum(F.cross_entropy(logits, labels) for logits, _ in results)
    if not eta2 or len(results) < 2:
        return (1 - eta2) * task
    u = [head.project(z) for head, (_, z) in zip(model.heads, results)]                 # L - 1 tensors (B, S, W)
    contrasted = sum(contrast(a, b, mask, tau2) for a, b in zip(u, u[1:])) / (len(u) - 1)
    return (1 - eta2) * task + eta2 * contrasted


# --- When to leave ------------------------------------------------------------------------------------------------------

# A criterion gets, for the n rows that have just met head i, history (n, i, C): the logits of heads 1 .. i, NaN where a row
# skipped that layer (head i's own are always there); and rows (n,), their places in the pool. It gives (n,) bool: True
# leaves. SmartBERT's is entropy; the others are its family.
Criterion = Callable[[Tensor, Tensor], Tensor]


def entropy(logits: Tensor) -> Tensor:
    """Natural-log entropy of softmax(logits), (..., C) -> (...); 0 is certain, ln C is a guess (SmartBert.py:174-176)."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def entropy_below(threshold: float) -> Criterion:
    """Leave when the entropy is strictly below the threshold (SmartBERT as DeeBERT, Xin et al. 2020)."""
    return lambda history, rows: entropy(history[:, -1]) < threshold


def probability_above(threshold: float) -> Criterion:
    """Leave when the likeliest class is likelier than the threshold (The Right Tool, Schwartz et al. 2020)."""
    return lambda history, rows: history[:, -1].softmax(-1).amax(-1) > threshold


def patience(times: int) -> Criterion:
    """Leave when a head is the `times`-th in a row to repeat its predecessor's answer (PABEE, Zhou et al. 2020). A head
    that was passed by has no say."""
    def leave(history: Tensor, rows: Tensor) -> Tensor:
        agreed = torch.zeros(len(history), dtype=torch.long, device=history.device)
        last = torch.full_like(agreed, -1)
        for logits in history.unbind(1):                                                # (n, C), layer after layer
            met, answer = ~logits[:, 0].isnan(), logits.argmax(-1)
            agreed = torch.where(met, torch.where(answer == last, agreed + 1, 0), agreed)
            last = torch.where(met, answer, last)
        return agreed >= times
    return leave


def fixed_layer(layer: int) -> Criterion:
    """Everybody leaves at the first head from this layer (from 1) on: a shallower BERT. It would not ask the heads before,
    but `infer` does; who compares costs takes them out (eval.measure)."""
    return lambda history, rows: torch.full_like(rows, history.shape[1] >= layer, dtype=torch.bool)


def first_correct(labels: Tensor) -> Criterion:
    """The oracle: leave at the first head that is right. It looks at the labels (N,) of the pool, so it is no criterion
    but a bound: with these heads none is right more often. Where no head is right it runs to the end, so its cost is none."""
    return lambda history, rows: history[:, -1].argmax(-1) == labels[rows]


# --- Dynamic inference: one example -----------------------------------------------------------------------------------

@torch.inference_mode()
def infer_one(model: SmartBert, ids: Tensor, segment_ids: Tensor, threshold: float, skip: bool = True) -> tuple:
    """SmartBERT as the paper tells it: one example, one layer after the other (SmartBert.py:160-183).

    ids, segment_ids (1, S) without padding; threshold in nats; skip=False leaves the gates out.
    Returns logits (1, C), the layers that ran and the layer at which the example left, counted from 1.
    """
    L, ran = len(model.bert.layers), []
    h = model.bert.embeddings(ids, segment_ids)                                         # h_0 (1, S, H)
    for i in range(L):
        # Skipping gate: g_i = sigmoid(w a + b), the probability that this example skips layer i.
        # Hard weight: h_i = h_{i-1} where g_i >= 1/2, and then there is nothing to compute.
        if skip and model.gates[i](h, None) >= 0.5:
            continue
        h = model.bert.layers[i](h, None)                                               # h_i = layer_i(h_{i-1})
        ran.append(i + 1)
        if i == L - 1:
            break
        # Exit head: leave where the entropy -sum_c p_c ln p_c of its answer is below the threshold.
        logits, _ = model.heads[i](h, None)                                             # (1, C)
        if entropy(logits) < threshold:
            return logits, ran, i + 1
    # Never sure: the last head answers, also where the last layer was skipped.
    logits, _ = model.heads[-1](h, None)
    return logits, ran, L


# --- Dynamic inference: the same for many at once ---------------------------------------------------------------------

@dataclass
class Outcome:
    """What became of a pool of N rows, in the order they were given. Layers count from 1."""
    logits: Tensor      # (N, C)
    ran: Tensor         # (N, L) bool: the layers each row ran
    exit: Tensor        # (N,) long: the layer at which it left; L for those who reached the end
    gates: Tensor       # (N, L): the gates it asked, NaN elsewhere
    history: Tensor     # (N, L, C): the answers of the heads it met, NaN elsewhere


@torch.inference_mode()
def infer(model: SmartBert, ids: Tensor, segment_ids: Tensor, mask: Tensor, *, skip: bool = True,
          criterion: Criterion | None = None, batch_tokens: int = 1024) -> Outcome:
    """Dynamic inference on a whole pool: at each layer only the rows that run it are computed.

    A batch that shrinks as its rows skip and leave soon computes two or three rows at a time, and the processor idles.
    So the rows of a pool wait in front of a layer, and those that run it pass in full batches of like length: full means
    batch_tokens, so that long rows, of which few are alike, go in small batches with little padding.

    ids, segment_ids, mask (N, S), best sorted by length: a batch is cut to its longest row. skip: ask the gates; criterion: the
    exit criterion, asked after every layer that ran but the last, or None for no exits. Who is never sure takes the last head,
    also when the last layer was skipped (SmartBert.py:160-183; there one row at a time). The model must be in eval mode.
    """
    N, L, device = len(ids), len(model.bert.layers), ids.device
    lengths = mask.sum(1).tolist()
    ran = torch.zeros(N, L, dtype=torch.bool, device=device)
    exits = torch.full((N,), L, device=device)
    gates = torch.full((N, L), torch.nan, device=device)
    history = torch.full((N, L, model.heads[-1].out.out_features), torch.nan, device=device)

    def in_batches(rows: Tensor):
        """rows (n,) of the pool -> pieces whose tokens, padding and all, fit batch_tokens (or of one row): the rows, the
        length of the longest, their mask."""
        order, start, longest = rows.tolist(), 0, 0
        for end, row in enumerate(order):
            if end > start and max(longest, lengths[row]) * (end - start + 1) > batch_tokens:
                yield rows[start:end], longest, mask_or_none(mask[rows[start:end], :longest])
                start, longest = end, 0
            longest = max(longest, lengths[row])
        if order:
            yield rows[start:], longest, mask_or_none(mask[rows[start:], :longest])

    waiting = torch.arange(N, device=device)
    # zeros: what stands in padding gets no weight in attention, but no weight times NaN would still be NaN
    h = torch.zeros(*ids.shape, model.bert.config.hidden_size, device=device)          # (N, S, H)
    for rows, s, _ in in_batches(waiting):
        h[rows, :s] = model.bert.embeddings(ids[rows, :s], segment_ids[rows, :s])
    for i, layer in enumerate(model.bert.layers):
        running = waiting
        if skip and len(waiting):
            g = torch.cat([model.gates[i](h[rows, :s], m) for rows, s, m in in_batches(waiting)])
            gates[waiting, i] = g.float()
            running = waiting[g < 0.5]
        for rows, s, m in in_batches(running):
            out = layer(h[rows, :s], m)                                                 # (n, s, H)
            h[rows, :s] = out
            ran[rows, i] = True
            if criterion is not None and i < L - 1:
                history[rows, i] = model.heads[i](out, m)[0].float()
                leaving = criterion(history[rows, :i + 1], rows)                            # (n,)
                exits[rows[leaving]] = i + 1                                            # layers count from 1
        waiting = waiting[exits[waiting] == L]
    for rows, s, m in in_batches(waiting):                  # never sure, or no exits: the last head
        history[rows, -1] = model.heads[-1](h[rows, :s], m)[0].float()
    return Outcome(history[torch.arange(N, device=device), exits - 1], ran, exits, gates, history)


# --- Cost -------------------------------------------------------------------------------------------------------------

def layer_flops(model: SmartBert, tokens: Tensor) -> Tensor:
    """FLOPs of one layer on rows of so many real tokens, (N,) -> (N,). A multiply-add is two.

        2 S (4 H^2 + 2 H I) + 4 S^2 H   which is   24 S H^2 + 4 S^2 H   where I = 4H
    """
    H, I = model.bert.config.hidden_size, model.bert.config.intermediate_size
    return 2 * tokens * (4 * H * H + 2 * H * I) + 4 * tokens**2 * H


def auxiliary_flops(module: Gate | ExitHead, tokens: Tensor) -> Tensor:
    """FLOPs of one gate or one exit head, (N,) -> (N,): shrink, keys and values, one query and its attention, output."""
    W, H = module.body.inner.weight.shape
    outputs = 2 * W * module.out.out_features + (2 * W * W if isinstance(module, ExitHead) else 0)
    return 2 * tokens * (H * W + 2 * W * W) + 2 * W * W + 4 * tokens * W + outputs


def flops(model: SmartBert, tokens: Tensor, outcome: Outcome) -> Tensor:
    """FLOPs of each row of a pool as it went: layers run, gates asked, heads met. tokens (N,) real -> (N,)."""
    gates, heads = (~outcome.gates.isnan()).sum(1), (~outcome.history[:, :, 0].isnan()).sum(1)
    return (layer_flops(model, tokens) * outcome.ran.sum(1) + auxiliary_flops(model.gates[0], tokens) * gates
            + auxiliary_flops(model.heads[0], tokens) * heads)


def plain_flops(model: SmartBert, tokens: Tensor) -> Tensor:
    """FLOPs of plain BERT on rows of so many real tokens, (N,) -> (N,)."""
    return layer_flops(model, tokens) * len(model.bert.layers) + auxiliary_flops(model.heads[-1], tokens)
