"""All that comes from outside: GLUE's files, Google's weights, the tokenizer, batches, metrics; and a toy task.

GLUE (Wang et al., 2019) is read as it is meant to be read: tab separated, no quoting, UTF-8. The eight tasks are the
paper's. Where nothing may be downloaded, load_task("toy") writes sentences of known difficulty on the spot.

    splits = load_task("rte", data_dir="~/glue")                # {"train": Split, "dev": Split}
    tokenizer = load_tokenizer("path/to/bert-base-uncased")
    for batch in batches(encode(tokenizer, splits["train"]), 32, seed=1): ...

Dimensions: B examples of a batch, S tokens of its longest. A UserError carries one line for the user.
"""

import difflib
import hashlib
import json
import os
import random
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import requests
import torch
from tokenizers.implementations import BertWordPieceTokenizer
from torch import Tensor
from tqdm import tqdm

try:
    import fcntl
except ImportError:         # Windows
    fcntl = None

GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data/"
SENTEVAL_URL = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"
HUB_URL = "https://huggingface.co/"
LARGEST = 4 * 2**30         # bytes that a file in a zip may unpack to


class UserError(ValueError):
    """What the user can mend: the message is one line that says what is wrong and what to do.

    train.py and eval.py print it and end with status 2.
    """


# --- The tasks --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Task:
    """One classification task."""
    name: str
    folder: str                                 # GLUE's folder
    columns: tuple = ("sentence1", "sentence2", "label")        # text, second text (or None), label, by name
    labels: tuple[str, ...] = ("0", "1")        # as they stand in the files; the position is the class id
    metrics: tuple[str, ...] = ("accuracy",)    # the first is the one that is compared
    devs: tuple[str, ...] = ("dev",)
    archive: str = ""                           # the zip under GLUE_URL; MRPC has none
    header: tuple[str, ...] = ()                # of files that have no header line of their own


ENTAILMENT = ("entailment", "not_entailment")
TASKS = {task.name: task for task in (
    Task("cola", "CoLA", ("sentence", None, "label"), metrics=("matthews",), archive="CoLA.zip",
         header=("source", "label", "mark", "sentence")),
    Task("sst2", "SST-2", ("sentence", None, "label"), archive="SST-2.zip"),
    Task("mrpc", "MRPC", ("#1 String", "#2 String", "Quality"), metrics=("f1", "accuracy")),
    Task("qqp", "QQP", ("question1", "question2", "is_duplicate"), metrics=("f1", "accuracy"), archive="QQP-clean.zip"),
    Task("mnli", "MNLI", ("sentence1", "sentence2", "gold_label"), labels=("contradiction", "entailment", "neutral"),
         devs=("dev_matched", "dev_mismatched"), archive="MNLI.zip"),
    Task("qnli", "QNLI", ("question", "sentence", "label"), labels=ENTAILMENT, archive="QNLIv2.zip"),
    Task("rte", "RTE", labels=ENTAILMENT, archive="RTE.zip"),
    Task("wnli", "WNLI", archive="WNLI.zip"),
    Task("toy", "", (), labels=("a", "b", "c")),
)}


