"""GLUE's and the toy's examples as batches of tokens; metrics; at the end files and downloads.

    splits = load_task("rte", data_dir="~/glue")                # {"train": Split, "dev": Split}
    tokenizer = load_tokenizer(Path("path/to/bert-base-uncased"))
    split = encode(tokenizer, splits["train"])
    for rows in training_batches(split, size=32, seed=1):
        batch = collate(split, rows)

The paper uses eight of GLUE's nine tasks (Wang et al., 2019); "toy" needs no file.
Dimensions: N examples of a split, B of a batch, S tokens of the longest example in a batch.
"""

import hashlib
import io
import json
import math
import os
import random
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import requests
import torch
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from torch import Tensor, nn
from tqdm import tqdm


class UserError(ValueError):
    """An error that the user can fix; the message is one line: what is wrong and what to do."""


# --- The tasks and their metrics ----------------------------------------------------------------

@dataclass(frozen=True)
class Task:
    """One of GLUE's tasks: where its files are, what is in them, how it is scored."""
    name: str
    folder: str                                 # GLUE's folder
    columns: tuple = ("sentence1", "sentence2", "label")    # text, second text (or None), label
    labels: tuple[str, ...] = ("0", "1")        # as in the files; the position is the class id
    metrics: tuple[str, ...] = ("accuracy",)    # the first is the main one
    devs: tuple[str, ...] = ("dev",)
    header: tuple[str, ...] = ()                # column names of a file without a header line


ENTAILMENT = ("entailment", "not_entailment")
TASKS = {task.name: task for task in (
    Task("toy", "", ("sentence", None, "label"), labels=("a", "b", "c")),
    Task("cola", "CoLA", ("sentence", None, "label"), metrics=("matthews",),
         header=("source", "label", "mark", "sentence")),
    Task("sst2", "SST-2", ("sentence", None, "label")),
    Task("mrpc", "MRPC", ("#1 String", "#2 String", "Quality"), metrics=("f1", "accuracy")),
    Task("qqp", "QQP", ("question1", "question2", "is_duplicate"), metrics=("f1", "accuracy")),
    Task("mnli", "MNLI", ("sentence1", "sentence2", "gold_label"),
         labels=("contradiction", "entailment", "neutral"),
         devs=("dev_matched", "dev_mismatched")),
    Task("qnli", "QNLI", ("question", "sentence", "label"), ENTAILMENT),
    Task("rte", "RTE", labels=ENTAILMENT),
    Task("wnli", "WNLI"),
)}


def scores(task: Task, predictions: list[int], labels: list[int]) -> dict[str, float]:
    """The task's metrics, the main one first, from N class ids each. F1 (of class 1) and Matthews'
    correlation are 0 where they are undefined."""
    p, y = np.asarray(predictions), np.asarray(labels)
    tn, fp, fn, tp = np.bincount(2 * (y == 1) + (p == 1), minlength=4).tolist()     # 2 y + p
    spread = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    values = {"accuracy": float(np.mean(p == y)),
              "f1": 2 * tp / max(2 * tp + fp + fn, 1),
              "matthews": (tp * tn - fp * fn) / max(spread, 1)}
    return {metric: values[metric] for metric in task.metrics}


# --- Examples -----------------------------------------------------------------------------------

@dataclass
class Split:
    """N examples, not encoded until `encode` gives them ids and segment_ids."""
    name: str                                   # train, held-out, dev, ...
    texts: list[tuple[str, str | None]]         # text, second text or None
    labels: list[int]                           # class ids
    levels: list[int] = field(default_factory=list)                 # the toy's difficulty
    ids: list[np.ndarray] = field(default_factory=list)             # token ids, int32
    segment_ids: list[np.ndarray] = field(default_factory=list)     # 0 or 1, uint8
    partial: bool = False                       # whether they come from a *.partial.tsv

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows) -> "Split":
        """The examples at these positions, in this order."""
        def pick(values: list) -> list:
            return [values[i] for i in rows if values]          # an empty list stays empty
        return replace(self, texts=pick(self.texts), labels=pick(self.labels), ids=pick(self.ids),
                       levels=pick(self.levels), segment_ids=pick(self.segment_ids))


