"""SmartBERT: a BERT that skips the layers it does not need and stops as soon as it is sure.

Hu, Zhu, Li, Tang: "SmartBERT: A Promotion of Dynamic Early Exiting Mechanism for Accelerating BERT
Inference", IJCAI 2023. Every layer gets two small modules. A *skipping gate* reads what enters the
layer and decides whether this example runs it. An *exit head* reads what leaves the layer and
decides whether the answer is already certain.

"Release" means the authors' code (github HuBoren99/SmartBert); SmartBert.py:98 is line 98 of its
models/SmartBert.py. "Deviation 12" is number 12 of the list in results/README.md.

Dimensions: B rows (examples), S tokens, H hidden size, W width of gates and heads, L layers,
C classes, N rows of a pool (all examples of one call of `infer`), n some of these rows. mask is
True at real tokens, False at padding. Read `global_mean(x, n)` as x; it does more only where
torchrun shares a batch out among processes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from bert import Bert, mask_or_none


# --- Skipping gate and exit head ----------------------------------------------------------------

def gate_width(hidden_size: int) -> int:
    """W = H / 6, rounded to a multiple of 8: 128 for bert-base, as in the release. So a gate costs
    about the same share of a layer at any H (deviation 12). At least 16: four heads of 4."""
    return max(16, 8 * round(hidden_size / 48))


class ClsAttention(nn.Module):
    """The first half of every gate and head (each has its own weights): project the tokens to W
    dimensions, then attend from [CLS] to all of them.

    The release computes attention for every query (models/MultiheadAttention.py:28-69) and then
    keeps only [CLS] (models/Gate.py:18). Queries do not affect each other, so computing only the
    [CLS] query gives the same result.
    """

    def __init__(self, hidden_size: int, width: int, heads: int, dropout: float):
        super().__init__()
        self.inner = nn.Linear(hidden_size, width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.heads, self.dropout = heads, dropout

    def forward(self, h: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """h (B, S, H), mask (B, S) or None -> attention's output at [CLS] (B, W), z (B, S, W)."""
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
    """g = P(skip this layer), from the layer's input (models/Gate.py)."""

    def __init__(self, hidden_size: int, width: int, dropout: float, bias: float):
        super().__init__()
        self.body = ClsAttention(hidden_size, width, heads=2, dropout=dropout)
        self.out = nn.Linear(width, 1)
        nn.init.constant_(self.out.bias, bias)      # below 0, g < 1/2: layers run (deviation 11)

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """h (B, S, H) -> g (B,)."""
        a, _ = self.body(h, mask)
        return torch.sigmoid(self.out(a)).squeeze(1)                        # g = sigmoid(w a + b)


def projection(inputs: int, width: int) -> nn.Sequential:
    """A projection head (models/SmartBert.py:21-26): the contrast compares tokens in this space,
    so it does not force the hidden states of neighbouring layers to be similar."""
    return nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width), nn.Tanh(),
                         nn.Linear(width, width))


class ExitHead(nn.Module):
    """The task's classifier after one layer, nearly as small as a gate (models/Classifier.py)."""

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

    bert: the encoder. classes: C. gate_bias: initial bias of every gate; the release's is near 0,
    so its gates start near g = 1/2.
    """

    def __init__(self, bert: Bert, classes: int, gate_bias: float = -2.0):
        super().__init__()
        config = bert.config
        H, W, L = config.hidden_size, gate_width(config.hidden_size), config.num_hidden_layers
        dropout = config.attention_probs_dropout_prob
        self.bert = bert
        self.gates = nn.ModuleList(Gate(H, W, dropout, gate_bias) for _ in range(L))
        self.heads = nn.ModuleList(ExitHead(H, W, classes, dropout) for _ in range(L))
        self.projections = nn.ModuleList(projection(H, W) for _ in range(L))    # for phase 1
        for part in (self.gates, self.heads, self.projections):
            for p in part.parameters():
                if p.dim() > 1:                     # std 1 / sqrt(inputs) (deviation 13)
                    nn.init.normal_(p, std=p.shape[1] ** -0.5)

    def forward(self, ids: Tensor, segment_ids: Tensor, mask: Tensor) -> Tensor:
        """Plain BERT: every layer, then the last head. ids, ... (B, S) -> logits (B, C)."""
        h = self.bert(ids, segment_ids, mask)[-1]                           # (B, S, H)
        logits, _ = self.heads[-1](h, mask_or_none(mask))
        return logits


# --- Hard weight --------------------------------------------------------------------------------

def hard_weight(g: Tensor) -> Tensor:
    """Hard gate: 1 = skip, 0 = run; its gradient is that of the soft g (SmartBert.py:98-100).

    Straight-through estimator: autograd treats `hard` as a constant, and (g - g.detach()) has the
    value 0 and the gradient of g. Computed in this order, the value is exactly 0 or 1.
    """
    hard = (g >= 0.5).to(g.dtype)
    return hard + (g - g.detach())


# --- Dynamic inference: one example -------------------------------------------------------------

def entropy(logits: Tensor) -> Tensor:
    """-sum_c p_c ln p_c in nats, p = softmax(logits) (SmartBert.py:173-174): (..., C) -> (...).
    0 means certain; ln C means all classes are equally likely."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@torch.inference_mode()