def find_task(name: str) -> Task:
    """The task of that name. Raises UserError with the known names, the nearest first."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name.lower(), TASKS, 1, 0.4)
    raise UserError(f"unknown task {name!r}: {f'did you mean {near[0]}? ' if near else ''}known are {', '.join(TASKS)}")


@dataclass
class Split:
    """Examples of one split. texts: (text, second text or None); labels: class ids; levels: the toy's difficulty;
    ids, segment_ids: token and segment ids of each example, there once `encode` has run; partial: from a *.partial.tsv."""
    texts: list[tuple[str, str | None]]
    labels: list[int]
    levels: list[int] | None = None
    ids: list[list[int]] = field(default_factory=list)
    segment_ids: list[list[int]] = field(default_factory=list)
    partial: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices) -> "Split":
        """The examples at these positions, in this order."""
        return replace(self, **{name: [values[i] for i in indices] for name, values in vars(self).items()
                                if isinstance(values, list) and values})


def load_task(name: str, data_dir: str | Path | None = None, cache: str | Path | None = None,
              seed: int = 0) -> dict[str, Split]:
    """{"train": Split, "dev": Split} ("dev_matched", "dev_mismatched" for mnli), not encoded yet.

    data_dir holds GLUE's folders or is the task's own; without it the official files are downloaded into the cache.
    seed is the toy's. Raises UserError.
    """
    task = find_task(name)
    if name == "toy":
        return toy(seed=seed)
    base = cache_dir(cache) / "glue" if data_dir is None else Path(os.path.expanduser(data_dir))
    folder, splits = base / task.folder, ("train", *task.devs)

    def there() -> bool:
        return all((folder / f"{split}.tsv").is_file() for split in splits)

    if data_dir is None and not there():
        try:
            with file_lock(base.parent):
                if not there():                         # or another process has been quicker
                    (unpack if task.archive else assemble_mrpc)(task, folder)
        except OSError as error:
            raise UserError(f"could not write {folder} ({error.strerror}): make room there, or name another cache folder")
    if not base.is_dir():
        raise UserError(f"the data folder {base} is not there: name the folder that holds {task.folder}/")
    return {split: read_split(task, folder if folder.is_dir() else base, split) for split in splits}


def read_lines(path: Path, advice: str) -> list[str]:
    """The lines of a UTF-8 text, with or without BOM; - is standard input. They end at \\n (or \\r\\n) alone: GLUE's
    sentences hold other characters, such as U+2028 and U+0085, that str.splitlines takes for line ends."""
    try:
        text = (sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path} is missing, or is not UTF-8 text: {advice}")
    return text.replace("\r\n", "\n").rstrip("\n").split("\n")


def quote(cell: str) -> str:
    """A cell for an error message: in quotes, at most 60 characters of it."""
    return repr(cell if len(cell) <= 60 else cell[:57] + "...")


def read_split(task: Task, folder: Path, split: str) -> Split:
    """One tsv file; without split.tsv, split.partial.tsv.

    Rows with more or fewer fields than the header, and MNLI's without a gold label, are left out,
    counted and named on stderr. A label the task does not know, a column that is missing or there
    twice and a file without examples raise UserError.
    """
    path, part = folder / f"{split}.tsv", folder / f"{split}.partial.tsv"
    path = part if part.is_file() and not path.is_file() else path
    advice = f"put {task.folder}'s {split}.tsv there"
    lines = read_lines(path, advice)
    header, first = (task.header, 1) if task.header else (lines.pop(0).split("\t"), 2)
    twice = next((name for i, name in enumerate(header) if name in header[:i]), None)
    if twice is not None:
        raise UserError(f"{path} has the column {quote(twice)} twice in its first line: {advice}")
    wanted = set(task.columns) - {None}
    if not wanted <= set(header):
        raise UserError(f"{path} has no column {min(wanted - set(header))!r} in its first line: {advice}")
    texts, labels, left_out = [], [], {}                # why -> the numbers of the lines
    for number, line in enumerate(lines, first):
        cells = line.split("\t")                    # no quoting: a " is a character like any other
        if len(cells) != len(header):
            why = "lack fields" if len(cells) < len(header) else "have too many fields"
            left_out.setdefault(why, []).append(number)
            continue
        text, second, label = map(dict(zip(header, cells)).get, task.columns)
        if task.name == "mnli" and label == "-":        # its annotators did not agree
            left_out.setdefault("have no gold label", []).append(number)
            continue
        if label not in task.labels:
            raise UserError(f"{path}, line {number}: label {quote(label)} is none of "
                            f"{', '.join(task.labels)}: {advice}")
        texts.append((text, second))
        labels.append(task.labels.index(label))
    notes = [f"left out {len(rows)} rows that {why} (line {', '.join(map(str, rows[:5]))}"
             f"{', ...' if len(rows) > 5 else ''})" for why, rows in left_out.items()]
    if not labels:
        raise UserError(f"{path} holds {', '.join(['no examples', *notes])}: {advice}")
    for note in notes:
        print(f"{path}: {note}", file=sys.stderr)
    return Split(texts, labels, partial=path == part)


MOST_HELD = 2000        # rows that judge epochs and thresholds as well as more would, and cost less


def digest(split: Split) -> str:
    """What identifies the examples of a split: SHA-256 of their texts and labels, in their order."""
    sha = hashlib.sha256()
    for example in zip(split.texts, split.labels):
        sha.update(repr(example).encode("utf-8", "surrogatepass"))
    return sha.hexdigest()


def hold_out(split: Split, share: float = 0.1, seed: int = 0) -> tuple[Split, Split]:
    """Part a split in two, both in its order: (the rest, `share` of each class, drawn by seed; of a large
    split less, so that about MOST_HELD rows are held out). Raises UserError."""
    if not 0 <= share < 1:
        raise UserError(f"a held-out share of {share} is not in 0..1: use, for example, 0.1")
    share = min(share, MOST_HELD / max(len(split), 1))
    rng, held = random.Random(seed), set()
    for label in sorted(set(split.labels)):
        members = [i for i, other in enumerate(split.labels) if other == label]
        held.update(rng.sample(members, round(share * len(members))))
    if len(held) == len(split):
        raise UserError(f"nothing is left to train on: a share of {share} holds out all "
                        f"{len(split)} examples, use a smaller share or more examples")
    return split.select([i for i in range(len(split)) if i not in held]), split.select(sorted(held))


# --- From the network to the disk -------------------------------------------------------------------------------------

def cache_dir(folder: str | Path | None = None) -> Path:
    """Where downloads go: the argument, else SMARTBERT_CACHE, else smartbert/ in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(folder or os.environ.get("SMARTBERT_CACHE") or Path(base) / "smartbert"))