def load_task(name: str, data_dir: str | None = None) -> dict[str, Split]:
    """{"train": Split, "dev": Split}; mnli has "dev_matched", "dev_mismatched". data_dir: GLUE's
    folder or the task's own; without it the files are downloaded, once. Raises UserError."""
    if name == "toy":
        return toy()
    task = TASKS[name]
    splits = ("train", *task.devs)
    if data_dir is None:
        folder = download_task(task, splits)
    else:
        folder = Path(data_dir).expanduser()
        if (folder / task.folder).is_dir():
            folder = folder / task.folder
    return {split: read_split(task, folder, split) for split in splits}


def read_split(task: Task, folder: Path, split: str) -> Split:
    """Read SPLIT.tsv or, if it is missing, SPLIT.partial.tsv. Quotation marks are plain text. Rows
    with a wrong number of fields or without a gold label are left out, with a warning."""
    path = folder / f"{split}.tsv"
    if not path.is_file():
        path = folder / f"{split}.partial.tsv"
    if not path.is_file():
        raise UserError(f"{folder} holds no {split}.tsv: name the folder with GLUE's files")
    lines = split_lines(path.read_bytes(), path)
    if task.header:
        lines.insert(0, "\t".join(task.header))
    header = lines[0].split("\t")
    missing = [column for column in task.columns if column not in (*header, None)]
    if missing:
        raise UserError(f"{path} has no column {missing[0]!r}: lay it out like {task.folder}'s")
    text, second, label = task.columns
    texts, labels, left_out = [], [], []
    for number, line in enumerate(lines[1:], 1):
        row = dict(zip(header, line.split("\t")))
        if line.count("\t") != len(header) - 1 or row[label] == "-":
            left_out.append(line)
            continue
        if row[label] not in task.labels:
            raise UserError(f"{path}, example {number}: label {row[label]!r:.60} is not one "
                            f"of {', '.join(task.labels)}")
        texts.append((row[text], row.get(second)))
        labels.append(task.labels.index(row[label]))
    if left_out:
        print(f"warning: {path}: left out {len(left_out)} rows without {len(header)} fields, or "
              f"without a gold label, such as {left_out[0]!r:.60}: fields can't be quoted, nor "
              f"hold line breaks", file=sys.stderr)
    if not labels:
        raise UserError(f"{path} holds no examples")
    return Split(split, texts, labels, partial=path.name.endswith(".partial.tsv"))


def hold_out(split: Split, share: float, seed: int, limit=None) -> tuple[Split, Split]:
    """(training part, held-out part) of the first `limit` examples, in the original order. A share
    (0..1) of each class is held out at random, never all of it; in all about 2000 rows at most."""
    split = split.select(range(len(split))[:limit])
    share = min(share, 2000 / len(split))
    rng, held = random.Random(seed), set()
    for label in sorted(set(split.labels)):
        members = [i for i, other in enumerate(split.labels) if other == label]
        held.update(rng.sample(members, min(round(share * len(members)), len(members) - 1)))
    training = split.select(sorted(set(range(len(split))) - held))
    return training, replace(split.select(sorted(held)), name="held-out")


# --- Tokens and batches -------------------------------------------------------------------------

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def load_tokenizer(folder: Path) -> Tokenizer | BertWordPieceTokenizer:
    """The tokenizer of a weights folder or of a run: tokenizer.json, or else vocab.txt. Raises
    UserError where there is neither, or where it is not BERT's."""
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    else:
        tokenizer = read_vocabulary(folder / "vocab.txt")
    tokenizer.no_truncation()                   # `encode` sets its own
    tokenizer.no_padding()
    empty = tokenizer.encode("", "")
    if list(zip(empty.tokens, empty.type_ids)) != [("[CLS]", 0), ("[SEP]", 0), ("[SEP]", 1)]:
        raise UserError(f"the tokenizer in {folder} is not BERT's: an empty pair becomes "
                        f"{empty.tokens} with segments {empty.type_ids}")
    return tokenizer


def encode(tokenizer: Tokenizer, split: Split, max_length: int = 128) -> Split:
    """The split with token and segment ids: [CLS] text [SEP], or [CLS] text [SEP] second [SEP].
    Where there are more than max_length tokens, the longer text is cut first."""
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    ids, segment_ids = [], []
    for text, second in split.texts:
        row = tokenizer.encode(text, second)
        ids.append(np.array(row.ids, np.int32))
        segment_ids.append(np.array(row.type_ids, np.uint8))
    return replace(split, ids=ids, segment_ids=segment_ids)