def infer_one(model: SmartBert, ids: Tensor, segment_ids: Tensor, threshold: float,
              skip: bool = True) -> tuple[Tensor, list[int], int]:
    """SmartBERT as the paper describes it: one example, one layer after another
    (SmartBert.py:157-181).

    ids, segment_ids (1, S) without padding; threshold in nats; skip=False leaves the gates out.
    Returns logits (1, C), the layers that ran and the layer of the exit, counted from 1.
    """
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


# --- Cross-layer contrast -----------------------------------------------------------------------

def contrast(u: Tensor, v: Tensor, mask: Tensor, tau: float) -> Tensor:
    """The contrastive loss (InfoNCE) of tokens in two neighbouring layers (SmartBert.py:112-122).

        contrast = mean over tokens t of  -log( s[t,t] / sum_t' s[t,t'] )
        s[t,t']  = exp( cos(u_t, v_t') / tau )

    u, v (B, S, W): the projected tokens of layer i and layer i+1. Positive: the same token in the
    other layer. Negatives: the other tokens of the same example, in the other layer. Padding is
    neither an anchor nor a negative (in the release it is both: deviation 1). mask (B, S). Returns
    a scalar.
    """
    log_s = F.normalize(u, dim=-1) @ F.normalize(v, dim=-1).transpose(1, 2) / tau     # (B, S, S)
    log_s = log_s.masked_fill(~mask[:, None, :], -torch.inf)
    losses = log_s.logsumexp(dim=-1) - log_s.diagonal(dim1=1, dim2=2)       # (B, S)
    return losses[mask].mean()


# --- Phase 1: encoder, gates and last head ------------------------------------------------------

def gated_forward(model: SmartBert, ids: Tensor, segment_ids: Tensor, mask: Tensor, hard: bool,
                  depth: int | None = None, full_share: float = 0.0) -> tuple:
    """Run the first `depth` layers (default: all) and mix each output with its input.

        h_i = (1 - g_i) * layer_i(h_{i-1}) + g_i * h_{i-1}              (SmartBert.py:91-103)

    In training, skipped layers are computed too: in phase 1 the gradient of g_i needs
    layer_i(h_{i-1}), in phase 2 head i reads it.
    full_share: this share of the rows, drawn at random, ignores the gates and runs every layer, so
    that the full model stays good (deviation 14).
    Returns, for the d layers run: the inputs [h_0 .. h_{d-1}], the raw outputs [layer_i(h_{i-1})]
    and h_d (each (B, S, H)); then g before and after the hard weight (each (B, d)).
    """
    h, m = model.bert.embeddings(ids, segment_ids), mask_or_none(mask)
    inputs, outputs, soft, used = [], [], [], []
    obeys_gate = torch.ones(len(ids), device=h.device)                      # (B,), 0: run in full
    if full_share:
        obeys_gate = (torch.rand(len(ids), device=h.device) >= full_share).float()
    for gate, layer in zip(model.gates[:depth], model.bert.layers[:depth]):
        output = layer(h, m)                                                # (B, S, H)
        g_soft = gate(h, m)                                                 # (B,)
        g = hard_weight(g_soft) if hard else g_soft
        inputs.append(h)
        outputs.append(output)
        soft.append(g_soft)
        used.append(g)
        g = (g * obeys_gate)[:, None, None]                                 # (B, 1, 1)
        h = (1 - g) * output + g * h
    return inputs, outputs, h, torch.stack(soft, 1), torch.stack(used, 1)


