"""All that comes from outside: GLUE's files, BERT's weights, the tokenizer; batches and metrics.

    splits = load_task("rte", data_dir="~/glue")                # {"train": Split, "dev": Split}
    tokenizer = load_tokenizer("path/to/bert-base-uncased")
    for batch in batches(encode(tokenizer, splits["train"]), 32, seed=1): ...

The eight tasks of GLUE (Wang et al., 2019) are those of the paper. load_task("toy") needs no file.
Dimensions: N examples of a split, B of a batch, S tokens of the longest example in a batch.
"""

import hashlib
import json
import os
import random
import secrets
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import requests
import torch
from tokenizers.implementations import BertWordPieceTokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data/"
SENTEVAL_URL = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"
LARGEST = 4 * 2**30         # bytes that a file in a zip may unpack to
MOST_HELD = 2000            # held-out rows at most: more would select no better
CHUNK = 10_000              # texts encoded at a time, to save memory


class UserError(ValueError):
    """An error that the user can mend; the message is one line: what is wrong and what to do."""


# --- The tasks ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Task:
    """One classification task."""
    name: str
    folder: str                                 # GLUE's folder
    columns: tuple = ("sentence1", "sentence2", "label")    # text, second text (or None), label
    labels: tuple[str, ...] = ("0", "1")        # as in the files; the position is the class id
    metrics: tuple[str, ...] = ("accuracy",)    # the first is the main one
    devs: tuple[str, ...] = ("dev",)
    archive: str = ""                           # the zip under GLUE_URL; MRPC has none
    header: tuple[str, ...] = ()                # column names of a file without a header line


ENTAILMENT = ("entailment", "not_entailment")
TASKS = {task.name: task for task in (
    Task("cola", "CoLA", ("sentence", None, "label"), metrics=("matthews",), archive="CoLA.zip",
         header=("source", "label", "mark", "sentence")),
    Task("sst2", "SST-2", ("sentence", None, "label"), archive="SST-2.zip"),
    Task("mrpc", "MRPC", ("#1 String", "#2 String", "Quality"), metrics=("f1", "accuracy")),
    Task("qqp", "QQP", ("question1", "question2", "is_duplicate"), metrics=("f1", "accuracy"),
         archive="QQP-clean.zip"),
    Task("mnli", "MNLI", ("sentence1", "sentence2", "gold_label"), archive="MNLI.zip",
         labels=("contradiction", "entailment", "neutral"),
         devs=("dev_matched", "dev_mismatched")),
    Task("qnli", "QNLI", ("question", "sentence", "label"), ENTAILMENT, archive="QNLIv2.zip"),
    Task("rte", "RTE", labels=ENTAILMENT, archive="RTE.zip"),
    Task("wnli", "WNLI", archive="WNLI.zip"),
    Task("toy", "", (), labels=("a", "b", "c")),
)}


