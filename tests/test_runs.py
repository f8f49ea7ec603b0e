"""Run folders: atomic files, the manifest, and every way a file can be damaged."""

import os
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import refuses, tree

from tinyld import checkpoint
from tinyld.checkpoint import fingerprint, load_adapter, load_base, save_base
from tinyld.errors import TinyldError
from tinyld.methods import METHODS
from tinyld.options import InfoOptions
from tinyld.runs import ADAPTER, CONFIG, MANIFEST, METRICS, MODEL, TOKENIZER, RunFolder, Spectator
from tinyld.verbs import info
from tinyld.write import sha256, write_atomic

HALF = ".tinyld-0123456789abcdef.tmp"  # what a writer that is killed leaves


@pytest.fixture()
def base(place: Path, tmp_path: Path) -> Path:
    return shutil.copytree(place / "base", tmp_path / "base")


@pytest.fixture()
def adapter(place: Path, base: Path, tmp_path: Path) -> Path:
    """An adapter of `base`."""
    folder = RunFolder(shutil.copytree(place / "mood", tmp_path / "adapter"))
    folder.write_json(CONFIG, folder.config | {"base": folder.config["base"] | {"path": str(base)}})
    return folder.path


@pytest.fixture()
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


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


def change_weights(run: Path) -> Path:
    """Makes another base of one."""
    tensors = RunFolder(run).read_tensors(MODEL)
    RunFolder(run).write_tensors(MODEL, {name: tensor + 1 for name, tensor in tensors.items()})
    return run


