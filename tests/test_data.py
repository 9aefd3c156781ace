"""data.py against independent oracles: metrics worked out by hand, files with every trap of GLUE,
and a server on this machine.

    pytest tests/test_data.py                           # what needs GLUE's files is skipped
    SMARTBERT_SHARED=folder pytest tests/test_data.py   # reads folder/glue/, folder/weights/
"""

import gzip
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import requests
import torch

import data
from data import TASKS, Split, UserError

SHARED = Path(os.environ.get("SMARTBERT_SHARED", ""))
needs_shared = pytest.mark.skipif(
    not os.environ.get("SMARTBERT_SHARED"),
    reason="SMARTBERT_SHARED is not set: no GLUE files to read",
)


def lists(rows: list[np.ndarray]) -> list[list[int]]:
    return [row.tolist() for row in rows]


def fails(call, *parts: str) -> str:
    """call() raises UserError with a message of one line that holds all parts."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


# --- Tasks and metrics --------------------------------------------------------------------------


def test_an_unknown_task_gets_the_known_names():
    assert data.find_task("rte") is TASKS["rte"]
    message = fails(lambda: data.find_task("sst-2" * 50), "sst-2", *TASKS)
    assert len(message) < 160


@pytest.mark.parametrize(
    "tp, fp, fn, tn, accuracy, f1, matthews",
    [
        (6, 1, 2, 3, 9 / 12, 12 / 15, 16 / 1120**0.5),  # worked out by hand from the four counts
        (5, 0, 0, 4, 1.0, 1.0, 1.0),
        (0, 4, 5, 0, 0.0, 0.0, -1.0),
        (7, 3, 0, 0, 0.7, 14 / 17, 0.0),  # one class predicted: no Matthews'
        (0, 0, 3, 7, 0.7, 0.0, 0.0),
    ],
)
def test_metrics_of_known_tables(tp, fp, fn, tn, accuracy, f1, matthews):
    predictions = [1] * (tp + fp) + [0] * (fn + tn)
    labels = [1] * tp + [0] * fp + [1] * fn + [0] * tn
    both = data.scores(TASKS["mrpc"], predictions, labels)
    assert both == pytest.approx({"f1": f1, "accuracy": accuracy})
    assert data.scores(TASKS["cola"], predictions, labels) == pytest.approx({"matthews": matthews})
    assert list(data.scores(TASKS["mrpc"], predictions, labels)) == ["f1", "accuracy"]


def test_matthews_is_the_correlation_of_two_binary_vectors():
    rng = np.random.default_rng(3)
    for _ in range(20):
        labels = rng.integers(0, 2, 37)
        predictions = np.where(rng.random(37) < 0.3, 1 - labels, labels)
        value = data.scores(TASKS["cola"], predictions.tolist(), labels.tolist())["matthews"]
        assert value == pytest.approx(np.corrcoef(predictions, labels)[0, 1])


def test_three_classes_and_majority():
    assert data.scores(TASKS["mnli"], [0, 2, 2, 1], [0, 1, 2, 1]) == {"accuracy": 0.75}
    assert data.majority(TASKS["mnli"], [2, 0, 2, 1, 2]) == pytest.approx({"accuracy": 0.6})
    assert data.majority(TASKS["cola"], [1, 1, 0]) == {"matthews": 0.0}


# --- Reading ------------------------------------------------------------------------------------

RTE = "index\tsentence1\tsentence2\tlabel\n"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rte_folder(folder: Path, train: str | bytes = RTE + "0\ta b\tc\tentailment\n") -> Path:
    write(folder / "RTE" / "train.tsv", train)
    write(folder / "RTE" / "dev.tsv", RTE + "0\td e\tf\tnot_entailment\n")
    return folder


def test_reads_a_pair_task_from_either_folder(tmp_path):
    rte_folder(tmp_path)
    for folder in (tmp_path, tmp_path / "RTE", str(tmp_path)):
        splits = data.load_task("rte", folder)
        assert list(splits) == ["train", "dev"]
        assert splits["train"].texts == [("a b", "c")] and splits["train"].labels == [0]
        assert splits["dev"].labels == [1] and not splits["dev"].partial


def test_text_that_trips_readers(tmp_path):
    """BOM, Windows line ends, quotes that never close, and the line ends of str.splitlines."""
    rows = [
        'he said "no',
        'and "" left"',
        "one\u2028two",
        "three\u0085four\x0b\x1c",
        "caf\u00e9\rnoir",
    ]
    body = "".join(f"{i}\t{text}\tb\tentailment\r\n" for i, text in enumerate(rows))
    rte_folder(tmp_path, b"\xef\xbb\xbf" + RTE.encode() + body.encode())
    assert [text for text, _ in data.load_task("rte", tmp_path)["train"].texts] == rows


def test_columns_are_found_by_name_and_cola_has_none(tmp_path):
    write(
        tmp_path / "RTE" / "train.tsv",
        "label\tsentence2\tx\tsentence1\nentailment\tsecond\t\tfirst\n",
    )
    write(tmp_path / "RTE" / "dev.tsv", RTE + "0\td\te\tentailment")
    assert data.load_task("rte", tmp_path)["train"].texts == [("first", "second")]
    for name in ("train", "dev"):
        write(
            tmp_path / "CoLA" / f"{name}.tsv", "gj04\t1\t\tIt rains.\ngj04\t0\t*\tRains it it.\n"
        )
    cola = data.load_task("cola", tmp_path)["dev"]
    assert cola.texts == [("It rains.", None), ("Rains it it.", None)] and cola.labels == [1, 0]


def test_rows_of_another_width_are_left_out_and_named(tmp_path, capsys):
    rte_folder(
        tmp_path,
        RTE + "0\ta\tb\tentailment\n1\ta\tno label\n\n"
        "2\tc\td\tnot_entailment\n3\ta\tb\tc\tentailment\n" + "short\n" * 5 + "\n\n",
    )
    assert data.load_task("rte", tmp_path)["train"].texts == [("a", "b"), ("c", "d")]
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "train.tsv: left out 8 rows" in warning
    assert "4 fields" in warning and "lines [3, 4, 6, 7, 8]" in warning
    rte_folder(tmp_path, RTE + "0\ta\tb\tc\tentailment\n")
    fails(lambda: data.load_task("rte", tmp_path), "no examples", "1 rows left out")


def test_mnli_rows_without_a_gold_label_are_left_out(tmp_path, capsys):
    for split in ("train", "dev_matched", "dev_mismatched"):
        write(
            tmp_path / f"{split}.tsv", "sentence1\tsentence2\tgold_label\na\tb\t-\nc\td\tneutral\n"
        )
    assert data.load_task("mnli", tmp_path)["train"].texts == [("c", "d")]
    warning = capsys.readouterr().err.splitlines()[0]
    assert "train.tsv: left out 1 rows" in warning
    assert "without a gold label: the first are lines [2]" in warning
    rte_folder(tmp_path, RTE + "0\ta\tb\t-\n")
    fails(lambda: data.load_task("rte", tmp_path), "label '-' is none of")


def test_headers_with_a_column_twice_and_long_cells(tmp_path):
    rte_folder(tmp_path, "label\tsentence1\tsentence2\tlabel\nentailment\ta\tb\tentailment\n")
    fails(lambda: data.load_task("rte", tmp_path), "train.tsv", "2 columns 'label'")
    rte_folder(tmp_path, RTE + "0\ta\tb\t" + "x" * 5000 + "\n")
    message = fails(lambda: data.load_task("rte", tmp_path), "line 2", "'" + "x" * 59)
    assert "x" * 60 not in message


def test_files_that_cannot_be_used(tmp_path):
    def load():
        return data.load_task("rte", tmp_path)

    rte_folder(tmp_path, RTE + "0\ta\tb\tentailment\n1\ta\tb\tmaybe\n")
    fails(load, "train.tsv, line 3", "'maybe'", "not_entailment")
    for empty in ("", RTE, "\n"):
        rte_folder(tmp_path, empty)
        fails(load, "train.tsv")
    rte_folder(tmp_path, "index\tsentence1\tlabel\n0\ta\tentailment\n")
    fails(load, "train.tsv", "0 columns 'sentence2'")
    rte_folder(tmp_path, RTE.encode() + b"0\t\xff\xfe\tb\tentailment\n")
    fails(load, "train.tsv", "UTF-8")
    (tmp_path / "RTE" / "train.tsv").unlink()
    fails(load, str(tmp_path / "RTE" / "train.tsv"), "put RTE's train.tsv there")
    fails(lambda: data.load_task("rte", tmp_path / "nowhere"), "nowhere is not a folder")


def test_partial_files_are_marked_and_never_preferred(tmp_path):
    rte_folder(tmp_path)
    write(tmp_path / "RTE" / "train.partial.tsv", RTE + "0\tpart\tb\tentailment\n")
    assert not data.load_task("rte", tmp_path)["train"].partial
    (tmp_path / "RTE" / "train.tsv").unlink()
    splits = data.load_task("rte", tmp_path)
    assert splits["train"].partial and not splits["dev"].partial
    assert splits["train"].texts == [("part", "b")] and splits["train"].select([0]).partial


def test_a_large_split_holds_out_a_bounded_part():
    rest, held = data.hold_out(Split([("a", None)] * 50_000, [0, 1, 1, 1, 1] * 10_000), 0.1)
    assert len(held) == 2000 and len(rest) == 48_000
    assert held.labels.count(0) == 400


def test_hold_out_is_stratified_disjoint_and_reproducible():
    labels = [0] * 60 + [1] * 30 + [2] * 10
    split = Split([(f"t{i}", None) for i in range(100)], labels, levels=list(range(100)))
    rest, held = data.hold_out(split, 0.2, seed=5)
    assert [held.labels.count(c) for c in range(3)] == [12, 6, 2]
    assert sorted(rest.levels + held.levels) == list(range(100))
    assert all(
        text == f"t{i}" and label == labels[i]
        for part in (rest, held)
        for (text, _), label, i in zip(part.texts, part.labels, part.levels)
    )
    assert data.hold_out(split, 0.2, seed=5)[1].levels == held.levels
    assert data.hold_out(split, 0.2, seed=6)[1].levels != held.levels
    assert len(data.hold_out(split, 0.0)[1]) == 0
    fails(
        lambda: data.hold_out(split.select([0, 99]), 0.9),
        "nothing is left to train on: ",
        "0.9",
        "all 2",
    )
    fails(lambda: data.hold_out(split.select([]), 0.0), "nothing is left to train on: ")


@needs_shared
@pytest.mark.parametrize(
    "name, train, devs, partial",
    [  # row counts of the official files
        ("cola", 8551, {"dev": 1043}, False),
        ("sst2", 67349, {"dev": 872}, False),
        ("mrpc", 3668, {"dev": 408}, False),
        ("rte", 2490, {"dev": 277}, False),
        ("wnli", 635, {"dev": 71}, False),
        ("qnli", 2000, {"dev": 5463}, True),
        ("mnli", 15891, {"dev_matched": 9815, "dev_mismatched": 9832}, True),
        ("qqp", 2000, {"dev": 7600}, True),
    ],
)
def test_glue_row_counts(name, train, devs, partial, capsys):
    splits = data.load_task(name, SHARED / "glue")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": train, **devs}
    assert splits["train"].partial == partial
    assert splits[next(iter(devs))].partial == (name == "qqp")
    assert capsys.readouterr().err == ""  # no row was left out
    assert all(
        text and (second is None) == (name in ("cola", "sst2"))
        for rows in splits.values()
        for text, second in rows.texts
    )
    assert set(splits["train"].labels) == set(range(len(TASKS[name].labels)))


@needs_shared
@pytest.mark.parametrize(
    "name, expected",
    [
        ("mrpc", {"f1": 0.812, "accuracy": 0.684}),
        ("wnli", {"accuracy": 0.563}),
        ("rte", {"accuracy": 0.527}),
        ("cola", {"matthews": 0.0}),
    ],
)
def test_majority_of_the_dev_sets(name, expected):
    labels = data.load_task(name, SHARED / "glue")["dev"].labels
    assert data.majority(TASKS[name], labels) == pytest.approx(expected, abs=5e-4)


# --- Downloads ----------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Serves server.files, compressed where that is allowed. server.cut: only so many bytes."""

    def do_GET(self):
        body = self.server.files.get(self.path)
        self.server.log.append(self.path)
        if body is None:
            return self.send_error(404)
        self.send_response(200)
        if "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.cut])

    def log_message(self, *arguments):
        pass