@contextmanager
def file_lock(folder: Path) -> Iterator[None]:
    """Make a folder and be the only one who fills it: a second process waits here until the first is done (not on
    Windows). Two runs may so be started at once before anything is downloaded."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if fcntl:
            os.close(handle)                            # and so unlocked


def atomic_write(path: str | Path, save: Callable) -> None:
    """Write a file so that it is there whole or not at all: save(file) to a neighbour, fsync, one atomic rename."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)               # it is still there only where something failed


def write_json(path: str | Path, value) -> None:
    atomic_write(path, lambda file: file.write(json.dumps(value, indent=1).encode() + b"\n"))


def download(url: str, path: Path) -> None:
    """Fetch url to path where it is not there yet, with a progress bar. What has come stays in path.part, from where the
    next call goes on; the file takes its name only at the size the server gave. Raises UserError, with what to do."""
    advice = f"run again to go on, or fetch {url} by hand and put it at {path}"
    if path.is_file():
        return
    try:
        with file_lock(path.parent):
            while not path.is_file():
                fetch(url, path, advice)
    except requests.RequestException as error:
        status = getattr(error.response, "status_code", None)
        reason = f"the server answered {status}" if status else "no connection, or it broke"
        raise UserError(f"could not download {path.name} ({reason}): {advice}")
    except OSError as error:
        raise UserError(f"could not write {path} ({error.strerror}): make room there, or name another cache folder")


