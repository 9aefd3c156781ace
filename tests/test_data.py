"""data.py against independent oracles: metrics worked out by hand, files with every trap of GLUE,
tokenizers as their library reads them, a hub on this machine; GLUE's files in SMARTBERT_SHARED."""

import io
import json
import zipfile
from collections import Counter
from itertools import product
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import data
from bert import load_bert
from conftest import TINY_WORDS, save_tiny_weights, tokenizer_json
from data import TASKS, Split, UserError
from loopback import hang_up, hub, point_to, server  # noqa: F401


def lists(rows: list[np.ndarray]) -> list[list[int]]:
    return [row.tolist() for row in rows]


def fails(call, *parts: str) -> None:
    """call() raises UserError with a message of one line that holds all parts."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


def write(path: Path, content: str | bytes | dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        content = (json.dumps(content) if isinstance(content, dict) else content).encode()
    path.write_bytes(content)
    return path


# --- Metrics ------------------------------------------------------------------------------------

@pytest.mark.parametrize("tp, fp, fn, tn, accuracy, f1, matthews", [  # worked out by hand
    (6, 1, 2, 3, 9 / 12, 12 / 15, 16 / 1120**0.5), (5, 0, 0, 4, 1.0, 1.0, 1.0),
    (0, 4, 5, 0, 0.0, 0.0, -1.0),
    (7, 3, 0, 0, 0.7, 14 / 17, 0.0),  # one class predicted: no Matthews'
    (0, 0, 3, 7, 0.7, 0.0, 0.0)])
def test_metrics_of_known_tables(tp, fp, fn, tn, accuracy, f1, matthews):
    predictions = [1] * (tp + fp) + [0] * (fn + tn)
    labels = [1] * tp + [0] * fp + [1] * fn + [0] * tn
    both = data.scores(TASKS["mrpc"], predictions, labels)
    assert both == pytest.approx({"f1": f1, "accuracy": accuracy})
    assert list(both) == ["f1", "accuracy"] == list(TASKS["qqp"].metrics)  # the main one first
    assert data.scores(TASKS["cola"], predictions, labels) == pytest.approx({"matthews": matthews})
    if matthews != 0:
        assert matthews == pytest.approx(np.corrcoef(predictions, labels)[0, 1])
    assert data.scores(TASKS["mnli"], [0, 2, 2, 1], [0, 1, 2, 1]) == {"accuracy": 0.75}


# --- Reading ------------------------------------------------------------------------------------

RTE = "index\tsentence1\tsentence2\tlabel\n"
MNLI = ("index promptID pairID genre sentence1_binary_parse sentence2_binary_parse "
        "sentence1_parse sentence2_parse sentence1 sentence2 label1 gold_label")


def rte(folder: Path, train: str | bytes) -> Path:
    write(folder / "RTE" / "dev.tsv", RTE + "0\td e\tf\tnot_entailment\n")
    return write(folder / "RTE" / "train.tsv", train)


@pytest.mark.parametrize("name, folder, header, row, text, label", [  # GLUE's own columns
    ("cola", "CoLA", "", "gj04 1 * A", ("A", None), 1),
    ("sst2", "SST-2", "sentence label", "A 0", ("A", None), 0),
    ("mrpc", "MRPC", "Quality #1~ID #2~ID #1~String #2~String", "1 7 8 A B", ("A", "B"), 1),
    ("qqp", "QQP", "id qid1 qid2 question1 question2 is_duplicate", "3 4 5 A B 0", ("A", "B"), 0),
    ("mnli", "MNLI", MNLI, "0 1 2 x p q r s A B entailment neutral", ("A", "B"), 2),
    ("qnli", "QNLI", "index question sentence label", "1 A B not_entailment", ("A", "B"), 1),
    ("rte", "RTE", "index sentence1 sentence2 label", "1 A B entailment", ("A", "B"), 0),
    ("wnli", "WNLI", "index sentence1 sentence2 label", "1 A B 1", ("A", "B"), 1)])
def test_each_task_is_read_by_its_columns(tmp_path, name, folder, header, row, text, label):
    """From GLUE's folder, and from the task's own."""
    lines = [line.replace(" ", "\t").replace("~", " ") for line in (header, row) if line]
    for split in ("train", *TASKS[name].devs):
        write(tmp_path / folder / f"{split}.tsv", "\n".join(lines) + "\n")
    for place in (tmp_path, tmp_path / folder, str(tmp_path)):
        splits = data.load_task(name, place)
        assert list(splits) == ["train", *TASKS[name].devs]
        for key, split in splits.items():
            found = (split.name, split.texts, split.labels, split.partial)
            assert found == (key, [text], [label], False)


def test_text_that_trips_readers(tmp_path, capsys):
    """BOM, Windows line ends, quotes that never close, and the line ends of str.splitlines."""
    rows = ['he said "no', 'and "" left"', "one\u2028two", "a\u0085b\x0b\x1c", "caf\u00e9\rnoir"]
    body = "".join(f"{i}\t{text}\tb\tentailment\r\n" for i, text in enumerate(rows))
    rte(tmp_path, b"\xef\xbb\xbf" + RTE.encode() + body.encode())
    assert [text for text, _ in data.load_task("rte", tmp_path)["train"].texts] == rows
    assert capsys.readouterr().err == ""


def test_rows_of_another_width_or_without_a_gold_label_are_left_out(tmp_path, capsys):
    """A field in CSV's quotes with a line break becomes two such rows."""
    odd = ["1\ta\tno label", "", "3\ta\tb\tc\tentailment", "9\ta\tb\t-", '0\t"begins',
           'ends"\tb\tentailment']
    rows = ['0\t"a" b\tb\tentailment', *odd, "2\tc\td\tnot_entailment", "", ""]
    rte(tmp_path, RTE + "\n".join(rows))
    train = data.load_task("rte", tmp_path)["train"]
    assert train.texts == [('"a" b', "b"), ("c", "d")] and train.labels == [0, 1]
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "train.tsv: left out 6 rows without 4 fields" in warning
    assert "such as '1\\ta\\tno label': fields can't be quoted" in warning
    rte(tmp_path, RTE + "0\ta\tb\tc\tentailment\n")
    fails(lambda: data.load_task("rte", tmp_path), "train.tsv", "no examples")