def find_task(name: str) -> Task:
    """The task of that name. Raises UserError with the names that there are."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r:.60}: use one of {', '.join(TASKS)}")
    return TASKS[name]


# --- Reading ------------------------------------------------------------------------------------

@dataclass
class Split:
    """N examples, not encoded until `encode` gives them ids and segment_ids."""
    texts: list[tuple[str, str | None]]         # text, second text or None
    labels: list[int]                           # class ids
    levels: list[int] | None = None             # the toy's difficulty
    ids: list[np.ndarray] = field(default_factory=list)             # token ids, int32
    segment_ids: list[np.ndarray] = field(default_factory=list)     # 0 or 1, uint8
    partial: bool = False                       # whether they come from a *.partial.tsv

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices) -> "Split":
        """The examples at these positions, in this order."""
        chosen = {name: [values[i] for i in indices] for name, values in vars(self).items()
                  if isinstance(values, list) and values}
        return replace(self, **chosen)


def load_task(name: str, data_dir: str | Path | None = None, cache: str | Path | None = None,
              seed: int = 0) -> dict[str, Split]:
    """{"train": Split, "dev": Split}, or "dev_matched" and "dev_mismatched" for mnli.

    data_dir holds GLUE's folders or is the task's own. Without it the official files are
    downloaded into the cache folder. seed is that of the toy task. Raises UserError.
    """
    task = find_task(name)
    if name == "toy":
        return toy(seed=seed)
    base = Path(os.path.expanduser(data_dir)) if data_dir else cache_dir(cache) / "glue"
    folder, splits = base / task.folder, ("train", *task.devs)
    if not data_dir and not all((folder / f"{split}.tsv").is_file() for split in splits):
        try:
            (unpack if task.archive else assemble_mrpc)(task, folder)
        except OSError as error:
            raise UserError(f"could not write {folder} ({error.strerror}): make room there, or "
                            f"name another cache folder")
    where = folder if folder.is_dir() else base
    return {split: read_split(task, where, split) for split in splits}


def read_lines(path: Path, advice: str) -> list[str]:
    """The lines of a UTF-8 text, with or without BOM, except blank lines at its end. The path - is
    standard input. Raises UserError, which ends with the advice.

    Only \\n and \\r\\n end a line. GLUE's sentences hold other characters, such as U+2028, at
    which str.splitlines would split.
    """
    try:
        with sys.stdin.buffer if str(path) == "-" else path.open("rb") as file:
            lines = [line.removesuffix(b"\n").removesuffix(b"\r").decode() for line in file]
    except (OSError, UnicodeDecodeError, AttributeError):   # sys.stdin is None where it is closed
        raise UserError(f"{path} is missing, or is not UTF-8 text: {advice}")
    while lines and not lines[-1]:
        lines.pop()
    return [lines[0].removeprefix("\ufeff"), *lines[1:]] if lines else [""]


def read_split(task: Task, folder: Path, split: str) -> Split:
    """One tsv file, without quoting: split.tsv, else split.partial.tsv. Raises UserError.

    Rows with more or fewer fields than the header, and MNLI's rows without a gold label, are left
    out, counted and named on stderr.
    """
    path, part = folder / f"{split}.tsv", folder / f"{split}.partial.tsv"
    path = part if part.is_file() and not path.is_file() else path
    advice = f"put {task.folder}'s {split}.tsv there"
    lines = read_lines(path, advice)
    header, first = (task.header, 1) if task.header else (lines.pop(0).split("\t"), 2)
    for name in filter(None, task.columns):
        if header.count(name) != 1:
            raise UserError(f"{path} has {header.count(name)} columns {name!r} in its first line, "
                            f"not one: {advice}")
    texts, labels, left_out = [], [], []
    at, second_at, label_at = (header.index(name) if name else None for name in task.columns)
    for number, line in enumerate(lines, first):
        cells = line.split("\t")
        if len(cells) != len(header) or (task.name == "mnli" and cells[label_at] == "-"):
            left_out.append(str(number))
            continue
        if cells[label_at] not in task.labels:
            raise UserError(f"{path}, line {number}: label {cells[label_at]!r:.60} is none of "
                            f"{', '.join(task.labels)}: {advice}")
        labels.append(task.labels.index(cells[label_at]))
        texts.append((cells[at], None if second_at is None else cells[second_at]))
    if not labels:
        raise UserError(f"{path} holds no examples ({len(left_out)} rows left out): {advice}")
    if left_out:
        where = ", ".join(left_out[:5] + ["..."] * (len(left_out) > 5))
        print(f"{path}: left out {len(left_out)} rows that do not have {len(header)} fields, or "
              f"have no gold label (line {where})", file=sys.stderr)
    return Split(texts, labels, partial=path == part)


def own_examples(task: Task, texts: list[str] | None, path: str | None) -> Split:
    """The user's own examples, without labels: one text or pair from the command line, or one for
    each line of a file (- is standard input), with a tab between the two texts of a pair. Raises
    UserError."""
    if texts:
        lines = ["\t".join(texts)]
    else:
        lines = read_lines(Path(path), "name a file with a sentence a line, or - for stdin")
    pair, examples = bool(task.columns and task.columns[1]), []
    wanted = "two sentences, in a file with a tab between them" if pair else "one sentence"
    for number, line in enumerate(lines, 1):
        parts = line.split("\t")
        if len(parts) != 1 + pair or not all(part.strip() for part in parts):
            raise UserError(f"example {number} is {' | '.join(parts)!r:.60}, but {task.name} "
                            f"takes {wanted}: in quotes on the command line, a line each in a "
                            f"file")
        if any("\ud800" <= character <= "\udfff" for character in line):
            raise UserError(f"example {number} is not UTF-8 text: give it in that encoding")
        examples.append((parts[0], parts[1] if pair else None))
    return Split(examples, [0] * len(examples))


# --- The held-out part --------------------------------------------------------------------------

def digest(split: Split) -> str:
    """SHA-256 of the texts and labels of a split, in their order: it identifies the examples."""
    sha = hashlib.sha256()
    for example in zip(split.texts, split.labels):
        sha.update(repr(example).encode("utf-8", "surrogatepass"))
    return sha.hexdigest()


def hold_out(split: Split, share: float = 0.1, seed: int = 0) -> tuple[Split, Split]:
    """(training part, held-out part), both in the order of the split. A share (0..1) of each class
    is drawn at random, at most about MOST_HELD rows in all. Raises UserError."""
    share = min(share, MOST_HELD / max(len(split), 1))
    rng, held = random.Random(seed), set()
    for label in sorted(set(split.labels)):
        members = [i for i, other in enumerate(split.labels) if other == label]
        held.update(rng.sample(members, round(share * len(members))))
    if len(held) == len(split):
        raise UserError(f"nothing is left to train on: a share of {share} holds out all "
                        f"{len(split)} examples, use a smaller share or more examples")
    rest = [i for i in range(len(split)) if i not in held]
    return split.select(rest), split.select(sorted(held))


# --- Files and downloads ------------------------------------------------------------------------

def cache_dir(folder: str | Path | None = None) -> Path:
    """The argument, else SMARTBERT_CACHE, else smartbert/ in the user's cache directory."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "smartbert"
    return Path(os.path.expanduser(folder or os.environ.get("SMARTBERT_CACHE") or usual))