@dataclass
class Batch:
    """B examples, padded to S tokens."""
    ids: Tensor             # (B, S) long
    segment_ids: Tensor     # (B, S) long
    mask: Tensor            # (B, S) bool, True at real tokens
    labels: Tensor          # (B,) long
    rows: Tensor            # (B,) long, the positions in the split

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.ids, self.segment_ids, self.mask


def collate(split: Split, rows: list[int], device: str = "cpu") -> Batch:
    """These examples as one batch, padded with 0 to the longest of them."""
    def pad(values: list[np.ndarray]) -> Tensor:                                        # (B, S)
        tensors = [torch.from_numpy(values[i]) for i in rows]
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True).long()
    ids = pad(split.ids)
    lengths = torch.tensor([len(split.ids[i]) for i in rows])                           # (B,)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]                                # (B, S)
    labels = torch.tensor([split.labels[i] for i in rows])
    columns = (ids, pad(split.segment_ids), mask, labels, torch.tensor(rows))
    return Batch(*(column.to(device) for column in columns))


def training_batches(split: Split, size: int, seed: int) -> list[list[int]]:
    """One epoch's batches, as positions of examples. The examples are shuffled, then sorted by
    length within chunks of 50 batches to save padding. Finally the batches are shuffled."""
    rng, chunk, made = np.random.default_rng(seed), 50 * size, []
    order = rng.permutation(len(split)).tolist()
    for start in range(0, len(order), chunk):
        rows = sorted(order[start:start + chunk], key=lambda i: len(split.ids[i]))
        made += [rows[i:i + size] for i in range(0, len(rows), size)]
    return [made[i] for i in rng.permutation(len(made))]


def pools(split: Split, device: str = "cpu", largest: int = 1024) -> list[Batch]:
    """The split sorted by length, in the fewest batches of at most `largest` rows, about equal."""
    size = math.ceil(len(split) / math.ceil(len(split) / largest))
    order = sorted(range(len(split)), key=lambda i: len(split.ids[i]))
    return [collate(split, order[i:i + size], device) for i in range(0, len(order), size)]


# --- The toy task -------------------------------------------------------------------------------

OWNERS = ("cat dog king queen baker sailor child teacher farmer clown judge nurse poet pilot "
          "thief monk singer hunter painter miller soldier doctor wizard bear").split()
THINGS = ("coin pea ball ring key stone pearl bean shell nut dice button marble plum cherry "
          "thimble ruby candle feather bell crown spoon glove ticket").split()