def serve(handler):
    """A server on this machine for the length of a test; its url ends without a slash."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.files, server.log, server.cut, server.commit, server.moving = {}, [], None, 1, False
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for server in serve(Handler):
        for name in ("GLUE_URL", "SENTEVAL_URL"):
            monkeypatch.setattr(data, name, f"{server.url}/")
        yield server


BODY = bytes(range(256)) * 700  # more than two chunks


def test_download_whole(server, tmp_path):
    server.files["/x.bin"], path = BODY, tmp_path / "deep" / "x.bin"
    for _ in range(2):
        data.download(f"{server.url}/x.bin", path)
        assert path.read_bytes() == BODY and list(path.parent.iterdir()) == [path]
    assert server.log == ["/x.bin"]  # the second time it was there


def test_a_truncated_download_leaves_nothing(server, tmp_path, monkeypatch):
    server.files["/x.bin"], server.cut, path = BODY, 100_000, tmp_path / "x.bin"
    url = f"{server.url}/x.bin"
    fails(lambda: data.download(url, path), "x.bin", url, str(path))
    server.cut = None
    with monkeypatch.context() as patch:  # urllib3 1 ends such a body in silence
        patch.setattr(requests.Response, "iter_content", lambda self, size: iter([BODY[:10]]))
        fails(lambda: data.download(url, path), f"10 of {len(BODY)} bytes", str(path))
    assert list(tmp_path.iterdir()) == []
    data.download(url, path)
    assert path.read_bytes() == BODY


def test_two_downloads_at_once(server, tmp_path, monkeypatch):
    """Both have written before either renames its file: neither disturbs the other."""
    server.files["/x.bin"], path, whole = BODY, tmp_path / "x.bin", []
    real, barrier = os.replace, threading.Barrier(2, timeout=20)

    def meet(source, target):
        barrier.wait()
        whole.append(Path(source).read_bytes() == BODY)
        barrier.wait()
        real(source, target)

    monkeypatch.setattr(os, "replace", meet)
    both = [
        threading.Thread(target=data.download, args=(f"{server.url}/x.bin", path))
        for _ in range(2)
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert whole == [True, True] and path.read_bytes() == BODY
    assert list(tmp_path.iterdir()) == [path]


def test_no_network_says_what_to_fetch_by_hand(server, tmp_path, monkeypatch):
    archive = str(tmp_path / "glue" / "RTE.zip")
    fails(lambda: data.load_task("rte", cache=tmp_path), "RTE.zip", "404", archive)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    monkeypatch.setattr(data, "GLUE_URL", f"http://127.0.0.1:{port}/")
    fails(lambda: data.load_task("rte", cache=tmp_path), f"127.0.0.1:{port}/RTE.zip", archive)
    assert not (tmp_path / "glue" / "RTE").exists()
    write(tmp_path / "file", "")
    monkeypatch.setattr(data, "GLUE_URL", f"{server.url}/")
    server.files["/RTE.zip"] = zipped(**WHOLE)
    fails(lambda: data.load_task("rte", cache=tmp_path / "file"), "could not write", "RTE")


def zipped(**files: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


WHOLE = {
    "RTE/": "",
    "RTE/train.tsv": RTE + "0\ta b\tc\tentailment\n" * 500,
    "RTE/dev.tsv": RTE + "0\td\te\tnot_entailment\n",
    "RTE/test.tsv": "",
    "__MACOSX/RTE/._dev.tsv": "x",
}


def test_glue_zip_is_fetched_once_and_unpacked_whole(server, tmp_path, monkeypatch):
    server.files["/RTE.zip"] = zipped(**WHOLE)
    monkeypatch.setenv("SMARTBERT_CACHE", str(tmp_path))
    for _ in range(2):
        splits = data.load_task("rte")
        assert len(splits["train"]) == 500 and splits["dev"].texts == [("d", "e")]
    assert len(server.log) == 1
    assert sorted(p.name for p in (tmp_path / "glue").iterdir()) == ["RTE", "RTE.zip"]
    assert {p.name for p in (tmp_path / "glue" / "RTE").iterdir()} == {"dev.tsv", "train.tsv"}


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_zip_is_removed(server, tmp_path, damage):
    whole = zipped(**WHOLE)
    middle = whole.index(b"RTE/train.tsv") + 20  # inside the compressed rows
    flipped = whole[:middle] + bytes(9) + whole[middle + 9 :]
    bad = whole[:-30] if damage == "truncated" else flipped
    archive = write(tmp_path / "glue" / "RTE.zip", bad)
    fails(lambda: data.load_task("rte", cache=tmp_path), str(archive), "run again")
    assert list((tmp_path / "glue").iterdir()) == []
    server.files["/RTE.zip"] = whole
    assert len(data.load_task("rte", cache=tmp_path)["train"]) == 500


@pytest.mark.parametrize(
    "member", ["../evil.tsv", "RTE/../../../evil.tsv", "/tmp/smartbert-evil.tsv"]
)
def test_zip_that_leads_out_of_its_folder_does_not(server, tmp_path, member):
    """Only the task's own files are taken out of it, and they stand in the task's folder."""
    write(tmp_path / "cache" / "glue" / "RTE.zip", zipped(**WHOLE, **{member: "evil"}))
    assert len(data.load_task("rte", cache=tmp_path / "cache")["train"]) == 500
    glue = tmp_path / "cache" / "glue"
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == {
        glue / "RTE.zip",
        glue / "RTE/train.tsv",
        glue / "RTE/dev.tsv",
    }
    assert not Path("/tmp/smartbert-evil.tsv").exists()


def test_zip_member_of_a_huge_declared_size_is_refused(tmp_path, monkeypatch):
    """The size in the zip's directory is set to just under 4 GiB, the most its 32 bits can say."""
    whole = bytearray(zipped(**WHOLE))
    size = whole.rindex(b"RTE/train.tsv") - 22  # where the directory's entry has it
    whole[size : size + 4] = b"\xfe\xff\xff\xff"
    archive = write(tmp_path / "glue" / "RTE.zip", bytes(whole))
    assert data.LARGEST == 2**32
    monkeypatch.setattr(data, "LARGEST", 2**31)
    fails(
        lambda: data.load_task("rte", cache=tmp_path),
        str(archive),
        "RTE/train.tsv",
        f"{2**31} bytes",
        "run again",
    )
    assert not archive.exists()


