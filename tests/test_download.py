"""Downloads, from a server on 127.0.0.1 that stands in for the official ones."""

from __future__ import annotations

import http.server
import io
import json
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tinyld import download, formats, progress
from tinyld.download import NetworkError, RemoteFile, Source, check_cached, fetch
from tinyld.errors import TinyldError
from tinyld.formats import CONVERTERS, read_members, tenth
from tinyld.tasks import Task, load_split, load_task

SHARED = Path(__file__).parents[2] / "shared" / "data"
URL = "https://example.org/files/a.bin"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """URL path -> content, served as every host's; the path /cut promises more than it sends."""
    files: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = files.get(self.path)
            self.send_response(404 if content is None else 200)
            extra = 10 if self.path == "/cut" else 0
            self.send_header("Content-Length", str(len(content or b"") + extra))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("TINYLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TINYLD_MIRROR", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("TINYLD_DATA", raising=False)
    yield files
    server.shutdown()
    thread.join()
    server.server_close()


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != "checksums.json")


def zip_of(members: dict[str, bytes | str]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as pack:
        for name, content in members.items():
            pack.writestr(name, content)
    return out.getvalue()


def tar_of(members: dict[str, bytes | str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as pack:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            pack.addfile(info, io.BytesIO(content))
    return out.getvalue()


# ---------------------------------------------------------------------------------------------- fetching


def test_a_download_arrives_whole_with_progress_and_its_digest_recorded(
    site: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float]] = []

    class Recorder(progress.Progress):
        def advance_to(self, done: float, rate: str = "", note: str = "") -> None:
            seen.append((done, self.total))

    monkeypatch.setattr(progress, "Progress", Recorder)
    site["/files/a.bin"] = bytes(range(256)) * 4096
    assert fetch(URL, tmp_path / "a.bin", description="letters").read_bytes() == site["/files/a.bin"]
    assert "downloading letters from http://127.0.0.1" in capsys.readouterr().err
    assert len(seen) >= 4 and seen[-1] == (2**20, 2**20)
    assert list(json.loads((tmp_path / "cache/checksums.json").read_text())) == [URL]


def test_a_file_that_changed_since_the_first_download_is_refused(site: dict[str, bytes], tmp_path: Path) -> None:
    site["/files/a.bin"] = b"first"
    fetch(URL, tmp_path / "a.bin")
    fetch(URL, tmp_path / "again.bin")
    site["/files/a.bin"] = b"second"
    with pytest.raises(TinyldError, match=r"checksum is 163\w+, expected a793\w+; .* delete .*checksums.json"):
        fetch(URL, tmp_path / "b.bin")
    assert left_behind(tmp_path) == ["a.bin", "again.bin"]


def test_a_wrong_published_checksum_is_refused_the_first_time(site: dict[str, bytes], tmp_path: Path) -> None:
    site["/files/a.bin"] = b"first"
    with pytest.raises(TinyldError, match="expected 0000"):
        fetch(URL, tmp_path / "a.bin", sha256="0" * 64)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://example.org/none", r"could not download http://127.0.0.1:\d+/none: HTTP 404"),
        ("https://example.org/cut", "could not download .*/cut: .*after 3 "),
    ],
)
def test_a_failed_transfer_leaves_nothing(site: dict[str, bytes], tmp_path: Path, url: str, message: str) -> None:
    site["/cut"] = b"abc"
    with pytest.raises(NetworkError, match=message):
        fetch(url, tmp_path / "a.bin")
    assert left_behind(tmp_path) == []


def test_a_server_that_is_not_there_is_a_network_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TINYLD_MIRROR", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(NetworkError, match="could not download http://127.0.0.1:9/files/a.bin: .*refused"):
        fetch(URL, tmp_path / "a.bin")


