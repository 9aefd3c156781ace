"""SmartBERT: a BERT that skips the layers it does not need and stops as soon as it is sure.

Hu, Zhu, Li, Tang: "SmartBERT: A Promotion of Dynamic Early Exiting Mechanism for Accelerating BERT
Inference", IJCAI 2023. Every layer gets two small modules. A *skipping gate* reads what enters the
layer and decides whether this example runs it. An *exit head* reads what leaves the layer and
decides whether the answer is already certain.

    logits, ran, exit = infer_one(model, ids, segment_ids, threshold=0.3)

`infer_one` is the paper in one loop. The losses follow it, then `infer`: many examples at once.

Dimensions: B rows (examples) of a batch, S tokens, H hidden size, W width of gates and heads,
L layers, C classes, N rows of a pool (what one call of `infer` takes). mask is True at real
tokens, False at padding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert import Bert, attend


# --- The model: skipping gates and exit heads ---------------------------------------------------

class ClsAttention(nn.Module):
    """The first half of every gate and head (each has its own weights): project the tokens to W
    dimensions, then attend from [CLS] to all of them. No other query is needed."""

    def __init__(self, hidden_size: int, width: int, n_heads: int, dropout: float):
        super().__init__()
        self.inner = nn.Linear(hidden_size, width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.n_heads, self.dropout = n_heads, dropout

    def forward(self, h: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """h (B, S, H), mask (B, S) or None -> attention's output at [CLS] (B, W), z (B, S, W)."""
        z = torch.tanh(self.inner(h))                                       # z = tanh(W_in h)
        q = self.query(z[:, :1])                                            # (B, 1, W): [CLS]
        k, v = self.key_value(z).chunk(2, dim=2)                            # each (B, S, W)
        a = attend(q, k, v, self.n_heads, mask, self.dropout, self.training)    # (B, 1, W)
        return a.squeeze(1), z


class Gate(nn.Module):
    """The skipping gate: g = P(skip this layer), from the layer's input."""

    def __init__(self, hidden_size: int, width: int, dropout: float, bias: float):
        super().__init__()
        self.body = ClsAttention(hidden_size, width, n_heads=2, dropout=dropout)
        self.out = nn.Linear(width, 1)
        nn.init.constant_(self.out.bias, bias)          # below 0, g < 1/2: layers run at first

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """h (B, S, H) -> g (B,)."""
        a, _ = self.body(h, mask)
        return torch.sigmoid(self.out(a)).squeeze(1)                        # g = sigmoid(w a + b)


def projection(inputs: int, width: int) -> nn.Sequential:
    """Maps tokens to where the contrast compares them, so hidden states need not be similar."""
    return nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width), nn.Tanh(),
                         nn.Linear(width, width))


