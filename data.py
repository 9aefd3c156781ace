"""All that comes from outside: GLUE's files, BERT's weights, the tokenizer; batches and metrics.

    splits = load_task("rte", data_dir="~/glue")                # {"train": Split, "dev": Split}
    tokenizer = load_tokenizer("path/to/bert-base-uncased")
    for batch in batches(encode(tokenizer, splits["train"]), 32, seed=1): ...

The eight tasks of GLUE (Wang et al., 2019) are the paper's; "toy" needs no file. What a function
cannot use, it refuses with UserError.
Dimensions: N examples of a split, B of a batch, S tokens of the longest example in a batch.
"""

import hashlib
import json
import os
import random
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import requests
import torch
from tokenizers.implementations import BertWordPieceTokenizer
from torch import Tensor, nn
from tqdm import tqdm

GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data/"
SENTEVAL_URL = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"
GOOGLE_URL = "https://storage.googleapis.com/bert_models/"
GOOGLE_FILES = ["bert_config.json", "vocab.txt", "bert_model.ckpt.index",
                "bert_model.ckpt.data-00000-of-00001"]
LARGEST = 4 * 2**30         # bytes that a file in a zip may unpack to


class UserError(ValueError):
    """An error that the user can mend; the message is one line: what is wrong and what to do."""


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
        labels=("contradiction", "entailment", "neutral"), devs=("dev_matched", "dev_mismatched")),
    Task("qnli", "QNLI", ("question", "sentence", "label"), ENTAILMENT, archive="QNLIv2.zip"),
    Task("rte", "RTE", labels=ENTAILMENT, archive="RTE.zip"),
    Task("wnli", "WNLI", archive="WNLI.zip"),
    Task("toy", "", ("sentence", None, "label"), labels=("a", "b", "c")),
)}


