"""Run folders: files, a manifest with the SHA-256 of each, a log, checkpoints.

A run folder holds `config.json` (what was asked, on what), `metrics.jsonl` (a line per log step), the weights
(`model.safetensors` for a base, `adapter.safetensors` for a method), `tokenizer.json` (bases), `results.json`
(evaluations), `checkpoints/` and `manifest.json`. Only what a manifest lists or what bears our temporary names is
ever deleted, and nothing through a link. torch is imported only where tensors are, so that `tinyld info` needs none.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyld.environment import check_unchanged as check_unchanged
from tinyld.environment import environment as environment
from tinyld.environment import under_torchrun as under_torchrun
from tinyld.errors import TinyldError
from tinyld.read import TENSORS_BYTES, Record, as_object, parse_json, parse_tensors, read_bytes, read_json, read_text
from tinyld.write import clear, is_temporary, locked, make_folder, sha256, sync, temporary_name, to_json, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, METRICS, MANIFEST, RESULTS = "config.json", "metrics.jsonl", "manifest.json", "results.json"
MODEL, ADAPTER, TOKENIZER = "model.safetensors", "adapter.safetensors", "tokenizer.json"
INITIAL = "initial.safetensors"  # what pretraining with --keep-init began with, until it is finished
PROTOTYPE = "prototype.safetensors"  # of an adapter's task, for compose to route by; not needed to use the adapter
CHECKPOINTS, STATE, STATE_TENSORS = "checkpoints", "state.json", "state.safetensors"
KINDS = ("base", "adapter", "composition")  # of a run, in its config


# ------------------------------------------------------------------------------------------------ run folders


class RunFolder:
    """One run's folder. `create` refuses a folder that holds something; `open` checks that it is a run.

    A file and its line in the manifest cannot change in one step, so the manifest first names the new content as
    pending, then the file takes its name, then the manifest is settled: wherever the process dies, the file on the
    disk is one that the manifest knows.
    """

    def __init__(self, path: Path):
        self.path = path
        self._is_locked = False

    @staticmethod
    def check_free(path: Path, force: bool = False) -> None:
        """TinyldError unless `path` is new or empty, or holds a run that `force` may replace."""
        folder = RunFolder(path)
        if not os.path.lexists(path) or folder._holds_nothing():
            return
        is_run = folder.is_run() and not path.is_symlink()
        if not (force and is_run):
            go_on = f"go on with it by --resume {path}, " if folder.checkpoints() else ""
            hint = f"{go_on}choose another --out, or replace it by --force" if is_run else "choose another --out"
            raise TinyldError(f"{path} exists and is not empty: {hint}")

    @classmethod
    def create(cls, path: Path, force: bool = False) -> RunFolder:
        """A new run folder where `check_free` allows one; of the run that was there, all that is ours is gone."""
        cls.check_free(path, force)
        folder = cls(path)
        if folder.is_run():
            with folder.locked():
                files = [name for name in folder._manifest()["files"] if name != CONFIG]
                folder.remove_checkpoints()
                clear(path, [METRICS, *files, CONFIG, MANIFEST])  # last what tells that it is a run
        make_folder(path)
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        if not (path / CONFIG).is_file():
            raise TinyldError(f"no run in {path}: expected {CONFIG}, {_found(path)}")
        return cls(path)

    def is_run(self) -> bool:
        """Whether this is one of ours: a config that says which kind of run it is, and a manifest that lists it."""
        try:
            return CONFIG in self._manifest()["files"] and read_json(self.path / CONFIG).get("kind") in KINDS
        except (TinyldError, AttributeError):
            return False

    def _holds_nothing(self) -> bool:
        """Whether the folder is empty, or holds only what a writer that was killed before its config leaves."""
        if not self.path.is_dir():
            return False
        names = {name for name in os.listdir(self.path) if not is_temporary(name)}
        try:
            return names <= {MANIFEST, TOKENIZER} and (not names or (MANIFEST in names and bool(self._manifest())))
        except TinyldError:
            return False

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """`locked` of this folder, once for all that is done within."""
        if self._is_locked:
            yield
            return
        with locked(self.path):
            self._is_locked = True
            try:
                yield
            finally:
                self._is_locked = False

    @property
    def config(self) -> Record:
        config = self.read_json(CONFIG)
        if not isinstance(config, Record) or config.get("kind") not in KINDS:
            raise TinyldError(f"{self.path / CONFIG}: not the config of a run (no 'kind')")
        return config

    def write(self, name: str, content: bytes) -> None:
        """Writes a file and its SHA-256 into the manifest."""
        entry = {"sha256": sha256(content), "bytes": len(content)}
        with self.locked():
            manifest = self._manifest()
            for dead, left in manifest.get("pending", {}).items():  # by a writer that died: did its file take its name?
                with contextlib.suppress(TinyldError):
                    if sha256(self.read(dead)) == left["sha256"]:
                        manifest["files"][dead] = left
            manifest["pending"] = {name: entry}
            write_atomic(self.path / MANIFEST, to_json(manifest))
            write_atomic(self.path / name, content)
            manifest["files"][name] = entry
            del manifest["pending"]
            write_atomic(self.path / MANIFEST, to_json(manifest))

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, to_json(value))

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save

        self.write(name, save({k: tensors[k].detach().contiguous().cpu() for k in sorted(tensors)}))

    def remove(self, name: str) -> None:
        """Removes a file that the manifest lists, and its line there."""
        with self.locked():
            manifest = self._manifest()
            if manifest["files"].pop(name, None):
                clear(self.path, [name])  # first, so that --resume tries again should this process die between the two
                write_atomic(self.path / MANIFEST, to_json(manifest))

    def read(self, name: str) -> bytes:
        """A file's bytes, checked against the manifest."""
        path = self.path / name
        for wait in (0.05, None):
            if not path.exists():
                raise TinyldError(f"no {name} in {self.path}: {_found(self.path)}")
            content = read_bytes(path, TENSORS_BYTES)
            if sha256(content) in [entry["sha256"] for entry in self._entries(name)]:
                return content
            if wait is not None:
                time.sleep(wait)  # a writer may have been between the two
        raise TinyldError(f"{path}: damaged: its SHA-256 differs from the one in {MANIFEST}")

    def read_json(self, name: str) -> Any:
        return parse_json(self.read(name), self.path / name)

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        return parse_tensors(self.read(name), self.path / name)

    def digest(self, name: str) -> str:
        """SHA-256 of a file, from the manifest."""
        entries = self._entries(name)
        return str(entries[0]["sha256"]) if len(entries) == 1 else sha256(self.read(name))

    def files(self) -> dict[str, int]:
        """Every file of the manifest with its size in bytes."""
        return {name: int(self._entries(name)[0]["bytes"]) for name in self._manifest()["files"]}

    def _entries(self, name: str) -> list[dict[str, Any]]:
        """What the manifest knows of a file: one entry, or two when its writer died between file and manifest."""
        manifest = self._manifest()
        entries = [part[name] for part in (manifest["files"], manifest.get("pending", {})) if name in part]
        if not entries:
            raise TinyldError(f"{self.path / name}: not listed in {MANIFEST}; it was not written by tinyld")
        return entries

    def _manifest(self) -> dict[str, Any]:
        path = self.path / MANIFEST
        if not os.path.lexists(path):
            return {"files": {}}
        manifest = as_object(read_json(path), path)
        for part in (manifest["files"], manifest.get("pending", {})):
            for name, entry in as_object(part, f"{path}: files").items():
                entry = as_object(entry, f"{path}: {name!r}")
                if not isinstance(entry["sha256"], str) or not isinstance(entry["bytes"], int):
                    raise TinyldError(f"{path}: damaged, the entry for {name!r} has no sha256 and bytes")
                if Path(name).name != name:
                    raise TinyldError(f"{path}: the name {name!r} leaves the run folder")
        return manifest

    # ---- the metrics log

    def log(self, record: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        path = self.path / METRICS
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            with open(os.open(path, flags, 0o666), "ab") as file:
                file.write(to_json(record, None))
        except OSError as error:
            raise TinyldError(f"{path}: cannot be written ({error.strerror})") from None

    def metrics(self) -> list[Record]:
        """The log's records; a last line without its end, which a killed writer leaves, is not one."""
        path = self.path / METRICS
        if not path.exists():
            return []
        *lines, _ = read_text(path).split("\n")
        records = [as_object(parse_json(line, path), path) for line in lines]
        if not all(isinstance(record["step"], int) for record in records):
            raise TinyldError(f"{path}: damaged, a line has no step")
        return records

    def close_log(self) -> None:
        """Puts the finished log into the manifest."""
        self.write(METRICS, read_bytes(self.path / METRICS))

    def rewind_metrics(self, step: int) -> None:
        """Drops the lines after `step`, which a resumed run writes again."""
        kept = [r for r in self.metrics() if r["step"] <= step]
        write_atomic(self.path / METRICS, b"".join(to_json(r, None) for r in kept))

    # ---- checkpoints

    def save_checkpoint(self, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any], keep: int) -> Path:
        """Writes `checkpoints/<step>` whole, then removes all but the newest `keep`."""
        folder = self.path / CHECKPOINTS
        final, partial, replaced = folder / f"{step:08d}", temporary_name(folder), temporary_name(folder)
        try:
            if (self.path / METRICS).exists():
                sync(self.path / METRICS)
            folder.mkdir(exist_ok=True)
            partial.mkdir()
            inner = RunFolder(partial)
            inner.write_tensors(STATE_TENSORS, tensors)
            inner.write_json(STATE, {"step": step, **state})
            if final.exists():
                os.replace(final, replaced)
            os.replace(partial, final)
            sync(folder)
        except (OSError, TinyldError) as error:
            reason = str(error) if isinstance(error, TinyldError) else f"{final}: cannot be written ({error.strerror})"
            with contextlib.suppress(TinyldError):
                _clear_checkpoint(partial)
            raise TinyldError(f"{reason}; {self.last_good()}") from None
        for old in [replaced, *self.checkpoints()[:-keep]]:
            with contextlib.suppress(TinyldError):
                _clear_checkpoint(old)
        return final

    def last_good(self) -> str:
        """For an error: what can be gone on with."""
        found = self.checkpoints()
        return f"the last good checkpoint is {found[-1]}" if found else "no checkpoint had been written"

    def checkpoints(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        return [path for path in self._checkpoint_folders() if re.fullmatch(r"\d{8,12}", path.name)]

    def _checkpoint_folders(self) -> list[Path]:
        folder = self.path / CHECKPOINTS
        if folder.is_symlink() or not folder.is_dir():
            return []
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())

    def load_checkpoint(self, step: int | None = None) -> tuple[dict[str, Tensor], Record] | None:
        """(tensors, state) of the newest checkpoint, or of that at `step`; None when there is none to go on from."""
        found = {int(p.name): p for p in self.checkpoints()}
        if step is not None and step not in found:
            steps = ", ".join(map(str, found)) or "none"
            raise TinyldError(f"no checkpoint at step {step} in {self.path}; there are {steps}")
        if not found:
            return None
        chosen = max(found) if step is None else step
        inner = RunFolder(found[chosen])
        try:
            return inner.read_tensors(STATE_TENSORS), as_object(inner.read_json(STATE), inner.path / STATE)
        except TinyldError as error:
            older = [s for s in found if s < chosen]
            way_out = f"go on from an older one with --set from_step={older[-1]}" if older else "there is no older one"
            raise TinyldError(f"{error}; {way_out}") from None

    def remove_checkpoints(self, after: int = -1) -> None:
        """Removes the checkpoints of steps after `after`; all of them, and what is half-written, by default."""
        for path in self.checkpoints():
            if int(path.name) > after:
                _clear_checkpoint(path)
        if after < 0:
            self.remove_leftovers()
            clear(self.path / CHECKPOINTS, with_folder=True)

    def remove_leftovers(self) -> None:
        """Removes what a killed writer left half-written."""
        clear(self.path)
        for path in self._checkpoint_folders():
            if is_temporary(path.name):
                _clear_checkpoint(path)


def _clear_checkpoint(path: Path) -> None:
    clear(path, [STATE_TENSORS, STATE, MANIFEST], with_folder=True)


def _found(path: Path) -> str:
    """What a folder holds, for an error."""
    names = sorted(os.listdir(path)) if path.is_dir() else ["no such folder"]
    return f"found {', '.join(names[:8]) or 'an empty folder'}"


class Spectator(RunFolder):
    """A run folder that another process of the same run writes: reading works, writing does nothing."""

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        yield

    def _leave(self, *args: Any) -> Any:
        return self.path

    write = write_tensors = remove = log = close_log = rewind_metrics = _leave
    save_checkpoint = remove_checkpoints = remove_leftovers = _leave
