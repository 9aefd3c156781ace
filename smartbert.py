"""SmartBERT: a BERT that skips the layers it does not need and stops as soon as it is sure.

Hu, Zhu, Li, Tang: "SmartBERT: A Promotion of Dynamic Early Exiting Mechanism for Accelerating BERT
Inference", IJCAI 2023. Every layer gets two small modules. A *skipping gate* reads what enters the
layer and decides whether this example runs it. An *exit head* reads what leaves the layer and
decides whether the answer is already certain.

This file follows the paper: gate and exit head, hard weight, inference of one example, contrast,
the losses of the two training phases, inference of many examples, cost. "Release" means the
authors' code (github HuBoren99/SmartBert); SmartBert.py:98 is a line of its models/SmartBert.py.

Dimensions: B rows (examples), S tokens, H hidden size, W width of gates and heads, L layers,
C classes, N rows of a pool (the examples that one call of `infer` gets), n some of these rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert import Bert, mask_or_none


# --- Skipping gate and exit head ----------------------------------------------------------------

def width(hidden_size: int) -> int:
    """W = H / 6, rounded to a multiple of 8: 128 for bert-base, as in the release, and the same
    share of a layer at any size (README, deviation 12). At least 16, for four attention heads."""
    return max(16, 8 * round(hidden_size / 48))


class ClsAttention(nn.Module):
    """The body that gates and heads share: shrink the tokens to W, then let [CLS] look at them.

    The release computes the attention of every token (models/MultiheadAttention.py:33-66) and then
    reads [CLS] alone (models/Gate.py:19). The other queries change nothing, so only [CLS] asks
    here.
    """

    def __init__(self, hidden_size: int, width: int, heads: int, dropout: float):
        super().__init__()
        self.inner = nn.Linear(hidden_size, width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.heads, self.dropout = heads, dropout

    def forward(self, h: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """h (B, S, H), mask (B, S) or None -> what [CLS] saw (B, W), the tokens z (B, S, W)."""
        B, S, _ = h.shape
        z = torch.tanh(self.inner(h))                                       # z = tanh(W_in h)
        # q (B, heads, 1, W / heads); k, v (B, heads, S, W / heads)
        q = self.query(z[:, :1]).view(B, 1, self.heads, -1).transpose(1, 2)
        k, v = self.key_value(z).view(B, S, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        mask = None if mask is None else mask[:, None, None, :]             # (B, 1, 1, S)
        p = self.dropout if self.training else 0.0
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        return a.transpose(1, 2).reshape(B, -1), z


class Gate(nn.Module):
    """g = P(skip this layer), from what would enter the layer (models/Gate.py)."""

    def __init__(self, hidden_size: int, width: int, dropout: float, bias: float):
        super().__init__()
        self.body = ClsAttention(hidden_size, width, heads=2, dropout=dropout)
        self.out = nn.Linear(width, 1)
        nn.init.constant_(self.out.bias, bias)      # below 0: layers run at first (deviation 11)

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """h (B, S, H) -> g (B,)."""
        a, _ = self.body(h, mask)
        return torch.sigmoid(self.out(a)).squeeze(1)                        # g = sigmoid(w a + b)


def projection(inputs: int, width: int) -> nn.Sequential:
    """To the space in which the contrast compares tokens (models/SmartBert.py:21-26), so that the
    hidden states of neighbouring layers need not become alike."""
    return nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width), nn.Tanh(),
                         nn.Linear(width, width))


class ExitHead(nn.Module):
    """The task's classifier after one layer, as small as a gate (models/Classifier.py)."""

    def __init__(self, hidden_size: int, width: int, classes: int, dropout: float):
        super().__init__()
        self.body = ClsAttention(hidden_size, width, heads=4, dropout=dropout)
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, classes)
        self.project = projection(width, width)     # for phase 2's contrast; not run at inference

    def forward(self, h: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """h (B, S, H) -> logits (B, C), the shrunken tokens z (B, S, W)."""
        a, z = self.body(h, mask)
        return self.out(torch.tanh(self.hidden(a))), z


class SmartBert(nn.Module):
    """BERT with a gate before each layer and an exit head after it.

    bert: the encoder; classes: C; gate_bias: where the gates start (0 is the release's even
    chance).
    """

    def __init__(self, bert: Bert, classes: int, gate_bias: float = -2.0):
        super().__init__()
        config = bert.config
        H, W, L = config.hidden_size, width(config.hidden_size), config.num_hidden_layers
        dropout = config.attention_probs_dropout_prob
        self.bert = bert
        self.gates = nn.ModuleList(Gate(H, W, dropout, gate_bias) for _ in range(L))
        self.heads = nn.ModuleList(ExitHead(H, W, classes, dropout) for _ in range(L))
        self.projections = nn.ModuleList(projection(H, W) for _ in range(L))    # for phase 1
        for name, p in self.named_parameters():
            if not name.startswith("bert.") and name.endswith("weight") and p.dim() > 1:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)  # keeps the scale (deviation 13)

    def forward(self, ids: Tensor, segment_ids: Tensor, mask: Tensor) -> Tensor:
        """Plain BERT: every layer, then the last head. ids, ... (B, S) -> logits (B, C)."""
        h = self.bert(ids, segment_ids, mask)[-1]                           # (B, S, H)
        logits, _ = self.heads[-1](h, mask_or_none(mask))
        return logits


