"""Run folders: atomic files, the manifest, and every way a file can be damaged."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tinyld import checkpoint
from tinyld.checkpoint import attach, find_base, fingerprint, load_adapter, load_base, method_record, save_base
from tinyld.config import ModelConfig, to_dict
from tinyld.data import torch_seeded
from tinyld.errors import TinyldError
from tinyld.methods import METHODS, make_config
from tinyld.model import Denoiser
from tinyld.options import InfoOptions
from tinyld.runs import (
    ADAPTER,
    CONFIG,
    MANIFEST,
    METRICS,
    MODEL,
    TOKENIZER,
    RunFolder,
    sha256,
    temporary_name,
    write_atomic,
)
from tinyld.tokenizer import Tokenizer
from tinyld.verbs import info

PACKAGE = Path(__file__).parents[1] / "tinyld"


def write_base(path: Path, config: ModelConfig, tokenizer: Tokenizer, seed: int = 0) -> Path:
    folder = RunFolder.create(path)
    model = Denoiser(config, torch_seeded(seed))
    folder.write_json(CONFIG, {"kind": "base", "model": to_dict(config), "data": {"tokens": 1}, "environment": {}})
    save_base(folder, model, dict(model.named_parameters()), tokenizer, torch.float32)
    return path


def write_adapter(path: Path, base_path: Path, name: str = "adapters") -> Path:
    """An adapter whose weights are random, so that it is not the identity."""
    base = load_base(base_path)
    adapted = attach(base, name, make_config(name, {}, base.model.config), "reviews", torch_seeded(1))
    with torch.no_grad():
        for parameter in adapted.method.own.values():
            parameter.add_(torch.randn(parameter.shape, generator=torch_seeded(2)), alpha=0.1)
    folder = RunFolder.create(path)
    record = {
        "kind": "adapter", "task": "reviews", "method": method_record(adapted.method), "parameters": {},
        "base": {"path": str(base_path), "fingerprint": base.fingerprint}, "environment": {},
    }  # fmt: skip
    folder.write_json(CONFIG, record)
    folder.write_tensors(ADAPTER, adapted.method.own)
    return path


@pytest.fixture()
def base(tmp_path: Path, config: ModelConfig, tokenizer: Tokenizer) -> Path:
    return write_base(tmp_path / "base", config, tokenizer)


@pytest.fixture()
def adapter(tmp_path: Path, base: Path) -> Path:
    return write_adapter(tmp_path / "adapter", base)


def load(run: Path) -> Any:
    """Loads a base or an adapter as the commands do."""
    folder = RunFolder.open(run)
    return load_base(run) if folder.config["kind"] == "base" else load_adapter(folder)


def refusal(run: Path) -> str:
    """The one line that loading the run ends with."""
    with pytest.raises(TinyldError) as raised:
        load(run)
    message = str(raised.value)
    assert "\n" not in message and message
    return message


# ------------------------------------------------------------------------------------------------ single files


def test_a_file_is_written_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"one", b"", b"\0" * 100_000):
        write_atomic(path, content)
        assert path.read_bytes() == content
        assert [p.name for p in tmp_path.iterdir()] == ["file"]


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
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_write_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b))[1])
    write_atomic(tmp_path / "file", b"x")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder


@pytest.mark.parametrize("place", ["missing/file", "plain/file", "folder"])
def test_a_place_that_cannot_be_written_is_one_error(place: str, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(TinyldError, match="cannot be written"):
        write_atomic(tmp_path / place, b"x")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["folder", "plain"]


def test_no_source_file_unpickles() -> None:
    sources = sorted(PACKAGE.rglob("*.py"))
    assert len(sources) > 20
    for source in sources:
        text = source.read_text(encoding="utf-8")
        for word in (r"\bpickle\b", "torch.load", "torch.save", "shelve", "marshal", "joblib"):
            assert not re.search(word, text), f"{source} has {word}"


# ------------------------------------------------------------------------------------------------ the manifest


def test_the_manifest_has_the_digest_and_size_of_every_file(base: Path) -> None:
    files = json.loads((base / MANIFEST).read_text())["files"]
    assert set(files) == {CONFIG, MODEL, TOKENIZER}
    for name, entry in files.items():
        content = (base / name).read_bytes()
        assert entry == {"sha256": sha256(content), "bytes": len(content)}


def test_a_base_and_an_adapter_come_back_with_their_bits(base: Path, adapter: Path, config: ModelConfig) -> None:
    loaded = load(base)
    first = Denoiser(config, torch_seeded(0))
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, first.get_parameter(name))
    adapted = load(adapter)
    stored = RunFolder(adapter).read_tensors(ADAPTER)
    assert stored.keys() == adapted.method.own.keys()
    assert all(torch.equal(p, stored[n]) for n, p in adapted.method.own.items())


def test_a_base_is_named_by_weights_tokenizer_and_shape(
    base: Path, tmp_path: Path, config: ModelConfig, tokenizer: Tokenizer
) -> None:
    again = write_base(tmp_path / "again", config, tokenizer)
    other = write_base(tmp_path / "other", config, tokenizer, seed=1)
    assert fingerprint(RunFolder(base)) == fingerprint(RunFolder(again)) != fingerprint(RunFolder(other))
    smaller = Tokenizer.train(["the film"] * 9, 100)
    RunFolder(again).write(TOKENIZER, smaller.to_json().encode())
    assert fingerprint(RunFolder(base)) != fingerprint(RunFolder(again))


# ------------------------------------------------------------------------------------------------ damage

DAMAGED = [("base", MODEL), ("base", TOKENIZER), ("base", CONFIG), ("adapter", ADAPTER), ("adapter", CONFIG)]


@pytest.mark.parametrize(("run", "name"), DAMAGED)
@pytest.mark.parametrize("place", [0.0, 0.01, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_is_found_and_the_file_named(
    run: str, name: str, place: float, bit: int, base: Path, adapter: Path, tmp_path: Path
) -> None:
    path = tmp_path / run / name
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1 << bit
    path.write_bytes(content)
    assert str(path) in refusal(tmp_path / run)


@pytest.mark.parametrize(("run", "name"), DAMAGED)
@pytest.mark.parametrize("change", ["empty", "half", "one byte less", "one byte more", "doubled"])
def test_a_file_of_another_length_is_found_and_named(
    change: str, run: str, name: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    path = tmp_path / run / name
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(
        {
            "empty": b"",
            "half": content[:half],
            "one byte less": content[:-1],
            "one byte more": content + b"\0",
            "doubled": content * 2,
        }[change]
    )
    assert str(path) in refusal(tmp_path / run)


@pytest.mark.parametrize(("run", "name"), [*DAMAGED, ("base", MANIFEST), ("adapter", MANIFEST)])
def test_a_missing_file_is_named_with_what_is_there(
    run: str, name: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / run / name).unlink()
    message = refusal(tmp_path / run)
    if name == MANIFEST:
        assert f"not listed in {MANIFEST}" in message
    else:
        assert name.split(".")[0] in message and str(tmp_path / run) in message
    if name in (MODEL, ADAPTER, CONFIG):
        assert "found" in message and MANIFEST in message


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_manifest_is_one_error_or_no_harm(seed: int, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(seed)
    path = base / MANIFEST
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    for act in (lambda: load(base), lambda: info(InfoOptions(run=base))):
        try:
            act()
        except TinyldError as error:
            assert "\n" not in str(error) and str(base) in str(error)


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"files": []}', '{"files": {"config.json": 1}}', '{"files": {"config.json": {}}}', "null", "\udc80"],
)
def test_a_manifest_of_the_wrong_form_is_one_error(content: str, base: Path) -> None:
    (base / MANIFEST).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert str(base) in refusal(base)
    with pytest.raises(TinyldError):
        info(InfoOptions(run=base))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\xff" * 64,
        b"\x08" + b"\0" * 7 + b"{}      ",
        (2**63).to_bytes(8, "little") + b"{",
        b"PK\x03\x04",
    ],
)
def test_a_weights_file_that_is_no_safetensors_is_refused_even_with_the_right_digest(
    content: bytes, base: Path
) -> None:
    RunFolder(base).write(MODEL, content)
    assert str(base / MODEL) in refusal(base)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("run", "name"), [("base", MODEL), ("adapter", ADAPTER)])
def test_weights_that_are_not_finite_are_refused(
    run: str, name: str, value: float, base: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / run)
    tensors = folder.read_tensors(name)
    key = sorted(tensors)[-1]
    tensors[key].view(-1)[-1] = value
    folder.write_tensors(name, tensors)
    message = refusal(tmp_path / run)
    assert "not finite" in message and repr(key) in message and str(tmp_path / run / name) in message


@pytest.mark.parametrize(("run", "name"), [("base", MODEL), ("adapter", ADAPTER)])
@pytest.mark.parametrize(
    ("change", "part"), [("drop", "missing"), ("add", "unexpected surplus"), ("reshape", "wrong shape")]
)
def test_tensors_that_do_not_fit_are_named(
    run: str, name: str, change: str, part: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / run)
    tensors = folder.read_tensors(name)
    key = sorted(tensors)[0]
    if change == "drop":
        del tensors[key]
    elif change == "add":
        tensors["surplus"] = torch.zeros(1)
    else:
        tensors[key] = tensors[key][..., :-1].clone()
    folder.write_tensors(name, tensors)
    message = refusal(tmp_path / run)
    assert part in message and (change == "add" or key in message) and str(tmp_path / run / name) in message


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"kind": "tent"}, "not the config of a run"),
        ({"model": {"vocab_size": 10, "depth": 3}}, "unknown key 'depth'"),
        ({"model": {}}, "missing key 'vocab_size'"),
        ({"model": {"vocab_size": "many"}}, "'many' is not of type int"),
        ({"model": {"vocab_size": 10, "num_heads": 0}}, "num_heads must be at least 1"),
        ({"model": {"vocab_size": 10}}, "the tokenizer has"),
    ],
)
def test_a_config_that_says_something_else_is_refused(change: dict[str, Any], part: str, base: Path) -> None:
    folder = RunFolder(base)
    folder.write_json(CONFIG, folder.config | change)
    assert part in refusal(base)


@pytest.mark.parametrize(
    ("run", "change"),
    [
        ("base", {"model": {"vocab_size": 160, "d_model": 2**20, "num_layers": 9_999, "d_ff": 2**20}}),
        ("adapter", {"method": {"name": "adapters", "rank": 10**12}}),
        ("adapter", {"method": {"name": "weight-lora", "rank": 10**12}}),
        ("adapter", {"method": {"name": "trajectory-lora", "ranks": [10**12, 8, 1]}}),
    ],
)
def test_a_config_that_asks_for_more_than_its_file_holds_is_refused_before_memory_is_taken(
    run: str, change: dict[str, Any], base: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / run)
    tokens = Tokenizer.load(base / TOKENIZER).vocab_size
    if run == "base":
        change["model"]["vocab_size"] = tokens
    folder.write_json(CONFIG, folder.config | change)
    assert re.search(r"holds [\d,]+ values, but config.json asks for [\d,]+$", refusal(tmp_path / run))


def test_a_config_with_rows_of_no_sane_length_is_refused(base: Path) -> None:
    """Rotary tables are as long as a row may be, and no weight tells how long that is."""
    folder = RunFolder(base)
    config = folder.config
    config["model"]["max_length"] = 10**9
    folder.write_json(CONFIG, config)
    assert "max_length must be from 2 to 131072, got 1000000000" in refusal(base)


def test_weights_of_another_type_are_refused(base: Path) -> None:
    folder = RunFolder(base)
    tensors = folder.read_tensors(MODEL)
    folder.write_tensors(MODEL, {n: t.long() for n, t in tensors.items()})
    assert "wrong type: torch.int64, expected floats" in refusal(base)


@pytest.mark.parametrize("dies_at", range(1, 4))
def test_a_writer_that_dies_anywhere_leaves_a_file_that_the_manifest_knows(
    dies_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.write("a.json", b"old")
    calls, replace = 0, os.replace

    def dies(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == dies_at:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            folder.write("a.json", b"new")
    content = folder.read("a.json")
    assert content == (b"old" if dies_at < 3 else b"new") and folder.digest("a.json") == sha256(content)
    folder.write("b.json", b"another")
    assert folder.read("a.json") == content and folder.digest("a.json") == sha256(content)
    folder.write("a.json", b"newest")
    assert folder.read("a.json") == b"newest" and folder.files() == {"a.json": 6, "b.json": 7}


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    first = RunFolder.create(tmp_path / "run")
    with first.locked():
        first.write("a.json", b"1")
        with pytest.raises(TinyldError, match="another process is writing"):
            RunFolder(tmp_path / "run").write("a.json", b"2")
    RunFolder(tmp_path / "run").write("a.json", b"3")
    assert first.read("a.json") == b"3"


def test_a_folder_with_only_what_a_killed_writer_leaves_is_taken(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = RunFolder.create(run)
    folder.write(TOKENIZER, b"{}")
    temporary_name(run).write_bytes(b"{")
    RunFolder.check_free(run)
    (run / MANIFEST).unlink()  # then the tokenizer is somebody else's
    with pytest.raises(TinyldError, match="not empty"):
        RunFolder.check_free(run)


def test_an_unknown_method_is_refused(adapter: Path) -> None:
    folder = RunFolder(adapter)
    folder.write_json(CONFIG, folder.config | {"method": {"name": "prefix"}})
    message = refusal(adapter)
    assert "unknown method 'prefix'" in message and all(name in message for name in METHODS)


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


def test_a_moved_base_is_found_with_base_and_named_when_it_is_not(adapter: Path, base: Path, tmp_path: Path) -> None:
    base.rename(tmp_path / "moved")
    message = refusal(adapter)
    assert str(base) in message and "--base" in message
    assert load_adapter(RunFolder(adapter), tmp_path / "moved").base.path == tmp_path / "moved"


def test_a_base_that_was_asked_for_and_is_not_there_is_no_silent_fallback(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(TinyldError, match="nowhere"):
        find_base(RunFolder(adapter).config, adapter, tmp_path / "nowhere")


def test_an_adapter_is_no_base_and_a_base_no_adapter(adapter: Path, base: Path) -> None:
    with pytest.raises(TinyldError, match="is an adapter, not a base"):
        load_base(adapter)
    with pytest.raises(TinyldError, match="holds a base, not an adapter"):
        load_adapter(RunFolder(base))


# ------------------------------------------------------------------------------------------------ folders


def test_a_new_run_takes_a_new_or_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new", "deep/er"):
        assert RunFolder.create(tmp_path / name).path.is_dir()


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_holds_something_else_is_never_replaced(force: bool, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    (tmp_path / "file").write_text("text")
    for name in ("photos", "file"):
        with pytest.raises(TinyldError) as raised:
            RunFolder.create(tmp_path / name, force)
        assert "--force" not in str(raised.value) and str(tmp_path / name) in str(raised.value)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "cat" and (tmp_path / "file").read_text() == "text"


def test_a_run_is_replaced_only_with_force(base: Path) -> None:
    with pytest.raises(TinyldError, match="--force"):
        RunFolder.create(base)
    load(base)
    RunFolder.create(base, force=True)
    assert list(base.iterdir()) == []


def test_what_is_no_run_says_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    for name, found in (("photos", "cat.jpg"), ("empty", "an empty folder"), ("missing", "no such folder")):
        with pytest.raises(TinyldError, match=f"no run in .*{name}: expected config.json, found {found}"):
            RunFolder.open(tmp_path / name)


# ------------------------------------------------------------------------------------------------ log, checkpoints


def test_the_log_is_read_without_its_torn_last_line_and_rewound(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    assert folder.metrics() == []
    for step in (0, 5, 10):
        folder.log({"step": step, "loss": step / 3})
    with open(tmp_path / "run" / METRICS, "a") as file:
        file.write('{"step": 15, "lo')
    assert [r["step"] for r in folder.metrics()] == [0, 5, 10]
    folder.rewind_metrics(5)
    folder.log({"step": 6})
    assert folder.metrics() == [{"step": 0, "loss": 0.0}, {"step": 5, "loss": 5 / 3}, {"step": 6}]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_checkpoints_are_kept_and_the_last_is_loaded(keep: int, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    for step in (2, 9, 10, 100, 1000):
        folder.save_checkpoint(step, {"model.w": torch.full((2,), float(step))}, {"tokens": step * 7}, keep)
    assert [int(p.name) for p in folder.checkpoints()] == [9, 10, 100, 1000][-keep:]
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        p.name for p in folder.checkpoints()
    ]
    tensors, state = folder.load_checkpoint()
    assert state == {"step": 1000, "tokens": 7000} and torch.equal(tensors["model.w"], torch.full((2,), 1000.0))


def test_a_checkpoint_that_was_cut_short_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.save_checkpoint(1, {"w": torch.ones(1)}, {}, 2)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_json", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            folder.save_checkpoint(2, {"w": torch.zeros(1)}, {}, 2)
    assert [p.name for p in folder.checkpoints()] == ["00000001"]
    folder.save_checkpoint(2, {"w": torch.full((1,), 5.0)}, {}, 2)
    assert torch.equal(folder.load_checkpoint()[0]["w"], torch.full((1,), 5.0))


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named(name: str, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    path = folder.save_checkpoint(1, {"w": torch.ones(50)}, {"tokens": 1}, 2) / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(TinyldError, match="damaged") as raised:
        folder.load_checkpoint()
    assert str(path) in str(raised.value)
    folder.remove_checkpoints()
    assert folder.load_checkpoint() is None


def test_a_damaged_checkpoint_is_passed_over_only_when_asked(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.save_checkpoint(1, {"w": torch.ones(50)}, {}, 2)
    path = folder.save_checkpoint(2, {"w": torch.zeros(50)}, {}, 2) / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TinyldError, match="--set from_step=1$"):
        folder.load_checkpoint()
    assert folder.load_checkpoint(1)[1]["step"] == 1
    with pytest.raises(TinyldError, match="no checkpoint at step 7 .*; there are 1, 2"):
        folder.load_checkpoint(7)


# ------------------------------------------------------------------------------------------------ nothing of others


def tree(path: Path) -> dict[str, Any]:
    """Every path below with its content, links by their target."""
    return {
        str(p.relative_to(path)): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in sorted(path.rglob("*"))
    }


FOREIGN = [
    {"manifest.json": '{"name": "an extension", "version": "1"}', "config.json": "{}"},
    {"manifest.json": '{"name": "an extension"}', "config.json": '{"kind": "base"}'},
    {"manifest.json": '{"files": {}}', "config.json": '{"kind": "base"}'},
    {"manifest.json": '{"files": {"config.json": "x"}}', "config.json": '{"kind": "base"}'},
    {"manifest.json": '{"files": {"config.json": {"sha256": "0", "bytes": 1}}}', "config.json": '{"kind": "tent"}'},
    {"manifest.json": '{"name": "an extension"}'},
    {"manifest.json": '{"name": "an extension"}', "tokenizer.json": "{}"},
]


@pytest.mark.parametrize("files", FOREIGN)
def test_a_folder_that_only_looks_like_a_run_is_never_replaced(files: dict[str, str], tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name, content in (files | {"precious.txt": "mine"}).items() if "config.json" in files else files.items():
        (theirs / name).write_text(content)
    before = tree(tmp_path)
    for force in (False, True):
        with pytest.raises(TinyldError, match="is not empty: choose another --out$"):
            RunFolder.create(theirs, force)
    assert tree(tmp_path) == before


def test_force_removes_what_the_run_wrote_and_nothing_else(base: Path, tmp_path: Path) -> None:
    folder = RunFolder(base)
    folder.log({"step": 1})
    folder.save_checkpoint(1, {"w": torch.ones(1)}, {}, 2)
    temporary_name(base).write_text("half")
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_text("cat")
    (base / "notes.txt").write_text("mine")
    (base / "checkpoints" / "00000001" / "notes.txt").write_text("mine")
    (base / "checkpoints" / "00000007").symlink_to(photos)
    (base / "photos").symlink_to(photos)
    RunFolder.create(base, force=True)
    left = {"notes.txt", "photos", "checkpoints", "checkpoints/00000001", "checkpoints/00000001/notes.txt"}
    assert set(tree(base)) == left | {"checkpoints/00000007"}
    assert tree(photos) == {"cat.jpg": b"cat"}


def test_checkpoints_that_are_a_link_are_not_ours(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    other = RunFolder.create(photos)
    other.save_checkpoint(3, {"w": torch.ones(1)}, {}, 2)
    folder = RunFolder.create(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").symlink_to(photos / "checkpoints")
    before = tree(photos)
    folder.remove_checkpoints()
    folder.remove_leftovers()
    assert tree(photos) == before and folder.checkpoints() == []


def test_a_link_to_a_run_is_not_replaced(base: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(base)
    before = tree(base)
    with pytest.raises(TinyldError, match="is not empty"):
        RunFolder.create(tmp_path / "latest", force=True)
    assert tree(base) == before


def test_a_manifest_cannot_name_a_file_outside_its_folder(base: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    manifest = json.loads((base / MANIFEST).read_text())
    manifest["files"]["../precious.txt"] = {"sha256": "0", "bytes": 4}
    (base / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(TinyldError, match="is not empty: choose another"):
        RunFolder.create(base, force=True)
    assert (tmp_path / "precious.txt").read_text() == "mine" and "leaves the run folder" in refusal(base)


def test_what_is_no_regular_file_is_written_to_or_refused_and_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "dangling"):
        with pytest.raises(TinyldError, match="cannot be written"):
            write_atomic(tmp_path / name, b"x")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_atomic(tmp_path / "pipe", b"through the pipe")
    assert os.read(reader, 100) == b"through the pipe"
    os.close(reader)
    write_atomic(Path("/dev/null"), b"x")
    assert (tmp_path / "target").read_text() == "mine" and (tmp_path / "pipe").is_fifo()
    assert Path("/dev/null").is_char_device() and len(list(tmp_path.iterdir())) == 4


def test_a_written_file_has_the_users_own_mode_and_no_foreseeable_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, replace = set(), os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (names.add(Path(a).name), replace(a, b))[1])
    for _ in range(3):
        write_atomic(tmp_path / ("n" * 255), b"x")
    (tmp_path / "plain").write_text("")
    assert len(names) == 3
    assert (tmp_path / ("n" * 255)).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_no_number_that_is_not_finite_is_written_as_json(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    for act in (lambda: folder.write_json("a.json", {"x": float("nan")}), lambda: folder.log({"step": float("inf")})):
        with pytest.raises(TinyldError, match="not a finite number"):
            act()


# ------------------------------------------------------------------------------------------------ bases, again


def test_a_base_is_found_by_its_fingerprint_among_the_released_ones(
    adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "bundled_data_dir", lambda: tmp_path / "bundled")
    (tmp_path / "bundled").mkdir()
    base.rename(tmp_path / "bundled" / "small")
    assert load(adapter).base.path == tmp_path / "bundled" / "small"
    (tmp_path / "bundled" / "small").rename(tmp_path / "elsewhere")
    message = refusal(adapter)
    assert str(base) in message and "--base" in message and str(tmp_path / "bundled" / "small") in message
    assert find_base(RunFolder(adapter).config, adapter, tmp_path / "elsewhere") == tmp_path / "elsewhere"


@pytest.mark.parametrize(
    "record", [{}, {"path": 3, "fingerprint": "x"}, {"path": "x"}, "base", {"path": "x", "fingerprint": "y", "z": 1}]
)
def test_a_run_that_says_nothing_sensible_of_its_base_is_refused(record: Any, adapter: Path) -> None:
    folder = RunFolder(adapter)
    folder.write_json(CONFIG, folder.config | {"base": record})
    assert f"{adapter / CONFIG}: base" in refusal(adapter)


def test_a_missing_key_of_a_config_is_one_line(adapter: Path) -> None:
    folder = RunFolder(adapter)
    folder.write_json(CONFIG, {"kind": "adapter"})
    assert refusal(adapter) == f"{adapter / CONFIG}: missing key 'base'"


def test_a_base_in_int8_keeps_its_weights_to_a_half_step_of_each_row(
    base: Path, tmp_path: Path, config: ModelConfig, tokenizer: Tokenizer
) -> None:
    small = RunFolder.create(tmp_path / "small")
    whole = load_base(base)
    small.write_json(CONFIG, RunFolder(base).config)
    save_base(small, whole.model, dict(whole.model.named_parameters()), tokenizer, torch.int8)
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