def skip_penalty(soft: Tensor, used: Tensor, lam: float = 0.0, budget: float = 1.0,
                 budget_weight: float = 0.0) -> Tensor:
    """The loss that makes the gates skip: the paper's penalty if lam > 0, else our budget.

        paper:   lam / sum_i mean_batch(g_i)                            (SmartBert.py:96, 110)
        budget:  budget_weight * max(0, mean(1 - g) - budget)^2         0 within the budget

    soft, used: the gates (B, L) before and after the hard weight. The paper's sum takes the soft
    gates even when hard ones are used; ours takes those that are used. Returns a scalar.
    """
    if lam:
        return lam / global_mean(soft.mean(0), len(soft)).sum()
    run = global_mean((1 - used).mean(), len(used))
    return budget_weight * F.relu(run - budget) ** 2


@dataclass
class Phase1:
    """Phase 1's loss and its parts (scalars); run (B, L): 1 - g after the hard weight. Rows that
    run in full (full_share) still count with the values of their gates."""
    loss: Tensor
    task: Tensor
    penalty: Tensor
    contrast: Tensor
    run: Tensor


def phase1_loss(model: SmartBert, ids: Tensor, segment_ids: Tensor, mask: Tensor, labels: Tensor,
                *, hard: bool, penalty: dict, eta1: float = 0.01, tau1: float = 0.5,
                full_share: float = 0.0) -> Phase1:
    """loss1 = (1 - eta1) * ( CE(last head) + penalty ) + eta1 * sum_i contrast(u_i, u_{i+1})

    (SmartBert.py:108-122.) i = 1 .. L-1 and u_i = project_i(h_{i-1}): the contrast compares the
    inputs of neighbouring layers, summed over the L-1 pairs. penalty: keyword arguments of
    `skip_penalty`. full_share: see `gated_forward`. ids, segment_ids, mask (B, S), labels (B,).
    """
    inputs, _, h, soft, used = gated_forward(model, ids, segment_ids, mask, hard,
                                             full_share=full_share)
    logits, _ = model.heads[-1](h, mask_or_none(mask))
    task = global_mean(F.cross_entropy(logits, labels), len(labels))
    penalty_loss = skip_penalty(soft, used, **penalty)
    contrast_loss = task.new_zeros(())
    if eta1:
        u = [project(x) for project, x in zip(model.projections, inputs)]   # L tensors (B, S, W)
        contrast_loss = sum(contrast(a, b, mask, tau1) for a, b in zip(u, u[1:]))
        contrast_loss = global_mean(contrast_loss, mask.sum())
    loss = (1 - eta1) * (task + penalty_loss) + eta1 * contrast_loss
    return Phase1(loss, task, penalty_loss, contrast_loss, 1 - used)


# --- Phase 2: the exit heads --------------------------------------------------------------------

def phase2_loss(model: SmartBert, ids: Tensor, segment_ids: Tensor, mask: Tensor, labels: Tensor,
                *, eta2: float = 0.05, tau2: float = 0.55, full_share: float = 0.0) -> Tensor:
    """loss2 = (1 - eta2) * sum_i CE(head_i) + eta2 * mean_i contrast(u_i, u_{i+1})

    (SmartBert.py:125-154; deviations 2, 3, 5.) CE: i = 1 .. L-1; contrast: i = 1 .. L-2.
    u_i = project_i(z_i), where z_i is tanh(W_in h) in head i. Only these heads are trained; the
    encoder, the gates and the last head are frozen. The hidden states follow the hard gates, but
    head i always reads layer_i(h_{i-1}), even where the gate skips layer i.
    full_share: see `gated_forward`. ids, segment_ids, mask (B, S), labels (B,). Returns a scalar.
    """
    last = len(model.heads) - 1
    with torch.no_grad():
        _, outputs, *_ = gated_forward(model, ids, segment_ids, mask, hard=True, depth=last,
                                       full_share=full_share)
    m = mask_or_none(mask)
    task, u = 0.0, []
    for head, output in zip(model.heads[:last], outputs):
        logits, z = head(output, m)                                         # (B, C), (B, S, W)
        task = task + F.cross_entropy(logits, labels)
        u.append(head.project(z))                                           # (B, S, W)
    task = global_mean(task, len(labels))
    if not eta2 or last < 2:
        return (1 - eta2) * task
    pairs = [contrast(a, b, mask, tau2) for a, b in zip(u, u[1:])]
    return (1 - eta2) * task + eta2 * global_mean(sum(pairs) / len(pairs), mask.sum())