@pytest.mark.parametrize("train, words", [
    (RTE + "0\ta\tb\tentailment\n1\ta\tb\tno\n", ["train.tsv", "2", "'no'", "not_entailment"]),
    (RTE, ["train.tsv", "no examples"]), ("", ["train.tsv", "no column 'sentence1'"]),
    ("index\tsentence1\tlabel\n0\ta\tentailment\n", ["train.tsv", "no column 'sentence2'"]),
    (RTE.encode() + b"0\t\xff\xfe\tb\tentailment\n", ["train.tsv", "UTF-8"])])
def test_files_that_cannot_be_used(tmp_path, train, words):
    path = rte(tmp_path, train)
    fails(lambda: data.load_task("rte", tmp_path), str(tmp_path), *words)
    path.unlink()
    fails(lambda: data.load_task("rte", tmp_path), str(tmp_path / "RTE"), "train.tsv")
    fails(lambda: data.load_task("rte", tmp_path / "nowhere"), str(tmp_path / "nowhere"))


def test_partial_files_are_marked_and_never_preferred(tmp_path):
    path = rte(tmp_path, RTE + "0\ta b\tc\tentailment\n")
    write(tmp_path / "RTE" / "train.partial.tsv", RTE + "0\tpart\tb\tentailment\n")
    assert not data.load_task("rte", tmp_path)["train"].partial
    path.unlink()
    splits = data.load_task("rte", tmp_path)
    assert splits["train"].partial and not splits["dev"].partial
    assert splits["train"].texts == [("part", "b")] and splits["train"].select([0]).partial


