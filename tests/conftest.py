"""What several test files share: a tiny model of odd sizes, and the folder with real data."""

import builtins
import io
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

# No test asks the hub or reads the user's cache: its library reads these when it is loaded, here,
# because its log stays bound to the stderr of that moment, which a test would close.
HUB_HOME = tempfile.TemporaryDirectory(prefix="smartbert-tests-")
os.environ |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": HUB_HOME.name}
os.environ.pop("HF_HUB_OFFLINE", None)

import huggingface_hub.file_download  # noqa: F401
import pytest
import torch
from safetensors.torch import save_file

import train
from bert import Bert, BertConfig, name_table
from smartbert import SmartBert

train.DEVICES[:] = ["cpu"]  # whatever this machine has
torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it gives


@pytest.fixture
def shared() -> Path:
    """The folder with real GLUE data and weights."""
    folder = os.environ.get("SMARTBERT_SHARED")
    if not folder:
        pytest.skip("SMARTBERT_SHARED is not set: no real data and weights to test with")
    return Path(folder)


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """refused(main, arguments, *words): the script ends with status 2 and one line on stderr,
    which has the words that help. Returns that line."""

    def check(main, arguments, *words: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:  # any other exception would be a traceback
            main([str(argument) for argument in arguments])
        said = capsys.readouterr().err.strip().splitlines()
        if said[0].startswith("usage:"):  # argparse's own errors
            said.pop(0)
        assert stop.value.code == 2 and len(said) == 1, said
        assert all(word in said[0] for word in words), (words, said[0])
        return said[0]

    monkeypatch.chdir(tmp_path)
    return check


def tiny_model(seed=0, classes=3, layers=5, dropout=0.0) -> SmartBert:
    """5 layers, 20 wide, random enough that gates and heads disagree from row to row."""
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=41, hidden_size=20, num_hidden_layers=layers,
                        num_attention_heads=5, intermediate_size=28, max_position_embeddings=17,
                        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
                        initializer_range=0.4)
    model = SmartBert(Bert(config), classes, gate_bias=0.0)
    with torch.no_grad():
        for gate in model.gates:  # far from 1/2, so that no rounding flips a decision
            gate.out.weight.mul_(30)
        for head in model.heads:
            head.out.weight.mul_(3)
    return model.eval()


def tiny_batch(seed=0, rows=9, longest=13) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, segment_ids, mask (rows, longest): lengths from 2 on, with rubbish in the padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 41, (rows, longest), generator=generator)
    segment_ids = torch.randint(0, 2, (rows, longest), generator=generator)
    lengths = torch.randint(2, longest + 1, (rows,), generator=generator)
    lengths[0] = longest
    return ids, segment_ids, torch.arange(longest) < lengths[:, None]


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
TINY_WORDS = [*SPECIAL, *CHARACTERS, *(f"##{c}" for c in CHARACTERS)]


def tokenizer_json(words: list[str] = TINY_WORDS, **changes) -> dict:
    """What transformers 5 writes into tokenizer.json for a BertTokenizer with these words."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    def part(name: str, segment: int) -> dict:
        kind = "SpecialToken" if name in SPECIAL else "Sequence"
        return {kind: {"id": name, "type_id": segment}}
    single = [part("[CLS]", 0), part("A", 0), part("[SEP]", 0)]
    ends = {name: {"id": name, "ids": [words.index(name)], "tokens": [name]}
            for name in ("[CLS]", "[SEP]")}
    return {"version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": word, **flags, "special": True}
                         for i, word in enumerate(words) if word in SPECIAL],
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "lowercase": True,
                       "handle_chinese_chars": True, "strip_accents": None},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "post_processor": {"type": "TemplateProcessing", "single": single,
                           "pair": [*single, part("B", 1), part("[SEP]", 1)],
                           "special_tokens": ends},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": dict(zip(words, range(len(words))))},
    } | changes


def save_tiny_weights(folder: Path, old: bool = False) -> Path:
    """A weights folder in the hub's layout: two layers, 8 wide, an alphabet of word pieces. As
    transformers 5 saves it, or as the oldest models are: pytorch_model.bin and vocab.txt."""
    config = BertConfig(vocab_size=len(TINY_WORDS), hidden_size=8, num_hidden_layers=2,
                        num_attention_heads=2, intermediate_size=12, max_position_embeddings=24)
    parts = Bert(config).state_dict()
    tensors = {"pooler.dense.weight": torch.eye(8), "pooler.dense.bias": torch.zeros(8)}
    for ours, theirs in name_table(config).items():
        tensors |= dict(zip(theirs, (part.clone() for part in parts[ours].chunk(len(theirs)))))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(asdict(config) | {"model_type": "bert"}))
    if old:
        torch.save(tensors, folder / "pytorch_model.bin")
        (folder / "vocab.txt").write_text("\n".join(TINY_WORDS) + "\n")
        return folder
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    stated = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    return folder


@pytest.fixture
def weights_refused(refused, tmp_path):
    """weights_refused(weights, *words): RTE's training from these weights ends as in `refused`."""
    rows = "a\tb\tentailment\nc d\te\tnot_entailment\n" * 5
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("sentence1\tsentence2\tlabel\n" + rows)
    settings = [*"--task rte --max-length 16 --epochs1 1 --out run --data-dir".split(), tmp_path]
    return lambda weights, *words: refused(train.main, [*settings, "--weights", weights], *words)


@pytest.fixture
def lock(monkeypatch):
    """lock(path): from now on the system lets nobody read this file."""
    real = builtins.open

    def lock(path: Path) -> None:
        def refuse(file, *arguments, **others):
            if str(file) == str(path):
                raise PermissionError(13, "Permission denied", str(path))
            return real(file, *arguments, **others)

        for place in (builtins, io, Path):  # each has an open of its own
            monkeypatch.setattr(place, "open", refuse)

    return lock
