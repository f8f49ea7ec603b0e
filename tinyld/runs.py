"""Run folders: durable atomic files, a manifest with the SHA-256 of each, checkpoints. Safetensors and JSON only.

torch is imported only where tensors are read or written, so that `tinyld info` needs none.

A run folder holds `config.json` (what was asked, on what), `metrics.jsonl` (a line per log step), the weights
(`model.safetensors` for a base, `adapter.safetensors` for a method), `tokenizer.json` (bases), `results.json`
(evaluations), `checkpoints/` and `manifest.json`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tinyld
from tinyld.errors import TinyldError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, METRICS, MANIFEST, RESULTS = "config.json", "metrics.jsonl", "manifest.json", "results.json"
MODEL, ADAPTER, TOKENIZER = "model.safetensors", "adapter.safetensors", "tokenizer.json"
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
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise TinyldError(f"{path}: cannot be written ({error.strerror or error})") from None
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TinyldError(f"{path}: cannot be made ({error.strerror})") from None


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TinyldError(f"no such file: {path}") from None
    except OSError as error:
        raise TinyldError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
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
    """One run's folder. `create` refuses a folder that holds something; `open` checks that it is a run."""

    def __init__(self, path: Path):
        self.path = path

    @staticmethod
    def check_free(path: Path, force: bool = False) -> None:
        """TinyldError unless `path` is new or empty, or holds a run that `force` may replace."""
        is_run = RunFolder(path).is_run()
        if path.exists() and (not path.is_dir() or any(path.iterdir())) and not (force and is_run):
            go_on = f"go on with it by --resume {path}, " if RunFolder(path).checkpoints() else ""
            hint = f"{go_on}choose another --out, or replace it by --force" if is_run else "choose another --out"
            raise TinyldError(f"{path} exists and is not empty: {hint}")

    @classmethod
    def create(cls, path: Path, force: bool = False) -> RunFolder:
        """A new, empty run folder where `check_free` allows one."""
        cls.check_free(path, force)
        if cls(path).is_run():
            shutil.rmtree(path)
        make_folder(path)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        if not (path / CONFIG).is_file():
            found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) if path.is_dir() else "no such folder"
            raise TinyldError(f"no run in {path}: expected {CONFIG}, found {found or 'an empty folder'}")
        return cls(path)

    def is_run(self) -> bool:
        """Whether this looks like one of ours: both a config and a manifest."""
        return (self.path / CONFIG).is_file() and (self.path / MANIFEST).is_file()

    @property
    def config(self) -> dict[str, Any]:
        config = json.loads(self.read(CONFIG))
        if not isinstance(config, dict) or config.get("kind") not in ("base", "adapter", "composition"):
            raise TinyldError(f"{self.path / CONFIG}: not the config of a run (no 'kind')")
        return config

    def write(self, name: str, content: bytes) -> None:
        """Writes a file and its SHA-256 into the manifest."""
        write_atomic(self.path / name, content)
        manifest = self._manifest()
        manifest["files"][name] = {"sha256": sha256(content), "bytes": len(content)}
        write_atomic(self.path / MANIFEST, to_json(manifest))

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, to_json(value))

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save

        self.write(name, save({k: tensors[k].detach().contiguous().cpu() for k in sorted(tensors)}))

    def read(self, name: str) -> bytes:
        """A file's bytes, checked against the manifest."""
        path = self.path / name
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            found = ", ".join(sorted(p.name for p in self.path.iterdir())) if self.path.is_dir() else "no such folder"
            raise TinyldError(f"no {name} in {self.path}: found {found or 'nothing'}") from None
        except OSError as error:
            raise TinyldError(f"{path}: cannot be read ({error.strerror})") from None
        if self._entry(name)["sha256"] != sha256(content):
            raise TinyldError(f"{path}: damaged: its SHA-256 differs from the one in {MANIFEST}")
        return content

    def read_json(self, name: str) -> Any:
        return json.loads(self.read(name))

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        return parse_tensors(self.read(name), self.path / name)

    def digest(self, name: str) -> str:
        """SHA-256 of a file, from the manifest."""
        return str(self._entry(name)["sha256"])

    def files(self) -> dict[str, int]:
        """Every file of the manifest with its size in bytes."""
        return {name: int(self._entry(name)["bytes"]) for name in self._manifest()["files"]}

    def _entry(self, name: str) -> dict[str, Any]:
        entry = self._manifest()["files"].get(name)
        if entry is None:
            raise TinyldError(f"{self.path / name}: not listed in {MANIFEST}; it was not written by tinyld")
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("sha256"), str)
            or not isinstance(entry.get("bytes"), int)
        ):
            raise TinyldError(f"{self.path / MANIFEST}: damaged, the entry for {name!r} has no sha256 and bytes")
        if Path(name).name != name:
            raise TinyldError(f"{self.path / MANIFEST}: the name {name!r} leaves the run folder")
        return entry

    def _manifest(self) -> dict[str, Any]:
        path = self.path / MANIFEST
        if not path.exists():
            return {"files": {}}
        manifest = read_json(path)
        if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
            raise TinyldError(f"{path}: damaged, expected an object with 'files'")
        return manifest

    # ---- the metrics log

    def log(self, record: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        with open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        path = self.path / METRICS
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]

    def rewind_metrics(self, step: int) -> None:
        """Drops the lines after `step`, which a resumed run writes again."""
        kept = [r for r in self.metrics() if r["step"] <= step]
        write_atomic(self.path / METRICS, "".join(json.dumps(r) + "\n" for r in kept).encode())

    # ---- checkpoints

    def save_checkpoint(self, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any], keep: int) -> Path:
        """Writes `checkpoints/<step>` whole, then removes all but the newest `keep`."""
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        final, partial = folder / f"{step:08d}", folder / f".{step:08d}.tmp"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        inner = RunFolder(partial)
        inner.write_tensors("state.safetensors", tensors)
        inner.write_json("state.json", {"step": step, **state})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        sync_folder(folder)
        for old in self.checkpoints()[:-keep]:
            shutil.rmtree(old)
        return final

    def checkpoints(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        folder = self.path / "checkpoints"
        return sorted(p for p in folder.glob("[0-9]*") if p.is_dir()) if folder.is_dir() else []

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, state) of the newest checkpoint."""
        found = self.checkpoints()
        if not found:
            raise TinyldError(f"nothing to resume in {self.path}: it has no checkpoint")
        inner = RunFolder(found[-1])
        return inner.read_tensors("state.safetensors"), inner.read_json("state.json")

    def remove_checkpoints(self) -> None:
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)


def environment() -> dict[str, Any]:
    """Versions and machine facts that a result depends on."""
    import torch

    return {
        "tinyld": tinyld.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "command": " ".join(["tinyld", *sys.argv[1:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