@pytest.mark.parametrize("name, train, devs, partial", [  # row counts of the official files
    ("cola", 8551, [1043], False), ("sst2", 67349, [872], False), ("mrpc", 3668, [408], False),
    ("rte", 2490, [277], False), ("wnli", 635, [71], False), ("qnli", 2000, [5463], True),
    ("mnli", 15891, [9815, 9832], True), ("qqp", 2000, [7600], True)])
def test_glue_row_counts(shared, name, train, devs, partial, capsys):
    splits = data.load_task(name, shared / "glue")
    assert [len(split) for split in splits.values()] == [train, *devs]
    assert splits["train"].partial == partial
    assert splits[TASKS[name].devs[0]].partial == (name == "qqp")
    assert capsys.readouterr().err == ""  # no row was left out
    texts = [pair for rows in splits.values() for pair in rows.texts]
    assert all(text and (second is None) == (name in ("cola", "sst2")) for text, second in texts)
    assert set(splits["train"].labels) == set(range(len(TASKS[name].labels)))


# --- Splits -------------------------------------------------------------------------------------

def test_hold_out_is_stratified_disjoint_and_reproducible():
    labels = [0] * 60 + [1] * 30 + [2] * 10
    split = Split("train", [(f"t{i}", None) for i in range(100)], labels, levels=list(range(100)))
    rest, held = data.hold_out(split, 0.2, seed=5)
    assert (rest.name, held.name) == ("train", "held-out")
    assert [held.labels.count(c) for c in range(3)] == [12, 6, 2]
    assert sorted(rest.levels + held.levels) == list(range(100))
    for part in (rest, held):
        assert part.levels == sorted(part.levels)
        assert part.texts == [(f"t{i}", None) for i in part.levels]
        assert part.labels == [labels[i] for i in part.levels]
    assert data.hold_out(split, 0.2, seed=5)[1].levels == held.levels
    assert data.hold_out(split, 0.2, seed=6)[1].levels != held.levels
    assert [len(data.hold_out(split, share, 5)[1]) for share in (0.0, 0.99)] == [0, 97]
    rest, held = data.hold_out(split, 0.5, seed=5, limit=80)  # of the first 80
    assert sorted(rest.levels + held.levels) == list(range(80))
    large = Split("train", [("a", None)] * 50_000, [0, 1, 1, 1, 1] * 10_000)
    held = data.hold_out(large, 0.1, seed=1)[1]  # more would select no better
    assert len(held) == 2000 and held.labels.count(0) == 400


def test_a_selection_takes_every_field_along():
    split, rows = encoded(9), [7, 0, 7]
    split.levels, split.partial = list(range(9)), True
    chosen = split.select(rows)
    for name in ("ids", "segment_ids"):
        assert lists(getattr(chosen, name)) == [lists(getattr(split, name))[i] for i in rows]
    assert chosen.texts == [split.texts[i] for i in rows] and chosen.levels == rows
    assert chosen.labels == [1, 0, 1] and chosen.partial and len(split.select([])) == 0


def test_a_digest_tells_every_change_of_texts_and_labels():
    pairs = [("a", "b"), ("c", None)]
    first = Split("train", pairs, [0, 1])
    others = [(pairs, [1, 1]), (pairs[::-1], [1, 0]), ([*pairs[:1], ("c", "None")], [0, 1])]
    splits = [first, first.select([0]), *(Split("train", *other) for other in others)]
    assert len({data.digest(split) for split in splits}) == 5
    assert data.digest(first.select([0, 1])) == data.digest(first)


# --- Batches ------------------------------------------------------------------------------------

def encoded(rows: int = 331) -> Split:
    """Rows of 3 to 40 tokens; row i holds the token i + 1 alone, so each can be told apart."""
    lengths = np.random.default_rng(0).integers(3, 41, rows).tolist()
    ids = [np.array([i + 1] * n, np.int32) for i, n in enumerate(lengths)]
    segment_ids = [np.array([0] * (n - 2) + [1] * 2, np.uint8) for n in lengths]
    texts, labels = [(f"t{i}", None) for i in range(rows)], [i % 3 for i in range(rows)]
    return Split("train", texts, labels, ids=ids, segment_ids=segment_ids)