def fetch(url: str, path: Path, advice: str) -> None:
    """One request of `download`. Returns without a file where what had come before fits nothing that is there: the next
    starts over. Raises UserError, RequestException, OSError."""
    # path.part.tag: the server's mark (ETag or date) of the version path.part was begun with; without one, no resume.
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.tag")
    have, begun = (part.stat().st_size, tag.read_text()) if part.is_file() and tag.is_file() else (0, None)
    headers = {"Accept-Encoding": "identity"}           # a compressed body would make byte counts meaningless
    if have:                                            # If-Range: the rest of that version, or all of another
        headers |= {"Range": f"bytes={have}-", "If-Range": begun}
    with requests.get(url, stream=True, timeout=30, headers=headers) as answer:
        mark = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        span, _, whole = answer.headers.get("Content-Range", "").rpartition("/")
        resumed = have and span.startswith(f"bytes {have}-") and mark == begun
        if have and answer.status_code in (206, 416) and not resumed:
            part.unlink()
            return
        answer.raise_for_status()
        have, whole = (have, whole) if resumed else (0, answer.headers.get("Content-Length", ""))
        total = int(whole) if whole.isdigit() else None
        with open(part, "ab" if have else "wb") as file, tqdm(
                desc=path.name, total=total, initial=have, unit="B", unit_scale=True, disable=None) as bar:
            tag.write_text(mark) if mark else tag.unlink(missing_ok=True)
            for chunk in answer.iter_content(1 << 16):
                bar.update(file.write(chunk))
            file.flush()
            os.fsync(file.fileno())
    size = part.stat().st_size
    if total not in (None, size):
        raise UserError(f"{path.name} came with {size} of {total} bytes: {advice}")
    os.replace(part, path)
    tag.unlink(missing_ok=True)


def unpack(task: Task, folder: Path) -> None:
    """The tsv files of GLUE's zip, and nothing else, into folder. Raises UserError for a zip that is not whole."""
    archive = folder.parent / task.archive
    download(GLUE_URL + task.archive, archive)
    try:
        with zipfile.ZipFile(archive) as files:         # only these are read, wherever other names in the zip may lead
            for name in (f"{task.folder}/{split}.tsv" for split in ("train", *task.devs)):
                if files.getinfo(name).file_size > LARGEST:
                    raise UserError(f"{archive} is not GLUE's ({name} would unpack to more than "
                                    f"{LARGEST / 2**30:g} GiB): remove it and run again to "
                                    f"download it")
            tables = {split: files.read(f"{task.folder}/{split}.tsv") for split in ("train", *task.devs)}
    except KeyError as error:
        raise UserError(f"{archive} is not GLUE's ({error.args[0]}): remove it and run again to download it")
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError):
        archive.unlink()
        raise UserError(f"{archive} was truncated or damaged, and is removed: run again to download it")
    for split, table in tables.items():
        atomic_write(folder / f"{split}.tsv", lambda file: file.write(table))


def assemble_mrpc(task: Task, folder: Path) -> None:
    """MRPC's train.tsv and dev.tsv from Microsoft's text: dev is the rows whose pair of ids GLUE lists. Raises UserError."""
    text, dev_ids = folder.parent / "msr_paraphrase_train.txt", folder.parent / "mrpc_dev_ids.tsv"
    download(SENTEVAL_URL + text.name, text)
    download(GLUE_URL + dev_ids.name, dev_ids)
    advice = "remove it and run again to download it"
    header, *lines = read_lines(text, advice)
    rows = {tuple(line.split("\t")[1:3]): line for line in lines}                       # by their two ids
    listed = {tuple(line.split()) for line in read_lines(dev_ids, advice) if line[:1].isdigit()}
    lost = listed - rows.keys()
    if lost or not listed:
        raise UserError(f"{text if lost else dev_ids} is not whole, {len(lost)} dev rows are missing: {advice}")
    for split, chosen in (("train", rows.keys() - listed), ("dev", listed)):
        table = [header] + [line for ids, line in rows.items() if ids in chosen]
        atomic_write(folder / f"{split}.tsv", lambda file: file.write("\n".join(table).encode()))


BASE = "google-bert/bert-base-uncased"
MINIATURES = [f"google/bert_uncased_L-{L}_H-{H}_A-{H // 64}" for L in range(2, 13, 2) for H in (128, 256, 512, 768)]


