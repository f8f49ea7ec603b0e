"""Run folders: durable atomic files, a manifest with the SHA-256 of each, checkpoints. Safetensors and JSON only.

torch is imported only where tensors are read or written, so that `tinyld info` needs none.

A run folder holds `config.json` (what was asked, on what), `metrics.jsonl` (a line per log step), the weights
(`model.safetensors` for a base, `adapter.safetensors` for a method), `tokenizer.json` (bases), `results.json`
(evaluations), `checkpoints/` and `manifest.json`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tinyld
from tinyld.errors import TinyldError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, METRICS, MANIFEST, RESULTS = "config.json", "metrics.jsonl", "manifest.json", "results.json"
MODEL, ADAPTER, TOKENIZER = "model.safetensors", "adapter.safetensors", "tokenizer.json"
INITIAL = "initial.safetensors"  # what pretraining with --keep-init began with, until it is finished
PROTOTYPE = "prototype.safetensors"  # of an adapter's task, for compose to route by; not needed to use the adapter


# ------------------------------------------------------------------------------------------------ single files


def write_atomic(path: Path, content: bytes) -> None:
    """Writes `path` whole or not at all, and durably: temporary name, fsync, rename, fsync of the folder."""
    if path.is_dir():
        raise TinyldError(f"{path}: cannot be written (it is a folder)")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise TinyldError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync(path: Path) -> None:
    """Puts a file or a folder's names on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TinyldError(f"{path}: cannot be made ({error.strerror})") from None