def test_zip_of_another_task_and_killed_unpacking(server, tmp_path, monkeypatch):
    archive = write(tmp_path / "glue" / "RTE.zip", zipped(**{"WNLI/train.tsv": "x"}))
    fails(lambda: data.load_task("rte", cache=tmp_path), "RTE.zip", "RTE/train.tsv")
    assert not archive.exists()
    archive.write_bytes(zipped(**WHOLE))
    real = data.atomic_write

    def killed(path, save):
        if path.name == "dev.tsv":
            raise KeyboardInterrupt
        real(path, save)

    monkeypatch.setattr(data, "atomic_write", killed)
    with pytest.raises(KeyboardInterrupt):
        data.load_task("rte", cache=tmp_path)
    assert not (tmp_path / "glue" / "RTE" / "dev.tsv").exists()
    monkeypatch.setattr(data, "atomic_write", real)
    assert len(data.load_task("rte", cache=tmp_path)["dev"]) == 1


def test_mrpc_is_put_together(server, tmp_path):
    rows = [f'{i % 2}\t{100 + i}\t{200 + i}\tHe said "no {i}\tShe {i}' for i in range(6)]
    text = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + "\n".join(rows) + "\n"
    server.files = {
        "/msr_paraphrase_train.txt": text.encode(),
        "/mrpc_dev_ids.tsv": b"104\t204\n101\t201\n",
    }
    splits = data.load_task("mrpc", cache=tmp_path)
    seconds = {name: [second for _, second in split.texts] for name, split in splits.items()}
    assert seconds == {"dev": ["She 1", "She 4"], "train": ["She 0", "She 2", "She 3", "She 5"]}
    assert splits["dev"].labels == [1, 0]
    server.files["/msr_paraphrase_train.txt"] = "\n".join(text.split("\n")[:4]).encode()
    fails(
        lambda: data.load_task("mrpc", cache=tmp_path / "other"),
        "msr_paraphrase_train.txt",
        "lacks rows of the dev set",
    )
    assert not (tmp_path / "other" / "glue" / "MRPC").exists()