def atomic_write(path: str | Path, save: Callable) -> None:
    """Write a file whole or not at all. save(file) writes a temporary file beside it, which then
    takes its name. Two processes that write the same path do not share a temporary file."""
    path, temporary = Path(path), Path(f"{path}.{secrets.token_hex(4)}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "xb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)               # it is still there only after an error


def write_json(path: str | Path, value) -> None:
    atomic_write(path, lambda file: file.write(json.dumps(value, indent=1).encode() + b"\n"))


def download(url: str, path: Path) -> None:
    """Fetch url to path, whole or not at all, unless path is there. Raises UserError, OSError."""
    advice = f"run again, or fetch {url} by hand and put it at {path}"

    def save(file) -> None:
        headers = {"Accept-Encoding": "identity"}       # else Content-Length is a compressed size
        with requests.get(url, stream=True, timeout=30, headers=headers) as answer:
            answer.raise_for_status()
            size = int(answer.headers.get("Content-Length", 0))
            with tqdm(desc=path.name, total=size, unit="B", unit_scale=True, disable=None) as bar:
                for chunk in answer.iter_content(1 << 16):
                    bar.update(file.write(chunk))
        if size not in (0, file.tell()):
            raise UserError(f"{path.name} came with {file.tell()} of {size} bytes: {advice}")
    try:
        if not path.is_file():
            atomic_write(path, save)
    except requests.RequestException as error:
        status = getattr(error.response, "status_code", "no connection, or it broke")
        raise UserError(f"could not download {path.name} ({status}): {advice}")


def unpack(task: Task, folder: Path) -> None:
    """The tsv files of GLUE's zip, and nothing else, into folder. Raises UserError, OSError."""
    archive, tables = folder.parent / task.archive, {}
    download(GLUE_URL + task.archive, archive)
    try:
        with zipfile.ZipFile(archive) as files:         # other names in the zip are never read
            for split in ("train", *task.devs):
                member = files.getinfo(f"{task.folder}/{split}.tsv")
                if member.file_size > LARGEST:
                    raise ValueError(f"{member.filename} unpacks to over {LARGEST} bytes")
                tables[split] = files.read(member)
    except Exception as error:                          # a damaged zip raises nearly anything
        archive.unlink(missing_ok=True)
        raise UserError(f"{archive} is truncated, damaged or not GLUE's ({error}): it is removed, "
                        f"run again to download it")
    for split, table in tables.items():
        atomic_write(folder / f"{split}.tsv", lambda file: file.write(table))