def test_too_large_a_download_is_cut_short(
    site: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_BYTES", 1000)
    site["/files/a.bin"] = b"x" * 1001
    with pytest.raises(NetworkError, match="larger than 1,000 bytes"):
        fetch(URL, tmp_path / "a.bin")
    assert left_behind(tmp_path) == []


def test_only_http_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLD_CACHE", str(tmp_path))
    monkeypatch.delenv("TINYLD_MIRROR", raising=False)
    with pytest.raises(TinyldError, match="only http and https"):
        fetch("file:///etc/hosts", tmp_path / "a.bin")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_checksum_file_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setenv("TINYLD_CACHE", str(tmp_path))
    (tmp_path / "checksums.json").write_text(content)
    with pytest.raises(TinyldError, match="checksums.json: .*delete it to start anew"):
        fetch(URL, tmp_path / "a.bin")


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("TINYLD_CACHE", raising=False)
    assert download.cache_dir() == Path("/h/.cache/tinyld")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert download.cache_dir() == Path("/x/tinyld")
    monkeypatch.setenv("TINYLD_CACHE", "/c")
    assert download.cache_dir() == Path("/c")


# ---------------------------------------------------------------------------------------------- archives


@pytest.mark.parametrize("pack", [zip_of, tar_of])
@pytest.mark.parametrize("evil", ["../evil", "/evil", "a/../../evil", "..\\evil"])
def test_an_archive_with_a_path_out_of_its_folder_is_refused(tmp_path: Path, pack, evil: str) -> None:
    archive = tmp_path / "a.zip"
    archive.write_bytes(pack({"good": "x", evil: "y"}))
    with pytest.raises(TinyldError, match=r"a.zip: refused, its path '.*evil' leaves the folder"):
        read_members(archive, ".*")
    assert left_behind(tmp_path) == ["a.zip"]


@pytest.mark.parametrize("pack", [zip_of, tar_of])
def test_an_archive_bomb_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack
) -> None:
    archive = tmp_path / "a.zip"
    archive.write_bytes(pack({"one": b"\0" * 600, "two": b"\0" * 600}))
    assert set(read_members(archive, ".*")) == {"one", "two"}
    monkeypatch.setattr(formats, "MAX_BYTES", 1000)
    with pytest.raises(TinyldError, match="unpacks to more than 1,000 bytes"):
        read_members(archive, ".*")


NO_ARCHIVES = [b"", b"<html>sorry</html>", zip_of({"a": "b"})[:40], tar_of({"a": "b"})[:20]]


@pytest.mark.parametrize("content", NO_ARCHIVES, ids=["empty", "html", "cut zip", "cut tar"])
def test_what_is_no_archive_is_named_as_such(tmp_path: Path, content: bytes) -> None:
    archive = tmp_path / "a.zip"
    archive.write_bytes(content)
    with pytest.raises(TinyldError, match="a.zip: not a readable archive"):
        read_members(archive, ".*")