class Hub(Handler):
    """As much of the hub's protocol as snapshot_download needs. server.files: OWNER/NAME -> the
    files of that repository. server.cut: the first large GET breaks off after so many bytes.
    server.commit: the newest commit; where server.moving, each look at it finds a newer one."""

    def do_HEAD(self):
        self.answer(head=True)

    def do_GET(self):
        self.answer(head=False)

    def answer(self, head: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        repository, kind, file = path.removeprefix("api/models/"), "", ""
        commit = f"{self.server.commit:040x}"
        for word in ("/revision/", "/tree/", "/resolve/"):
            if word in repository:
                repository, _, rest = repository.partition(word)
                asked, _, file = rest.partition("/")
                kind, commit = word.strip("/"), commit if asked == "main" else asked
        self.server.commit += self.server.moving
        files = self.server.files.get(repository)
        if not head:
            self.server.log.append(file or kind)
        if files is None or kind == "resolve" and file not in files:
            code = "RepoNotFound" if files is None else "EntryNotFound"
            return self.send(b"", head, 404, {"X-Error-Code": code, "X-Repo-Commit": commit})
        if kind == "resolve":
            return self.send(
                files[file],
                head,
                200,
                {"ETag": f'"{abs(hash(files[file])):x}"', "X-Repo-Commit": commit},
            )
        tree = [
            {"type": "file", "path": name, "size": len(body), "oid": f"{abs(hash(body)):x}"}
            for name, body in files.items()
        ]
        siblings = [{"rfilename": name} for name in files]
        info = {"id": repository, "sha": commit, "siblings": siblings}
        answer = tree if kind == "tree" else info
        self.send(json.dumps(answer).encode(), head, 200, {"Content-Type": "application/json"})

    def send(self, body: bytes, head: bool, status: int, headers: dict[str, str]) -> None:
        start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        self.send_response(206 if start else status)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if not head:
            cut = self.server.cut if len(body) > 1000 else None
            self.wfile.write(body[start:][:cut])
            if cut:
                self.server.cut, self.close_connection = None, True


TENSORS = os.urandom(300_000)
BERT = {
    "config.json": b"{}",
    "vocab.txt": b"[PAD]\n",
    "tokenizer_config.json": b"{  }",
    "tokenizer.json": b"{ }",
    "pytorch_model.bin": TENSORS,
}
OTHERS = {
    "model.safetensors": TENSORS[::-1],
    "README.md": b"x",
    "onnx/model.onnx": b"y",
    "tf_model.h5": b"z",
}


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("SMARTBERT_CACHE", raising=False)
    for server in serve(Hub):
        server.files["some-one/some-bert"] = BERT | OTHERS
        monkeypatch.setattr(
            huggingface_hub,
            "snapshot_download",
            partial(huggingface_hub.snapshot_download, endpoint=server.url, token=False),
        )
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_weights_come_from_the_hub_once(hub, tmp_path, capfd):
    for _ in range(2):
        folder = data.fetch_weights("some-one/some-bert", tmp_path)
        assert contents(folder) == BERT  # these files, and no others
        assert tmp_path / "weights" in folder.parents
    assert [hub.log.count(file) for file in BERT] == [1] * len(BERT)
    assert capfd.readouterr().err == ""  # no progress bar in a log file
    assert data.fetch_weights(str(folder), tmp_path / "other") == folder
    hub.shutdown()
    hub.server_close()  # no connection: the cache suffices
    assert data.fetch_weights("some-one/some-bert", tmp_path) == folder


def test_safetensors_where_the_hub_has_nothing_else(hub, tmp_path):
    small = {name: body for name, body in BERT.items() if name != "pytorch_model.bin"}
    hub.files["some-one/some-bert"], hub.moving = small | OTHERS, True
    folder = data.fetch_weights("some-one/some-bert", tmp_path)
    assert contents(folder) == small | {  # all of one commit
        "model.safetensors": TENSORS[::-1]
    }


def test_an_interrupted_fetch_ends_with_the_right_bytes(hub, tmp_path):
    hub.cut = 100_000
    try:
        data.fetch_weights("some-one/some-bert", tmp_path)
    except UserError:  # older versions do not try again
        pass
    assert hub.cut is None
    assert contents(data.fetch_weights("some-one/some-bert", tmp_path)) == BERT


def test_weights_that_cannot_be_fetched(hub, tmp_path):
    for name in ("some-one/no-bert", "no/such/folder", "a name", "~/nowhere"):
        fails(
            lambda: data.fetch_weights(name, tmp_path),
            repr(name),
            "there is no such name",
            "check the name",
            "pytorch_model.bin",
        )
    hub.shutdown()
    hub.server_close()
    message = fails(
        lambda: data.fetch_weights("some-one/some-bert", tmp_path),
        "some-bert",
        "not in the hub's cache and no connection",
    )
    assert "Error" not in message
    assert len(fails(lambda: data.fetch_weights("x" * 5000, tmp_path))) < 300


@pytest.mark.parametrize(
    "name, path",
    [
        ("google-bert/bert-base-uncased", "/2018_10_18/uncased_L-12_H-768_A-12.zip"),
        ("google/bert_uncased_L-2_H-128_A-2", "/2020_02_20/uncased_L-2_H-128_A-2.zip"),
    ],
)
def test_google_serves_its_models_where_the_hub_is_down(
    hub, server, tmp_path, monkeypatch, name, path
):
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr(data, "GOOGLE_URL", f"{server.url}/")
    files = {file: f"content of {file}" for file in data.GOOGLE_FILES}
    within = {f"{Path(path).stem}/{file}": text for file, text in files.items()}
    server.files[path] = zipped(**within, **{"../evil": "x"})
    for _ in range(2):
        folder = data.fetch_weights(name, tmp_path)
        assert contents(folder) == {file: text.encode() for file, text in files.items()}
    assert folder == tmp_path / "weights" / Path(path).stem and server.log == [path]
    assert not (tmp_path / "evil").exists()
    server.files[path] = zipped(**{f"x/{file}": "" for file in data.GOOGLE_FILES[1:]})
    fails(lambda: data.fetch_weights(name, tmp_path / "other"), "bert_config.json", "run again")
    assert not list((tmp_path / "other" / "weights").iterdir())


def test_a_zip_of_weights(tmp_path):
    """Damaged, it stays: it is the user's."""
    path = write(tmp_path / "mine.zip", zipped(**{file: file for file in data.GOOGLE_FILES}))
    assert set(contents(data.fetch_weights(str(path), tmp_path))) == set(data.GOOGLE_FILES)
    for bad in (path.read_bytes()[:-30], zipped(**{"vocab.txt": "x"}), b""):
        write(path, bad)
        fails(lambda: data.fetch_weights(str(path), tmp_path), str(path), "replace it")
        assert path.read_bytes() == bad


def test_the_variables_of_the_hub_library_apply(hub, tmp_path):
    """In a process of its own, because the library reads them when it is loaded."""
    code = "import data; print(data.fetch_weights('some-one/some-bert'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(data.__file__).parent,
        env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)},
    )
    folder = Path(done.stdout.strip())
    assert contents(folder) == BERT and tmp_path in folder.parents