CUPS, SWAPS = ("a", "b", "c"), ("ab", "bc", "ac")
# The toy's encoder. It is so narrow that it learns only if its initial weights have a standard
# deviation of 1 / sqrt(H), not BERT's 0.02. A wide inner layer would memorise pairs of swaps.
TOY_BERT = dict(hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=128,
                max_position_embeddings=128, initializer_range=64**-0.5,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def toy(train: int = 3600, dev: int = 900, seed: int = 0) -> dict[str, Split]:
    """A thing is hidden under one of three cups, and pairs of cups change places. Where is it?
    Level k has k swaps: "king coin b" -> b, "king coin b ab" -> a, "king coin b ab ac" -> c.

    What a swap does depends on where the thing is by then. So more swaps are harder, and no sum of
    word scores is enough. Labels are equally frequent, and so are the dev set's levels;
    half of the training sentences have level 2, which is learned last."""
    rng, splits, seen = random.Random(seed), {}, set()
    for name, size, levels in ("train", train, (0, 1, 2, 2)), ("dev", dev, (0, 1, 2)):
        split = splits[name] = Split(name, [], [])
        while len(split) < size:
            turn, label = divmod(len(split), 3)         # first the answer: a turn has each once
            swaps, cup = rng.choices(SWAPS, k=levels[turn % len(levels)]), CUPS[label]
            for swap in reversed(swaps):                # from there back to the first cup
                if cup in swap:
                    cup = swap.replace(cup, "")
            text = " ".join([rng.choice(OWNERS), rng.choice(THINGS), cup, *swaps])
            if text not in seen:                        # no sentence occurs twice
                seen.add(text)
                split.texts.append((text, None))
                split.labels.append(label)
                split.levels.append(len(swaps))
    return splits


def toy_tokenizer() -> BertWordPieceTokenizer:
    """A tokenizer whose vocabulary is the toy grammar's words."""
    words = [*SPECIAL, *OWNERS, *THINGS, *CUPS, *SWAPS]
    return BertWordPieceTokenizer({word: i for i, word in enumerate(words)})


# --- Files and downloads: a student may stop reading here ---------------------------------------

GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data/"
ARCHIVES = {"QQP": "QQP-clean", "QNLI": "QNLIv2"}       # the others are named like their folder
MRPC_URL = "https://dl.fbaipublicfiles.com/senteval/senteval_data/msr_paraphrase_train.txt"


def split_lines(content: bytes, source: str | Path) -> list[str]:
    """The lines of a UTF-8 text, except blank lines at its end. GLUE's sentences hold characters,
    such as U+2028, at which str.splitlines would split."""
    try:
        text = content.decode("utf-8-sig")              # without a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text: {error}") from error
    return text.replace("\r\n", "\n").rstrip("\n").split("\n")


def read_vocabulary(path: Path) -> BertWordPieceTokenizer:
    """BERT's WordPiece over vocab.txt, one token per line; like transformers it lower-cases
    texts unless tokenizer_config.json says otherwise. Refuses what vocab.txt cannot express."""
    if not path.is_file():
        raise UserError(f"{path.parent} holds neither tokenizer.json nor vocab.txt")
    words = split_lines(path.read_bytes(), path)
    advice = "save the tokenizer as tokenizer.json"
    stated = {}
    for file in (path.with_name("config.json"), *sorted(path.parent.glob("*token*.json"))):
        values = json.loads(file.read_text(encoding="utf-8"))
        values = {name: value for name, value in values.items() if value is not None}
        stated |= values
        added = list(values) if file.name == "added_tokens.json" else []
        for name in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
            more = values.get(name, [])
            added += more.values() if isinstance(more, dict) else more
        for token in added:
            if isinstance(token, dict):
                token = token["content"]
            if token not in SPECIAL:
                raise UserError(f"{file} adds the token {token!r}: {advice}")
    kind, unknown = str(stated.get("tokenizer_class")), str(stated.get("unk_token", "[UNK]"))
    if kind not in ("None", "BertTokenizer", "BertTokenizerFast") or "[UNK]" not in unknown:
        raise UserError(f"{path} is of a {kind} with {unknown} for unknown words: {advice}")
    vocabulary = dict(zip(words, range(len(words))))
    return BertWordPieceTokenizer(vocabulary, lowercase=stated.get("do_lower_case", True),
                                  strip_accents=stated.get("strip_accents"),
                                  handle_chinese_chars=stated.get("tokenize_chinese_chars", True))


def digest(split: Split) -> str:
    """SHA-256 of a split's texts and labels. A run stores it, to detect that its data changed."""
    examples = repr(list(zip(split.texts, split.labels)))
    return hashlib.sha256(examples.encode()).hexdigest()


def atomic_write(path: Path, save) -> None:
    """Write a file whole or not at all: save(file) fills a temporary one; then it is renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:            # torch.save makes the latter of the former
        raise UserError(f"could not write {path} (a full disk?): {in_words(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)               # it is there only after an error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text whole or not at all."""
    atomic_write(path, lambda file: file.write(text.encode()))


MADE_BY = '{"made_by": "SmartBERT, version 7"'      # run.json's beginning marks a folder as ours
# A run's files in the order in which they are deleted: run.json, which marks them, is last.
OURS = ("model.pt", "*.[0-9]*.tmp", "tokenizer.json", "eval.json", "eval-dev_mismatched.json",
        "page.html", "score.png", "criteria.png", "layers.png", "examples.png", "training.png",
        "run.json")


def check_folder(folder: Path, resume: bool, overwrite: bool) -> bool:
    """Whether the folder holds a run to resume. Raises UserError where something is in the way."""
    if not list(folder.glob("*")):
        return False
    start = "no file"
    if (folder / "run.json").is_file():
        start = (folder / "run.json").read_text(errors="replace")[:len(MADE_BY)]
    if start not in (MADE_BY, ""):                      # an empty one is left by a crash
        raise UserError(f"--out {folder} is not empty and not a run of this version: name another")
    if resume and (folder / "model.pt").is_file():
        for path in folder.glob("*.[0-9]*.tmp"):        # left by a kill
            path.unlink()
        return True
    if not overwrite:
        raise UserError(f"{folder} already holds a run: continue it with --resume (if it has a "
                        f"model.pt), replace it with --overwrite, or name another --out")
    return False


def claim_folder(folder: Path, overwrite: bool) -> None:
    """Make a run's folder, without a former run's files. Of two runs at once, one is refused."""
    if overwrite:
        for pattern in OURS:
            for path in folder.glob(pattern):
                path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "run.json", "x", encoding="utf-8") as file:
        file.write(MADE_BY)