class ExitHead(nn.Module):
    """The exit head: the task's classifier after one layer, nearly as small as a gate."""

    def __init__(self, hidden_size: int, width: int, classes: int, dropout: float):
        super().__init__()
        self.body = ClsAttention(hidden_size, width, n_heads=4, dropout=dropout)
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, classes)
        self.project = projection(width, width)     # for phase 2's contrast; not run at inference

    def forward(self, h: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """h (B, S, H) -> logits (B, C), the narrow tokens z (B, S, W)."""
        a, z = self.body(h, mask)
        return self.out(torch.tanh(self.hidden(a))), z


class SmartBert(nn.Module):
    """BERT with a gate before each layer and an exit head after it. bert: the encoder. classes: C.
    gate_bias: initial bias of every gate; at 0, gates start near g = 1/2. L is at least 2."""

    def __init__(self, bert: Bert, classes: int, gate_bias: float = -2.0):
        super().__init__()
        config = bert.config
        H, L, dropout = config.hidden_size, len(bert.layers), config.attention_probs_dropout_prob
        # W = H / 6, rounded to a multiple of 8: 128 for bert-base, as in the paper's code. So a
        # gate costs about the same share of a layer at any H >= 96. At least 16: four heads of 4.
        W = max(16, 8 * round(H / 48))
        self.bert = bert
        self.gates = nn.ModuleList(Gate(H, W, dropout, gate_bias) for _ in range(L))
        self.heads = nn.ModuleList(ExitHead(H, W, classes, dropout) for _ in range(L))
        self.projections = nn.ModuleList(projection(H, W) for _ in range(L))    # for phase 1
        for p in nn.ModuleList([self.gates, self.heads, self.projections]).parameters():
            if p.dim() > 1:                         # an input of unit scale keeps its scale
                nn.init.normal_(p, std=p.shape[1] ** -0.5)

    def forward(self, ids: Tensor, segment_ids: Tensor, mask: Tensor) -> Tensor:
        """Plain BERT: every layer, then the last head. All inputs (B, S) -> logits (B, C)."""
        h = self.bert(ids, segment_ids, mask)[-1]                           # (B, S, H)
        logits, _ = self.heads[-1](h, mask)
        return logits


# --- Dynamic inference: one example -------------------------------------------------------------

def entropy(logits: Tensor) -> Tensor:
    """-sum_c p_c ln p_c in nats, p = softmax(logits): (..., C) -> (...). 0 means certain; ln C
    means all classes are equally likely."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@torch.inference_mode()
def infer_one(model: SmartBert, ids: Tensor, segment_ids: Tensor, threshold: float,
              skip: bool = True) -> tuple[Tensor, list[int], int]:
    """SmartBERT as the paper describes it: one example, one layer after another.

    ids, segment_ids (1, S) without padding; threshold in nats; skip=False leaves the gates out.
    Call model.eval() first. Returns logits (1, C), the layers that ran and the layer of the exit,
    both counted from 1."""
    L, ran = len(model.bert.layers), []
    h = model.bert.embeddings(ids, segment_ids)                             # h_0 (1, S, H)
    parts = zip(model.gates, model.bert.layers, model.heads)
    for i, (gate, layer, head) in enumerate(parts, start=1):                # i as in the paper
        # Skipping gate: g_i, the probability of skipping layer i.
        # Hard weight: where g_i >= 1/2, h_i = h_{i-1} and nothing is computed.
        if skip and gate(h, None) >= 0.5:
            continue
        h = layer(h, None)                                            # h_i = layer_i(h_{i-1})
        ran.append(i)
        # Exit head: stop if the entropy of its prediction is below the threshold.
        if i < L:
            logits, _ = head(h, None)                                       # (1, C)
            if entropy(logits) < threshold:
                return logits, ran, i
    # No early exit: the last head answers, even if the last layer was skipped.
    logits, _ = model.heads[-1](h, None)
    return logits, ran, L


# --- Hard weight --------------------------------------------------------------------------------

def hard_weight(g: Tensor) -> Tensor:
    """Hard gate: 1 = skip, 0 = run; its gradient is that of the soft g.

    Straight-through estimator: autograd treats `hard` as a constant, and (g - g.detach()) has the
    value 0 and the gradient of g. In this order the sum is exactly 0 or 1."""
    hard = (g >= 0.5).to(g.dtype)
    return hard + (g - g.detach())


# --- Cross-layer contrast -----------------------------------------------------------------------

def contrast(u: Tensor, v: Tensor, mask: Tensor, tau: float) -> Tensor:
    """The contrastive loss (InfoNCE) of tokens in two neighbouring layers: a token should
    recognise itself in the next layer. The paper's aim is better middle layers, where rows exit.

        contrast = mean over tokens t of  -log( s[t,t] / sum_t' s[t,t'] )
        s[t,t']  = exp( cos(u_t, v_t') / tau )

    u, v (B, S, W): the projected tokens of layer i and layer i+1. Positive: the same token in the
    other layer. Negatives: the example's other tokens there. Padding is neither an anchor nor a
    negative: the loss must not depend on it. mask (B, S), temperature tau. Returns a scalar."""
    log_s = F.normalize(u, dim=-1) @ F.normalize(v, dim=-1).transpose(1, 2) / tau     # (B, S, S)
    log_s = log_s.masked_fill(~mask[:, None, :], -torch.inf)
    losses = log_s.logsumexp(dim=-1) - log_s.diagonal(dim1=1, dim2=2)       # (B, S)
    return losses[mask].mean()


# --- The gated forward pass of both phases ------------------------------------------------------

@dataclass
class Gated:
    """What the gated forward pass computed in the d layers that it ran."""
    inputs: list[Tensor]        # d times (B, S, H): h_0 .. h_{d-1}, what entered each layer
    outputs: list[Tensor]       # d times (B, S, H): layer_i(h_{i-1}), what left it
    last: Tensor                # (B, S, H): h_d
    g_soft: Tensor              # (B, d): the gates before the hard weight
    g_used: Tensor              # (B, d): hard_weight(g_soft) if hard, else g_soft


def gated_forward(model: SmartBert, ids: Tensor, segment_ids: Tensor, mask: Tensor, hard: bool,
                  depth: int | None = None, full_share: float = 0.0) -> Gated:
    """Run the first `depth` layers (default: all) and mix each output with its input.

        h_i = (1 - g_i) * layer_i(h_{i-1}) + g_i * h_{i-1}

    Skipped layers are computed too. In phase 1 the gradient of g_i needs layer_i(h_{i-1}). In
    phase 2 head i reads it. A random share full_share of the rows ignores the gates and runs every
    layer. This keeps the full model good, and the heads also learn from ungated states."""
    h = model.bert.embeddings(ids, segment_ids)                             # h_0 (B, S, H)
    inputs, outputs, g_soft, g_used = [], [], [], []
    obeys_gate = torch.rand(len(ids), device=h.device) >= full_share        # (B,) bool
    for gate, layer in zip(model.gates[:depth], model.bert.layers[:depth]):
        inputs.append(h)
        output = layer(h, mask)                                             # (B, S, H)
        outputs.append(output)
        g = gate(h, mask)                                                   # (B,)
        g_soft.append(g)
        if hard:
            g = hard_weight(g)
        g_used.append(g)
        g = torch.where(obeys_gate, g.to(h.dtype), 0)[:, None, None]        # (B, 1, 1)
        h = (1 - g) * output + g * h
    return Gated(inputs, outputs, h, torch.stack(g_soft, 1), torch.stack(g_used, 1))


# --- Phase 1: encoder, gates and last head ------------------------------------------------------

def skip_penalty(g_soft: Tensor, g_used: Tensor, lam: float, budget: float) -> Tensor:
    """The loss that makes the gates skip: the paper's penalty if lam > 0, else our budget.

        paper:   lam / sum_i mean_batch(g_i)
        budget:  10 * max(0, mean(1 - g) - budget)^2            0 within the budget

    The paper's penalty uses g_soft (B, L), because the sum of hard gates can be 0. The budget uses
    g_used (B, L), because it limits the share of layers that inference runs. Rows that ignore
    their gates (full_share) are counted like all other rows. Returns a scalar."""
    if lam > 0:
        return lam / g_soft.mean(0).sum()
    return 10 * F.relu((1 - g_used).mean() - budget) ** 2


def phase1_loss(model: SmartBert, ids: Tensor, segment_ids: Tensor, mask: Tensor, labels: Tensor,
                *, hard: bool, lam: float = 0.0, budget: float = 1.0, eta1: float = 0.01,
                tau1: float = 0.5, full_share: float = 0.0) -> dict[str, Tensor]:
    """loss1 = (1 - eta1) * ( CE(last head) + penalty ) + eta1 * sum_i contrast(u_i, u_{i+1})

    The sum is over i = 1 .. L-1. Here u_i = projections_i(h_{i-1}), so the contrast compares the
    inputs of neighbouring layers. In the paper's code, too, phase 1 has a sum and phase 2 a mean.
    With lam = 0 and budget = 1 there is no penalty. `gated_forward` explains hard and full_share.
    ids, segment_ids and mask are (B, S); labels are (B,). Returns "loss", its parts "task",
    "penalty" and "contrast" (scalars), and "run" (L,), the mean of 1 - g for each layer."""
    gated = gated_forward(model, ids, segment_ids, mask, hard, full_share=full_share)
    logits, _ = model.heads[-1](gated.last, mask)                           # (B, C)
    task = F.cross_entropy(logits, labels)
    penalty = skip_penalty(gated.g_soft, gated.g_used, lam, budget)
    u = [project(h) for project, h in zip(model.projections, gated.inputs)]     # L x (B, S, W)
    contrasts = sum(contrast(a, b, mask, tau1) for a, b in zip(u, u[1:]))
    loss = (1 - eta1) * (task + penalty) + eta1 * contrasts
    return {"loss": loss, "task": task, "penalty": penalty, "contrast": contrasts,
            "run": (1 - gated.g_used).mean(0)}


# --- Phase 2: the exit heads --------------------------------------------------------------------

def phase2_loss(model: SmartBert, ids: Tensor, segment_ids: Tensor, mask: Tensor, labels: Tensor,
                *, eta2: float = 0.05, tau2: float = 0.55,
                full_share: float = 0.0) -> dict[str, Tensor]:
    """loss2 = (1 - eta2) * sum_i CE(head_i) + eta2 * mean_i contrast(u_i, u_{i+1})

    The sum is over i = 1 .. L-1, the mean over i = 1 .. L-2. The states h_i follow the hard gates,
    but head i always reads layer_i(h_{i-1}), even where the gate skips layer i. The head returns
    narrow tokens z_i, and u_i = head_i.project(z_i). Only heads 1 .. L-1 are trained.
    `gated_forward` explains full_share. ids, segment_ids and mask are (B, S); labels are (B,).
    Returns scalars "loss", "task" and "contrast". With L = 2 there is no pair: contrast is 0."""
    depth = len(model.heads) - 1
    with torch.no_grad():
        gated = gated_forward(model, ids, segment_ids, mask, hard=True, depth=depth,
                              full_share=full_share)
    task, u = 0.0, []
    for head, output in zip(model.heads[:depth], gated.outputs):
        logits, z = head(output, mask)                                      # (B, C), (B, S, W)
        task = task + F.cross_entropy(logits, labels)
        u.append(head.project(z))                                           # (B, S, W)
    pairs = [contrast(a, b, mask, tau2) for a, b in zip(u, u[1:])]
    contrasts = torch.stack(pairs).mean() if pairs else torch.zeros_like(task)    # L = 2: none
    loss = (1 - eta2) * task + eta2 * contrasts
    return {"loss": loss, "task": task, "contrast": contrasts}


# --- Dynamic inference: many examples -----------------------------------------------------------

@dataclass
class Outcome:
    """What happened to the N rows of a pool of examples, in their order. Layers count from 1."""
    logits: Tensor          # (N, C): of the head that answers
    exit: Tensor            # (N,) long: the layer of the exit; L for a row that reached the end
    ran: Tensor             # (N, L) bool: the layers that each row ran
    gate_asked: Tensor      # (N, L) bool: the gates that were computed
    gates: Tensor           # (N, L): the values g of the gates; 0 where not computed
    head_asked: Tensor      # (N, L) bool: the heads that were computed
    history: Tensor         # (N, L, C): the logits of the heads; 0 where not computed


def full_batches(chosen: Tensor, mask: Tensor, batch_tokens: int):
    """Split the chosen rows of a pool into batches of at most batch_tokens tokens (padding
    counts), but at least one row each. chosen (N,) bool, mask (N, S). Yields the positions of a
    batch's rows in the pool (n,), the length s of its longest row, and its mask (n, s)."""
    rows = chosen.nonzero().squeeze(1)
    lengths = mask[rows].sum(1).tolist()
    while lengths:                                  # take the first n rows, at least one
        longest, n = lengths[0], 1
        while n < len(lengths) and max(longest, lengths[n]) * (n + 1) <= batch_tokens:
            longest, n = max(longest, lengths[n]), n + 1
        yield rows[:n], longest, mask[rows[:n], :longest]
        rows, lengths = rows[n:], lengths[n:]