# --- Hard weight --------------------------------------------------------------------------------

def hard_weight(g: Tensor) -> Tensor:
    """1 where the layer is skipped, 0 where it runs; the gradient is that of g
    (SmartBert.py:98-100).

    A straight-through estimator: `hard` is a constant to autograd; the bracket is 0 in value and
    has the gradient of the soft g. In this order the value is exactly 0 or 1, without a rounding
    error.
    """
    hard = (g >= 0.5).to(g.dtype)
    return hard + (g - g.detach())


# --- Dynamic inference: one example -------------------------------------------------------------

def entropy(logits: Tensor) -> Tensor:
    """-sum_c p_c ln p_c of p = softmax(logits), in nats: (..., C) -> (...). 0 is certain, ln C is
    a guess (SmartBert.py:174-176)."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@torch.inference_mode()
def infer_one(model: SmartBert, ids: Tensor, segment_ids: Tensor, threshold: float,
              skip: bool = True) -> tuple[Tensor, list[int], int]:
    """SmartBERT as the paper describes it: one example, one layer after another
    (SmartBert.py:160-183).

    ids, segment_ids (1, S) without padding; threshold in nats; skip=False leaves the gates out.
    Returns logits (1, C), the layers that ran and the layer of the exit, counted from 1.
    """
    L, ran = len(model.bert.layers), []
    h = model.bert.embeddings(ids, segment_ids)                             # h_0 (1, S, H)
    for i in range(L):
        # Skipping gate: g_i = sigmoid(w a + b) is the probability of skipping layer i.
        # Hard weight: h_i = h_{i-1} where g_i >= 1/2; then there is nothing to compute.
        if skip and model.gates[i](h, None) >= 0.5:
            continue
        h = model.bert.layers[i](h, None)                             # h_i = layer_i(h_{i-1})
        ran.append(i + 1)
        if i == L - 1:
            break
        # Exit head: stop where the entropy of its answer is below the threshold.
        logits, _ = model.heads[i](h, None)                                 # (1, C)
        if entropy(logits) < threshold:
            return logits, ran, i + 1
    # No early exit: the last head answers, also where the last layer was skipped.
    logits, _ = model.heads[-1](h, None)
    return logits, ran, L


# --- Cross-layer contrast -----------------------------------------------------------------------

def contrast(u: Tensor, v: Tensor, mask: Tensor, tau: float) -> Tensor:
    """The loss of finding a token of one layer among the tokens of the next
    (SmartBert.py:112-122).

        contrast = mean over tokens t of  -log( s[t,t] / sum_t' s[t,t'] )
        s[t,t']  = exp( cos(u_t, v_t') / tau )

    u, v (B, S, W): the tokens of two neighbouring layers, projected. mask (B, S): padding is
    neither a token to be found nor a negative (the release counts it: deviation 1). Returns a
    scalar.
    """
    log_s = F.normalize(u, dim=-1) @ F.normalize(v, dim=-1).transpose(1, 2) / tau     # (B, S, S)
    log_s = log_s.masked_fill(~mask[:, None, :], -torch.inf)
    losses = log_s.logsumexp(dim=-1) - log_s.diagonal(dim1=1, dim2=2)       # (B, S)
    return losses[mask].mean()


# --- Phase 1: encoder, gates and last head ------------------------------------------------------

def gated_forward(model: SmartBert, ids: Tensor, segment_ids: Tensor, mask: Tensor, hard: bool,
                  depth: int | None = None) -> tuple:
    """Run all layers, or layers[:depth], and mix each output with its input (SmartBert.py:91-103).

        h_i = (1 - g_i) * layer_i(h_{i-1}) + g_i * h_{i-1}

    A skipped layer runs here too: its gate learns from what the layer would have changed.
    Returns inputs [h_0 .. h_{L-1}], raw outputs [layer_i(h_{i-1})], h_L (each (B, S, H)),
    soft gates (B, L) and the gates as they were used (B, L).
    """
    h, m = model.bert.embeddings(ids, segment_ids), mask_or_none(mask)
    inputs, outputs, soft, used = [], [], [], []
    for gate, layer in zip(model.gates[:depth], model.bert.layers[:depth]):
        inputs.append(h)
        outputs.append(layer(h, m))
        soft.append(gate(h, m))                                             # (B,)
        used.append(hard_weight(soft[-1]) if hard else soft[-1])
        g = used[-1][:, None, None]                                         # (B, 1, 1)
        h = (1 - g) * outputs[-1] + g * h
    return inputs, outputs, h, torch.stack(soft, 1), torch.stack(used, 1)


def skip_penalty(soft: Tensor, used: Tensor, lam: float = 0.0, budget: float = 1.0,
                 budget_weight: float = 0.0) -> Tensor:
    """What makes the gates skip. soft gates and gates as used, each (B, L) -> a scalar.

        paper:  lambda / sum_i mean_batch(g_i)        smaller with more skipping (SmartBert.py:110)
        ours:   weight * max(0, share of layers run - budget)^2     0 within the budget

    The paper's sum stays soft when the gates are hard (SmartBert.py:96); ours counts what runs.
    """
    paper = lam / soft.mean(0).sum() if lam else soft.new_zeros(())
    ours = budget_weight * F.relu((1 - used).mean() - budget) ** 2
    return paper + ours


@dataclass
class Phase1:
    """Phase 1's loss and its parts (scalars); run (B, L): 1 - g as used, of each row and layer."""
    loss: Tensor
    task: Tensor
    penalty: Tensor
    contrast: Tensor
    run: Tensor