def test_only_the_named_member_is_read(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    archive.write_bytes(tar_of({"./x/a.tsv": "a", "x/b.tsv": "b"}))
    assert read_members(archive, r"x/a\.tsv") == {"x/a.tsv": b"a"}
    with pytest.raises(TinyldError, match="holds no member"):
        read_members(archive, "a.tsv")


# ---------------------------------------------------------------------------------------------- official formats

MSR = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
PUBLISHED: dict[str, list[bytes]] = {
    "sst2": [zip_of({"SST-2/train.tsv": "sentence\tlabel\na \t0\nb\t1\n", "SST-2/dev.tsv": "sentence\tlabel\nc\t1\n"})],
    "cola": [zip_of({"CoLA/train.tsv": "gj04\t1\t\ta\ngj04\t0\t*\tb\n", "CoLA/dev.tsv": "gj04\t1\t\tc\n"})],
    "rte": [
        zip_of(
            {
                "RTE/train.tsv": "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n",
                "RTE/dev.tsv": 'index\tsentence1\tsentence2\tlabel\n0\t"c\td\tnot_entailment\n',
                "RTE/test.tsv": "index\tsentence1\tsentence2\n0\te\tf\n",
            }
        )
    ],
    "mrpc": [f"\ufeff{MSR}1\t1\t2\ta\tb\r\n0\t3\t4\tc\td\r\n".encode(), f"{MSR}1\t5\t6\te\tf\n".encode(), b"3\t4\n"],
    "trec": [b"DESC:manner How did it ?\nNUM:date When\xf0was it ?\n", b"HUM:ind Who ?\n"],
    "subj": [
        tar_of({"plot.tok.gt9.5000": b"he dies . \n", "quote.tok.gt9.5000": b"caf\xe9 \x96 fine\n", "README": "x"})
    ],
    "mr": [tar_of({"rt-polaritydata/rt-polarity.neg": "dull\n", "rt-polaritydata/rt-polarity.pos": "bright\n"})],
    "ag-news": [b'"3","Title","He said ""no"""\n"4","T","Bits"\n', b'"1","T","War"\n'],
    "imdb": [
        tar_of(
            {
                "aclImdb/README": "x",
                "aclImdb/train/neg/1_2.txt": "bad<br /><br />very",
                "aclImdb/train/unsup/9_0.txt": "none",
                "aclImdb/test/pos/0_9.txt": "good",
            }
        )
    ],
}
CONVERTED: dict[str, set[tuple[str, int]]] = {
    "sst2": {("a", 0), ("b", 1), ("c", 1)},
    "cola": {("a", 1), ("b", 0), ("c", 1)},
    "rte": {("a ||| b", 0), ('"c ||| d', 1)},
    "mrpc": {("a ||| b", 1), ("c ||| d", 0), ("e ||| f", 1)},
    "trec": {("How did it ?", 1), ("When\xf0was it ?", 5), ("Who ?", 3)},
    "subj": {("he dies .", 0), ("café – fine", 1)},
    "mr": {("dull", 0), ("bright", 1)},
    "ag-news": {('He said "no"', 2), ("Bits", 3), ("War", 0)},
    "imdb": {("bad very", 0), ("good", 1)},
}


def publish(site: dict[str, bytes], task: Task, contents: list[bytes], **changes: object) -> Task:
    """Puts the contents where the task's files are; the task without published checksums and counts."""
    remotes = task.source.files
    for remote, content in zip(remotes, contents, strict=True):
        site["/" + remote.url.split("/", 3)[3]] = content
    files = tuple(RemoteFile(remote.url) for remote in remotes)
    return replace(task, source=replace(task.source, files=files, **{"label_counts": {}, **changes}))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_formats_become_our_rows(site: dict[str, bytes], tmp_path: Path, name: str) -> None:
    task = publish(site, load_task(name), PUBLISHED[name])
    folder = download.download_task(name, task.source)
    rows = []
    for path in folder.glob("*.tsv"):
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        assert header == "sentence\tlabel"
        rows += [tuple(line.split("\t")) for line in lines]
    assert {(text, task.labels.index(label)) for text, label in rows} == CONVERTED[name]
    assert {path.stem for path in folder.iterdir()} >= set(task.splits)
    assert not list((tmp_path / "cache/downloads").iterdir())


def test_mrpc_dev_rows_are_those_whose_ids_are_listed(site: dict[str, bytes]) -> None:
    task = publish(site, load_task("mrpc"), PUBLISHED["mrpc"])
    assert [e.before for e in load_split(task, "dev")] == ["c ?"]
    assert [e.before for e in load_split(task, "train")] == ["a ?"]


def test_a_set_without_dev_gets_the_same_tenth_of_train_every_time(site: dict[str, bytes]) -> None:
    questions = [f"HUM:ind Who is number {i} ?" for i in range(1000)]
    task = publish(site, load_task("trec"), ["\n".join(questions).encode(), b"HUM:ind Who ?\n"])
    dev, train = load_split(task, "dev"), load_split(task, "train")
    assert 60 < len(dev) < 140 and len(dev) + len(train) == 1000
    assert all(tenth(e.before.removesuffix(" this asks for a")) == 0 for e in dev)
    assert [tenth(f"Who is number {i} ?") for i in range(8)] == [4, 0, 6, 9, 9, 8, 8, 0]  # the cut must never move
    assert tenth("Who is number 7 ?") == tenth("who is  number 7")


def test_a_second_split_and_a_second_run_need_no_network(site: dict[str, bytes]) -> None:
    task = publish(site, load_task("sst2"), PUBLISHED["sst2"])
    first = load_split(task, "dev")
    site.clear()
    assert load_split(task, "dev") == first and len(load_split(task, "train")) == 2


def test_a_wrong_row_count_is_refused_and_nothing_is_kept(site: dict[str, bytes], tmp_path: Path) -> None:
    task = publish(site, load_task("sst2"), PUBLISHED["sst2"], label_counts=load_task("sst2").label_counts)
    with pytest.raises(TinyldError) as caught:
        load_split(task, "dev")
    message = str(caught.value)
    assert "sst2 train has 2 rows (negative 1, positive 1), expected 67,349 rows" in message and "\n" not in message
    assert left_behind(tmp_path) == [] and not (tmp_path / "cache/data").exists()
    # the refused file's checksum is not held against the right one
    right = zip_of({"SST-2/train.tsv": "sentence\tlabel\nx\t0\n", "SST-2/dev.tsv": "sentence\tlabel\ny\t1\n"})
    counts = {"train": {"negative": 1}, "dev": {"positive": 1}}
    assert len(load_split(publish(site, task, [right], label_counts=counts), "dev")) == 1


@pytest.mark.parametrize("name", ["trec", "ag-news", "mrpc", "sst2"])
def test_a_page_instead_of_the_file_is_refused(site: dict[str, bytes], tmp_path: Path, name: str) -> None:
    task = load_task(name)
    task = publish(site, task, [b"<html>log in</html>\n"] * len(task.source.files), label_counts=task.label_counts)
    with pytest.raises(TinyldError, match="not the format|not a readable archive|expected"):
        load_split(task, "dev" if "dev" in task.splits else "train")
    assert left_behind(tmp_path) == []


def test_rows_that_changed_in_the_cache_are_noticed(site: dict[str, bytes], tmp_path: Path) -> None:
    task = publish(site, load_task("sst2"), PUBLISHED["sst2"])
    load_split(task, "train")
    path = tmp_path / "cache/data/sst2/train.tsv"
    check_cached(path)
    path.write_text(path.read_text()[:-2])
    with pytest.raises(TinyldError, match="train.tsv: changed or cut off since it was downloaded; delete it"):
        load_split(task, "train")
    path.unlink()
    assert len(load_split(task, "train")) == 2


def test_a_download_never_replaces_a_file_of_the_users(site: dict[str, bytes], tmp_path: Path) -> None:
    task = publish(site, load_task("sst2"), PUBLISHED["sst2"])
    mine = tmp_path / "cache/data/sst2/train.tsv"
    mine.parent.mkdir(parents=True)
    mine.write_text("sentence\tlabel\nmine\t0\n")
    assert load_split(task, "dev")[0].before == "c it was"
    assert load_split(task, "train")[0].before == "mine it was"


def test_the_real_sst2_comes_out_as_it_went_in(site: dict[str, bytes]) -> None:
    if not (SHARED / "sst2").is_dir():
        pytest.skip("no sst2 in shared/data")
    task = load_task("sst2")
    files = {f"SST-2/{split}.tsv": (SHARED / "sst2" / f"{split}.tsv").read_bytes() for split in ("train", "dev")}
    task = publish(site, task, [zip_of(files)], label_counts=task.label_counts)
    examples = load_split(task, "train")
    assert Counter(e.label for e in examples) == Counter({0: 29_780, 1: 37_569})
    assert examples == load_split(task, "train", data=SHARED)


def test_a_source_names_a_known_format() -> None:
    source = load_task("trec").source
    assert isinstance(source, Source) and source.format in CONVERTERS