def test_a_batch_is_padded_with_zeros():
    split, rows = encoded(20), [17, 3, 11, 4]
    batch = data.collate(split, rows)
    S = max(len(split.ids[i]) for i in rows)
    for name in ("ids", "segment_ids"):
        values = [lists(getattr(split, name))[i] for i in rows]
        assert getattr(batch, name).tolist() == [row + [0] * (S - len(row)) for row in values]
    assert batch.mask.tolist() == [[j < len(split.ids[i]) for j in range(S)] for i in rows]
    assert batch.labels.tolist() == [i % 3 for i in rows] and batch.rows.tolist() == rows
    kinds = [value.dtype for value in vars(batch).values()]
    assert kinds == [torch.long, torch.long, torch.bool, torch.long, torch.long]
    assert list(map(id, batch.inputs)) == list(map(id, vars(batch).values()))[:3]


def test_batches_of_an_epoch():
    split = encoded(2003)
    first, again, other = (data.training_batches(split, 8, seed) for seed in (1, 1, 2))
    assert first == again and first != other
    assert sorted(i for rows in first for i in rows) == list(range(2003))
    assert len(first) == 251 and [len(rows) for rows in first].count(8) == 250
    cells = sum(len(rows) * max(len(split.ids[i]) for i in rows) for rows in first)
    assert cells < 1.05 * sum(map(len, split.ids))  # hardly any padding
    small = encoded(400)  # whose batches are in no order of length or place
    batches = data.training_batches(small, 8, seed=1)
    for kind in ([len(small.ids[rows[0]]) for rows in batches], [min(rows) for rows in batches]):
        assert abs(np.corrcoef(kind, np.arange(50))[0, 1]) < 0.3
    together = [{frozenset(rows) for rows in made} for made in (first, other)]
    assert len(together[0] & together[1]) < 20  # another epoch puts others together


@pytest.mark.parametrize("largest, sizes", [(1024, [331]), (100, [83, 83, 83, 82]), (331, [331])])
def test_pools_hold_the_split_in_the_order_of_length(largest, sizes):
    split = encoded(331)
    made = data.pools(split, largest=largest)
    assert [len(pool.labels) for pool in made] == sizes
    assert (torch.cat([pool.mask.sum(1) for pool in made]).diff() >= 0).all()
    rows = [i for pool in made for i in pool.rows.tolist()]
    assert sorted(rows) == list(range(331))
    assert [i for pool in made for i in (pool.ids[:, 0] - 1).tolist()] == rows
    assert {pool.ids.device.type for pool in data.pools(split, "meta")} == {"meta"}


# --- The toy task -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def toy():
    return data.load_task("toy")


def test_toy_labels_follow_from_the_words(toy):
    """By an oracle of its own: three places, in which the thing's two neighbours move."""
    tokenizer = data.toy_tokenizer()
    for split in toy.values():
        split = data.encode(tokenizer, split)
        for (text, second), label, level in zip(split.texts, split.labels, split.levels):
            cup, *pairs = text.split()[2:]
            table = [other == cup for other in "abc"]
            for pair in pairs:
                i, j = map("abc".index, pair)
                table[i], table[j] = table[j], table[i]
            assert second is None and len(pairs) == level and table.index(True) == label
        assert [len(ids) - 5 for ids in split.ids] == split.levels  # a token for every word
        assert tokenizer.token_to_id("[UNK]") not in np.concatenate(split.ids)