def phase1_loss(model: SmartBert, ids: Tensor, segment_ids: Tensor, mask: Tensor, labels: Tensor,
                *, hard: bool, penalty: dict, eta1: float = 0.01, tau1: float = 0.5) -> Phase1:
    """loss1 = (1 - eta1) * ( CE(last head) + penalty ) + eta1 * sum_i contrast(u_i, u_{i+1})

    (SmartBert.py:105-123.) u_i = project_i(h_{i-1}): the contrast sees what enters the layers, L -
    1 pairs of neighbours, and is their sum. penalty: lam, budget, budget_weight of `skip_penalty`.
    ids, segment_ids, mask (B, S), labels (B,).
    """
    inputs, _, h, soft, used = gated_forward(model, ids, segment_ids, mask, hard)
    logits, _ = model.heads[-1](h, mask_or_none(mask))
    task = F.cross_entropy(logits, labels)
    penalised = skip_penalty(soft, used, **penalty)
    contrasted = task.new_zeros(())
    if eta1:
        u = [project(x) for project, x in zip(model.projections, inputs)]   # L tensors (B, S, W)
        contrasted = sum(contrast(a, b, mask, tau1) for a, b in zip(u, u[1:]))
    loss = (1 - eta1) * (task + penalised) + eta1 * contrasted
    return Phase1(loss, task, penalised, contrasted, 1 - used)


# --- Phase 2: the exit heads --------------------------------------------------------------------

def phase2_loss(model: SmartBert, ids: Tensor, segment_ids: Tensor, mask: Tensor, labels: Tensor,
                *, eta2: float = 0.05, tau2: float = 0.55) -> Tensor:
    """loss2 = (1 - eta2) * sum_i CE(head_i) + eta2 * mean_i contrast(u_i, u_{i+1})

    (SmartBert.py:125-155.) For heads 1 .. L-1; u_i = project_i(z_i), the tokens as head i has
    shrunk them. Unlike phase 1's, this contrast is a mean over pairs. The path is the hard-gated
    one and all but these heads is frozen. Each head sees the raw output of its layer, even where
    it was skipped. ids, segment_ids, mask (B, S), labels (B,). Returns a scalar.
    """
    with torch.no_grad():
        _, outputs, _, _, _ = gated_forward(model, ids, segment_ids, mask, hard=True, depth=-1)
    m = mask_or_none(mask)
    results = [head(h, m) for head, h in zip(model.heads[:-1], outputs)]
    task = sum(F.cross_entropy(logits, labels) for logits, _ in results)
    if not eta2 or len(results) < 2:
        return (1 - eta2) * task
    u = [head.project(z) for head, (_, z) in zip(model.heads, results)]     # each (B, S, W)
    contrasted = sum(contrast(a, b, mask, tau2) for a, b in zip(u, u[1:])) / (len(u) - 1)
    return (1 - eta2) * task + eta2 * contrasted