@pytest.mark.parametrize("variable", [True, False])
def test_weights_go_to_our_cache_where_one_is_named(tmp_path, monkeypatch, variable):
    """Else cache_dir is None: the library's own."""

    def record(name, cache_dir, **others):
        asked.append(cache_dir)
        return tmp_path

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", record)
    monkeypatch.delenv("SMARTBERT_CACHE", raising=False)
    if variable:
        monkeypatch.setenv("SMARTBERT_CACHE", str(tmp_path / "v"))
    data.fetch_weights("some-one/some-bert")
    data.fetch_weights("some-one/some-bert", tmp_path / "a")
    assert set(asked) == {tmp_path / "v/weights" if variable else None, tmp_path / "a/weights"}


def test_cache_folder(monkeypatch, tmp_path):
    for name in ("SMARTBERT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.cache_dir() == tmp_path / ".cache" / "smartbert"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert data.cache_dir() == Path("/xdg/smartbert")
    monkeypatch.setenv("SMARTBERT_CACHE", "~/here")
    assert data.cache_dir() == tmp_path / "here"
    assert data.cache_dir("/there") == Path("/there")


def test_an_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = write(tmp_path / "x", "old")

    def broken(file):
        file.write(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        data.atomic_write(path, broken)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    data.atomic_write(path, lambda file: file.write(b"new"))
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


# --- Tokens -------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize(
    "text, second, ids, segment_ids",
    [  # ids that BERT is known to give
        ("hello world", None, [101, 7592, 2088, 102], [0] * 4),
        ("Hello, WORLD!", None, [101, 7592, 1010, 2088, 999, 102], [0] * 6),
        ("h\u00e9llo", "world", [101, 7592, 102, 2088, 102], [0, 0, 0, 1, 1]),
    ],
)
def test_bert_tokens(text, second, ids, segment_ids):
    tokenizer = data.load_tokenizer(SHARED / "weights" / "e5-small")
    split = data.encode(tokenizer, Split([(text, second)], [0]))
    assert lists(split.ids) == [ids] and lists(split.segment_ids) == [segment_ids]


def vocabulary(folder: Path, *words: str) -> Path:
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *words)
    write(folder / "vocab.txt", "".join(f"{word}\n" for word in words))
    return folder