# --- Earlier methods, for comparison ------------------------------------------------------------

# The same encoder and heads with other losses. inputs: ids, segment_ids, mask, each (B, S); labels
# (B,). Each loss is a scalar. CE_i: the cross-entropy of head i, which reads h_i.

def every_head(model: SmartBert, inputs: tuple, depth: int | None = None) -> list[Tensor]:
    """The logits of the first `depth` heads (default: all) without gates, each (B, C)."""
    ids, segment_ids, mask = inputs
    h, m, answers = model.bert.embeddings(ids, segment_ids), mask_or_none(mask), []
    for layer, head in zip(model.bert.layers[:depth], model.heads):
        h = layer(h, m)                                                     # (B, S, H)
        answers.append(head(h, m)[0])                                       # (B, C)
    return answers


def bert_loss(model: SmartBert, inputs: tuple, labels: Tensor) -> Tensor:
    """CE_L: fine-tuning. It is also the first stage of DeeBERT and FastBERT."""
    return F.cross_entropy(model(*inputs), labels)


def deebert_loss(model: SmartBert, inputs: tuple, labels: Tensor) -> Tensor:
    """sum_i CE_i for i < L: the second stage of DeeBERT (Xin et al. 2020; castorini/DeeBERT).
    train.make_optimizer freezes encoder and last head. SmartBERT's phase 2 adds the contrast and
    lets the gates choose the path."""
    early = every_head(model, inputs, depth=len(model.heads) - 1)
    return sum(F.cross_entropy(logits, labels) for logits in early)


def fastbert_loss(model: SmartBert, inputs: tuple, labels: Tensor) -> Tensor:
    """sum_i KL( p_L || p_i ) for i < L: FastBERT's self-distillation (Liu et al. 2020), in the
    direction of its code (autoliuweijie/FastBERT, run_fastbert.py). The heads learn the last
    head's answer p_L; labels are not used."""
    *early, last = every_head(model, inputs)
    teacher = last.detach().log_softmax(-1)
    return sum(F.kl_div(logits.log_softmax(-1), teacher, reduction="batchmean", log_target=True)
               for logits in early)


def pabee_loss(model: SmartBert, inputs: tuple, labels: Tensor) -> Tensor:
    """sum_i i CE_i / sum_i i: one stage for encoder and heads, later heads weigh more (PABEE, Zhou
    et al. 2020; JetRunner/PABEE, modeling_bert.py). Its exit criterion is `patience`."""
    losses = [F.cross_entropy(logits, labels) for logits in every_head(model, inputs)]
    weighted = sum(i * loss for i, loss in enumerate(losses, start=1))
    return weighted / sum(range(1, len(losses) + 1))


def berxit_loss(model: SmartBert, inputs: tuple, labels: Tensor, step: int) -> Tensor:
    """CE_L in even steps, sum_i CE_i in odd ones: one stage, in which alternating keeps the other
    heads from disturbing the last one (BERxiT, Xin et al. 2021; castorini/berxit,
    modeling_highway_bert.py, strategy "alternate"). step: from 0."""
    if step % 2 == 0:
        return bert_loss(model, inputs, labels)
    return sum(F.cross_entropy(logits, labels) for logits in every_head(model, inputs))


def layerdrop_loss(model: SmartBert, inputs: tuple, labels: Tensor, drop: float = 0.2) -> Tensor:
    """CE_L, where every step leaves out each layer with probability `drop` (LayerDrop, Fan et al.
    2020). The model can then be used at any depth: see `kept_layers`."""
    ids, segment_ids, mask = inputs
    h, m = model.bert.embeddings(ids, segment_ids), mask_or_none(mask)
    for layer in model.bert.layers:
        if torch.rand(()) >= drop:
            h = layer(h, m)                                                 # (B, S, H)
    logits, _ = model.heads[-1](h, m)
    return F.cross_entropy(logits, labels)


