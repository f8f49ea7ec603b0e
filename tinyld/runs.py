"""Run folders: files, a manifest with the SHA-256 of each, a log, checkpoints.

A run folder holds `config.json` (what was asked, on what), `metrics.jsonl` (a line per log step), the weights
(`model.safetensors` for a base, `adapter.safetensors` for a method), `tokenizer.json` (bases), `results.json`
(evaluations), `manifest.json`, and while it trains `checkpoints/`, a folder of the same kind with a file a step. Only
what a manifest lists or what bears our temporary names is ever deleted, and nothing through a link. torch is imported
only where tensors are, so that `tinyld info` needs none.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tinyld.errors import TinyldError, failing
from tinyld.read import TENSORS_BYTES, Record, decode, parse_json, parse_tensors, read_bytes, read_object, read_text
from tinyld.write import clear, is_temporary, locked, make_folder, sha256, sync, to_json, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, METRICS, MANIFEST, RESULTS = "config.json", "metrics.jsonl", "manifest.json", "results.json"
MODEL, ADAPTER, TOKENIZER = "model.safetensors", "adapter.safetensors", "tokenizer.json"
PROTOTYPE = "prototype.safetensors"  # of an adapter's task, for compose to route by; not needed to use the adapter
CHECKPOINTS = "checkpoints"
ROWS_SUFFIX = "-rows.jsonl"  # of the file beside a run that keeps the rows it was given in Python
KINDS = ("base", "adapter", "composition")  # of a run, in its config
SHARE, COUNT = Annotated[float, {"least": 0, "most": 1}], Annotated[int, {"least": 1}]
SCORES: Any = {"n": COUNT} | dict.fromkeys(("accuracy", "low", "high"), SHARE)
SCORES |= dict.fromkeys(("nll_bound", "nll_stderr"), float)
ENTRY: Any = {"sha256": str, "bytes": int, "before": str}
ROWS: Any = {"folder": str | None, "held_out": bool, "limit": int | None, "rows": int, "sha256": str}
MEMBER: Any = {"run": str, "task": {"name": str}, "method": dict, "data": ROWS}
TYPES: dict[str, Any] = {  # of what is read out of these files, where it is there; see config.check_type
    CONFIG: {
        "base": {"path": str, "fingerprint": str, "dtype": str, "reading": dict},
        "train": dict,
        "data": ROWS | {"dev_sha256": str, "files": list[str], "tokens": int},
        "parameters": dict[str, float],
        "task": {"name": str, "verbalizer": dict[str, str]},
        "method": {"name": str},
        "started_as": {"name": str, "prune": float},
        "environment": {"command": str},
        "members": list[MEMBER],
        "merged": {"task": {"name": str}},
        "by_name": bool,
    },
    RESULTS: {"eval": dict[str, SCORES]}
    | dict.fromkeys(("pretrain", "finetune"), {"seconds": float, "dev_accuracy": SHARE, "dev_nll_bound": float}),
    MANIFEST: {"files": dict[str, ENTRY]},
    CHECKPOINTS: dict.fromkeys(("step", "tokens", "log_count"), int)
    | dict.fromkeys(("seconds", "log_sum"), float) | {"scaler": dict[str, float]},
}  # fmt: skip


def is_foreign(path: Path) -> bool:
    """Whether this is the folder of a public model, as its authors saved it, and no run of ours."""
    names = ("model.safetensors", "model.safetensors.index.json")
    return not os.path.lexists(path / MANIFEST) and any(os.path.isfile(path / name) for name in names)


class RunFolder:
    """One run's folder. `create` refuses a folder that holds something; `open` checks that it is a run.

    A file and its line in the manifest cannot change in one step, so the manifest first names the new content and the
    one `before` it, then the file takes its name: wherever the process dies, the file is one that the manifest knows.
    """

    def __init__(self, path: Path):
        self.path = path
        self._is_locked = False

    @staticmethod
    def check_free(path: Path, force: bool = False) -> None:
        """TinyldError unless `path` is new or empty, or holds a run that `force` may replace."""
        folder = RunFolder(path)
        is_run = folder.is_run() and not path.is_symlink()
        if os.path.lexists(path) and not folder._holds_nothing() and not (force and is_run):
            stopped = folder.checkpoints() or (is_run and not folder.has_weights())
            go_on = f"go on with it by --resume {path}, " if stopped else ""
            hint = f"{go_on}choose another --out, or replace it by --force" if is_run else "choose another --out"
            raise TinyldError(f"{path} exists and is not empty: {hint}")

    @classmethod
    def create(cls, path: Path, force: bool = False) -> RunFolder:
        """A new run folder where `check_free` allows one; of the run that was there, all that is ours is gone."""
        cls.check_free(path, force)
        folder = cls(path)
        if folder.is_run():
            with folder.locked():
                files = [name for name in folder._manifest() if name != CONFIG]
                folder.remove_checkpoints()
                clear(path, [METRICS, *files, CONFIG, MANIFEST])  # last what tells that it is a run
        make_folder(path)
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        if not os.path.isfile(path / CONFIG):
            raise TinyldError(f"no run in {path}: expected {CONFIG}, {_found(path)}")
        return cls(path)

    def is_run(self) -> bool:
        """Whether this is one of ours: a config that says which kind of run it is, and a manifest that lists it."""
        try:
            return CONFIG in self._manifest() and read_object(self.path / CONFIG).get("kind") in KINDS
        except TinyldError:
            return False

    def _holds_nothing(self) -> bool:
        """Whether the folder is empty, or holds only what a writer that was killed before its config leaves."""
        try:
            names = {name for name in os.listdir(self.path) if not is_temporary(name)}
            return names <= {MANIFEST, TOKENIZER} & {MANIFEST, *self._manifest()}
        except (TinyldError, OSError):
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
        """The run's config.json."""
        config, path = self.read_json(CONFIG), self.path / CONFIG
        if config.get("kind") not in KINDS:
            raise TinyldError(f"{path}: not the config of a run (no 'kind')")
        return config

    def write(self, name: str, content: bytes) -> None:
        """Writes a file and its SHA-256 into the manifest."""
        with self.locked():
            files, entry = self._manifest(), {"sha256": sha256(content), "bytes": len(content)}
            with contextlib.suppress(TinyldError):
                entry["before"] = sha256(self.read(name))
            write_atomic(self.path / MANIFEST, to_json({"files": files | {name: entry}}))
            write_atomic(self.path / name, content)

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, to_json(value))

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save

        self.write(name, save({k: tensors[k].detach().contiguous().cpu() for k in sorted(tensors)}))

    def remove(self, name: str) -> None:
        """Removes a file that the manifest lists, and its line there."""
        with self.locked():
            files = self._manifest()
            if files.pop(name, None):
                clear(self.path, [name])  # first, so that --resume tries again should this process die between the two
                write_atomic(self.path / MANIFEST, to_json({"files": files}))

    def has_weights(self) -> bool:
        """Whether it was trained to its end."""
        return any(name.endswith(".safetensors") for name in self.files())

    def check_finished(self, name: str) -> None:
        """TinyldError for a run whose training was stopped, so that it has no weights in the file of that name."""
        if not os.path.lexists(self.path / name) and name not in self.files():
            verb = "pretrain" if name == MODEL else "finetune"
            raise TinyldError(f"{self.path} was not trained to its end: tinyld {verb} --resume {self.path} goes on")

    def read(self, name: str) -> bytes:
        """A file's bytes, checked against the manifest."""
        path = self.path / name
        if not path.exists():
            raise TinyldError(f"no {name} in {self.path}: {_found(self.path)}")
        content, entry = read_bytes(path, TENSORS_BYTES), self._entry(name)
        if sha256(content) not in (entry["sha256"], entry.get("before")):
            raise TinyldError(f"{path}: damaged: its SHA-256 differs from the one in {MANIFEST}")
        return content

    def read_json(self, name: str) -> Any:
        return parse_json(self.read(name), self.path / name, TYPES.get(name, Any))

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        return parse_tensors(self.read(name), self.path / name)

    def digest(self, name: str) -> str:
        """SHA-256 of a file, from the manifest."""
        entry = self._entry(name)
        return sha256(self.read(name)) if "before" in entry else entry["sha256"]

    def files(self) -> dict[str, int]:
        """Every file of the manifest with its size in bytes."""
        return {name: entry["bytes"] for name, entry in self._manifest().items()}

    def _entry(self, name: str) -> dict[str, Any]:
        files = self._manifest()
        if name not in files:
            raise TinyldError(f"{self.path / name}: not listed in {MANIFEST}; it was not written by tinyld")
        return files[name]

    def _manifest(self) -> dict[str, Any]:
        path = self.path / MANIFEST
        if not os.path.lexists(path):
            return {}
        files = parse_json(read_text(path), path, TYPES[MANIFEST])["files"]
        for name, entry in files.items():
            if Path(name).name != name or not entry["sha256"].isascii() or "bytes" not in entry:
                raise TinyldError(f"{path}: damaged, at {name!r}")
        return files

    # ---- the metrics log

    def log(self, record: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        with failing(self.path / METRICS, "written"):
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            with open(os.open(self.path / METRICS, flags, 0o666), "ab") as file:
                file.write(to_json(record, None))

    def metrics(self) -> list[Record]:
        """The log's records; a last line without its end, which a killed writer leaves, is not one."""
        path = self.path / METRICS
        if not path.exists():
            return []
        content = read_bytes(path)  # whose end may be of a disk that lost its power
        *lines, _ = decode(content[: content.rfind(b"\n") + 1], path).split("\n")
        return [parse_json(line, path, {"step": int}) for line in lines]

    def close_log(self) -> None:
        """Puts the finished log into the manifest."""
        self.write(METRICS, read_bytes(self.path / METRICS))

    def rewind(self, step: int) -> None:
        """Drops the checkpoints and the log's lines after `step`, which a resumed run writes again."""
        kept = b"".join(to_json(r, None) for r in self.metrics() if r["step"] <= step)
        self.remove_checkpoints(after=max(step, 0))
        write_atomic(self.path / METRICS, kept)

    # ---- checkpoints

    @property
    def _checkpoints(self) -> RunFolder:
        path = self.path / CHECKPOINTS
        if path.is_symlink():
            raise TinyldError(f"{path}: is a link; put the folder itself in its place, or remove the link")
        return RunFolder(path)

    def save_checkpoint(self, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any], keep: int) -> None:
        """Writes `checkpoints/<step>`, with the state's JSON as a tensor, then removes all but the newest `keep`."""
        import torch

        try:
            with failing(self.path, "written"):
                if (self.path / METRICS).exists():
                    sync(self.path / METRICS)
                folder = self._checkpoints
                folder.path.mkdir(exist_ok=True)
            about = torch.frombuffer(bytearray(to_json({"step": step, **state})), dtype=torch.uint8)
            folder.write_tensors(f"{step:08d}", {**tensors, "state": about})
        except TinyldError as error:
            raise TinyldError(f"{error}; {self.last_good()}") from None
        for old in self.checkpoints()[:-keep]:
            folder.remove(old.name)

    def last_good(self) -> str:
        """For an error: what can be gone on with."""
        found = self.checkpoints()
        return f"the last good checkpoint is {found[-1]}" if found else "there is no good checkpoint"

    def checkpoints(self) -> list[Path]:
        """Checkpoint files, oldest first."""
        folder = self.path / CHECKPOINTS
        if folder.is_symlink() or not folder.is_dir():
            return []
        return sorted(path for path in folder.iterdir() if re.fullmatch(r"\d{8,12}", path.name) and path.is_file())

    def load_checkpoint(self) -> tuple[dict[str, Tensor], Record] | None:
        """(tensors, state) of the newest checkpoint; None when there is none to go on from."""
        folder, found = self._checkpoints, self.checkpoints()
        if not found:
            return None
        try:
            tensors = folder.read_tensors(found[-1].name)
            return tensors, parse_json(tensors.pop("state").numpy().tobytes(), found[-1], TYPES[CHECKPOINTS])
        except TinyldError as error:
            raise TinyldError(f"{error}; delete it to go on from the one before, or else from the start") from None

    def remove_checkpoints(self, after: int = -1) -> None:
        """Removes the checkpoints of steps after `after`, by default all of them, and what is half-written."""
        folder = RunFolder(self.path / CHECKPOINTS)
        for path in self.checkpoints():
            if int(path.name) > after:
                folder.remove(path.name)
        clear(self.path)
        clear(folder.path, [] if self.checkpoints() else [MANIFEST], with_folder=True)


def _found(path: Path) -> str:
    """What a folder holds, for an error."""
    names = sorted(os.listdir(path)) if os.path.isdir(path) else ["no such folder"]
    return f"found {', '.join(names[:8]) or 'an empty folder'}"


class Spectator(RunFolder):
    """A run folder that another process of the same run writes: reading works, writing does nothing."""

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        yield

    def _leave(self, *args: Any, **kwargs: Any) -> Any:
        return self.path

    write = write_tensors = remove = log = close_log = rewind = save_checkpoint = remove_checkpoints = _leave