# --- Exit criteria ------------------------------------------------------------------------------

# An exit criterion decides for the n rows that have just met head i. It gets history (n, i, C),
# the logits of heads 1 .. i, with NaN where a row skipped the layer (never at head i itself), and
# rows (n,), their places in the pool. It returns (n,) bool: True exits. SmartBERT's is the
# entropy.
Criterion = Callable[[Tensor, Tensor], Tensor]


def entropy_below(threshold: float) -> Criterion:
    """Exit when the entropy is strictly below the threshold (DeeBERT, Xin et al. 2020)."""
    return lambda history, rows: entropy(history[:, -1]) < threshold


def probability_above(threshold: float) -> Criterion:
    """Exit when the highest probability is above the threshold (Schwartz et al. 2020)."""
    return lambda history, rows: history[:, -1].softmax(-1).amax(-1) > threshold


def patience(times: int) -> Criterion:
    """Exit when `times` heads in a row have repeated their predecessor's answer (PABEE, Zhou et
    al. 2020). The head of a skipped layer does not count."""
    def criterion(history: Tensor, rows: Tensor) -> Tensor:
        agreed = torch.zeros(len(history), dtype=torch.long, device=history.device)
        last = torch.full_like(agreed, -1)
        for logits in history.unbind(1):                                    # layer by layer (n, C)
            met, answer = ~logits[:, 0].isnan(), logits.argmax(-1)
            agreed = torch.where(met, torch.where(answer == last, agreed + 1, 0), agreed)
            last = torch.where(met, answer, last)
        return agreed >= times
    return criterion


def fixed_layer(layer: int) -> Criterion:
    """Every row exits at the first head from this layer (from 1) on: a shallower BERT. It would
    not ask the heads before; whoever compares costs leaves those out (eval.measure)."""
    return lambda history, rows: torch.full_like(rows, history.shape[1] >= layer, dtype=torch.bool)


def first_correct(labels: Tensor) -> Criterion:
    """The oracle: exit at the first head that is right. It sees the labels (N,) of the pool, so it
    is not a method but a bound: no criterion over these heads is right more often. Where no head
    is right it runs to the end, so its cost is not a bound."""
    return lambda history, rows: history[:, -1].argmax(-1) == labels[rows]


# --- Dynamic inference: many examples -----------------------------------------------------------

@dataclass
class Outcome:
    """What happened to the N rows of a pool, in their given order. Layers count from 1."""
    logits: Tensor      # (N, C)
    ran: Tensor         # (N, L) bool: the layers that each row ran
    exit: Tensor        # (N,) long: the layer of its exit; L for a row that reached the end
    gates: Tensor       # (N, L): the gates that were asked, NaN elsewhere
    history: Tensor     # (N, L, C): the answers of the heads that were asked, NaN elsewhere


def full_batches(rows: Tensor, mask: Tensor, batch_tokens: int) -> Iterator[tuple]:
    """Cut rows (n,) of a pool into batches of at most batch_tokens tokens, padding included, or of
    one row. mask (N, S). Yields a batch's rows, the length s of the longest and the mask."""
    lengths = mask[rows].sum(1).tolist()
    start, s = 0, 0
    for end in range(len(lengths) + 1):
        full = end == len(lengths) or max(s, lengths[end]) * (end - start + 1) > batch_tokens
        if full and end > start:
            batch = rows[start:end]
            yield batch, s, mask_or_none(mask[batch, :s])
            start, s = end, 0
        if end < len(lengths):
            s = max(s, lengths[end])