def test_word_pieces_and_case(tmp_path):
    write(tmp_path / "tokenizer_config.json", '{"do_lower_case": true}')
    vocabulary(tmp_path, "a", "un", "##able", "##aff", "A")
    tokens = data.load_tokenizer(tmp_path).encode("A unaffable \u00e0 zz").tokens
    assert tokens == ["[CLS]", "a", "un", "##aff", "##able", "a", "[UNK]", "[SEP]"]
    write(tmp_path / "tokenizer_config.json", '{"do_lower_case": false}')
    tokens = data.load_tokenizer(tmp_path).encode("A a \u00e0").tokens
    assert tokens == ["[CLS]", "A", "a", "[UNK]", "[SEP]"]
    for content in (
        '{"do_lower',
        "[]",
        '{"do_lower_case": "false"}',
        '{"do_basic_tokenize": false}',
        '{"never_split": ["a"]}',
    ):
        write(tmp_path / "tokenizer_config.json", content)
        fails(lambda: data.load_tokenizer(tmp_path), "tokenizer_config.json")


def config(folder: Path, name: str = "tokenizer_config.json", **values) -> None:
    write(folder / name, json.dumps(values))


MIXED = "Caf\u00e9 \u4e2d\u56fd A"  # capitals, an accent, two Chinese characters
WORDS = ("Caf\u00e9", "Cafe", "caf\u00e9", "cafe", "\u4e2d", "\u56fd", "\u4e2d\u56fd", "A", "a")


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("strip", [None, True, False])
@pytest.mark.parametrize("chinese", [True, False])
def test_tokenizer_settings_are_obeyed_and_written(tmp_path, lower, strip, chinese):
    vocabulary(tmp_path, *WORDS)
    config(tmp_path, do_lower_case=lower, strip_accents=strip, tokenize_chinese_chars=chinese)
    tokenizer = data.load_tokenizer(tmp_path)
    accent = "e" if strip or strip is None and lower else "\u00e9"
    expected = [
        ("caf" if lower else "Caf") + accent,
        *(["\u4e2d", "\u56fd"] if chinese else ["\u4e2d\u56fd"]),
        "a" if lower else "A",
    ]
    assert tokenizer.encode(MIXED).tokens[1:-1] == expected
    data.write_vocabulary(tokenizer, tmp_path / "again")
    assert data.load_tokenizer(tmp_path / "again").encode(MIXED).tokens[1:-1] == expected
    (tmp_path / "tokenizer_config.json").unlink()  # the same from tokenizer.json alone
    config(
        tmp_path,
        "tokenizer.json",
        normalizer={
            "type": "BertNormalizer",
            "lowercase": lower,
            "strip_accents": strip,
            "handle_chinese_chars": chinese,
        },
    )
    assert data.load_tokenizer(tmp_path).encode(MIXED).tokens[1:-1] == expected
    config(tmp_path, do_lower_case=not lower)  # which loses against the other
    assert (data.load_tokenizer(tmp_path).encode("A").tokens[1] == "A") == lower


def test_tokenizer_settings_that_cannot_be_obeyed(tmp_path):
    def load():
        return data.load_tokenizer(tmp_path)

    vocabulary(tmp_path, "a", "A", "[unused1]")
    fails(load, "vocab.txt", "'A'", "tokenizer_config.json", "do_lower_case")
    config(tmp_path, "tokenizer.json", normalizer=None)
    fails(load, "do_lower_case")
    vocabulary(tmp_path, "a", "[unused1]", "[MASK]")
    assert load().encode("A").tokens[1] == "a"
    config(tmp_path, cls_token={"content": "[CLS]"}, sep_token={"content": "</s>"})
    message = fails(load, "tokenizer_config.json", "sep_token is '</s>'", "'[SEP]'")
    assert "cls_token" not in message
    for name, value, shown in (
        ("strip_accents", "no", "strip_accents is 'no'"),
        ("tokenize_chinese_chars", None, "handle_chinese_chars is None"),
        ("do_lower_case", 1, "lowercase is 1"),
        ("do_basic_tokenize", False, "do_basic_tokenize is False"),
        ("never_split", ["a"], "never_split is ['a']"),
    ):
        config(tmp_path, **{name: value})
        fails(load, "tokenizer_config.json", shown)
    for usual in ({"never_split": []}, {"never_split": None}, {"do_basic_tokenize": True}):
        config(tmp_path, **usual)
        load()
    config(tmp_path)
    write(tmp_path / "tokenizer.json", "{")
    fails(load, "tokenizer.json is not a JSON object")