def fetch_weights(name: str, cache: str | Path | None = None) -> Path:
    """A folder with config.json, vocab.txt and pytorch_model.bin: `name` itself where it is a folder, else Google's
    weights of that name on the hub, downloaded into the cache once. Raises UserError."""
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder
    full = next((full for full in (BASE, *MINIATURES) if name in (full, full.split("/")[1])), None)
    if full is None:
        raise UserError(f"weights {name!r} are neither a folder nor one of Google's: {BASE}, or "
                        f"google/bert_uncased_L-4_H-256_A-4 (L 2, 4, 6, 8, 10, 12; H 128, 256, 512, 768; A = H / 64); "
                        f"for others put config.json, vocab.txt and pytorch_model.bin into a folder and name that")
    folder = cache_dir(cache) / "weights" / full.replace("/", "--")
    for file in ("config.json", "vocab.txt", "pytorch_model.bin"):
        download(f"{HUB_URL}{full}/resolve/main/{file}", folder / file)
    return folder


# --- Tokens and batches -----------------------------------------------------------------------------------------------

SPECIALS = {f"{name.lower()}_token": f"[{name}]" for name in ("UNK", "SEP", "PAD", "CLS", "MASK")}


def read_object(path: Path) -> dict:
    """The JSON object in a file, {} where there is no file. Raises UserError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if isinstance(value, dict):
            return value
    except (ValueError, OSError, RecursionError):
        pass
    raise UserError(f"{path} is not a JSON object: remove it and download it again")


def tokenizer_settings(folder: Path) -> dict[str, bool | None]:
    """do_lower_case, strip_accents and tokenize_chinese_chars, those that tokenizer_config.json
    states, or else the normalizer in tokenizer.json. Raises UserError."""
    path, other = folder / "tokenizer_config.json", folder / "tokenizer.json"
    config, names = read_object(path), {
        "do_lower_case": "lowercase", "strip_accents": "strip_accents",
        "tokenize_chinese_chars": "handle_chinese_chars"}
    odd = []
    for name, usual in SPECIALS.items():
        token = config.get(name, usual)
        token = token.get("content") if isinstance(token, dict) else token
        if token != usual:
            odd.append(f"{name} {quote(str(token))}")
    if odd:
        raise UserError(f"{path} names special tokens that are not BERT's, {', '.join(odd)}: "
                        f"use weights with {', '.join(SPECIALS.values())}")
    stated = {name: (path, name, config[name]) for name in names if name in config}
    if len(stated) < len(names):
        block = read_object(other).get("normalizer")
        if isinstance(block, dict) and block.get("type") == "BertNormalizer":
            stated = {ours: (other, theirs, block[theirs]) for ours, theirs in names.items()
                      if theirs in block} | stated
    for ours, (file, name, value) in stated.items():
        if not isinstance(value, bool) and not (ours == "strip_accents" and value is None):
            raise UserError(f"{file}: {name} is {quote(str(value))}, not true or false: "
                            f"correct it, or download the file again")
    return {ours: value for ours, (_, _, value) in stated.items()}


def load_tokenizer(folder: str | Path) -> BertWordPieceTokenizer:
    """BERT's WordPiece tokenizer over folder/vocab.txt (a token a line, its id the line's number
    from 0), as tokenizer_config.json or tokenizer.json there says. Where neither states the case
    it is lower-case, and the vocabulary must be so too. Raises UserError."""
    path = Path(folder) / "vocab.txt"
    words = read_lines(path, "a weights folder holds config.json, vocab.txt and pytorch_model.bin")
    missing = [word for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if word not in words]
    if missing:
        raise UserError(f"{path} is no BERT vocabulary, it lacks {' '.join(missing)}: remove it and download it again")
    if len(set(words)) < len(words):
        raise UserError(f"{path} has a line twice, so that ids are in doubt: remove it and download it again")
    stated = tokenizer_settings(Path(folder))
    capital = next((word for word in words if word != word.lower()
                    and not (word.startswith("[") and word.endswith("]"))), None)
    if capital is not None and "do_lower_case" not in stated:
        raise UserError(f"{path} has upper-case words such as {quote(capital)}: put a "
                        f"tokenizer_config.json beside it with do_lower_case true or false")
    return BertWordPieceTokenizer({word: i for i, word in enumerate(words)},
                                  lowercase=stated.get("do_lower_case", True),
                                  strip_accents=stated.get("strip_accents"),
                                  handle_chinese_chars=stated.get("tokenize_chinese_chars", True))


def write_vocabulary(tokenizer: BertWordPieceTokenizer, folder: str | Path) -> None:
    """vocab.txt and the settings, so that `load_tokenizer(folder)` gives the same tokenizer."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    atomic_write(Path(folder) / "vocab.txt", lambda file: file.write("".join(f"{w}\n" for w, _ in words).encode()))
    rules = tokenizer.normalizer
    write_json(Path(folder) / "tokenizer_config.json", {
        "do_lower_case": rules.lowercase, "strip_accents": rules.strip_accents,
        "tokenize_chinese_chars": rules.handle_chinese_chars})