def assemble_mrpc(task: Task, folder: Path) -> None:
    """MRPC's two files from Microsoft's text: dev.tsv is the rows whose two ids GLUE lists. Raises
    UserError, OSError."""
    text, dev_ids = folder.parent / "msr_paraphrase_train.txt", folder.parent / "mrpc_dev_ids.tsv"
    download(SENTEVAL_URL + text.name, text)
    download(GLUE_URL + dev_ids.name, dev_ids)
    advice = "remove it and run again to download it"
    header, *lines = read_lines(text, advice)
    listed = {tuple(line.split()) for line in read_lines(dev_ids, advice) if line[:1].isdigit()}
    in_dev = [tuple(line.split("\t")[1:3]) in listed for line in lines]
    if not listed or sum(in_dev) < len(listed):
        raise UserError(f"{text if listed else dev_ids} lacks rows of the dev set: {advice}")
    for split, wanted in (("train", False), ("dev", True)):
        table = [header] + [line for line, dev in zip(lines, in_dev) if dev == wanted]
        atomic_write(folder / f"{split}.tsv", lambda file: file.write("\n".join(table).encode()))


def fetch_weights(name: str, cache: str | Path | None = None) -> Path:
    """A folder with BERT's weights: `name` itself where it is one, else a download of that name
    from the Hugging Face hub. Raises UserError.

    Downloads stay in weights/ of the cache folder where one is named, else in the hub's own cache.
    The variables of huggingface_hub apply, such as HF_ENDPOINT and HF_HUB_OFFLINE.
    """
    if os.path.isdir(os.path.expanduser(name)):
        return Path(os.path.expanduser(name))
    import huggingface_hub.utils                        # here: it takes half a second
    named = cache or os.environ.get("SMARTBERT_CACHE")
    where = cache_dir(named) / "weights" if named else None
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    files = "config.json vocab.txt tokenizer_config.json tokenizer.json pytorch_model.bin".split()
    fetch = huggingface_hub.snapshot_download
    try:
        folder = Path(fetch(name, cache_dir=where, allow_patterns=files))
        if not (folder / "pytorch_model.bin").is_file():
            fetch(name, cache_dir=where, allow_patterns="model.safetensors", revision=folder.name)
        return folder
    except Exception as error:      # of the library, of the system, of requests or httpx
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"weights {name!r:.60} are not a folder, and did not come from the hub "
                        f"({reason}): check the name and the connection, or name a folder "
                        f"with config.json, vocab.txt and pytorch_model.bin")


# --- Tokens and batches -------------------------------------------------------------------------

# What tokenizer_config.json may say: the only values that are supported, and the choices that are
# obeyed, with their names in the normalizer of tokenizer.json.
FIXED = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
         "mask_token": "[MASK]", "do_basic_tokenize": True, "never_split": None}
CHOICES = {"do_lower_case": "lowercase", "strip_accents": "strip_accents",
           "tokenize_chinese_chars": "handle_chinese_chars"}