def test_vocabularies_that_cannot_be_used(tmp_path):
    fails(lambda: data.load_tokenizer(tmp_path), "vocab.txt", "pytorch_model.bin")
    for content in ("", "[PAD]\n[CLS]\nhello\n"):
        write(tmp_path / "vocab.txt", content)
        fails(lambda: data.load_tokenizer(tmp_path), "vocab.txt", "[UNK]", "[SEP]")
    fails(lambda: data.load_tokenizer(vocabulary(tmp_path, "a", "b", "a")), "vocab.txt", "twice")


def test_the_longer_text_is_cut_first(tmp_path):
    """An oracle of its own: take the last token off the longer one until all fits."""
    tokenizer = data.load_tokenizer(vocabulary(tmp_path, *"abc"))
    for first, second in ((20, 3), (3, 20), (9, 9), (12, 8), (1, 2)):
        texts = [("a " * first, "b " * second), ("c " * 30, None)]
        split = data.encode(tokenizer, Split(texts, [0, 1]), 13)
        while first + second > 13 - 3:
            first, second = (first - 1, second) if first > second else (first, second - 1)
        assert lists(split.ids) == [
            [2] + [4] * first + [3] + [5] * second + [3],
            [2] + [6] * 11 + [3],
        ]
        assert lists(split.segment_ids) == [[0] * (first + 2) + [1] * (second + 1), [0] * 13]


def test_encoding_gives_what_the_tokenizer_gives_for_a_whole_batch(tmp_path):
    tokenizer = data.load_tokenizer(vocabulary(tmp_path, *"abc"))
    texts = [("a b" * i, None if i % 3 else "c " * i) for i in range(25)]
    split = data.encode(tokenizer, Split(texts, [0] * 25), 9)
    whole = tokenizer.encode_batch([text if text[1] is not None else text[0] for text in texts])
    assert lists(split.ids) == [row.ids for row in whole] and len(split) == 25
    assert lists(split.segment_ids) == [row.type_ids for row in whole]
    assert {row.dtype for row in split.ids} <= {np.dtype(np.int32)}
    assert {row.dtype for row in split.segment_ids} <= {np.dtype(np.uint8)}


def test_written_vocabulary_reads_back_equal(tmp_path):
    toy = data.toy_tokenizer()
    data.write_vocabulary(toy, tmp_path)
    again, split = data.load_tokenizer(tmp_path), data.toy(60, 20)["dev"]
    assert again.get_vocab() == toy.get_vocab()
    assert lists(data.encode(again, split).ids) == lists(data.encode(toy, split).ids)
    (tmp_path / "cased").mkdir()
    vocabulary(tmp_path / "cased", "A")
    write(tmp_path / "cased" / "tokenizer_config.json", '{"do_lower_case": false}')
    data.write_vocabulary(data.load_tokenizer(tmp_path / "cased"), tmp_path)
    assert data.load_tokenizer(tmp_path).encode("A a").tokens == ["[CLS]", "A", "[UNK]", "[SEP]"]


# --- Batches ------------------------------------------------------------------------------------


def encoded(rows: int = 331) -> Split:
    """Rows of 3 to 40 tokens; row i holds the token i + 1 alone, so each can be told apart."""
    lengths = np.random.default_rng(0).integers(3, 41, rows).tolist()
    return Split(
        [("", None)] * rows,
        [i % 3 for i in range(rows)],
        ids=[np.array([i + 1] * n, np.int32) for i, n in enumerate(lengths)],
        segment_ids=[np.array([0] * (n - 2) + [1] * 2, np.uint8) for n in lengths],
    )


def batches_of_lists(split: Split, size: int, seed: int | None) -> list[tuple]:
    """An oracle of plain lists: (ids, segment ids, mask, labels, indices) of every batch."""
    ids, segment_ids = lists(split.ids), lists(split.segment_ids)

    def cut(rows):
        rows = sorted(rows, key=lambda i: len(ids[i]))
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def pad(row, S):
        return row + [0] * (S - len(row))

    made = cut(range(len(ids)))
    if seed is not None:
        rng = np.random.default_rng(seed)
        order, pool = rng.permutation(len(ids)).tolist(), 50 * size
        made = [rows for i in range(0, len(ids), pool) for rows in cut(order[i : i + pool])]
        made = [made[i] for i in rng.permutation(len(made))]
    batches = []
    for rows in made:
        S = max(len(ids[i]) for i in rows)
        batches.append(
            (
                [pad(ids[i], S) for i in rows],
                [pad(segment_ids[i], S) for i in rows],
                [pad([True] * len(ids[i]), S) for i in rows],
                [split.labels[i] for i in rows],
                rows,
            )
        )
    return batches


@pytest.mark.parametrize("rows, size, seed", [(331, 7, None), (331, 7, 4), (331, 3, 1), (5, 8, 2)])
def test_batches_equal_those_of_plain_lists(rows, size, seed):
    split = encoded(rows + 2).select(range(rows, 0, -1))  # a selection, out of order
    made = list(data.batches(split, size, seed))
    assert [
        tuple(value.tolist() for value in vars(batch).values()) for batch in made
    ] == batches_of_lists(split, size, seed)
    for batch in made:
        assert batch.mask.dtype == torch.bool
        assert {
            batch.ids.dtype,
            batch.segment_ids.dtype,
            batch.labels.dtype,
            batch.index.dtype,
        } == {torch.long}