def encode(tokenizer: BertWordPieceTokenizer, split: Split, max_length: int = 128) -> Split:
    """The split with token ids and segment ids: [CLS] text [SEP], or [CLS] text [SEP] second [SEP], of which the longer
    text is cut first where there are more than max_length tokens. Raises UserError."""
    if max_length < 8:
        raise UserError(f"a maximal length of {max_length} tokens leaves nothing of a sentence: use 8 or more")
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    done = tokenizer.encode_batch([text if second is None else (text, second) for text, second in split.texts])
    return replace(split, ids=[e.ids for e in done], segment_ids=[e.type_ids for e in done])


@dataclass
class Batch:
    """ids, segment_ids (B, S) long; mask (B, S) bool, True at real tokens; labels, index in the split (B,) long."""
    ids: Tensor
    segment_ids: Tensor
    mask: Tensor
    labels: Tensor
    index: Tensor

    def to(self, device: str | torch.device) -> "Batch":
        return Batch(*(value.to(device) for value in vars(self).values()))


def collate(split: Split, indices: list[int]) -> Batch:
    """These examples as one batch, padded to the longest of them only (with id 0: the mask hides it)."""
    lengths = torch.tensor([len(split.ids[i]) for i in indices])                        # (B,)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]                          # (B, S)
    ids, segment_ids = torch.zeros(mask.shape, dtype=torch.long), torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.tensor([token for i in indices for token in split.ids[i]])
    segment_ids[mask] = torch.tensor([segment for i in indices for segment in split.segment_ids[i]])
    return Batch(ids, segment_ids, mask, torch.tensor([split.labels[i] for i in indices]), torch.tensor(indices))


def batch_indices(split: Split, size: int, seed: int | None = None) -> list[list[int]]:
    """Which examples make which batch: like lengths together, so that little is padded.

    Without a seed: sorted by length, for evaluation. With one, for training: shuffled, sorted only within pools of 50
    batches, and the batches shuffled again; the same seed gives the same order. Raises UserError.
    """
    if size < 1:
        raise UserError(f"a batch size of {size} is no size: use 1 or more")

    def cut(rows) -> list[list[int]]:
        rows = sorted(rows, key=lambda i: len(split.ids[i]))                            # an IndexError: not encoded yet
        return [rows[i:i + size] for i in range(0, len(rows), size)]

    if seed is None:
        return cut(range(len(split)))
    rng = np.random.default_rng(seed)
    order, pool = rng.permutation(len(split)).tolist(), 50 * size
    made = [batch for start in range(0, len(order), pool) for batch in cut(order[start:start + pool])]
    return [made[i] for i in rng.permutation(len(made))]