@torch.inference_mode()
def infer(model: SmartBert, ids: Tensor, segment_ids: Tensor, mask: Tensor, *, skip: bool = True,
          threshold: float | None = None, all_heads: bool = False,
          batch_tokens: int | None = None) -> Outcome:
    """`infer_one` for a pool of N examples: each layer computes only the rows that run it.

    Skips and exits would make a batch smaller and smaller, and small batches are slow. So at every
    layer, all rows that run it are split into new, full batches. An example with L = 3:

        row   layer 1   layer 2            layer 3
        a     runs      skips              runs, the last head answers
        b     skips     runs, exits        (no longer alive)
        c     runs      runs, not sure     skips, the last head answers

    Layer 1 computes a and c together, layer 2 b and c, layer 3 a alone. Below, i counts layers
    from 0; rows (n,), s and m are those of `full_batches`.

    ids, segment_ids and mask are (N, S). Rows sorted by length are fastest. With skip, the gates
    are used. A row exits after a layer that it ran if the entropy there is below threshold. If
    threshold is None, no row exits early. With all_heads, every layer that ran asks its head
    even so. The default of batch_tokens depends on the device. Call model.eval() first."""
    N, L, C, device = len(ids), len(model.gates), model.heads[-1].out.out_features, ids.device
    if batch_tokens is None:
        batch_tokens = {"cpu": 1024}.get(device.type, 32768)
    ask_heads = all_heads or threshold is not None
    alive = torch.ones(N, dtype=torch.bool, device=device)      # not exited yet
    exits = torch.full((N,), L, device=device)
    gates = torch.zeros(N, L, device=device)
    history = torch.zeros(N, L, C, device=device)
    ran, gate_asked, head_asked = torch.zeros(3, N, L, dtype=torch.bool, device=device)
    # zeros, not empty: padding is read with weight 0, but 0 * NaN is NaN
    h = torch.zeros(*ids.shape, model.bert.config.hidden_size, device=device)   # (N, S, H)
    for rows, s, _ in full_batches(alive, mask, batch_tokens):
        h[rows, :s] = model.bert.embeddings(ids[rows, :s], segment_ids[rows, :s])
    for i in range(L):
        if skip:
            gate_asked[:, i] = alive
            for rows, s, m in full_batches(alive, mask, batch_tokens):
                gates[rows, i] = model.gates[i](h[rows, :s], m).float()     # (n,)
        ran[:, i] = alive & (gates[:, i] < 0.5)         # without skip all gates are 0: all run
        for rows, s, m in full_batches(ran[:, i], mask, batch_tokens):
            h[rows, :s] = model.bert.layers[i](h[rows, :s], m)              # (n, s, H)
            if ask_heads and i < L - 1:
                history[rows, i] = model.heads[i](h[rows, :s], m)[0].float()    # (n, C)
                head_asked[rows, i] = True
        if threshold is not None:
            leaves = head_asked[:, i] & (entropy(history[:, i]) < threshold)    # (N,) bool
            exits[leaves] = i + 1
            alive = alive & ~leaves
    head_asked[:, -1] = alive                                               # no early exit
    for rows, s, m in full_batches(alive, mask, batch_tokens):
        history[rows, -1] = model.heads[-1](h[rows, :s], m)[0].float()
    logits = history[torch.arange(N, device=device), exits - 1]             # (N, C)
    return Outcome(logits, exits, ran, gate_asked, gates, head_asked, history)


def infer_pools(model: SmartBert, pools: list, **how) -> Outcome:
    """Run `infer`, with the keyword arguments `how`, on the pools that data.pools made of a split.
    The outcome is on the CPU, in the order of the split. The model is set to eval mode."""
    model.eval()
    parts = [vars(infer(model, *pool.inputs, **how)) for pool in pools]     # field -> tensor
    back = torch.cat([pool.rows for pool in pools]).argsort().cpu()     # undoes the sorting
    return Outcome(**{name: torch.cat([part[name] for part in parts]).cpu()[back]
                      for name in parts[0]})