def test_a_selection_takes_every_field_along():
    split = encoded(9)
    split.levels, split.partial = list(range(9)), True
    chosen = split.select([7, 0, 7])
    assert lists(chosen.ids) == [lists(split.ids)[i] for i in (7, 0, 7)]
    assert lists(chosen.segment_ids) == [lists(split.segment_ids)[i] for i in (7, 0, 7)]
    assert (chosen.levels, chosen.labels, chosen.partial) == ([7, 0, 7], [1, 0, 1], True)
    assert len(split.select([])) == len(split.select([]).ids) == 0


def padding(split: Split, indices: list[list[int]]) -> float:
    """Share of the cells that no token fills."""
    cells = sum(len(rows) * max(len(split.ids[i]) for i in rows) for rows in indices)
    return 1 - sum(map(len, split.ids)) / cells


def test_order_of_batches():
    split = encoded(2000)
    first, again, other = (data.batch_indices(split, 8, seed) for seed in (1, 1, 2))
    assert first == again and first != other
    assert len(first) == len(data.batch_indices(split, 8)) == 250
    assert len(list(data.batches(split, 8))) == 250
    lengths = [len(split.ids[i]) for rows in data.batch_indices(split, 8) for i in rows]
    assert lengths == sorted(lengths)
    pool = split.select(range(400))  # training sees no order of length in a pool
    means = [np.mean([len(pool.ids[i]) for i in rows]) for rows in data.batch_indices(pool, 8, 1)]
    assert abs(np.corrcoef(means, np.arange(50))[0, 1]) < 0.3
    shuffled = np.random.default_rng(0).permutation(2000).reshape(250, 8).tolist()
    assert padding(split, first) < 0.3 * padding(split, shuffled)
    assert padding(split, data.batch_indices(split, 8)) <= padding(split, first)
    with pytest.raises(IndexError):  # no empty epoch in silence
        data.batch_indices(Split([("a", None)], [0]), 8)


def test_batch_moves_whole():
    batch = next(data.batches(encoded(5), 5)).to("meta")
    assert {value.device.type for value in vars(batch).values()} == {"meta"}


# --- The toy task -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy():
    return data.load_task("toy")


def test_toy_labels_follow_from_the_words(toy):
    """An oracle of its own: three places, in which the thing's two neighbours move."""
    for split in toy.values():
        for (text, second), label, level in zip(split.texts, split.labels, split.levels):
            cup, *pairs = text.split()[2:]
            table = [other == cup for other in "abc"]
            for pair in pairs:
                i, j = map("abc".index, pair)
                table[i], table[j] = table[j], table[i]
            assert second is None and len(pairs) == level and table.index(True) == label


def test_toy_is_balanced_and_its_splits_are_distinct(toy):
    for name, shares in (("train", (1 / 4, 1 / 4, 1 / 2)), ("dev", (1 / 3, 1 / 3, 1 / 3))):
        cells = list(zip(toy[name].levels, toy[name].labels))
        assert {cell: cells.count(cell) for cell in cells} == {
            (level, label): round(len(cells) * shares[level] / 3)
            for level in range(3)
            for label in range(3)
        }
    texts = [text for split in toy.values() for text, _ in split.texts]
    assert len(set(texts)) == len(texts) == sum(map(len, toy.values()))
    assert toy["train"].texts == data.load_task("toy", seed=0)["train"].texts
    assert toy["train"].texts != data.load_task("toy", seed=1)["train"].texts


def test_a_toy_with_too_few_sentences_is_refused():
    """A label has 24 x 24 sentences of level 0; here nearly all of them are used."""
    splits = data.toy(train=5600, dev=900)
    assert [len(split) for split in splits.values()] == [5600, 900]
    with pytest.raises(UserError, match="576 sentences"):
        data.toy(train=6000, dev=900)


def test_toy_words_are_all_known(toy):
    tokenizer = data.toy_tokenizer()
    unknown = tokenizer.token_to_id("[UNK]")
    for split in toy.values():
        for ids, (text, _) in zip(data.encode(tokenizer, split).ids, split.texts):
            assert len(ids) == len(text.split()) + 2 and unknown not in ids


def bag_of_words(train: Split, dev: Split) -> float:
    """Dev accuracy of a logistic regression on word counts."""
    words = sorted({word for text, _ in train.texts for word in text.split()})

    def counts(split):
        return torch.tensor(
            [[float(text.split().count(word)) for word in words] for text, _ in split.texts]
        )

    x, y, weight, bias = (
        counts(train),
        torch.tensor(train.labels),
        torch.zeros(len(words), 3),
        torch.zeros(3),
    )
    optimizer = torch.optim.LBFGS([weight.requires_grad_(), bias.requires_grad_()], max_iter=40)

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ weight + bias, y)
        value.backward()
        return value

    optimizer.step(loss)
    return (
        ((counts(dev) @ weight + bias).argmax(1) == torch.tensor(dev.labels)).float().mean().item()
    )


def test_counting_words_does_not_solve_the_toy(toy):
    def at(*levels):  # a guess is right in a third
        return [
            toy[name].select([i for i, level in enumerate(toy[name].levels) if level in levels])
            for name in toy
        ]

    assert bag_of_words(*at(0)) > 0.95  # where nothing moves, counting suffices
    assert (
        bag_of_words(*at(1)) < 0.6
        and bag_of_words(*at(2)) < 0.45
        and bag_of_words(*at(1, 2)) < 0.5
    )