@torch.inference_mode()
def infer(model: SmartBert, ids: Tensor, segment_ids: Tensor, mask: Tensor, *, skip: bool = True,
          criterion: Criterion | None = None, batch_tokens: int = 1024) -> Outcome:
    """`infer_one` for a whole pool: each layer computes only the rows that run it.

    A batch shrinks as its rows skip layers and exit, and a batch of two or three rows wastes the
    processor. So the rows of a pool wait before a layer, and those that run it pass in full
    batches of similar length.

    ids, segment_ids, mask (N, S), best sorted by length. skip: ask the gates. criterion: asked
    after every layer that ran but the last; None: no exits. A row that never exits takes the last
    head, even where it skipped the last layer. The model must be in eval mode.
    """
    N, L, C, device = len(ids), len(model.gates), model.heads[-1].out.out_features, ids.device
    ran = torch.zeros(N, L, dtype=torch.bool, device=device)
    exits = torch.full((N,), L, device=device)
    gates = torch.full((N, L), torch.nan, device=device)
    history = torch.full((N, L, C), torch.nan, device=device)
    # Zeros in the padding: attention gives it no weight, but 0 * NaN would still be NaN.
    h = torch.zeros(*ids.shape, model.bert.config.hidden_size, device=device)   # (N, S, H)

    waiting = torch.arange(N, device=device)
    for rows, s, _ in full_batches(waiting, mask, batch_tokens):
        h[rows, :s] = model.bert.embeddings(ids[rows, :s], segment_ids[rows, :s])
    for i, layer in enumerate(model.bert.layers):
        running = waiting
        if skip:
            for rows, s, m in full_batches(waiting, mask, batch_tokens):
                gates[rows, i] = model.gates[i](h[rows, :s], m).float()     # (n,)
            running = waiting[gates[waiting, i] < 0.5]
        for rows, s, m in full_batches(running, mask, batch_tokens):
            h[rows, :s] = layer(h[rows, :s], m)                             # (n, s, H)
            ran[rows, i] = True
            if criterion is not None and i < L - 1:
                history[rows, i] = model.heads[i](h[rows, :s], m)[0].float()    # (n, C)
                leaving = criterion(history[rows, :i + 1], rows)            # (n,)
                exits[rows[leaving]] = i + 1
        waiting = waiting[exits[waiting] == L]
    for rows, s, m in full_batches(waiting, mask, batch_tokens):            # no early exit
        history[rows, -1] = model.heads[-1](h[rows, :s], m)[0].float()
    return Outcome(history[torch.arange(N, device=device), exits - 1], ran, exits, gates, history)


# --- Cost ---------------------------------------------------------------------------------------

def layer_flops(model: SmartBert, tokens: Tensor) -> Tensor:
    """FLOPs of one layer on rows of so many real tokens, (N,) -> (N,). A multiply-add is two.

        2 S (4 H^2 + 2 H I) + 4 S^2 H       which is    24 S H^2 + 4 S^2 H    where I = 4H
    """
    H, I = model.bert.config.hidden_size, model.bert.config.intermediate_size
    return 2 * tokens * (4 * H * H + 2 * H * I) + 4 * tokens**2 * H


def auxiliary_flops(module: Gate | ExitHead, tokens: Tensor) -> Tensor:
    """FLOPs of one gate or one exit head, (N,) -> (N,): shrink the tokens, their keys and values,
    one query and its attention, the output."""
    W, H = module.body.inner.weight.shape
    outputs = 2 * W * module.out.out_features
    if isinstance(module, ExitHead):
        outputs += 2 * W * W
    return 2 * tokens * (H * W + 2 * W * W) + 2 * W * W + 4 * tokens * W + outputs


def flops(model: SmartBert, tokens: Tensor, outcome: Outcome) -> Tensor:
    """FLOPs of each row of a pool: its layers, gates and heads. tokens (N,) real -> (N,)."""
    gates = (~outcome.gates.isnan()).sum(1)                                 # asked, (N,)
    heads = (~outcome.history[:, :, 0].isnan()).sum(1)
    return (layer_flops(model, tokens) * outcome.ran.sum(1)
            + auxiliary_flops(model.gates[0], tokens) * gates
            + auxiliary_flops(model.heads[0], tokens) * heads)


def plain_flops(model: SmartBert, tokens: Tensor) -> Tensor:
    """FLOPs of plain BERT on rows of so many real tokens, (N,) -> (N,)."""
    layers = layer_flops(model, tokens) * len(model.bert.layers)
    return layers + auxiliary_flops(model.heads[-1], tokens)