def test_toy_is_balanced_and_its_splits_are_distinct(toy):
    """Each way of the cups is about equally frequent: counting words does not solve the task."""
    for name, shares in (("train", (1 / 4, 1 / 4, 1 / 2)), ("dev", (1 / 3, 1 / 3, 1 / 3))):
        cells = list(zip(toy[name].levels, toy[name].labels))
        counts = {(k, c): round(len(cells) * shares[k] / 3) for k in range(3) for c in range(3)}
        assert {cell: cells.count(cell) for cell in cells} == counts
    texts = [text for split in toy.values() for text, _ in split.texts]
    assert len(set(texts)) == len(texts) == 3600 + 900
    assert toy["train"].texts == data.toy(seed=0)["train"].texts != data.toy(seed=1)["train"].texts
    ways = Counter(tuple(text.split()[2:]) for text in texts)
    for length, kinds in (1, 3), (2, 9), (3, 27):
        seen = [count for way, count in ways.items() if len(way) == length]
        assert len(seen) == kinds and max(seen) < 2 * min(seen)


# --- Tokens -------------------------------------------------------------------------------------

WORDS = [*data.SPECIAL, "Caf\u00e9", "Cafe", "caf\u00e9", "cafe", "cafe\u0301", "\u4e2d", "\u56fd",
         "\u4e2d\u56fd", *"Aab!-", "king", "size", "fi", "\ufb01", "un", "##able", "@@able", "e-a"]
TEXTS = ["Caf\u00e9 \u4e2d\u56fd A!",  # a capital, an accent, Chinese
         "cafe\u0301 e-A \ufb01 unable \u200bb [MASK] [NEW]a",  # a decomposed accent, a ligature
         "king size b " + "a " * 9]
USUAL = tokenizer_json(WORDS)
NEW = USUAL["added_tokens"][0] | {"id": len(WORDS), "content": "[NEW]"}
KING = NEW | {"id": len(WORDS) + 1, "content": "king size", "special": False, "normalized": True}
ADDED = [*USUAL["added_tokens"], NEW, KING]
FILL = {"strategy": {"Fixed": 30}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 4,
        "pad_type_id": 1, "pad_token": "[MASK]"}