def kept_layers(depth: int, L: int) -> list[int]:
    """The layers (from 0) that a LayerDrop model of L layers keeps at this depth: evenly spaced
    (Fan et al. 2020, "every other"), the same for all examples."""
    return [i for i in range(L) if (i + 1) * depth // L > i * depth // L]


# The loss of each stage; see train.StepLoss, which gives SmartBERT's and BERxiT's more arguments.
# Stages after the first train the heads 1 .. L-1 alone.
METHODS = {"smartbert": (phase1_loss, phase2_loss), "bert": (bert_loss,),
           "deebert": (bert_loss, deebert_loss), "fastbert": (bert_loss, fastbert_loss),
           "pabee": (pabee_loss,), "berxit": (berxit_loss,), "layerdrop": (layerdrop_loss,)}


# --- Exit criteria ------------------------------------------------------------------------------

# A criterion is called right after head i, for n of the rows that ran layer i, and says which of
# them exit: (n,) bool. history (n, i, C): the logits of heads 1 .. i, NaN for skipped layers
# (never for layer i). rows (n,): their numbers in the pool. SmartBERT's criterion is the entropy.
Criterion = Callable[[Tensor, Tensor], Tensor]


def entropy_below(threshold: float) -> Criterion:
    """Exit when the entropy is strictly below the threshold (DeeBERT, Xin et al. 2020)."""
    return lambda history, rows: entropy(history[:, -1]) < threshold


def probability_above(threshold: float) -> Criterion:
    """Exit when the highest probability is above the threshold (Schwartz et al. 2020)."""
    return lambda history, rows: history[:, -1].softmax(-1).amax(-1) > threshold


def patience(times: int) -> Criterion:
    """Exit when `times` consecutive heads agree with the head before them (PABEE, Zhou et al.
    2020). Heads of skipped layers are ignored."""
    def criterion(history: Tensor, rows: Tensor) -> Tensor:
        asked, answers = ~history[:, :, 0].isnan(), history.argmax(-1)      # (n, i), (n, i)
        changed = asked & (answers != answers[:, -1:])      # another answer than head i's
        same = asked & (changed.flip(1).cumsum(1).flip(1) == 0)     # none from here to head i
        return same.sum(1) > times                          # `same` counts head i itself
    return criterion


def fixed_layer(layer: int) -> Criterion:
    """Exit at head `layer` (from 1), or at the next head if that layer was skipped: a shallower
    BERT. Such a BERT has no earlier heads, so eval.measure does not count their cost."""
    return lambda history, rows: torch.full_like(rows, history.shape[1] >= layer, dtype=torch.bool)


def first_correct(labels: Tensor) -> Criterion:
    """The oracle: exit at the first correct head. It uses the labels (N,) of the pool, so it is
    not a method but an upper bound: no criterion on these heads has a higher accuracy. It is no
    bound on cost, because a row without a correct head runs to the end."""
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
    """Split rows (n,) of a pool into batches of at most batch_tokens tokens (padding counts), but
    at least one row each. mask (N, S). Yields the rows of a batch, the length s of its longest row
    and its mask (rows, s), or None if the batch has no padding."""
    lengths, start = mask[rows].sum(1).tolist(), 0
    while start < len(rows):
        s, end = lengths[start], start + 1
        while end < len(rows) and max(s, lengths[end]) * (end + 1 - start) <= batch_tokens:
            s, end = max(s, lengths[end]), end + 1
        batch, start = rows[start:end], end
        yield batch, s, mask_or_none(mask[batch, :s])


@torch.inference_mode()
def infer(model: SmartBert, ids: Tensor, segment_ids: Tensor, mask: Tensor, *, skip: bool = True,
          criterion: Criterion | None = None, layers: list[int] | None = None,
          batch_tokens: int | None = None) -> Outcome:
    """`infer_one` for a pool of N examples: each layer computes only the rows that run it.

    Skips and exits would make a batch smaller and smaller, and small batches are slow. So at every
    layer, all rows of the pool that run it are split into new, full batches.

    ids, segment_ids, mask (N, S); fastest if sorted by length. skip: use the gates. criterion: the
    exit criterion, applied after each layer that ran, except layer L; None: no early exit. A row
    without early exit uses the last head, even if it skipped layer L. layers: the only layers that
    exist, from 0; None: all. batch_tokens: default by device. Call model.eval() first.
    """
    N, L, C, device = len(ids), len(model.gates), model.heads[-1].out.out_features, ids.device
    ran = torch.zeros(N, L, dtype=torch.bool, device=device)
    exits = torch.full((N,), L, device=device)              # L also while a row has not exited
    gates = torch.full((N, L), torch.nan, device=device)
    history = torch.full((N, L, C), torch.nan, device=device)
    # zeros, not empty: a row is later read beside longer ones, and 0 * NaN is NaN
    h = torch.zeros(*ids.shape, model.bert.config.hidden_size, device=device)   # (N, S, H)

    if batch_tokens is None:
        batch_tokens = 1024 if device.type == "cpu" else 32768
    waiting = torch.arange(N, device=device)
    for rows, s, _ in full_batches(waiting, mask, batch_tokens):
        h[rows, :s] = model.bert.embeddings(ids[rows, :s], segment_ids[rows, :s])
    for i, layer in enumerate(model.bert.layers):
        if layers is not None and i not in layers:
            continue
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
    logits = history[torch.arange(N, device=device), exits - 1]             # (N, C)
    return Outcome(logits, ran, exits, gates, history)


# --- Cost ---------------------------------------------------------------------------------------

def layer_flops(model: SmartBert, tokens: Tensor) -> Tensor:
    """FLOPs of one layer for each row, (N,), two for a multiply-add. tokens (N,): its real S.

        2 S (4 H^2 + 2 H I) + 4 S^2 H       which is    24 S H^2 + 4 S^2 H    where I = 4H
    """
    H, I = model.bert.config.hidden_size, model.bert.config.intermediate_size
    return 2 * tokens * (4 * H * H + 2 * H * I) + 4 * tokens**2 * H


def auxiliary_flops(module: Gate | ExitHead, tokens: Tensor) -> Tensor:
    """FLOPs of one gate or one exit head for each row, (N,). tokens (N,): S, its real tokens.

        2 S H W + 4 S W^2      W_in; keys and values
        2 W^2 + 4 S W          the query of [CLS]; its scores and weighted sum
        2 W                    output of a gate
        2 W^2 + 2 W C          hidden layer and output of a head
    """
    W, H = module.body.inner.weight.shape
    body = 2 * tokens * H * W + 4 * tokens * W * W + 2 * W * W + 4 * tokens * W
    hidden = 2 * W * W if isinstance(module, ExitHead) else 0
    return body + hidden + 2 * W * module.out.out_features


def flops(model: SmartBert, tokens: Tensor, outcome: Outcome) -> Tensor:
    """FLOPs of each row of a pool in each layer, gate and head included, (N, L). tokens (N,): its
    real tokens."""
    tokens = tokens[:, None]                                                # (N, 1)
    gates, heads = ~outcome.gates.isnan(), ~outcome.history[:, :, 0].isnan()    # asked, (N, L)
    return (layer_flops(model, tokens) * outcome.ran
            + auxiliary_flops(model.gates[0], tokens) * gates
            + auxiliary_flops(model.heads[0], tokens) * heads)


def plain_flops(model: SmartBert, tokens: Tensor) -> Tensor:
    """FLOPs of plain BERT for each row, (N,). tokens (N,): its real tokens."""
    layers = layer_flops(model, tokens) * len(model.bert.layers)
    return layers + auxiliary_flops(model.heads[-1], tokens)


# --- Several processes --------------------------------------------------------------------------

def global_mean(mean: Tensor, count: int | Tensor) -> Tensor:
    """The mean over a batch that torchrun has shared out among processes. mean: that of this
    process, over `count` rows or tokens. Without torchrun it is returned as it is.

    Its value is the same everywhere. Its gradient is that of this process's part, times the number
    of processes, because DistributedDataParallel divides by it when it averages the gradients.
    """
    if not distributed.is_initialized():
        return mean
    mean, count = mean.float(), torch.as_tensor(count, device=mean.device)  # bf16: exact to 256
    sums = torch.cat([(mean.detach() * count).view(-1), count.float().view(1)])
    distributed.all_reduce(sums)
    part = mean * (distributed.get_world_size() * count / sums[-1])
    return part + ((sums[:-1] / sums[-1]).view_as(mean) - part).detach()