def read_object(path: Path) -> dict:
    """The JSON object in a file, {} where there is no file. Raises UserError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, OSError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: remove it and download it again")
    return value


def tokenizer_choices(folder: Path) -> dict[str, bool | None]:
    """The CHOICES that tokenizer_config.json states, or else tokenizer.json, by their names in the
    latter. Raises UserError for what cannot be obeyed."""
    path = folder / "tokenizer_config.json"
    config, rules = read_object(path), read_object(folder / "tokenizer.json").get("normalizer")
    for name, usual in FIXED.items():
        value = config.get(name, usual)
        value = value.get("content") if isinstance(value, dict) else value
        if value != usual and (name, value) != ("never_split", []):
            raise UserError(f"{path}: {name} is {value!r:.60}, but only {usual!r} is supported: "
                            f"use other weights")
    usable = isinstance(rules, dict) and rules.get("type") == "BertNormalizer"
    stated = {name: rules[name] for name in CHOICES.values() if name in rules} if usable else {}
    stated |= {CHOICES[name]: config[name] for name in CHOICES if name in config}
    for name, value in stated.items():
        if not isinstance(value, bool) and (name, value) != ("strip_accents", None):
            raise UserError(f"{path} or tokenizer.json: {name} is {value!r:.60}, not true or "
                            f"false: correct it, or download the file again")
    return stated


def load_tokenizer(folder: str | Path) -> BertWordPieceTokenizer:
    """BERT's WordPiece tokenizer over folder/vocab.txt: a token a line, its id the line's number
    from 0. Where no file states the case it is lower-case, and the vocabulary must be so too.
    Raises UserError."""
    path = Path(folder) / "vocab.txt"
    words = read_lines(path, "a weights folder holds config.json, vocab.txt and pytorch_model.bin")
    missing = {"[PAD]", "[UNK]", "[CLS]", "[SEP]"} - set(words)
    if missing or len(set(words)) < len(words):
        fault = f"lacks {' '.join(sorted(missing))}" if missing else "has a line twice"
        raise UserError(f"{path} is not a BERT vocabulary, it {fault}: download it again")
    stated = tokenizer_choices(Path(folder))
    capital = next((word for word in words if word != word.lower() and word[0] != "["), None)
    if capital is not None and "lowercase" not in stated:
        raise UserError(f"{path} has upper-case words such as {capital!r:.60}: put a "
                        f"tokenizer_config.json beside it with do_lower_case true or false")
    return BertWordPieceTokenizer({word: i for i, word in enumerate(words)}, **stated)


def write_vocabulary(tokenizer: BertWordPieceTokenizer, folder: str | Path) -> None:
    """vocab.txt and the settings, so that `load_tokenizer(folder)` gives the same tokenizer."""
    vocab, rules = tokenizer.get_vocab(), tokenizer.normalizer
    text = "".join(f"{word}\n" for word in sorted(vocab, key=vocab.get))
    atomic_write(Path(folder) / "vocab.txt", lambda file: file.write(text.encode()))
    write_json(Path(folder) / "tokenizer_config.json",
               {ours: getattr(rules, theirs) for ours, theirs in CHOICES.items()})


def encode(tokenizer: BertWordPieceTokenizer, split: Split, max_length: int = 128) -> Split:
    """The split with token and segment ids: [CLS] text [SEP], or [CLS] text [SEP] second [SEP].
    Where there are more than max_length tokens, the longer text is cut first."""
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    ids, segment_ids = [], []
    for start in range(0, len(split), CHUNK):
        chunk = [text if second is None else (text, second)
                 for text, second in split.texts[start:start + CHUNK]]
        for row in tokenizer.encode_batch(chunk):
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
    index: Tensor           # (B,) long, the positions in the split

    def to(self, device: str | torch.device) -> "Batch":
        return Batch(*(value.to(device) for value in vars(self).values()))


def collate(split: Split, indices: list[int]) -> Batch:
    """These examples as one batch, padded with 0 to the longest of them."""
    ids, segment_ids = (pad_sequence([torch.from_numpy(rows[i]) for i in indices], True).long()
                        for rows in (split.ids, split.segment_ids))                     # (B, S)
    lengths = torch.tensor([len(split.ids[i]) for i in indices])                        # (B,)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]                                # (B, S)
    labels = torch.tensor([split.labels[i] for i in indices])
    return Batch(ids, segment_ids, mask, labels, torch.tensor(indices))


def batch_indices(split: Split, size: int, seed: int | None = None) -> list[list[int]]:
    """The positions of the examples of each batch. Similar lengths go together, for little
    padding.

    Without a seed all are sorted by length, for evaluation. With a seed they are shuffled, sorted
    only within pools of 50 batches, and the batches are shuffled again, for training.
    """
    lengths = np.array([len(row) for row in split.ids])                                 # (N,)

    def cut(rows: np.ndarray) -> list[list[int]]:
        rows = rows[lengths[rows].argsort(kind="stable")].tolist()
        return [rows[i:i + size] for i in range(0, len(rows), size)]

    if seed is None:
        return cut(np.arange(len(split)))
    rng = np.random.default_rng(seed)
    order, pool = rng.permutation(len(split)), 50 * size
    made = [rows for i in range(0, len(order), pool) for rows in cut(order[i:i + pool])]
    return [made[i] for i in rng.permutation(len(made))]


def batches(split: Split, size: int, seed: int | None = None) -> Iterator[Batch]:
    """The split in the batches of `batch_indices`, each padded to its own longest example."""
    return (collate(split, indices) for indices in batch_indices(split, size, seed))


# --- Metrics ------------------------------------------------------------------------------------

def scores(task: Task, predictions: list[int], labels: list[int]) -> dict[str, float]:
    """The task's metrics, the main one first. Accuracy and F1 of class 1 are in 0..1, Matthews'
    correlation in -1..1. F1 and Matthews' are 0 where they are undefined."""
    p, y = np.asarray(predictions), np.asarray(labels)
    tn, fp, fn, tp = np.bincount(2 * (y == 1) + (p == 1), minlength=4).tolist()
    spread = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    values = {"accuracy": float(np.mean(p == y)),
              "f1": 2 * tp / (2 * tp + fp + fn) if tp else 0.0,
              "matthews": (tp * tn - fp * fn) / spread if spread else 0.0}
    return {metric: values[metric] for metric in task.metrics}