def find_task(name: str) -> Task:
    """The task of this name. Raises UserError."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r:.60}: use one of {', '.join(TASKS)}")
    return TASKS[name]


def scores(task: Task, predictions: list[int], labels: list[int]) -> dict[str, float]:
    """The task's metrics, the main one first, from N class ids each. F1 (of class 1) and Matthews'
    correlation are 0 where they are undefined."""
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


# --- Examples -----------------------------------------------------------------------------------

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
    """{"train": Split, "dev": Split}, or "dev_matched" and "dev_mismatched" for mnli. data_dir
    holds GLUE's folders or is the task's own. Without it the official files are downloaded into
    the cache folder. seed is that of the toy task."""
    task = find_task(name)
    if name == "toy":
        return toy(seed=seed)
    base = Path(os.path.expanduser(data_dir)) if data_dir else cache_dir(cache) / "glue"
    if data_dir and not base.is_dir():
        raise UserError(f"{base} is not a folder: name the one that holds GLUE's files")
    folder, splits = base / task.folder, ("train", *task.devs)
    if not data_dir and not all((folder / f"{split}.tsv").is_file() for split in splits):
        if task.archive:
            archive = folder.parent / task.archive
            download(GLUE_URL + task.archive, archive)
            unpack(archive, [f"{task.folder}/{split}.tsv" for split in splits], folder)
        else:
            assemble_mrpc(task, folder)
    folder = folder if folder.is_dir() else base
    return {split: read_split(task, folder, split) for split in splits}


def read_lines(path: Path, advice: str) -> list[str]:
    """The lines of a UTF-8 text (- is standard input), except blank lines at its end. GLUE's
    sentences hold characters, such as U+2028, at which str.splitlines would split."""
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        text = content.decode("utf-8-sig") + "\n"           # without BOM
    except (OSError, UnicodeDecodeError, AttributeError):   # sys.stdin is None where it is closed
        raise UserError(f"{path} is missing, or is not UTF-8 text: {advice}")
    return text.replace("\r\n", "\n").rstrip("\n").split("\n")


def read_split(task: Task, folder: Path, split: str) -> Split:
    """One tsv file, without quoting: split.tsv, else split.partial.tsv. Rows with more or fewer
    fields than the header, and MNLI's without a gold label, are left out and reported on stderr.
    """
    path, part = folder / f"{split}.tsv", folder / f"{split}.partial.tsv"
    path = part if part.is_file() and not path.is_file() else path
    advice = f"put {task.folder}'s {split}.tsv there, or a file laid out like it"
    lines = read_lines(path, advice)
    header, first = (task.header, 1) if task.header else (lines.pop(0).split("\t"), 2)
    for name in filter(None, task.columns):
        if header.count(name) != 1:
            raise UserError(f"{path} has {header.count(name)} columns {name!r}, not one: {advice}")
    text, second, label = task.columns
    texts, labels, left_out = [], [], []
    for number, line in enumerate(lines, first):
        cells = line.split("\t")
        row = dict(zip(header, cells))
        if len(cells) != len(header) or (task.name == "mnli" and row[label] == "-"):
            left_out.append(number)
        elif row[label] not in task.labels:
            raise UserError(f"{path}, line {number}: label {row[label]!r:.60} is none of "
                            f"{', '.join(task.labels)}: {advice}")
        else:
            texts.append((row[text], row.get(second)))
            labels.append(task.labels.index(row[label]))
    if not labels:
        raise UserError(f"{path} holds no examples ({len(left_out)} rows left out): {advice}")
    if left_out:
        print(f"{path}: left out {len(left_out)} rows without {len(header)} fields, or without a "
              f"gold label: the first are lines {left_out[:5]}", file=sys.stderr)
    return Split(texts, labels, partial=path == part)


def hold_out(split: Split, share: float = 0.1, seed: int = 0) -> tuple[Split, Split]:
    """(training part, held-out part), both in the order of the split. A share (0..1) of each class
    is drawn at random, at most about 2000 rows in all: more would select no better."""
    N, rng, held = len(split), random.Random(seed), set()
    share = min(share, 2000 / max(N, 1))
    for label in sorted(set(split.labels)):
        members = [i for i, other in enumerate(split.labels) if other == label]
        held.update(rng.sample(members, round(share * len(members))))
    if len(held) == N:
        raise UserError(f"nothing is left to train on: hold out less than {share} of all {N} rows")
    rest = [i for i in range(N) if i not in held]
    return split.select(rest), split.select(sorted(held))


def digest(split: Split) -> str:
    """SHA-256 of the texts and labels of a split, in their order. A run stores it, to detect later
    that its data have changed."""
    examples = "".join(map(repr, zip(split.texts, split.labels)))
    return hashlib.sha256(examples.encode("utf-8", "surrogatepass")).hexdigest()


def own_examples(task: Task, texts: list[str] | None, path: str | None) -> Split:
    """The user's own examples, without labels: one text or pair from the command line, or one for
    each line of a file (- is standard input), with a tab between the two texts of a pair."""
    advice = "name a file with a sentence a line, or - for stdin"
    lines = ["\t".join(texts)] if texts else read_lines(Path(path), advice)
    pair, examples = task.columns[1] is not None, []
    wanted = "two sentences" if pair else "one sentence"
    wanted += ", each in quotes" if texts else " with a tab between them" * pair
    for number, line in enumerate(lines, 1):
        parts = line.split("\t")
        if len(parts) != 1 + pair or not all(part.strip() for part in parts):
            raise UserError(f"example {number} is {line!r:.60}, but {task.name} takes {wanted}")
        if any("\ud800" <= character <= "\udfff" for character in line):
            raise UserError(f"example {number} is not UTF-8 text: give it in that encoding")
        examples.append((parts[0], parts[1] if pair else None))
    return Split(examples, [0] * len(examples))         # no label is known: zeros


# --- Tokens and batches -------------------------------------------------------------------------

# tokenizer_config.json's names of the settings that are obeyed -> those of tokenizer.json.
NORMALIZER = {"do_lower_case": "lowercase", "strip_accents": "strip_accents",
              "tokenize_chinese_chars": "handle_chinese_chars"}
# The values that are supported; the first is the default.
SUPPORTED = {"lowercase": [True, False], "strip_accents": [None, True, False],
             "handle_chinese_chars": [True, False], "do_basic_tokenize": [True],
             "never_split": [None, []], "unk_token": ["[UNK]"], "sep_token": ["[SEP]"],
             "pad_token": ["[PAD]"], "cls_token": ["[CLS]"], "mask_token": ["[MASK]"]}


def load_tokenizer(folder: str | Path) -> BertWordPieceTokenizer:
    """BERT's WordPiece tokenizer over folder/vocab.txt: a token a line, its id the line's number
    from 0. It obeys tokenizer_config.json, or else the normalizer of tokenizer.json. Where neither
    states the case it is lower-case, and the vocabulary must be so too."""
    path, stated = Path(folder) / "vocab.txt", {}
    words = read_lines(path, "a weights folder holds config.json, vocab.txt and pytorch_model.bin")
    if not {"[PAD]", "[UNK]", "[CLS]", "[SEP]"} <= set(words) or len(set(words)) < len(words):
        raise UserError(f"{path} lacks [PAD], [UNK], [CLS], [SEP] or has a line twice: replace it")
    for file in path.with_name("tokenizer.json"), path.with_name("tokenizer_config.json"):
        try:
            values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            values = values.get("normalizer", values) or {}
            stated |= {NORMALIZER.get(name, name): value for name, value in values.items()}
        except (ValueError, OSError, RecursionError, AttributeError):
            raise UserError(f"{file} is not a JSON object: remove it and download it again")
    for name, supported in SUPPORTED.items():
        value = stated.get(name, supported[0])
        if name.endswith("_token") and isinstance(value, dict):
            value = value.get("content")
        if repr(value) not in map(repr, supported):         # 1 equals True, but is not true
            wanted = " or ".join(map(repr, supported))
            raise UserError(f"{folder}: {name} is {value!r:.60} in tokenizer_config.json or "
                            f"tokenizer.json, use weights with {wanted}")
    capital = next((word for word in words if word != word.lower() and word[0] != "["), None)
    if capital and "lowercase" not in stated:
        raise UserError(f"{path} has capitals ({capital!r:.60}): put a tokenizer_config.json with "
                        f"do_lower_case true or false beside it")
    rules = {name: stated[name] for name in NORMALIZER.values() if name in stated}
    return BertWordPieceTokenizer({word: i for i, word in enumerate(words)}, **rules)


def write_vocabulary(tokenizer: BertWordPieceTokenizer, folder: str | Path) -> None:
    """vocab.txt and the settings, so that `load_tokenizer(folder)` gives the same tokenizer."""
    vocab = tokenizer.get_vocab()
    text = "".join(f"{word}\n" for word in sorted(vocab, key=vocab.get))
    atomic_write(Path(folder) / "vocab.txt", lambda file: file.write(text.encode()))
    settings = {name: getattr(tokenizer.normalizer, other) for name, other in NORMALIZER.items()}
    write_json(Path(folder) / "tokenizer_config.json", settings)


def encode(tokenizer: BertWordPieceTokenizer, split: Split, max_length: int = 128) -> Split:
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
    index: Tensor           # (B,) long, the positions in the split

    def to(self, device: str | torch.device) -> "Batch":
        return Batch(*(value.to(device) for value in vars(self).values()))


def collate(split: Split, indices: list[int]) -> Batch:
    """These examples as one batch, padded with 0 to the longest of them."""
    def pad(rows: list[np.ndarray]) -> Tensor:                                          # (B, S)
        return nn.utils.rnn.pad_sequence([torch.from_numpy(rows[i]) for i in indices], True).long()
    ids = pad(split.ids)
    lengths = torch.tensor([len(split.ids[i]) for i in indices])                        # (B,)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]                                # (B, S)
    labels = torch.tensor([split.labels[i] for i in indices])
    return Batch(ids, pad(split.segment_ids), mask, labels, torch.tensor(indices))


def batch_indices(split: Split, size: int, seed: int | None = None) -> list[list[int]]:
    """The positions of the examples of each batch. Similar lengths go together: little padding.
    Without a seed all are sorted by length, for evaluation. With a seed, for training, they are
    shuffled, sorted only within pools of 50 batches, and the batches are shuffled again."""
    N, lengths = len(split), np.array([len(row) for row in split.ids])                  # (N,)
    rng = np.random.default_rng(seed)
    order, pool = (np.arange(N), N + 1) if seed is None else (rng.permutation(N), 50 * size)
    made = []
    for rows in np.split(order, range(pool, N, pool)):
        rows = rows[lengths[rows].argsort(kind="stable")].tolist()
        made += [rows[i:i + size] for i in range(0, len(rows), size)]
    return made if seed is None else [made[i] for i in rng.permutation(len(made))]


def batches(split: Split, size: int, seed: int | None = None) -> Iterator[Batch]:
    """The split in the batches of `batch_indices`, each padded to its own longest example."""
    return (collate(split, indices) for indices in batch_indices(split, size, seed))


# --- The toy task -------------------------------------------------------------------------------

OWNERS = ("cat dog king queen baker sailor child teacher farmer clown judge nurse poet pilot "
          "thief monk singer hunter painter miller soldier doctor wizard bear").split()
THINGS = ("coin pea ball ring key stone pearl bean shell nut dice button marble plum cherry "
          "thimble ruby candle feather bell crown spoon glove ticket").split()
CUPS, SWAPS = ("a", "b", "c"), ("ab", "bc", "ac")


def toy(train: int = 3600, dev: int = 900, seed: int = 0) -> dict[str, Split]:
    """A thing is hidden under one of three cups, and pairs of cups change places. Where is it?
    Level k has k swaps: "king coin b" -> b, "king coin b ab" -> a, "king coin b ab ac" -> c.

    What a swap does depends on the swap before, so more swaps are harder, and no sum of word
    scores tells the answer. (A wide layer can learn two swaps by heart.) Labels are equally
    frequent, and so are the dev set's levels; half of the training sentences have level 2, which
    is learned last. Raises UserError where there are too few sentences of level 0."""
    if train // 12 + dev // 9 + 2 > len(OWNERS) * len(THINGS):
        raise UserError(f"the toy has only {len(OWNERS) * len(THINGS)} sentences of level 0 for a "
                        f"label: ask for fewer examples")
    rng, splits, seen = random.Random(seed), {}, set()
    for name, size, levels in ("train", train, (0, 1, 2, 2)), ("dev", dev, (0, 1, 2)):
        split = splits[name] = Split([], [], [])
        while len(split) < size:
            label, level = len(split) % 3, levels[len(split) // 3 % len(levels)]
            pairs, cup = rng.choices(SWAPS, k=level), CUPS[label]
            for pair in reversed(pairs):                # back to where the thing was hidden
                cup = pair.replace(cup, "") if cup in pair else cup
            text = " ".join([rng.choice(OWNERS), rng.choice(THINGS), cup, *pairs])
            if text not in seen:                        # no sentence occurs twice
                seen.add(text)
                split.texts.append((text, None))
                split.labels.append(label)
                split.levels.append(level)
    return splits


def toy_tokenizer() -> BertWordPieceTokenizer:
    """A tokenizer whose vocabulary is the toy grammar's words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *OWNERS, *THINGS, *CUPS, *SWAPS]
    return BertWordPieceTokenizer({word: i for i, word in enumerate(words)})


