"""Run folders: atomic files, the manifest, and every way a file can be damaged."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tinyld import checkpoint
from tinyld.checkpoint import attach, fingerprint, load_adapter, load_base, method_record, save_base
from tinyld.config import ModelConfig, to_dict
from tinyld.data import torch_seeded
from tinyld.errors import TinyldError
from tinyld.methods import METHODS, make_config
from tinyld.model import Denoiser
from tinyld.options import InfoOptions
from tinyld.runs import ADAPTER, CONFIG, MANIFEST, METRICS, MODEL, TOKENIZER, RunFolder, Spectator
from tinyld.tokenizer import Tokenizer
from tinyld.verbs import info
from tinyld.write import sha256, write_atomic

HALF = ".tinyld-0123456789abcdef.tmp"  # what a writer that is killed leaves
PACKAGE = Path(__file__).parents[1] / "tinyld"


def write_base(path: Path, config: ModelConfig, tokenizer: Tokenizer, seed: int = 0) -> Path:
    folder = RunFolder.create(path)
    model = Denoiser(config, torch_seeded(seed))
    folder.write_json(CONFIG, {"kind": "base", "model": to_dict(config), "data": {"tokens": 1}, "environment": {}})
    save_base(folder, dict(model.named_parameters()), tokenizer, torch.float32)
    return path


def write_adapter(path: Path, base_path: Path, name: str = "adapters") -> Path:
    """An adapter whose weights are random, so that it is not the identity."""
    base = load_base(base_path)
    method = attach(base, name, make_config(name, {}, base.model.config), torch_seeded(1))
    with torch.no_grad():
        for parameter in method.own.values():
            parameter.add_(torch.randn(parameter.shape, generator=torch_seeded(2)), alpha=0.1)
    folder = RunFolder.create(path)
    record = {
        "kind": "adapter", "task": {"name": "reviews"}, "method": method_record(method), "parameters": {},
        "base": {"path": str(base_path), "fingerprint": base.fingerprint}, "environment": {},
    }  # fmt: skip
    folder.write_json(CONFIG, record)
    folder.write_tensors(ADAPTER, method.own)
    return path


@pytest.fixture()
def base(tmp_path: Path, config: ModelConfig, tokenizer: Tokenizer) -> Path:
    return write_base(tmp_path / "base", config, tokenizer)


@pytest.fixture()
def adapter(tmp_path: Path, base: Path) -> Path:
    return write_adapter(tmp_path / "adapter", base)


def load(run: Path) -> Any:
    """Loads a base, or an adapter on its base, as the commands do."""
    folder = RunFolder.open(run)
    return load_base(run) if folder.config["kind"] == "base" else load_adapter(folder)


def refusal(run: Path) -> str:
    """The one line that loading the run ends with."""
    with pytest.raises(TinyldError) as raised:
        load(run)
    message = str(raised.value)
    assert "\n" not in message and message
    return message


@contextmanager
def dying(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[None]:
    """Within it the process dies as it gives its `at`-th file its name."""
    calls, replace = 0, os.replace

    def dies(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        yield


def tree(path: Path) -> dict[str, Any]:
    """Every path below with its content, links by their target."""
    return {
        str(p.relative_to(path)): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in sorted(path.rglob("*"))
    }


# ------------------------------------------------------------------------------------------------ single files


def test_a_file_is_on_the_disk_before_it_takes_its_name_and_nothing_else_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(Path(a).name), replace(a, b))[1])
    path, other = tmp_path / ("n" * 255), tmp_path / "plain"
    for content in (b"one", b"", b"\0" * 100_000):
        write_atomic(path, content)
        assert path.read_bytes() == content and [p.name for p in tmp_path.iterdir()] == [path.name]
    assert [call == "fsync" for call in calls] == [True, False, True] * 3  # the file, its name, the folder
    assert len(set(calls)) == 4, "no name is foreseeable"
    other.write_text("")
    assert path.stat().st_mode == other.stat().st_mode


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(TinyldError, match=r"file: cannot be written \(No space left on device\)"):
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_is_no_regular_file_is_written_to_or_refused_and_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())
    for name in ("link", "dangling", "folder", "missing/file", "target/file", "a\0b"):
        with pytest.raises(TinyldError, match="cannot be written"):
            write_atomic(tmp_path / name, b"x")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_atomic(tmp_path / "pipe", b"through the pipe")
    assert os.read(reader, 100) == b"through the pipe"
    os.close(reader)
    write_atomic(Path("/dev/null"), b"x")
    assert (tmp_path / "target").read_text() == "mine" and (tmp_path / "pipe").is_fifo()
    assert Path("/dev/null").is_char_device() and sorted(tmp_path.iterdir()) == before


def test_no_source_file_unpickles() -> None:
    sources = sorted(PACKAGE.rglob("*.py"))
    assert len(sources) > 20
    for source in sources:
        text = source.read_text(encoding="utf-8")
        for word in (r"\bpickle\b", "torch.load", "torch.save", "shelve", "marshal", "joblib"):
            assert not re.search(word, text), f"{source} has {word}"


# ------------------------------------------------------------------------------------------------ the manifest


def test_a_base_and_an_adapter_come_back_with_their_bits(base: Path, adapter: Path, config: ModelConfig) -> None:
    files = json.loads((base / MANIFEST).read_text())["files"]
    assert set(files) == {CONFIG, MODEL, TOKENIZER}
    for name, entry in files.items():
        content = (base / name).read_bytes()
        assert entry == {"sha256": sha256(content), "bytes": len(content)}
    first = Denoiser(config, torch_seeded(0))
    assert all(torch.equal(p, first.get_parameter(name)) for name, p in load(base).model.named_parameters())
    _, method = load(adapter)
    stored = RunFolder(adapter).read_tensors(ADAPTER)
    assert stored.keys() == method.own.keys()
    assert all(torch.equal(p, stored[n]) for n, p in method.own.items())


def test_a_base_is_named_by_weights_tokenizer_and_shape(
    base: Path, tmp_path: Path, config: ModelConfig, tokenizer: Tokenizer
) -> None:
    again = write_base(tmp_path / "again", config, tokenizer)
    other = write_base(tmp_path / "other", config, tokenizer, seed=1)
    assert fingerprint(RunFolder(base)) == fingerprint(RunFolder(again)) != fingerprint(RunFolder(other))
    smaller = Tokenizer.train(["the film"] * 9, 100)
    RunFolder(again).write(TOKENIZER, smaller.to_json().encode())
    assert fingerprint(RunFolder(base)) != fingerprint(RunFolder(again))


@pytest.mark.parametrize("dies_at", range(1, 3))
def test_a_writer_that_dies_anywhere_leaves_a_file_that_the_manifest_knows(
    dies_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.write("a.json", b"old")
    for _ in range(2):
        with dying(monkeypatch, dies_at), pytest.raises(KeyboardInterrupt):
            folder.write("a.json", b"new")
        assert folder.read("a.json") == b"old" and folder.digest("a.json") == sha256(b"old")
    folder.write("b.json", b"another")
    assert folder.read("a.json") == b"old" and folder.digest("a.json") == sha256(b"old")
    folder.write("a.json", b"newest")
    assert folder.read("a.json") == b"newest" and {n: e["bytes"] for n, e in folder.files().items()} == {
        "a.json": 6,
        "b.json": 7,
    }


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    first = RunFolder.create(tmp_path / "run")
    with first.locked():
        first.write("a.json", b"1")
        with pytest.raises(TinyldError, match="another process is writing"):
            RunFolder(tmp_path / "run").write("a.json", b"2")
    RunFolder(tmp_path / "run").write("a.json", b"3")
    assert first.read("a.json") == b"3"


def test_one_who_looks_on_reads_and_writes_nothing(base: Path) -> None:
    before = tree(base)
    folder = Spectator(base)
    assert folder.config["kind"] == "base"
    with folder.locked():
        folder.write_json("a.json", {})
        folder.write_tensors(MODEL, {})
        folder.log({"step": 1})
        folder.save_checkpoint(1, {}, {}, keep=1)
        folder.remove_checkpoints(after=1)
        folder.rewind(step=1)
        folder.remove(CONFIG)
        folder.close_log()
    assert tree(base) == before


# ------------------------------------------------------------------------------------------------ damage


def flip(at: float, bit: int) -> Callable[[bytes], bytes]:
    def flipped(content: bytes) -> bytes:
        damaged = bytearray(content)
        damaged[int(at * (len(content) - 1))] ^= 1 << bit
        return bytes(damaged)

    return flipped


DAMAGE = [flip(at, bit) for at in (0.0, 0.01, 0.3, 0.5, 0.9, 1.0) for bit in (0, 7)] + [
    lambda content: b"",
    lambda content: content[: len(content) // 2],
    lambda content: content[:-1],
    lambda content: content + b"\0",
    lambda content: content * 2,
]
FILES = [("base", MODEL), ("base", TOKENIZER), ("base", CONFIG), ("adapter", ADAPTER), ("adapter", CONFIG)]


@pytest.mark.parametrize(("run", "name"), FILES)
def test_a_damaged_or_missing_file_is_named(run: str, name: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    path = tmp_path / run / name
    content = path.read_bytes()
    for damage in DAMAGE:
        path.write_bytes(damage(content))
        assert str(path) in refusal(tmp_path / run)
    path.unlink()
    message = refusal(tmp_path / run)
    assert name.split(".")[0] in message and str(tmp_path / run) in message
    assert "found" in message and MANIFEST in message or name == TOKENIZER
    path.write_bytes(content)
    (tmp_path / run / MANIFEST).unlink()
    assert f"not listed in {MANIFEST}" in refusal(tmp_path / run)


@pytest.mark.parametrize("content", [
    "[]", "{}", '{"files": []}', '{"files": {"config.json": 1}}', '{"files": {"config.json": {}}}', "\xff",
])  # fmt: skip
def test_a_damaged_manifest_is_one_error(content: str, base: Path) -> None:
    (base / MANIFEST).write_bytes(content.encode("latin-1"))
    assert str(base) in refusal(base)
    with pytest.raises(TinyldError):
        info(InfoOptions(run=base))


@pytest.mark.parametrize(("run", "name"), [("base", MODEL), ("adapter", ADAPTER)])
def test_tensors_that_do_not_fit_are_named(run: str, name: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / run)
    tensors = folder.read_tensors(name)
    key = sorted(tensors)[0]
    value = tensors[key]
    for change, part in (
        ({key: torch.full_like(value, float("nan"))}, "holds values that are not finite"),
        ({key: torch.full_like(value, -float("inf"))}, "holds values that are not finite"),
        ({key: value.long()}, "wrong type: torch.int64, expected floats"),
        ({key: value[..., :-1].clone()}, "wrong shape"),
        ({key: None}, f"missing {key}"),
        ({"surplus": torch.zeros(1)}, "unexpected surplus"),
    ):
        folder.write_tensors(name, {n: t for n, t in (tensors | change).items() if t is not None})
        message = refusal(folder.path)
        assert part in message and (key in message or "surplus" in message) and str(folder.path / name) in message


CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("base", {"kind": "tent"}, "not the config of a run"),
    ("base", {"data": 3}, "data: '3' is not of type dict"),
    ("base", {"data": {"tokens": "many"}}, "data: tokens: 'many' is not of type int"),
    ("adapter", {"data": {"folder": [], "held_out": True}}, "data: folder: '[]' is not of type"),
    ("adapter", {"data": {"held_out": 1}}, "data: held_out: '1' is not of type bool"),
    ("adapter", {"data": {"sha256": None}}, "data: sha256: 'None' is not of type str"),
    ("base", {"model": {"vocab_size": 10, "depth": 3}}, "unknown key 'depth'"),
    ("base", {"model": {}}, "missing key 'vocab_size'"),
    ("base", {"model": {"vocab_size": "many"}}, "'many' is not of type int"),
    ("base", {"model": {"vocab_size": 10, "num_heads": 0}}, "num_heads"),
    ("base", {"model": {"vocab_size": 10}}, "the tokenizer has"),
    # rotary tables are as long as a row may be, and no weight tells how long that is
    ("base", {"model": {"vocab_size": 10, "max_length": 10**9}}, "max_length must be at most 131072, got 1000000000"),
    ("base", {"model": {"vocab_size": 160, "d_model": 2**20, "d_ff": 2**20}}, "parameters is asked for; at most"),
    ("adapter", {"method": {"name": "adapters", "rank": 10**12}}, "values, but config.json asks for"),
    ("adapter", {"method": {"name": "weight-lora", "rank": 10**12}}, "values, but config.json asks for"),
    ("adapter", {"method": {"name": "trajectory-lora", "ranks": [10**12, 8, 1]}}, "values, but config.json asks for"),
    ("adapter", {"method": {"name": "prefix"}}, f"unknown method 'prefix'; known: {', '.join(METHODS)}"),
    *(
        ("adapter", {"base": record}, f"{CONFIG}: base")
        for record in ({}, {"path": 3, "fingerprint": ""}, {"path": "x"}, "x", {"path": "", "fingerprint": "", "z": 1})
    ),
]  # fmt: skip


@pytest.mark.parametrize(("run", "change", "part"), CONFIGS)
def test_a_config_that_says_something_else_is_refused(
    run: str, change: dict[str, Any], part: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / run)
    folder.write_json(CONFIG, folder.config | change)
    assert part in refusal(folder.path) and str(folder.path) in refusal(folder.path)
    folder.write_json(CONFIG, {"kind": run})
    assert refusal(folder.path).startswith(f"{folder.path / CONFIG}: missing key '")


def test_no_number_that_is_not_finite_is_written_as_json(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    for act in (lambda: folder.write_json("a.json", {"x": float("nan")}), lambda: folder.log({"step": float("inf")})):
        with pytest.raises(TinyldError, match="not a finite number"):
            act()


# ------------------------------------------------------------------------------------------------ bases of adapters


def test_an_adapter_of_another_base_is_refused(
    adapter: Path, base: Path, tmp_path: Path, config: ModelConfig, tokenizer: Tokenizer
) -> None:
    other = write_base(tmp_path / "other", config, tokenizer, seed=1)
    with pytest.raises(TinyldError) as raised:
        load_adapter(RunFolder(adapter), other)
    assert RunFolder(adapter).config["base"]["fingerprint"] in str(raised.value) and str(other) in str(raised.value)
    shutil.rmtree(base)
    shutil.copytree(other, base)  # the recorded place, with something else in it
    assert "was trained on base" in refusal(adapter)


def test_a_base_is_found_by_its_fingerprint_where_it_is_given_or_released(
    adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "bundled_data_dir", lambda: tmp_path / "bundled")
    (tmp_path / "bundled").mkdir()
    base.rename(tmp_path / "bundled" / "small")
    assert load(adapter)[0].path == tmp_path / "bundled" / "small"
    (tmp_path / "bundled" / "small").rename(tmp_path / "moved")
    message = refusal(adapter)
    assert str(base) in message and "--base" in message and str(tmp_path / "bundled" / "small") in message
    assert load_adapter(RunFolder(adapter), tmp_path / "moved")[0].path == tmp_path / "moved"
    with pytest.raises(TinyldError, match="nowhere"):  # no silent fallback
        load_adapter(RunFolder(adapter), tmp_path / "nowhere")


def test_an_adapter_is_no_base_and_a_base_no_adapter(adapter: Path, base: Path) -> None:
    with pytest.raises(TinyldError, match="is an adapter, not a base"):
        load_base(adapter)
    with pytest.raises(TinyldError, match="holds a base, not an adapter"):
        load_adapter(RunFolder(base))


def test_a_base_in_int8_keeps_its_weights_to_a_half_step_of_each_row(
    base: Path, tmp_path: Path, config: ModelConfig, tokenizer: Tokenizer
) -> None:
    small = RunFolder.create(tmp_path / "small")
    whole = load_base(base)
    small.write_json(CONFIG, RunFolder(base).config)
    save_base(small, dict(whole.model.named_parameters()), tokenizer, torch.int8)
    loaded = load_base(small.path)
    for name, parameter in whole.model.named_parameters():
        found = loaded.model.get_parameter(name)
        if parameter.dim() == 2:
            step = parameter.abs().amax(1, keepdim=True) / 127
            assert ((found - parameter).abs() <= 0.501 * step + 1e-7).all()
        else:
            assert torch.equal(found, parameter.bfloat16().float())
    assert loaded.fingerprint != whole.fingerprint and small.files()[MODEL] < RunFolder(base).files()[MODEL] / 2
    tensors = small.read_tensors(MODEL)
    name = next(n for n in tensors if n.endswith(".scale"))
    small.write_tensors(MODEL, tensors | {name: tensors[name][:-1].clone()})
    assert "needs one scale a row" in refusal(small.path)
    small.write_tensors(MODEL, {n: t for n, t in tensors.items() if n != name})
    assert "wrong type: torch.int8" in refusal(small.path)


# ------------------------------------------------------------------------------------------------ log, checkpoints


def test_the_log_is_read_without_its_torn_last_line_and_rewound(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    assert folder.metrics() == []
    for step in (0, 5, 10):
        folder.log({"step": step, "loss": step / 3})
    with open(tmp_path / "run" / METRICS, "a") as file:
        file.write('{"step": 15, "lo')
    assert [r["step"] for r in folder.metrics()] == [0, 5, 10]
    folder.rewind(5)
    folder.log({"step": 6})
    assert folder.metrics() == [{"step": 0, "loss": 0.0}, {"step": 5, "loss": 5 / 3}, {"step": 6}]


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_are_kept_and_the_last_is_loaded(keep: int, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    for step in (2, 9, 10, 100, 1000):
        folder.save_checkpoint(step, {"model.w": torch.full((2,), float(step))}, {"tokens": step * 7}, keep)
    assert [int(p.name) for p in folder.checkpoints()] == [9, 10, 100, 1000][-keep:]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == keep + 1
    tensors, state = folder.load_checkpoint()
    assert state == {"step": 1000, "tokens": 7000} and torch.equal(tensors["model.w"], torch.full((2,), 1000.0))
    folder.remove_checkpoints()
    assert folder.load_checkpoint() is None and not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("dies_at", range(1, 3))
def test_a_checkpoint_that_was_cut_short_is_not_seen(
    dies_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.save_checkpoint(1, {"w": torch.ones(1)}, {}, 2)
    with dying(monkeypatch, dies_at), pytest.raises(KeyboardInterrupt):
        folder.save_checkpoint(2, {"w": torch.zeros(1)}, {}, 2)
    assert [p.name for p in folder.checkpoints()] == ["00000001"] and folder.load_checkpoint()[1]["step"] == 1
    folder.save_checkpoint(2, {"w": torch.full((1,), 5.0)}, {}, 2)
    assert torch.equal(folder.load_checkpoint()[0]["w"], torch.full((1,), 5.0))


def test_a_damaged_checkpoint_is_named_and_passed_over_only_when_it_is_deleted(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    for step in (1, 2):
        folder.save_checkpoint(step, {"w": torch.ones(50)}, {}, 2)
    path = folder.checkpoints()[-1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TinyldError, match=f"{path}: damaged.*; delete it to go on from the one before"):
        folder.load_checkpoint()
    path.unlink()
    assert folder.load_checkpoint()[1]["step"] == 1


# ------------------------------------------------------------------------------------------------ nothing of others


def test_a_new_run_takes_a_new_or_an_empty_folder_or_what_a_killed_writer_left(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, found in (("empty", "an empty folder"), ("new", "no such folder"), ("deep/er", "no such folder")):
        with pytest.raises(TinyldError, match=f"no run in .*{name}: expected config.json, found {found}"):
            RunFolder.open(tmp_path / name)
        assert RunFolder.create(tmp_path / name).path.is_dir()
    run = tmp_path / "new"
    RunFolder(run).write(TOKENIZER, b"{}")
    (run / HALF).write_bytes(b"{")
    RunFolder.check_free(run)
    (run / MANIFEST).unlink()  # then the tokenizer is somebody else's
    with pytest.raises(TinyldError, match="not empty"):
        RunFolder.check_free(run)


FOREIGN = [
    {"cat.jpg": "cat"},
    {"manifest.json": '{"name": "an extension", "version": "1"}', "config.json": "{}", "precious": "mine"},
    {"manifest.json": '{"name": "an extension"}', "config.json": '{"kind": "base"}', "precious": "mine"},
    {"manifest.json": '{"files": {}}', "config.json": '{"kind": "base"}', "precious": "mine"},
    {"manifest.json": '{"files": {"config.json": "x"}}', "config.json": '{"kind": "base"}', "precious": "mine"},
    {"manifest.json": '{"files": {"config.json": {"sha256": "0", "bytes": 1}}}', "config.json": '{"kind": "tent"}'},
    {"manifest.json": '{"files": {"../a": {"sha256": "0", "bytes": 1}}}', "config.json": '{"kind": "base"}'},
    {"manifest.json": '{"name": "an extension"}'},
    {"manifest.json": '{"name": "an extension"}', "tokenizer.json": "{}"},
]


@pytest.mark.parametrize("files", FOREIGN)
def test_a_folder_that_is_or_only_looks_like_a_run_is_never_replaced(files: dict[str, str], tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name, content in files.items():
        (theirs / name).write_text(content)
    (tmp_path / "a").write_text("mine")
    before = tree(tmp_path)
    for path, force in ((theirs, False), (theirs, True), (tmp_path / "a", True)):
        with pytest.raises(TinyldError, match=f"{path} exists and is not empty: choose another --out$"):
            RunFolder.create(path, force)
    assert tree(tmp_path) == before


def test_force_removes_what_the_run_wrote_and_nothing_else(base: Path, tmp_path: Path) -> None:
    with pytest.raises(TinyldError, match="--force"):
        RunFolder.create(base)
    load(base)
    folder = RunFolder(base)
    folder.log({"step": 1})
    folder.save_checkpoint(1, {"w": torch.ones(1)}, {}, 2)
    (base / HALF).write_text("half")
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_text("cat")
    (base / "notes.txt").write_text("mine")
    (base / "checkpoints" / "notes.txt").write_text("mine")
    (base / "checkpoints" / "00000007").symlink_to(photos)
    (base / "photos").symlink_to(photos)
    RunFolder.create(base, force=True)
    left = {"notes.txt", "photos", "checkpoints", "checkpoints/notes.txt", "checkpoints/00000007"}
    assert set(tree(base)) == left and tree(photos) == {"cat.jpg": b"cat"}


def test_what_is_behind_a_link_is_not_ours(base: Path, tmp_path: Path) -> None:
    other = RunFolder.create(tmp_path / "photos")
    other.save_checkpoint(3, {"w": torch.ones(1)}, {}, 2)
    folder = RunFolder.create(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "photos" / "checkpoints")
    (tmp_path / "latest").symlink_to(base)
    before = tree(tmp_path)
    folder.remove_checkpoints()
    for act in (folder.load_checkpoint, lambda: folder.save_checkpoint(1, {}, {}, keep=1)):
        with pytest.raises(TinyldError, match="checkpoints: is a link"):
            act()
    with pytest.raises(TinyldError, match="is not empty"):
        RunFolder.create(tmp_path / "latest", force=True)
    assert tree(tmp_path) == before and folder.checkpoints() == []