def batches(split: Split, size: int, seed: int | None = None) -> Iterator[Batch]:
    """The split in the batches of `batch_indices`, each padded to its own longest row."""
    return (collate(split, indices) for indices in batch_indices(split, size, seed))


# --- Metrics ----------------------------------------------------------------------------------------------------------

def scores(task: Task, predictions: list[int], labels: list[int]) -> dict[str, float]:
    """The task's metrics (main one first) of predicted class ids: accuracy and F1 of class 1 in 0..1, Matthews'
    correlation in -1..1; F1 and Matthews' are 0 where they are undefined."""
    p, y = np.asarray(predictions), np.asarray(labels)
    tn, fp, fn, tp = np.bincount(2 * (y == 1) + (p == 1), minlength=4).tolist()
    spread = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    values = {"accuracy": float(np.mean(p == y)),
              "f1": 2 * tp / (2 * tp + fp + fn) if tp else 0.0,
              "matthews": (tp * tn - fp * fn) / spread if spread else 0.0}
    return {metric: values[metric] for metric in task.metrics}


def majority(task: Task, labels: list[int]) -> dict[str, float]:
    """The scores of always answering the most frequent class: what has been learned when nothing has."""
    return scores(task, [int(np.bincount(labels).argmax())] * len(labels), labels)


# --- The toy task -----------------------------------------------------------------------------------------------------

OWNERS = ("cat dog king queen baker sailor child teacher farmer clown judge nurse poet pilot thief monk "
          "singer hunter painter miller soldier doctor wizard bear").split()
THINGS = ("coin pea ball ring key stone pearl bean shell nut dice button marble plum cherry thimble ruby "
          "candle feather bell crown spoon glove ticket").split()
CUPS, SWAPS = ("a", "b", "c"), ("ab", "bc", "ac")


def swap(cup: str, pair: str) -> str:
    """Where a thing is that was under this cup, when the two cups of a pair have changed places."""
    return pair.replace(cup, "") if cup in pair else cup


def toy(train: int = 3600, dev: int = 900, seed: int = 0) -> dict[str, Split]:
    """Somebody hides a thing under one of three cups, and pairs of cups change places. Under which cup
    is it at the end? Level k of 0 .. 2 has k swaps:

        level 0:  king coin b            -> b
        level 1:  king coin b ab         -> a
        level 2:  king coin b ab ac      -> c

    The next swap depends on where the last one left the thing. In training a layer of its own is
    found for each, after one that reads the cup: about k + 1 layers. At each level the labels are
    equally many. From every cup one swap leads to each cup, so no single word tells anything, and no
    sum of word scores gives the label. In the dev set the levels are equally many; in training every
    second sentence is of level 2, which is learned last. No sentence occurs twice (of level 0 there
    are 1,728).
    """
    rng, rows = random.Random(seed), {}                 # text -> label, level
    while len(rows) < train + dev:                      # the training rows, then the dev rows
        n, mix = (len(rows), (0, 1, 2, 2)) if len(rows) < train else (len(rows) - train, (0, 1, 2))
        level, label = mix[n // 3 % len(mix)], n % 3
        pairs, cup = rng.choices(SWAPS, k=level), CUPS[label]
        for pair in reversed(pairs):                    # back to where the thing was hidden
            cup = swap(cup, pair)
        text = " ".join([rng.choice(OWNERS), rng.choice(THINGS), cup, *pairs])
        rows.setdefault(text, (label, level))           # a sentence that is there already is drawn again
    labels, levels = [label for label, _ in rows.values()], [level for _, level in rows.values()]
    whole = Split([(text, None) for text in rows], labels, levels)
    return {"train": whole.select(range(train)), "dev": whole.select(range(train, train + dev))}


def toy_tokenizer() -> BertWordPieceTokenizer:
    """A tokenizer whose vocabulary is the toy grammar's words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *OWNERS, *THINGS, *CUPS, *SWAPS]
    return BertWordPieceTokenizer({word: i for i, word in enumerate(words)})