# --- Files and downloads ------------------------------------------------------------------------

def cache_dir(folder: str | Path | None = None) -> Path:
    """The argument, else SMARTBERT_CACHE, else smartbert/ in the user's cache directory."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "smartbert"
    return Path(os.path.expanduser(folder or os.environ.get("SMARTBERT_CACHE") or usual))


def atomic_write(path: str | Path, save: Callable) -> None:
    """Write a file whole or not at all. save(file) writes a temporary file beside it, which then
    takes its name. Two processes that write the same path do not share a temporary file."""
    path, temporary = Path(path), Path(f"{path}.{os.urandom(4).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except requests.RequestException:                   # an OSError too, but not of this file
        raise
    except OSError as error:
        raise UserError(f"could not write {path} ({error.strerror}): make room or change folder")
    finally:
        if temporary.exists():                          # only after an error
            temporary.unlink()


def write_json(path: str | Path, value) -> None:
    atomic_write(path, lambda file: file.write(json.dumps(value, indent=1).encode() + b"\n"))


def download(url: str, path: Path) -> None:
    """Fetch url to path, whole or not at all, unless path is there."""
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


def unpack(archive: Path, names: list[str], folder: Path, downloaded: bool = True) -> None:
    """These files of a zip, and nothing else, into folder. names: the ends of their paths in the
    zip. A download that is damaged is removed."""
    content = {}
    try:
        with zipfile.ZipFile(archive) as files:
            for name in names:                          # other names in the zip are never read
                paths = [p for p in files.namelist() if f"/{p}".endswith(f"/{name}")]
                if not paths:
                    raise ValueError(f"it lacks {name}")
                member = files.getinfo(min(paths, key=len))
                if member.file_size > LARGEST:
                    raise ValueError(f"{member.filename} unpacks to over {LARGEST} bytes")
                content[folder / Path(name).name] = files.read(member)
    except Exception as error:                          # a damaged zip raises nearly anything
        if not downloaded:
            raise UserError(f"{archive} is damaged or not one of Google's ({error}): replace it")
        archive.unlink(missing_ok=True)
        raise UserError(f"{archive} is removed, damaged or another file ({error}): run again")
    for path, text in content.items():
        atomic_write(path, lambda file: file.write(text))


def assemble_mrpc(task: Task, folder: Path) -> None:
    """MRPC's two files from Microsoft's text: dev.tsv is the rows whose two ids GLUE lists."""
    text, dev_ids = folder.parent / "msr_paraphrase_train.txt", folder.parent / "mrpc_dev_ids.tsv"
    download(SENTEVAL_URL + text.name, text)
    download(GLUE_URL + dev_ids.name, dev_ids)
    advice = "remove it and run again to download it"
    header, *lines = read_lines(text, advice)
    listed = {tuple(line.split()) for line in read_lines(dev_ids, advice) if line[:1].isdigit()}
    in_dev = [tuple(line.split("\t")[1:3]) in listed for line in lines]
    if not 0 < len(listed) <= sum(in_dev):
        raise UserError(f"{text} or {dev_ids.name} lacks rows of the dev set: {advice}")
    for split, wanted in ("train", False), ("dev", True):
        table = [header] + [line for line, dev in zip(lines, in_dev) if dev == wanted]
        atomic_write(folder / f"{split}.tsv", lambda file: file.write("\n".join(table).encode()))


def fetch_weights(name: str, cache: str | Path | None = None) -> Path:
    """A folder with BERT's weights. name: a folder; one of Google's zips, which is unpacked into
    our cache; or a name on the Hugging Face hub, which is downloaded (into our cache where one is
    named, else into the hub's own). Where the hub cannot be reached, Google's models come from
    Google. Raises UserError."""
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        return path
    if os.path.isfile(path):
        folder = cache_dir(cache) / "weights" / path.stem
        unpack(path, GOOGLE_FILES, folder, downloaded=False)
        return folder
    from huggingface_hub import snapshot_download, utils        # here: it takes half a second
    named = cache or os.environ.get("SMARTBERT_CACHE")
    where = cache_dir(named) / "weights" if named else None
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    files = "config.json vocab.txt tokenizer_config.json tokenizer.json pytorch_model.bin".split()
    try:
        folder = Path(snapshot_download(name, cache_dir=where, allow_patterns=files))
        if not (folder / files[-1]).is_file():
            snapshot_download(name, cache_dir=where, revision=folder.name,
                              allow_patterns="model.safetensors")
        return folder
    except (utils.RepositoryNotFoundError, utils.HFValidationError):
        reason = "there is no such name"
    except Exception as error:      # of the library, of the system, of requests or httpx
        if zipped := google_zip(name):
            return fetch_google(zipped, cache_dir(cache) / "weights")
        reason = getattr(error, "strerror", None) or "not in the hub's cache and no connection"
    raise UserError(f"weights {name!r:.60}: not a folder, not from the hub ({reason}): check the "
                    f"name, or use a folder with config.json, vocab.txt and pytorch_model.bin")


def google_zip(name: str) -> str | None:
    """Where Google keeps the model that has this name on the hub; None if it is not Google's."""
    large = {"google-bert/bert-base-uncased": "2018_10_18/uncased_L-12_H-768_A-12.zip",
             "google-bert/bert-large-uncased": "2018_10_18/uncased_L-24_H-1024_A-16.zip"}
    small = name.startswith("google/bert_uncased_L-")           # the miniatures of 2020
    return f"2020_02_20/{name.removeprefix('google/bert_')}.zip" if small else large.get(name)


def fetch_google(name: str, folder: Path) -> Path:
    """Google's zip under GOOGLE_URL, unpacked into a folder of its own."""
    archive = folder / Path(name).name
    folder = folder / archive.stem
    if not (folder / GOOGLE_FILES[-1]).is_file():       # it is written last
        download(GOOGLE_URL + name, archive)
        unpack(archive, GOOGLE_FILES, folder)
    return folder