def dying(at: int) -> Any:
    """Within it the process dies as it gives its `at`-th file its name."""
    effects = [mock.DEFAULT] * (at - 1) + [KeyboardInterrupt]
    return mock.patch.object(os, "replace", wraps=os.replace, side_effect=effects)


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(call: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    fails = mock.patch.object(os, call, side_effect=OSError(28, "No space left on device"))
    with fails, pytest.raises(TinyldError, match=r"file: cannot be written \(No space left on device\)"):
        write_atomic(path, b"new")
    assert tree(tmp_path) == {"file": b"old"}


def test_what_is_no_regular_file_is_written_to_or_refused_and_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = tree(tmp_path)
    for name in ("link", "dangling", "folder", "missing/file", "target/file", "a\0b"):
        refuses("cannot be written", write_atomic, tmp_path / name, b"x")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_atomic(tmp_path / "pipe", b"through the pipe")
    assert os.read(reader, 100) == b"through the pipe"
    os.close(reader)
    write_atomic(Path("/dev/null"), b"x")
    assert tree(tmp_path) == before and (tmp_path / "pipe").is_fifo() and Path("/dev/null").is_char_device()


def test_no_source_file_unpickles() -> None:
    sources = sorted((Path(__file__).parents[1] / "tinyld").rglob("*.py"))
    assert len(sources) > 20
    for source in sources:
        found = re.search(r"\bpickle\b|torch\.load|torch\.save|shelve|marshal|joblib", source.read_text("utf-8"))
        assert not found, f"{source} has {found}"


def test_a_base_is_named_by_weights_tokenizer_and_shape(base: Path) -> None:
    folder = RunFolder(base)
    names, model = [fingerprint(folder)], folder.config["model"]
    for change in (
        lambda: change_weights(base),
        lambda: folder.write(TOKENIZER, b"{}"),
        lambda: folder.write_json(CONFIG, folder.config | {"model": model | {"norm_eps": 0.5}}),
    ):
        change()
        names.append(fingerprint(folder))
    assert len(set(names)) == 4


def test_a_writer_that_dies_anywhere_leaves_a_file_that_the_manifest_knows(run: RunFolder) -> None:
    run.write("a.json", b"old")
    for dies_at in (1, 1, 2, 2):
        with pytest.raises(KeyboardInterrupt), dying(dies_at):
            run.write("a.json", b"new")
        assert run.read("a.json") == b"old" and run.digest("a.json") == sha256(b"old")
        run.write("b.json", b"another")
        assert run.read("a.json") == b"old" and run.digest("a.json") == sha256(b"old")
    run.write("a.json", b"newest")
    assert run.read("a.json") == b"newest" and run.files().keys() == {"a.json", "b.json"}


def test_one_who_looks_on_reads_and_writes_nothing(base: Path) -> None:
    before, folder = tree(base), Spectator(base)
    assert folder.config["kind"] == "base"
    with folder.locked():
        folder.write_json("a.json", {})
        folder.write_tensors(MODEL, {})
        folder.log({"step": 1})
        folder.save_checkpoint(1, {}, {}, keep=1)
        folder.remove_checkpoints(after=1)
        folder.rewind(step=1)
        folder.close_log()
    assert tree(base) == before


@pytest.mark.parametrize(("run", "name"), [
    ("base", MODEL), ("base", TOKENIZER), ("base", CONFIG), ("adapter", ADAPTER), ("adapter", CONFIG),
])  # fmt: skip
def test_a_damaged_or_missing_file_is_named(run: str, name: str, adapter: Path, tmp_path: Path) -> None:
    path = tmp_path / run / name
    content = path.read_bytes()
    flipped = [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in (0, len(content) // 2, -2)]
    for damaged in (*flipped, b"", content[: len(content) // 2], content[:-1], content + b"\0", content * 2):
        path.write_bytes(damaged)
        assert str(path) in refusal(path.parent)
    path.unlink()
    message = refusal(path.parent)
    assert name.split(".")[0] in message and str(path.parent) in message and "found" in message and MANIFEST in message
    path.write_bytes(content)
    (path.parent / MANIFEST).unlink()
    message = refusal(path.parent)
    assert f"not listed in {MANIFEST}" in message and "a public model has model.safetensors or its index" in message


def test_a_run_that_died_while_its_weights_were_written_goes_on(adapter: Path) -> None:
    """The manifest knows a file before it is there; its checkpoints are then still there."""
    (adapter / ADAPTER).unlink()
    (adapter / "checkpoints").mkdir()
    (adapter / "checkpoints" / "00000002").write_bytes(b"")
    assert f"finetune --resume {adapter} goes on" in refusal(adapter)
    assert f"finetune --resume {adapter} goes on" in info(InfoOptions(run=adapter))["state"]


def test_a_damaged_manifest_is_one_error(base: Path) -> None:
    for content in (b"[]", b"{}", b'{"files": {"config.json": 1}}', b'{"files": {"config.json": {}}}', b"\xff"):
        (base / MANIFEST).write_bytes(content)
        assert str(base) in refusal(base)
        with pytest.raises(TinyldError):
            info(InfoOptions(run=base))


@pytest.mark.parametrize(("run", "name"), [("base", MODEL), ("adapter", ADAPTER)])
def test_tensors_that_do_not_fit_are_named(run: str, name: str, adapter: Path) -> None:
    folder = RunFolder(adapter.parent / run)
    tensors = folder.read_tensors(name)
    key, value = min(tensors.items())
    for change, part in (
        ({key: torch.full_like(value, float("nan"))}, "holds values that are not finite"),
        ({key: value.long()}, "wrong type: torch.int64, expected floats"),
        ({key: value[..., :-1].clone()}, "wrong shape"),
        ({key: None}, f"missing {key}"),
        ({"surplus": torch.zeros(1)}, "unexpected surplus"),
    ):
        folder.write_tensors(name, {n: t for n, t in (tensors | change).items() if t is not None})
        message = refusal(folder.path)
        assert part in message and (key in message or "surplus" in message) and str(folder.path / name) in message


@pytest.mark.parametrize(("run", "change", "part"), [
    ("base", {"kind": "tent"}, "kind must be one of base, adapter, composition, got 'tent'"),
    ("base", {"kind": []}, "kind: '[]' is not of type str"),
    ("base", {"data": 3}, "data: '3' is not of type dict"),
    ("adapter", {"data": {"folder": [], "held_out": True}}, "data: folder: '[]' is not of type"),
    ("base", {"model": {"vocab_size": 10, "depth": 3}}, "unknown key 'depth'"),
    ("base", {"model": {"vocab_size": 10}}, "the tokenizer has"),
    ("adapter", {"method": {"name": "adapters", "rank": 10**12}}, "values, but config.json asks for"),
    ("adapter", {"method": {"name": "prefix"}}, f"unknown method 'prefix'; known: {', '.join(METHODS)}"),
    ("adapter", {"base": {"path": "x"}}, f"{CONFIG}: base: missing key 'fingerprint'"),
    ("adapter", {"base": {"path": "", "fingerprint": "", "dtype": "int3"}}, "dtype must be one of fp32, bf16, int8"),
    ("adapter", {"base": {"path": "", "fingerprint": "", "z": 1}}, f"{CONFIG}: base: unknown key 'z'"),
])  # fmt: skip
def test_a_config_that_says_something_else_is_refused(run: str, change: Any, part: str, adapter: Path) -> None:
    folder = RunFolder(adapter.parent / run)
    folder.write_json(CONFIG, folder.config | change)
    assert part in refusal(folder.path) and str(folder.path) in refusal(folder.path)
    folder.write_json(CONFIG, {"kind": run})
    assert refusal(folder.path).startswith(f"{folder.path / CONFIG}: missing key '")


def test_no_number_that_is_not_finite_is_written_as_json(run: RunFolder) -> None:
    for act in (lambda: run.write_json("a.json", {"x": float("nan")}), lambda: run.log({"step": float("inf")})):
        refuses("not a finite number", act)


def test_a_base_is_found_by_its_fingerprint_where_it_is_given_or_released(
    adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "bundled_data_dir", lambda: tmp_path / "bundled")
    assert load(adapter)[0].path == base, "as recorded"
    (tmp_path / "bundled").mkdir()
    small = base.rename(tmp_path / "bundled" / "small")
    assert load(adapter)[0].path == small
    moved = small.rename(tmp_path / "moved")
    message = refusal(adapter)
    assert str(base) in message and "--base" in message and str(small) in message
    assert load_adapter(RunFolder(adapter), moved)[0].path == moved
    with pytest.raises(TinyldError, match="nowhere"):  # no silent fallback
        load_adapter(RunFolder(adapter), tmp_path / "nowhere")
    change_weights(moved).rename(base)  # the recorded place, with something else in it
    message = refusal(adapter)
    assert f"was trained on base {RunFolder(adapter).config['base']['fingerprint']}" in message and str(base) in message


def test_an_adapter_is_no_base_and_a_base_no_adapter(adapter: Path, base: Path) -> None:
    refuses("is an adapter, not a base", load_base, adapter)
    refuses("holds a base, not an adapter", load_adapter, RunFolder(base))


def test_a_base_in_int8_keeps_its_weights_to_a_half_step_of_each_row(base: Path, tmp_path: Path) -> None:
    small, whole = RunFolder.create(tmp_path / "small"), load_base(base)
    small.write_json(CONFIG, RunFolder(base).config)
    save_base(small, dict(whole.model.named_parameters()), whole.tokenizer, "int8")
    loaded = load_base(small.path)
    for name, parameter in whole.model.named_parameters():
        found = loaded.model.get_parameter(name)
        if parameter.dim() == 2:
            step = parameter.abs().amax(1, keepdim=True) / 127
            assert ((found - parameter).abs() <= 0.501 * step + 1e-7).all()
        else:
            assert torch.equal(found, parameter.bfloat16().float())
    assert loaded.fingerprint != whole.fingerprint
    assert (small.path / MODEL).stat().st_size < (base / MODEL).stat().st_size / 2
    tensors = small.read_tensors(MODEL)
    name = next(n for n in tensors if n.endswith(".scale"))
    small.write_tensors(MODEL, tensors | {name: tensors[name][:-1].clone()})
    assert "needs one scale a row" in refusal(small.path)
    small.write_tensors(MODEL, {n: t for n, t in tensors.items() if n != name})
    assert "wrong type: torch.int8" in refusal(small.path)


def test_the_log_is_read_without_its_torn_last_line_and_rewound(run: RunFolder) -> None:
    assert run.metrics() == []
    for step in (0, 5, 10):
        run.log({"step": step, "loss": step / 3})
    with open(run.path / METRICS, "a") as file:
        file.write('{"step": 15, "lo')
    assert [r["step"] for r in run.metrics()] == [0, 5, 10]
    run.rewind(5)
    run.log({"step": 6})
    assert run.metrics() == [{"step": 0, "loss": 0.0}, {"step": 5, "loss": 5 / 3}, {"step": 6}]


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_are_kept_and_the_last_whole_one_is_loaded(keep: int, run: RunFolder) -> None:
    for step in (2, 9, 10, 100, 1000):
        run.save_checkpoint(step, {"model.w": torch.full((2,), float(step))}, {"tokens": step * 7}, keep)
    assert [int(p.name) for p in run.checkpoints()] == [10, 100, 1000][-keep:]
    assert len(list((run.path / "checkpoints").iterdir())) == keep + 1
    for dies_at in (1, 2):
        with pytest.raises(KeyboardInterrupt), dying(dies_at):
            run.save_checkpoint(2000, {"model.w": torch.zeros(2)}, {}, keep)
    tensors, state = run.load_checkpoint()
    assert state == {"step": 1000, "tokens": 7000} and torch.equal(tensors["model.w"], torch.full((2,), 1000.0))
    run.checkpoints()[-1].unlink()  # as one is told to, where it is damaged
    assert keep == 1 or run.load_checkpoint()[1]["step"] == 100
    run.remove_checkpoints(after=100)
    assert [int(p.name) for p in run.checkpoints()] == [10, 100, 1000][-keep:-1]
    run.remove_checkpoints()
    assert run.load_checkpoint() is None and not (run.path / "checkpoints").exists()


def test_a_new_run_takes_a_new_or_an_empty_folder_or_what_a_killed_writer_left(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, found in (("empty", "an empty folder"), ("new", "no such folder"), ("deep/er", "no such folder")):
        refuses(f"no run in .*{name}: expected config.json, found {found}", RunFolder.open, tmp_path / name)
        assert RunFolder.create(tmp_path / name).path.is_dir()
    run = tmp_path / "new"
    RunFolder(run).write(TOKENIZER, b"{}")
    (run / HALF).write_bytes(b"{")
    RunFolder.check_free(run)
    (run / MANIFEST).unlink()  # then the tokenizer is somebody else's
    refuses("not empty", RunFolder.check_free, run)


LISTS = '{"files": {"config.json": {"sha256": "0", "bytes": 1}}}'


@pytest.mark.parametrize("files", [
    {"cat.jpg": "cat"},
    {"manifest.json": '{"name": "an extension"}'},
    {"manifest.json": '{"name": "an extension"}', "tokenizer.json": "{}"},
    {"manifest.json": '{"name": "an extension"}', "config.json": '{"kind": "base"}', "precious": "mine"},
    {"manifest.json": '{"files": {}}', "config.json": '{"kind": "base"}', "precious": "mine"},
    {"manifest.json": '{"files": {"config.json": "x"}}', "config.json": '{"kind": "base"}', "precious": "mine"},
    {"manifest.json": LISTS, "config.json": '{"kind": "tent"}'},
    {"manifest.json": LISTS.replace("}}}", '}, "../a": {"sha256": "0"}}}'), "config.json": '{"kind": "base"}'},
])  # fmt: skip
def test_a_folder_that_is_or_only_looks_like_a_run_is_never_replaced(files: dict[str, str], tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name, content in files.items():
        (theirs / name).write_text(content)
    (tmp_path / "a").write_text("mine")
    before = tree(tmp_path)
    for path, force in ((theirs, False), (theirs, True), (tmp_path / "a", True)):
        refuses(f"{path} exists and is not empty: choose another --out$", RunFolder.create, path, force)
    assert tree(tmp_path) == before


def test_force_removes_what_the_run_wrote_and_nothing_else(base: Path, tmp_path: Path) -> None:
    refuses("--force", RunFolder.create, base)
    folder, photos = RunFolder(base), tmp_path / "photos"
    folder.save_checkpoint(1, {"w": torch.ones(1)}, {}, 2)
    (base / HALF).write_text("half")
    photos.mkdir()
    (photos / "cat.jpg").write_text("cat")
    (base / "notes.txt").write_text("mine")
    (base / "checkpoints" / "notes.txt").write_text("mine")
    (base / "checkpoints" / "00000007").symlink_to(photos)
    (base / "photos").symlink_to(photos)
    (tmp_path / "latest").symlink_to(base)
    refuses("is not empty", RunFolder.create, tmp_path / "latest", force=True)
    load(base)
    RunFolder.create(base, force=True)
    left = {"notes.txt", "photos", "checkpoints", "checkpoints/notes.txt", "checkpoints/00000007"}
    assert set(tree(base)) == left and tree(photos) == {"cat.jpg": b"cat"}


def test_a_checkpoint_without_its_state_or_its_manifest_is_not_passed_over(run: RunFolder) -> None:
    run.save_checkpoint(3, {"w": torch.ones(1)}, {}, 2)
    saved = RunFolder(run.path / "checkpoints")
    for state in ({}, {"state": torch.ones(3, dtype=torch.bfloat16)}):
        saved.write_tensors("00000003", {"w": torch.ones(1)} | state)
        refuses("00000003: damaged, its state is not there; delete it to go on", run.load_checkpoint)
    (saved.path / MANIFEST).unlink()
    refuses("not listed in manifest.json.*; delete it to go on", run.load_checkpoint)
    run.remove_checkpoints()
    assert len(run.checkpoints()) == 1, "what no manifest lists is not ours to delete"


def test_checkpoints_behind_a_link_are_not_ours(run: RunFolder, tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "photos").save_checkpoint(3, {"w": torch.ones(1)}, {}, 2)
    (run.path / "checkpoints").symlink_to(tmp_path / "photos" / "checkpoints")
    before = tree(tmp_path)
    for act in (run.load_checkpoint, run.remove_checkpoints, lambda: run.save_checkpoint(1, {}, {}, keep=1)):
        refuses("checkpoints: is a link", act)
    assert tree(tmp_path) == before