def download(url: str) -> bytes:
    """Download url; show a progress bar if stderr is a terminal."""
    try:
        with requests.get(url, stream=True, timeout=30) as answer:
            answer.raise_for_status()
            chunks = answer.iter_content(2**20)
            return b"".join(tqdm(chunks, desc=url, unit="MiB", disable=None))
    except requests.RequestException as error:          # also where it comes truncated
        raise UserError(f"could not download {url}: {error}") from error


def download_task(task: Task, splits: tuple[str, ...]) -> Path:
    """The task's folder in SMARTBERT_CACHE (or ~/.cache/smartbert), downloaded if need be."""
    cache = os.environ.get("SMARTBERT_CACHE", "~/.cache/smartbert")
    folder = Path(cache).expanduser() / "glue" / task.folder
    if all((folder / f"{split}.tsv").is_file() for split in splits):
        return folder
    if task.name == "mrpc":
        texts = split_mrpc()
    else:
        url = f"{GLUE_URL}{ARCHIVES.get(task.folder, task.folder)}.zip"
        with zipfile.ZipFile(io.BytesIO(download(url))) as files:
            texts = {split: files.read(f"{task.folder}/{split}.tsv") for split in splits}
    for split, text in texts.items():
        atomic_write(folder / f"{split}.tsv", lambda file: file.write(text))
    return folder


def split_mrpc() -> dict[str, bytes]:
    """MRPC's two files from Microsoft's text: dev.tsv is the rows whose two ids GLUE lists."""
    header, *lines = split_lines(download(MRPC_URL), MRPC_URL)
    listed = split_lines(download(GLUE_URL + "mrpc_dev_ids.tsv"), GLUE_URL)
    listed, tables = {tuple(line.split()) for line in listed}, {"train": [header], "dev": [header]}
    for line in lines:
        ids = tuple(line.split("\t")[1:3])
        tables["dev" if ids in listed else "train"].append(line)
    return {split: "\n".join(table).encode() for split, table in tables.items()}


def fetch_weights(name: str) -> Path:
    """A folder with BERT's weights. name: a folder, or a name on the hub, which huggingface_hub
    downloads and caches. Raises UserError."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download, utils        # a slow import
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    files = ["*.json", "vocab.txt", "model.safetensors"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=files))
        if not (folder / "model.safetensors").is_file():
            snapshot_download(name, revision=folder.name, allow_patterns="pytorch_model.bin")
    except Exception as error:          # of the library, of the system, of requests or httpx
        cached = getattr(error, "snapshot_path", None)
        if cached is not None and list(Path(cached).glob("*model.*")):
            return Path(cached)                         # all that is needed was there
        raise UserError(f"--weights takes a folder or a name on the hub, and {name} is not a "
                        f"folder: {in_words(error)}") from error
    return folder


def in_words(error: BaseException) -> str:
    """Type and message of an exception and of its cause, in one line, without torch's advice."""
    words = f"{type(error).__name__}: {str(error).rpartition('WeightsUnpickler error: ')[2]}"
    if error.__cause__ is not None:
        words += f" from {error.__cause__!r}"
    return " ".join(words.split())[:700]


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Around a script's work: what the user can fix ends it with one line and status 2."""
    try:
        yield
        return
    except (UserError, OSError, zipfile.BadZipFile) as error:
        reason = error
    except (MemoryError, RuntimeError) as error:
        if "memory" not in in_words(error).lower():
            raise
        reason = f"in training, lower --batch-size or --max-length: {in_words(error)}"
    print(f"{program}: {reason}", file=sys.stderr)
    sys.exit(2)
