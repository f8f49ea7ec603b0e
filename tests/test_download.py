"""Downloads, from a server on 127.0.0.1 that stands in for the official ones."""

import hashlib
import http.server
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import refuses

from tinyld import download
from tinyld.download import fetch, number_of
from tinyld.rows import load_split
from tinyld.tasks import Task, load_task


@pytest.fixture
def site(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """URL path -> content, served as every host's; /cut promises more than it sends."""
    files: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = files.get(self.path, b"")
            self.send_response(200 if self.path in files else 404)
            self.send_header("Content-Length", str(len(content) + 10 * (self.path == "/cut")))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("TINYLD_MIRROR", f"http://127.0.0.1:{server.server_port}")
        yield files
        server.shutdown()
        thread.join()


def zip_of(members: dict[str, bytes | str]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as pack:
        for name, content in members.items():
            pack.writestr(name, content)
    return out.getvalue()


def tar_of(members: dict[str, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as pack:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            pack.addfile(info, io.BytesIO(content.encode()))
    return out.getvalue()


def fetched(path: str, digest: str = "0" * 64) -> bytes:
    return fetch(f"https://example.org{path}", digest, "letters")


def test_a_download_arrives_whole_and_is_checked(
    site: dict[str, bytes], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site |= {"/a": bytes(range(256)) * 4096, "/cut": b"abc"}
    for kind in (hashlib.sha256, hashlib.md5):
        digest = kind(site["/a"]).hexdigest()
        assert fetched("/a", digest) == site["/a"]
        refuses(f"/a: checksum of 1,048,576 bytes is {digest}, expected 0000", fetched, "/a", "0" * len(digest))
    assert "downloading letters from http://127.0.0.1" in capsys.readouterr().err
    refuses("could not download .*/cut: it ended after 3 of 13 bytes", fetched, "/cut")
    refuses(r"could not download http://127.0.0.1:\d+/none: .*Not Found", fetched, "/none")
    monkeypatch.setenv("TINYLD_MIRROR", "nowhere")
    refuses("unknown url type", fetched, "/a")


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "TINYLD_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, folder in (("HOME", "/h/.cache/tinyld"), ("XDG_CACHE_HOME", "/x/tinyld"), ("TINYLD_CACHE", "/c")):
        monkeypatch.setenv(name, folder[:2])
        assert download.cache_dir() == Path(folder)


MSR = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
SENTENCE, PAIR = "sentence\tlabel\n", "index\tsentence1\tsentence2\tlabel\n"
PUBLISHED: dict[str, list[bytes]] = {
    "sst2": [zip_of({"SST-2/train.tsv": f"{SENTENCE}a \t0\nb\t1\n", "SST-2/dev.tsv": f"{SENTENCE}c\t1\n"})],
    "cola": [zip_of({"CoLA/train.tsv": "gj04\t1\t\ta\ngj04\t0\t*\tb\n", "CoLA/dev.tsv": "gj04\t1\t\tc\n"})],
    "rte": [zip_of({"RTE/train.tsv": f"{PAIR}0\ta\tb\tentailment\n", "RTE/test.tsv": "index\tsentence1\n0\te\n",
                    "RTE/dev.tsv": f'{PAIR}0\t"c\td\tnot_entailment\n'})],
    "mrpc": [f"\ufeff{MSR}1\t1\t2\ta\tb\r\n0\t3\t4\tc\td\r\n".encode(), f"{MSR}1\t5\t6\te\tf\n".encode(),
             b"3\t4\n"],
    "trec": [b"DESC:manner How did it ?\nNUM:date When\xf0was it ?\n", b"HUM:ind Who ?\n"],
    "subj": [zip_of({"s/plot.tok.gt9.5000": b"he dies . \n", "s/quote.tok.gt9.5000": b"caf\xe9 \x96 fine\n"})],
    "mr": [tar_of({"rt-polaritydata/rt-polarity.neg": "dull\n", "rt-polaritydata/rt-polarity.pos": "bright\n"})],
    "ag-news": [b'"3","Title","He said ""no"""\n"4","T","Bits"\n', b'"1","T","War"\n'],
    "imdb": [tar_of({"aclImdb/README": "x", "./aclImdb/train/neg/1_2.txt": "bad<br /><br />very",
                     "aclImdb/train/unsup/9_0.txt": "none", "aclImdb/test/pos/0_9.txt": "good"})],
}  # fmt: skip
CONVERTED: dict[str, dict[str, list[str]]] = {
    "sst2": {"train": ["a\tnegative", "b\tpositive"], "dev": ["c\tpositive"]},
    "cola": {"train": ["a\tacceptable", "b\tunacceptable"], "dev": ["c\tacceptable"]},
    "rte": {"train": ["a ||| b\tentailment"], "dev": ['"c ||| d\tnot_entailment']},
    "mrpc": {"train": ["a ||| b\tequivalent"], "dev": ["c ||| d\tnot_equivalent"], "test": ["e ||| f\tequivalent"]},
    "trec": {"train": ["How did it ?\tDESC", "When\xf0was it ?\tNUM"], "dev": [], "test": ["Who ?\tHUM"]},
    "subj": {"train": ["café – fine\tsubjective"], "dev": [], "test": ["he dies .\tobjective"]},
    "mr": {"train": ["bright\tpositive"], "dev": [], "test": ["dull\tnegative"]},
    "ag-news": {"train": ['He said "no"\tBusiness', "Bits\tSci/Tech"], "dev": [], "test": ["War\tWorld"]},
    "imdb": {"train": [], "dev": ["bad very\tnegative"], "test": ["good\tpositive"]},
}


def publish(site: dict[str, bytes], name: str, contents: list[bytes] | None = None) -> Task:
    """The task, with the contents where its files are, and their checksums."""
    task, files = load_task(name), {}
    for url, content in zip(task.download.files, contents or PUBLISHED[name], strict=True):
        site["/" + url.split("/", 3)[3]] = content
        files[url] = hashlib.sha256(content).hexdigest()
    return replace(task, download=replace(task.download, files=files))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_formats_become_our_rows(site: dict[str, bytes], name: str) -> None:
    folder = download.download_task(name, publish(site, name).download)
    found = {path.stem: path.read_text(encoding="utf-8").splitlines() for path in sorted(folder.glob("*.tsv"))}
    assert all(lines.pop(0) == "sentence\tlabel" for lines in found.values())
    assert found == CONVERTED[name]


def test_a_set_without_dev_gets_the_same_tenth_of_train_every_time(site: dict[str, bytes]) -> None:
    questions = [f"HUM:ind Who is number {i} ?" for i in range(1000)]
    task = publish(site, "trec", ["\n".join(questions).encode(), b"HUM:ind Who ?\n"])
    dev, train = load_split(task, "dev"), load_split(task, "train")
    assert 60 < len(dev) < 140 and len(dev) + len(train) == 1000
    assert all(number_of(e.before.removesuffix(" this asks for a")) % 10 == 0 for e in dev)
    tenths = [number_of(f"Who is number {i} ?") % 10 for i in range(8)]
    assert tenths == [4, 0, 6, 9, 9, 8, 8, 0], "the cut must never move"
    assert number_of("Who is number 7 ?") == number_of("who is  number 7")


def test_what_is_in_the_cache_needs_no_network_and_is_not_replaced(site: dict[str, bytes], tmp_path: Path) -> None:
    task = publish(site, "sst2")
    refuses("checksum", load_split, load_task("sst2"), "train")
    assert not (tmp_path / "cache").exists(), "nothing of another file is kept"
    mine = tmp_path / "cache/data/sst2/train.tsv"
    mine.parent.mkdir(parents=True)
    mine.write_text("sentence\tlabel\nmine\t0\n")
    assert load_split(task, "dev")[0].before == "c it was"
    site.clear()
    refuses("train.tsv: has 1 rows, which are not the 67,349 published ones; delete it", load_split, task, "train")
    task = replace(task, download=replace(task.download, rows={"train": 1, "dev": 1}))
    assert load_split(task, "dev")[0].before == "c it was"
    assert load_split(task, "train")[0].before == "mine it was", "a download replaces no file of the user's"