def remove_tree(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as error:
        raise TinyldError(f"{path}: cannot be removed ({error.strerror})") from None


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TinyldError(f"no such file: {path}") from None
    except OSError as error:
        raise TinyldError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise TinyldError(f"{path}: damaged, not JSON ({str(error)[:80]})") from None


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def parse_tensors(content: bytes, path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file that was read into memory; TinyldError when it is damaged or not finite."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise TinyldError(f"{path}: damaged safetensors file ({str(error)[:100]})") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise TinyldError(f"{path}: tensor {name!r} holds values that are not finite")
    return tensors


# ------------------------------------------------------------------------------------------------ run folders


class RunFolder:
    """One run's folder. `create` refuses a folder that holds something; `open` checks that it is a run.

    A file and its line in the manifest cannot change in one step, so the manifest first names the new content as
    pending, then the file takes its name, then the manifest is settled: wherever the process dies, the file on the
    disk is one that the manifest knows.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock: int | None = None

    @staticmethod
    def check_free(path: Path, force: bool = False) -> None:
        """TinyldError unless `path` is new or empty, or holds a run that `force` may replace."""
        is_run = RunFolder(path).is_run()
        if path.exists() and (not path.is_dir() or not _holds_nothing(path)) and not (force and is_run):
            go_on = f"go on with it by --resume {path}, " if RunFolder(path).checkpoints() else ""
            hint = f"{go_on}choose another --out, or replace it by --force" if is_run else "choose another --out"
            raise TinyldError(f"{path} exists and is not empty: {hint}")

    @classmethod
    def create(cls, path: Path, force: bool = False) -> RunFolder:
        """A new, empty run folder where `check_free` allows one."""
        cls.check_free(path, force)
        folder = cls(path)
        if folder.is_run():
            with folder.locked():
                remove_tree(path)
        make_folder(path)
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        if not (path / CONFIG).is_file():
            found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) if path.is_dir() else "no such folder"
            raise TinyldError(f"no run in {path}: expected {CONFIG}, found {found or 'an empty folder'}")
        return cls(path)

    def is_run(self) -> bool:
        """Whether this looks like one of ours: both a config and a manifest."""
        return (self.path / CONFIG).is_file() and (self.path / MANIFEST).is_file()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Within it this process alone writes here; TinyldError at once when another one does.

        The lock is flock's on the folder itself: it ends with the process and leaves no file behind.
        """
        if self._lock is not None:  # already ours
            yield
            return
        try:
            self._lock = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._lock).st_ino != os.stat(self.path).st_ino:  # replaced by --force meanwhile
                raise BlockingIOError
        except OSError as error:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None
            if isinstance(error, BlockingIOError):
                raise TinyldError(f"{self.path}: another process is writing in this run; wait for it") from None
            raise TinyldError(f"{self.path}: cannot be written ({error.strerror})") from None
        try:
            yield
        finally:
            os.close(self._lock)
            self._lock = None

    @property
    def config(self) -> dict[str, Any]:
        config = json.loads(self.read(CONFIG))
        if not isinstance(config, dict) or config.get("kind") not in ("base", "adapter", "composition"):
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

    def remove(self, name: str) -> None:
        """Removes a file's line in the manifest and the file, where they are there."""
        with self.locked():
            manifest = self._manifest()
            if manifest["files"].pop(name, None):
                write_atomic(self.path / MANIFEST, to_json(manifest))
            with contextlib.suppress(OSError):
                (self.path / name).unlink()

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save

        self.write(name, save({k: tensors[k].detach().contiguous().cpu() for k in sorted(tensors)}))

    def read(self, name: str, retry: bool = True) -> bytes:
        """A file's bytes, checked against the manifest."""
        path = self.path / name
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            found = ", ".join(sorted(p.name for p in self.path.iterdir())) if self.path.is_dir() else "no such folder"
            raise TinyldError(f"no {name} in {self.path}: found {found or 'nothing'}") from None
        except OSError as error:
            raise TinyldError(f"{path}: cannot be read ({error.strerror})") from None
        if sha256(content) not in [entry["sha256"] for entry in self._entries(name)]:
            if retry:  # a writer may have been between the two
                time.sleep(0.05)
                return self.read(name, retry=False)
            raise TinyldError(f"{path}: damaged: its SHA-256 differs from the one in {MANIFEST}")
        return content

    def read_json(self, name: str) -> Any:
        return json.loads(self.read(name))

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
        entries = [m[name] for m in (manifest["files"], manifest.get("pending", {})) if name in m]
        if not entries:
            raise TinyldError(f"{self.path / name}: not listed in {MANIFEST}; it was not written by tinyld")
        for entry in entries:
            if (
                not isinstance(entry, dict)
                or not isinstance(entry.get("sha256"), str)
                or not isinstance(entry.get("bytes"), int)
            ):
                raise TinyldError(f"{self.path / MANIFEST}: damaged, the entry for {name!r} has no sha256 and bytes")
        if Path(name).name != name:
            raise TinyldError(f"{self.path / MANIFEST}: the name {name!r} leaves the run folder")
        return entries

    def _manifest(self) -> dict[str, Any]:
        path = self.path / MANIFEST
        if not path.exists():
            return {"files": {}}
        manifest = read_json(path)
        parts = [manifest.get("files"), manifest.get("pending", {})] if isinstance(manifest, dict) else [None]
        if not all(isinstance(part, dict) for part in parts):
            raise TinyldError(f"{path}: damaged, expected an object with 'files'")
        return manifest

    # ---- the metrics log

    def log(self, record: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        path = self.path / METRICS
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise TinyldError(f"{path}: cannot be written ({error.strerror})") from None

    def metrics(self) -> list[dict[str, Any]]:
        """The log's records; a last line without its end, which a killed writer leaves, is not one."""
        path = self.path / METRICS
        if not path.exists():
            return []
        try:
            *lines, _ = path.read_text(encoding="utf-8").split("\n")
            records = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise TinyldError(f"{path}: damaged or unreadable ({str(error)[:80]})") from None
        if not all(isinstance(r, dict) and isinstance(r.get("step"), int) for r in records):
            raise TinyldError(f"{path}: damaged, a line has no step")
        return records

    def close_log(self) -> None:
        """Puts the finished log into the manifest."""
        self.write(METRICS, (self.path / METRICS).read_bytes())

    def rewind_metrics(self, step: int) -> None:
        """Drops the lines after `step`, which a resumed run writes again."""
        kept = [r for r in self.metrics() if r["step"] <= step]
        write_atomic(self.path / METRICS, "".join(json.dumps(r) + "\n" for r in kept).encode())

    # ---- checkpoints

    def save_checkpoint(self, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any], keep: int) -> Path:
        """Writes `checkpoints/<step>` whole, then removes all but the newest `keep`."""
        folder = self.path / "checkpoints"
        final, partial = folder / f"{step:08d}", folder / f".{step:08d}.tmp"
        try:
            if (self.path / METRICS).exists():
                sync(self.path / METRICS)
            folder.mkdir(exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            inner = RunFolder(partial)
            inner.write_tensors("state.safetensors", tensors)
            inner.write_json("state.json", {"step": step, **state})
            replaced = folder / f".{step:08d}.old.tmp"
            if final.exists():
                os.replace(final, replaced)
            os.replace(partial, final)
            sync(folder)
            shutil.rmtree(replaced, ignore_errors=True)
        except (OSError, TinyldError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = str(error) if isinstance(error, TinyldError) else f"{final}: cannot be written ({error.strerror})"
            raise TinyldError(f"{reason}; {self.last_good()}") from None
        for old in self.checkpoints()[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def last_good(self) -> str:
        """For an error: what can be gone on with."""
        found = self.checkpoints()
        return f"the last good checkpoint is {found[-1]}" if found else "no checkpoint had been written"

    def checkpoints(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        folder = self.path / "checkpoints"
        return sorted(p for p in folder.iterdir() if p.name.isdigit() and p.is_dir()) if folder.is_dir() else []

    def load_checkpoint(self, step: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
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
            return inner.read_tensors("state.safetensors"), inner.read_json("state.json")
        except TinyldError as error:
            older = [s for s in found if s < chosen]
            way_out = f"go on from an older one with --set from_step={older[-1]}" if older else "there is no older one"
            raise TinyldError(f"{error}; {way_out}") from None

    def remove_checkpoints(self, after: int = -1) -> None:
        """Removes the checkpoints of steps after `after`; all of them by default."""
        for path in self.checkpoints():
            if int(path.name) > after:
                shutil.rmtree(path, ignore_errors=True)
        if after < 0:
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Removes what a killed writer left half-written."""
        for path in [*self.path.glob(".*.tmp"), *(self.path / "checkpoints").glob(".*.tmp")]:
            if path.is_dir():
                remove_tree(path)
            else:
                path.unlink(missing_ok=True)


class Spectator(RunFolder):
    """A run folder that another process of the same run writes: reading works, writing does nothing."""

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        yield

    def write(self, name: str, content: bytes) -> None:
        pass

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        pass

    def remove(self, name: str) -> None:
        pass

    def log(self, record: dict[str, Any]) -> None:
        pass

    def close_log(self) -> None:
        pass

    def rewind_metrics(self, step: int) -> None:
        pass

    def save_checkpoint(self, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any], keep: int) -> Path:
        return self.path

    def remove_checkpoints(self, after: int = -1) -> None:
        pass

    def remove_leftovers(self) -> None:
        pass


def _holds_nothing(path: Path) -> bool:
    """Whether a folder is empty, or holds only what a writer that was killed before its config leaves."""
    names = {p.name for p in path.iterdir()}
    ours = {MANIFEST, *([TOKENIZER] if MANIFEST in names else [])}
    return all(n in ours or (n.startswith(".") and n.endswith(".tmp")) for n in names)


def check_unchanged(path: Path, config: Mapping[str, Any], data_sha256: str, allow: bool) -> None:
    """TinyldError unless a run goes on with the data, torch and threads it began with: else its bits would differ."""
    then, now = config["environment"], environment()
    depends = ("torch", "threads", "processes", "device", "fast_dtype")
    pairs = [(name, then.get(name, now[name]), now[name]) for name in depends]
    pairs.append(("data", str(config["data"].get("sha256"))[:12], data_sha256[:12]))
    changed = ", ".join(f"{name} was {a}, is {b}" for name, a, b in pairs if a != b)
    if changed and not allow:
        raise TinyldError(f"{path} began otherwise: {changed}; --set allow_changed=true goes on all the same")


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def environment() -> dict[str, Any]:
    """Versions and machine facts that a result depends on."""
    import torch

    from tinyld.device import fast_dtype, resolve_device

    return {
        "tinyld": tinyld.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ["WORLD_SIZE"]) if under_torchrun() else 1,
        "machine": platform.machine(),
        "fast_dtype": fast_dtype(resolve_device("auto")),  # what `auto` is here
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "command": " ".join(["tinyld", *sys.argv[1:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