CUT = {"direction": "Left", "max_length": 5, "strategy": "OnlyFirst", "stride": 2}
ENDS = {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
BERT = USUAL["normalizer"]
TOKENIZERS = {  # what changes in the usual tokenizer.json
    "usual": {}, "cased": {"normalizer": BERT | {"lowercase": False}},
    "with accents": {"normalizer": BERT | {"strip_accents": False}},
    "Chinese words": {"normalizer": BERT | {"handle_chinese_chars": False}},
    "nothing": {"normalizer": None}, "white space": {"pre_tokenizer": {"type": "WhitespaceSplit"}},
    "added": {"added_tokens": ADDED},
    "prefix": {"model": USUAL["model"] | {"continuing_subword_prefix": "@@"}},
    "short words": {"model": USUAL["model"] | {"max_input_chars_per_word": 3}},
    "BertProcessing": {"post_processor": ENDS}, "truncation": {"truncation": CUT, "padding": FILL}}


def by_the_library(path: Path, text: str, second: str | None, longest: int) -> tuple[list, list]:
    """Ids and segment ids: the library's pieces, and the rest in plain lists."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    a, b = (tokenizer.encode(t or "", add_special_tokens=False).ids for t in (text, second))
    if second is None:
        a = a[: longest - 2]
        return [2, *a, 3], [0] * (len(a) + 2)
    if_equal = b if len(a) > len(b) else a
    while len(a) + len(b) > longest - 3:  # the last token of the longer text goes first
        (if_equal if len(a) == len(b) else max(a, b, key=len)).pop()
    return [2, *a, 3, *b, 3], [0] * (len(a) + 2) + [1] * (len(b) + 1)


def test_tokenizers_are_those_of_their_library(tmp_path):
    """Every tokenizer.json gives the ids that the library gives, whatever lies beside it."""
    seen, pairs = {}, [(a, b) for a in TEXTS for b in (*TEXTS, None, "")]
    for name, changes in TOKENIZERS.items():
        path = write(tmp_path / name / "tokenizer.json", tokenizer_json(WORDS, **changes))
        write(path.with_name("vocab.txt"), "\n".join(reversed(WORDS)))
        write(path.with_name("tokenizer_config.json"), {"do_lower_case": "cased" not in name})
        for longest in (8, 13, 128):
            split = Split("train", pairs, [0] * len(pairs))
            split = data.encode(data.load_tokenizer(path.parent), split, longest)
            ours = list(zip(lists(split.ids), lists(split.segment_ids)))
            assert ours == [by_the_library(path, a, b, longest) for a, b in pairs], name
        seen[name] = str(ours)
    assert len(set(seen.values())) == len(seen) - 2  # they differ, save those two
    assert seen["BertProcessing"] == seen["truncation"] == seen["usual"]
    tokens = data.load_tokenizer(tmp_path / "added").encode("a[NEW]b KING size king").tokens
    assert tokens == ["[CLS]", "a", "[NEW]", "b", "king size", "king", "[SEP]"]


@pytest.mark.parametrize("file, content, word", [
    ("added_tokens.json", {"[NEW]": 77, "[OLD]": 78}, "[NEW]"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"4": ADDED[4], "77": NEW}}, "[NEW]"),
    ("tokenizer_config.json", {"additional_special_tokens": ["[NEW]", "x"]}, "[NEW]"),
    ("special_tokens_map.json", {"extra_special_tokens": {"a": "[SEP]", "b": NEW}}, "[NEW]"),
    ("tokenizer_config.json", {"tokenizer_class": "RobertaTokenizer"}, "RobertaTokenizer"),
    ("config.json", {"tokenizer_class": "BertJapaneseTokenizer"}, "BertJapaneseTokenizer"),
    ("tokenizer_config.json", {"unk_token": "<unk>"}, "<unk>"),
    ("special_tokens_map.json", {"unk_token": {"content": "<unk>"}}, "<unk>")])
def test_what_vocab_txt_cannot_say(tmp_path, weights_refused, file, content, word):
    """It needs a tokenizer.json, which is obeyed."""
    weights = save_tiny_weights(tmp_path / "tiny", old=True)
    path = write(weights / file, content)
    weights_refused(weights, str(path if word == "[NEW]" else weights), word, "tokenizer.json")
    write(weights / "tokenizer.json", tokenizer_json())
    assert data.load_tokenizer(weights).encode("a").ids == [2, TINY_WORDS.index("a"), 3]


def test_a_tokenizer_json_that_is_not_of_bert_is_refused(tmp_path, weights_refused):
    path = save_tiny_weights(tmp_path / "tiny") / "tokenizer.json"
    template = USUAL["post_processor"]
    start, a, end, b, _ = template["pair"]
    for pair in ([start, a, end, b, end], [start, a, end, end, b, end]):  # segments, RoBERTa's
        write(path, tokenizer_json(post_processor=template | {"pair": pair}))
        weights_refused(path.parent, str(path.parent), "not BERT's")
    write(path, tokenizer_json([*TINY_WORDS, "a"]))     # no more words, but the last id is new
    weights_refused(path.parent, f"{len(TINY_WORDS)} words", f"tokenizer {len(TINY_WORDS) + 1}")
    path.unlink()
    weights_refused(path.parent, str(path.parent), "tokenizer.json", "vocab.txt")


@pytest.mark.parametrize("lower, strip, chinese",
                         [*product((True, False), (None, True, False), (True, False))])
def test_vocab_txt_is_read_as_the_file_beside_it_says(tmp_path, lower, strip, chinese):
    """Where the usual five tokens are no added tokens."""
    usual = dict(enumerate(USUAL["added_tokens"]))
    stated = {"do_lower_case": lower, "strip_accents": strip, "tokenize_chinese_chars": chinese,
              "added_tokens_decoder": usual, "tokenizer_class": "BertTokenizerFast"}
    write(tmp_path / "vocab.txt", "\r\n".join(WORDS))
    write(tmp_path / "config.json", {"model_type": "bert", "additional_special_tokens": None})
    write(tmp_path / "tokenizer_config.json", stated | {"unk_token": "[UNK]"})
    write(tmp_path / "special_tokens_map.json", {"unk_token": usual[1]})
    accent = "e" if strip or strip is None and lower else "\u00e9"
    middle = ["\u4e2d", "\u56fd"] if chinese else ["\u4e2d\u56fd"]
    expected = [("caf" if lower else "Caf") + accent, *middle, "a" if lower else "A"]
    tokenizer = data.load_tokenizer(tmp_path)
    write(tmp_path / "run" / "tokenizer.json", tokenizer.to_str())  # as a run keeps it
    for tokenizer in (tokenizer, data.load_tokenizer(tmp_path / "run")):
        assert tokenizer.encode("Caf\u00e9 \u4e2d\u56fd A").tokens[1:-1] == expected
        assert tokenizer.encode("unable ux").tokens[1:-1] == ["un", "##able", "[UNK]"]


# --- Files --------------------------------------------------------------------------------------

def test_an_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = write(tmp_path / "x", "old")
    def broken(file):
        file.write(b"half")
        raise RuntimeError("no room")
    with pytest.raises(data.UserError, match="could not write .*x .*: RuntimeError: no room"):
        data.atomic_write(path, broken)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    before = path.stat().st_ino
    data.write_text(path, "n\u00ebw")
    assert path.stat().st_ino != before  # another file: whoever reads the old one reads on
    assert path.read_bytes() == "n\u00ebw".encode() and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error, words", [
    (UserError("fix it"), "fix it"), (FileNotFoundError(2, "No such file", "x.tsv"), "x.tsv"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "lower --batch-size or --max-length: "),
    (pytest.raises(RuntimeError, torch.empty, 1 << 50).value, "lower --batch-size"),
    (MemoryError("Unable to allocate 8 PiB"), "8 PiB"), (MemoryError(), "lower --batch-size"),
    (zipfile.BadZipFile("no zip"), "no zip"), (RuntimeError("shapes"), None), (KeyError(), None)])
def test_what_the_user_can_fix_is_said_in_one_line(refused, error, words):
    def script(arguments):
        with data.one_line_errors("x.py"):
            raise error
    if words is None:  # a fault of ours keeps its traceback
        with pytest.raises(type(error)):
            script([])
    else:
        refused(script, [], "x.py: ", words)
    caused = OSError("no\nway")
    caused.__cause__ = error
    assert data.in_words(caused) == f"OSError: no way from {error!r}"


def test_files_that_may_not_be_read(tmp_path, weights_refused, lock):
    for old, name in ((True, "vocab.txt"), (False, "tokenizer.json"), (False, "config.json"),
                      (False, "model.safetensors"), (True, "pytorch_model.bin")):
        path = save_tiny_weights(tmp_path / name, old) / name
        lock(path)
        weights_refused(path.parent, "Permission denied", str(path))
    lock(tmp_path / "train.tsv")
    weights_refused("x", "Permission denied", str(tmp_path / "train.tsv"))


# --- Downloads ----------------------------------------------------------------------------------

def test_glue_is_downloaded_once(server, tmp_path):
    """Only the task's own files are taken out of the zip, and they stand in the task's folder."""
    zipped, train = io.BytesIO(), RTE + "0\ta b\tc\tentailment\n" * 500
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("RTE/train.tsv", train)
        archive.writestr("RTE/dev.tsv", RTE + "0\td\te\tnot_entailment\n")
        archive.writestr("../evil.tsv", "x")
    server.files["/RTE.zip"] = zipped.getvalue()
    for _ in range(2):
        splits = data.load_task("rte")
        assert len(splits["train"]) == 500 and splits["dev"].texts == [("d", "e")]
    assert server.log == ["/RTE.zip"]
    folder = tmp_path / "cache" / "glue" / "RTE"
    found = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {folder / "train.tsv", folder / "dev.tsv"}


def test_downloads_that_fail_leave_nothing(server, tmp_path):
    for name, path in (("qnli", "QNLIv2.zip"), ("qqp", "QQP-clean.zip"), ("sst2", "SST-2.zip")):
        fails(lambda: data.load_task(name), f"{server.url}/{path}", "404")
    server.files["/SST-2.zip"] = bytes(300_000)  # of which a part comes
    fails(lambda: data.load_task("sst2"), f"{server.url}/SST-2.zip")
    hang_up(server)
    fails(lambda: data.load_task("sst2"), "SST-2.zip", "refused")
    assert not list(tmp_path.rglob("*"))


def test_mrpc_is_put_together(server):
    rows = [f'{i % 2}\t{100 + i}\t{200 + i}\tHe said "no {i}\tShe {i}' for i in range(6)]
    text = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n" + "\r\n".join(rows) + "\r\n"
    server.files["/msr_paraphrase_train.txt"] = text.encode()
    server.files["/mrpc_dev_ids.tsv"] = b"104\t204\n101\t201\n"
    splits = data.load_task("mrpc")
    seconds = {name: [second for _, second in split.texts] for name, split in splits.items()}
    assert seconds == {"dev": ["She 1", "She 4"], "train": ["She 0", "She 2", "She 3", "She 5"]}
    assert splits["dev"].labels == [1, 0]


@pytest.mark.parametrize("name, wanted", [
    ("one/new", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]),
    ("one/old", ["config.json", "pytorch_model.bin"])])
def test_weights_come_from_the_hub_once(hub, capfd, name, wanted):
    for _ in range(2):
        folder = data.fetch_weights(name)
        found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(found) == sorted([*wanted, "vocab.txt"])
    assert found.items() <= hub.files[name].items()
    files = [path for path in hub.log if "/resolve/" in path]
    assert len(files) == 2 * len(found)  # HEAD and GET, the second time neither
    assert data.fetch_weights(str(folder)) == folder
    assert capfd.readouterr().err == ""  # no progress bar in a log file


def test_a_cache_suffices_without_the_hub(hub, monkeypatch):
    """With HF_HUB_OFFLINE=1, which asks nobody, and without a connection. Also one that another
    program filled, with all that is needed but not with all that we would fetch."""
    names, hub.files["one/both"] = ["one/new", "one/old", "one/both"], hub.files["one/new"]
    folders = [data.fetch_weights(name) for name in names[:2]]
    for file in ("config.json", "tokenizer.json", "pytorch_model.bin"):
        both = huggingface_hub.snapshot_download("one/both", allow_patterns=file)
    folders.append(Path(both))
    hub.log.clear()
    with monkeypatch.context() as offline:
        offline.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert [data.fetch_weights(name) for name in names] == folders and not hub.log
    hang_up(hub)
    assert [data.fetch_weights(name) for name in names] == folders
    for folder in folders:
        load_bert(folder), data.load_tokenizer(folder)


@pytest.mark.parametrize("kind, status, code, said, words", [
    ("revision", 401, "", 'Token "x" is expired', ["HfHubHTTPError", "401", "is expired"]),
    ("resolve", 403, "GatedRepo", "Ask for access.", ["GatedRepoError", "403", "Ask for"]),
    ("revision", 404, "RepoNotFound", "", ["RepositoryNotFoundError", "404"]),
    ("revision", 503, "", "", ["HfHubHTTPError", "503"])])
def test_what_the_hub_answers_is_said(hub, weights_refused, kind, status, code, said, words):
    hub.refusals[kind] = status, b"", {"X-Error-Code": code, "X-Error-Message": said}
    weights_refused("one/new", "one/new", *words)


def test_hubs_that_cannot_be_used(hub, weights_refused, monkeypatch, tmp_path):
    point_to(monkeypatch, endpoint=hub.url.replace("http:", "https:"))
    weights_refused("one/new", "one/new", "SSL")
    point_to(monkeypatch, endpoint=hub.url, cache_dir=write(tmp_path / "file", "") / "hub")
    weights_refused("one/new", "one/new", "NotADirectoryError", str(tmp_path / "file"))
    point_to(monkeypatch, cache_dir=tmp_path / "empty")
    hang_up(hub)
    for name in ("one/new", "no/such/folder", "a name", "~/nowhere"):
        weights_refused(name, name, "Error", "folder")
    weights_refused("one/new", "refused")
