"""What the authors' release computes, met number by number.

fixtures/release.npz holds what HuBoren99/SmartBert @5623774, its modules unchanged, computes on
random weights: 5 layers, 24 wide, 3 heads, gates and heads 12 wide, 3 classes, batch of 7, dropout
off, lambda .4, eta1 .03, eta2 .2, tau1 .5, tau2 .55. "padded" has padding, "full" has none. Where
our method departs on purpose, the test says how.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import smartbert
from bert import Bert, BertConfig, convert_names
from smartbert import (
    SmartBert,
    entropy_below,
    gated_forward,
    infer,
    infer_one,
    phase1_loss,
    phase2_loss,
)

RELEASE = {
    name: torch.from_numpy(value)
    for name, value in np.load(Path(__file__).parent / "fixtures/release.npz").items()
}
# The release's names inside a gate, a classifier or a contrast projection, and ours. Three of
# theirs fill two of ours.
COMPANION = {
    "body.inner": ["output_layer_0"],
    "body.query": ["atten.query"],
    "body.key_value": ["atten.key", "atten.value"],
}
GATE = COMPANION | {"out": ["output_layer_1"]}
HEAD = (
    COMPANION
    | {"hidden": ["output_layer_1"], "out": ["output_layer_2"]}
    | {f"project.{i}": [f"main.{i}"] for i in (0, 1, 3)}
)
PROJECTION = {f"{i}": [f"{i}"] for i in (0, 1, 3)}


def expected(name: str) -> torch.Tensor:
    return RELEASE[f"expect/{name}"]


@pytest.fixture
def model(monkeypatch) -> SmartBert:
    """Our model with the release's weights."""
    monkeypatch.setattr(smartbert, "gate_width", lambda hidden_size: 12)
    config = BertConfig(
        vocab_size=61,
        hidden_size=24,
        num_hidden_layers=5,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=19,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    weights = {
        name.removeprefix("weights/"): value
        for name, value in RELEASE.items()
        if name.startswith("weights/")
    }
    ours = SmartBert(Bert(config), classes=3)
    encoder = {
        name.replace("embedding.", "embeddings.", 1): weights.pop(name)
        for name in list(weights)
        if name.startswith(("embedding.", "encoder."))
    }
    state = {f"bert.{name}": value for name, value in convert_names(encoder, Bert(config)).items()}
    for kind, theirs, table in (
        ("gates", "gate", GATE),
        ("heads", "classifier", HEAD),
        ("projections", "contrast", PROJECTION),
    ):
        for i in range(5):
            for part, names in table.items():
                for end in ("weight", "bias"):
                    state[f"{kind}.{i}.{part}.{end}"] = torch.cat(
                        [weights.pop(f"{theirs}.{i}.{name}.{end}") for name in names]
                    )
    assert not weights, f"names of the release that nothing of ours takes: {list(weights)}"
    ours.load_state_dict(state)
    return ours


def inputs(batch: str) -> tuple:
    """(ids, segment_ids, mask), labels."""
    if batch == "full":
        ids = RELEASE["input/full_ids"]
        return (ids, RELEASE["input/full_types"], torch.ones_like(ids, dtype=torch.bool)), RELEASE[
            "input/labels"
        ]
    return (RELEASE["input/ids"], RELEASE["input/types"], RELEASE["input/mask"].bool()), RELEASE[
        "input/labels"
    ]


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_plain_layers_gates_and_heads(model):
    """Embeddings, every layer, and each gate and head on them."""
    (ids, segment_ids, mask), _ = inputs("padded")
    hiddens = model.eval().bert(ids, segment_ids, mask)
    close(hiddens[0][mask], expected("plain/embeddings")[mask])
    for i in range(5):
        close(hiddens[i + 1][mask], expected(f"plain/hidden{i + 1}")[mask])
        close(model.gates[i](hiddens[i], mask), expected(f"plain/gate{i}"))
        close(model.heads[i](hiddens[i + 1], mask)[0], expected(f"plain/head{i}_logits"))


@pytest.mark.parametrize("batch", ["padded", "full"])
@pytest.mark.parametrize("gates", ["soft", "hard"])
@pytest.mark.parametrize("eta1", [0.0, 0.03])
def test_phase1_loss_and_gradients(model, batch, gates, eta1):
    """Loss, the last head's logits, and gradients of every gate and of the first layer's queries.

    With padding the contrast differs on purpose (deviation 1: ours leaves [PAD] out), so there
    only the logits and the loss without contrast are comparable.
    """
    where = f"{batch}/{'contrast' if eta1 else 'plain'}/phase1_{gates}"
    x, labels = inputs(batch)
    result = phase1_loss(
        model.train(), *x, labels, hard=gates == "hard", penalty=dict(lam=0.4), eta1=eta1, tau1=0.5
    )
    h = gated_forward(model, *x, hard=gates == "hard")[2]
    close(model.heads[-1](h, x[2])[0], expected(f"{where}/last_logits"))
    if batch == "padded" and eta1:
        assert abs(result.loss - expected(f"{where}/loss")) > 1e-4  # the deviation is real
        return
    close(result.loss, expected(f"{where}/loss"))
    result.loss.backward()
    for i, gate in enumerate(model.gates):
        close(gate.out.weight.grad, expected(f"{where}/grad_gate{i}_out"))
    close(model.bert.layers[0].qkv.weight.grad[:24], expected(f"{where}/grad_query0"))


@pytest.mark.parametrize("batch", ["padded", "full"])
def test_phase2_loss_and_gradients(model, batch):
    """The heads' loss and gradients, without the contrast."""
    x, labels = inputs(batch)
    loss = phase2_loss(model.train(), *x, labels, eta2=0.0)
    close(loss, expected(f"{batch}/plain/phase2/loss"))
    loss.backward()
    for i in range(4):
        close(model.heads[i].out.weight.grad, expected(f"{batch}/plain/phase2/grad_head{i}_out"))


def test_phase2_contrast_differs_only_where_we_say(model):
    """Deviations 2 and 3: ours keeps the positive in the denominator and uses all L - 2 pairs of
    heads. Put back, on our own projections, both of the release's oddities give the release's
    loss."""
    x, labels = inputs("full")
    outputs = gated_forward(model.train(), *x, hard=True)[1]
    u = [
        F.normalize(head.project(head(h, x[2])[1]), dim=-1)
        for head, h in zip(model.heads[:-1], outputs)
    ]
    odd = 0
    for a, b in list(zip(u, u[1:]))[:-1]:  # one pair short
        s = torch.exp(a @ b.transpose(1, 2) / 0.55)
        positive = s.diagonal(dim1=1, dim2=2)
        odd = (
            odd - torch.log(positive / (s.sum(-1) - positive)).mean()
        )  # no positive below the line
    task = phase2_loss(model, *x, labels, eta2=0.0)
    close(0.8 * task + 0.2 * odd / 3, expected("full/contrast/phase2/loss"))
    assert (
        abs(
            phase2_loss(model, *x, labels, eta2=0.2, tau2=0.55)
            - expected("full/contrast/phase2/loss")
        )
        > 1e-3
    )


@pytest.mark.parametrize("threshold", ["0.0", "0.6", "0.9", "1.05"])
@pytest.mark.parametrize("skip", [True, False])
def test_dynamic_inference(model, threshold, skip):
    """The whole batch at once gives what the release gives one example at a time: logits, skipped
    layers, exit layer."""
    (ids, segment_ids, mask), _ = inputs("padded")
    where = f"infer/threshold_{threshold}/{'skip' if skip else 'noskip'}"
    outcome = infer(
        model.eval(),
        ids,
        segment_ids,
        mask,
        skip=skip,
        criterion=entropy_below(float(threshold)),
        batch_tokens=30,
    )
    close(outcome.logits, expected(f"{where}/logits"))
    assert torch.equal(outcome.exit, expected(f"{where}/exit"))
    reached = torch.arange(1, 6) <= outcome.exit[:, None]
    assert torch.equal(~outcome.ran & reached, expected(f"{where}/skipped"))
    for row, S in enumerate(
        mask.sum(1).tolist()
    ):  # and so does the method written for one example
        logits, ran, exit = infer_one(
            model, ids[row : row + 1, :S], segment_ids[row : row + 1, :S], float(threshold), skip
        )
        close(logits[0], expected(f"{where}/logits")[row])
        assert exit == expected(f"{where}/exit")[row]
        assert ran == [i + 1 for i in range(exit) if not expected(f"{where}/skipped")[row, i]]