def majority(task: Task, labels: list[int]) -> dict[str, float]:
    """The scores of a model that always gives the most frequent class."""
    return scores(task, [int(np.bincount(labels).argmax())] * len(labels), labels)


# --- The toy task -------------------------------------------------------------------------------

OWNERS = ("cat dog king queen baker sailor child teacher farmer clown judge nurse poet pilot "
          "thief monk singer hunter painter miller soldier doctor wizard bear").split()
THINGS = ("coin pea ball ring key stone pearl bean shell nut dice button marble plum cherry "
          "thimble ruby candle feather bell crown spoon glove ticket").split()
CUPS, SWAPS = ("a", "b", "c"), ("ab", "bc", "ac")


def swap(cup: str, pair: str) -> str:
    """The new place of what was under a cup when the two cups of a pair change places."""
    return pair.replace(cup, "") if cup in pair else cup


def toy(train: int = 3600, dev: int = 900, seed: int = 0) -> dict[str, Split]:
    """A thing is hidden under one of three cups, and pairs of cups change places. Under which cup
    is it at the end? Level k of 0 .. 2 has k swaps:

        level 0:  king coin b            -> b
        level 1:  king coin b ab         -> a
        level 2:  king coin b ab ac      -> c

    What a swap does depends on where the swap before left the thing: in principle level k needs k
    + 1 layers, though a wide layer may learn the few cases of two steps by heart. One swap leads
    from every cup to each cup, so no single word tells the answer, and no sum of word scores does.
    At each level the labels are equally many. In the dev set the levels are equally many; in
    training half of the sentences are of level 2, which is learned last. No sentence occurs twice.
    """
    rng, rows = random.Random(seed), {}                 # text -> label, level
    while len(rows) < train + dev:                      # the training rows, then the dev rows
        n, mix = (len(rows), (0, 1, 2, 2)) if len(rows) < train else (len(rows) - train, (0, 1, 2))
        level, label = mix[n // 3 % len(mix)], n % 3
        pairs, cup = rng.choices(SWAPS, k=level), CUPS[label]
        for pair in reversed(pairs):                    # back to where the thing was hidden
            cup = swap(cup, pair)
        text = " ".join([rng.choice(OWNERS), rng.choice(THINGS), cup, *pairs])
        rows.setdefault(text, (label, level))           # one that is there is drawn again
    labels, levels = [label for label, _ in rows.values()], [level for _, level in rows.values()]
    whole = Split([(text, None) for text in rows], labels, levels)
    return {"train": whole.select(range(train)), "dev": whole.select(range(train, train + dev))}


def toy_tokenizer() -> BertWordPieceTokenizer:
    """A tokenizer whose vocabulary is the toy grammar's words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *OWNERS, *THINGS, *CUPS, *SWAPS]
    return BertWordPieceTokenizer({word: i for i, word in enumerate(words)})
