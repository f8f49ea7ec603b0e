"""Run folders: files, a manifest with the SHA-256 of each, a log, checkpoints; and what a run's bits depend on.

`config.json` says what was asked, on what; `metrics.jsonl` has a line per log step; while a run trains, `checkpoints/`
is a folder of the same kind with a file a step. Only what a manifest lists or what bears our temporary names is ever
deleted, and nothing through a link. No torch but for tensors.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tinyld
from tinyld.config import BASE_DTYPES
from tinyld.errors import TinyldError, failing
from tinyld.read import TENSORS_BYTES, Record, decode, parse_json, parse_tensors, read_bytes, read_object, read_text
from tinyld.write import clear, is_temporary, make_folder, sha256, to_json, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, METRICS, MANIFEST, RESULTS = "config.json", "metrics.jsonl", "manifest.json", "results.json"
MODEL, ADAPTER, TOKENIZER = "model.safetensors", "adapter.safetensors", "tokenizer.json"
INDEX = "model.safetensors.index.json"  # of a public model in several files
PROTOTYPE = "prototype.safetensors"  # of an adapter's task, for compose to route by; not needed to use the adapter
CHECKPOINTS = "checkpoints"
ROWS_SUFFIX = "-rows.jsonl"  # of the file beside a run that keeps the rows it was given in Python
KINDS = ("base", "adapter", "composition")  # of a run, in its config
SHARE, NAMED = Annotated[float, {"least": 0, "most": 1}], {"name": str, "path": str | None}
SCORES: Any = {"n": Annotated[int, {"least": 1}], "nll_bound": float, "nll_stderr": float | None, "sha256": str}
ROWS: Any = {"folder": str | None, "held_out": bool, "limit": int | None, "rows": int, "sha256": str}
ENTRY: Any = {"sha256": str, "bytes": int, "before": str}
MEMBER: Any = {"run": str, "task": NAMED, "method": dict, "data": ROWS}
TRAINED: Any = {"seconds": float, "dev_accuracy": SHARE, "dev_nll_bound": float}
TYPES: dict[str, Any] = {  # of what is read out of these files, where it is there; see config.check_type
    CONFIG: {
        "kind": Annotated[str, {"among": KINDS}], "base": dict, "model": dict, "train": dict, "method": NAMED,
        "valid": list[str], "save_dtype": Annotated[str, {"among": BASE_DTYPES}],
        "data": ROWS | {"dev_sha256": str, "files": list[str], "tokens": int}, "parameters": dict[str, float],
        "task": NAMED | {"verbalizer": dict[str, str]}, "started_as": NAMED | {"prune": float},
        "environment": {"command": str}, "members": list[MEMBER], "by_name": bool,
        "merged": {"task": NAMED, "data": ROWS},
    },
    RESULTS: {
        "eval": dict[str, SCORES | dict.fromkeys(("accuracy", "low", "high"), SHARE)],
        "pretrain": TRAINED, "finetune": TRAINED, "text": dict,
    },
    MANIFEST: {"files": dict[str, ENTRY]},
    CHECKPOINTS: dict.fromkeys(("step", "tokens", "log_count"), int)
    | dict.fromkeys(("seconds", "log_sum"), float) | {"scaler": dict[str, float]},
}  # fmt: skip


def is_foreign(path: Path) -> bool:
    """Whether this is the folder of a public model, as its authors saved it, and no run of ours."""
    return not os.path.lexists(path / MANIFEST) and any(os.path.isfile(path / name) for name in (MODEL, INDEX))


class RunFolder:
    """One run's folder. `create` refuses a folder that holds something; `open` checks that it is a run. A file and its
    line in the manifest cannot change in one step, so the manifest first names the new content and the one `before` it,
    then the file takes its name: wherever the process dies, the file is one that the manifest knows."""

    def __init__(self, path: Path):
        self.path = path
        self._is_locked = False

    @staticmethod
    def check_free(path: Path, force: bool = False) -> None:
        """TinyldError unless `path` is new or empty, holds only what a writer leaves that is killed before its config,
        or is a run that `force` may replace."""
        folder = RunFolder(path)
        is_run = folder.is_run() and not path.is_symlink()
        with contextlib.suppress(TinyldError, OSError):
            names = {name for name in os.listdir(path) if not is_temporary(name)}
            if names <= {MANIFEST, TOKENIZER, MODEL, ADAPTER} & {MANIFEST, *folder.files()}:
                return
        if os.path.lexists(path) and not (force and is_run):
            stopped = is_run and (folder.checkpoints() or not folder.has_weights())
            go_on = f"go on with it by --resume {shlex.quote(str(path))}, " if stopped else ""
            hint = f"{go_on}choose another --out, or replace it by --force" if is_run else "choose another --out"
            raise TinyldError(f"{path} exists and is not empty: {hint}")

    @staticmethod
    def create(path: Path, force: bool = False) -> RunFolder:
        """A new run folder where `check_free` allows one; of the run that was there, all that is ours is gone."""
        RunFolder.check_free(path, force)
        make_folder(path)
        folder = RunFolder(path)
        with folder.locked():
            files = [name for name in folder.files() if name != CONFIG]
            folder.remove_checkpoints()
            clear(path, [METRICS, *files, CONFIG, MANIFEST])  # last what tells that it is a run
        return folder

    @staticmethod
    def open(path: Path) -> RunFolder:
        if not os.path.isfile(path / CONFIG):
            raise TinyldError(f"no run in {path}: expected {CONFIG}, {_found(path)}")
        return RunFolder(path)

    def is_run(self) -> bool:
        """Whether this is one of ours: a config that says which kind of run it is, and a manifest that lists it."""
        try:
            return CONFIG in self.files() and read_object(self.path / CONFIG).get("kind") in KINDS
        except TinyldError:
            return False

    def has_weights(self) -> bool:
        """Whether it was trained to its end. The manifest knows a file before it is there, and checkpoints go last."""
        known = [name for name in (MODEL, ADAPTER) if name in self.files()]
        return any((self.path / name).exists() for name in known) or bool(known and not self.checkpoints())

    def check_unchanged(self, config: Mapping[str, Any], data: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """TinyldError unless it goes on with the data that it began with; says what of the machine differs."""
        for what, key in (("data", "sha256"), ("held-out data", "dev_sha256")):
            if config["data"].get(key, data[key]) != data[key]:
                way_out = f"put {config['data'].get('folder') or 'it'} back as it was, or begin a new run"
                raise TinyldError(f"{self.path} began with other {what}: {way_out}")
        then, now = config["environment"], environment(config["train"]["device"])
        depends = ("torch", "threads", "processes", "device", "fast_dtype", "instructions")
        if changed := [f"{name} was {then[name]}, is {now[name]}" for name in depends if then[name] != now[name]]:
            say(f"{self.path} goes on otherwise than it began, so its last digits may differ: {', '.join(changed)}")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Within it this process has the folder to itself; where another one has it, TinyldError at once. The lock is
        flock's on the folder itself: it ends with the process and leaves no file behind."""
        with contextlib.ExitStack() as stack:
            if not self._is_locked:
                with failing(self.path, "written"):
                    descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
                    stack.callback(os.close, descriptor)
                    try:
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        raise TinyldError(f"{self.path}: another process is writing in it; wait for that") from None
                self._is_locked = True
                stack.callback(setattr, self, "_is_locked", False)
            yield

    def files(self) -> dict[str, Any]:
        """What the manifest says of every file that it lists: `sha256` and `bytes`, and the SHA-256 `before`."""
        path = self.path / MANIFEST
        if not os.path.lexists(path):
            return {}
        files = parse_json(read_text(path), path, TYPES[MANIFEST])["files"]
        if any(Path(name).name != name for name in files):
            raise TinyldError(f"{path}: damaged, lists what is in another folder")
        return files

    def digest(self, name: str) -> str:
        """SHA-256 of a file, from the manifest where that knows one and only one."""
        entry = self.files().get(name)
        return sha256(self.read(name)) if entry is None or "before" in entry else entry["sha256"]

    def read(self, name: str) -> bytes:
        """A file's bytes, checked against the manifest."""
        path = self.path / name
        if not path.exists():
            if name in (MODEL, ADAPTER) and not self.has_weights():
                command = f"tinyld {'pretrain' if name == MODEL else 'finetune'} --resume {shlex.quote(str(self.path))}"
                raise TinyldError(f"{self.path} was not trained to its end: {command} goes on")
            raise TinyldError(f"no {name} in {self.path}: {_found(self.path)}")
        content, entry = read_bytes(path, TENSORS_BYTES), self.files().get(name)
        if entry is None:
            whole = "copy a run's whole folder (a public model has model.safetensors or its index beside this file)"
            raise TinyldError(f"{path}: not listed in {MANIFEST}; {whole}")
        if sha256(content) not in (entry["sha256"], entry.get("before")):
            raise TinyldError(f"{path}: damaged: its SHA-256 differs from the one in {MANIFEST}")
        return content

    def read_json(self, name: str) -> Any:
        return parse_json(self.read(name), self.path / name, TYPES.get(name, Any))

    @property
    def config(self) -> Record:
        return self.read_json(CONFIG)

    @property
    def results(self) -> Record:
        """What its training and evaluations found, so far."""
        return (
            self.read_json(RESULTS) if os.path.lexists(self.path / RESULTS) else parse_json("{}", self.path / RESULTS)
        )

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        return parse_tensors(self.read(name), self.path / name)

    def write(self, name: str, content: bytes) -> None:
        """Writes a file and its SHA-256 into the manifest."""
        with self.locked():
            files, entry = self.files(), {"sha256": sha256(content), "bytes": len(content)}
            with contextlib.suppress(TinyldError):
                entry["before"] = sha256(self.read(name))
            write_atomic(self.path / MANIFEST, to_json({"files": files | {name: entry}}))
            write_atomic(self.path / name, content)

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, to_json(value))

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.write(name, to_safetensors(tensors))

    def log(self, record: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl, durably."""
        line = to_json(record, None)
        with failing(self.path / METRICS, "written"), open(self.path / METRICS, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[Record]:
        """The log's records; a last line without its end, which a killed writer leaves, is not one."""
        path = self.path / METRICS
        content = read_bytes(path) if path.exists() else b""  # whose end may be of a disk that lost its power
        *lines, _ = decode(content[: content.rfind(b"\n") + 1], path).split("\n")
        return [parse_json(line, path, {"step": int}) for line in lines]

    def close_log(self) -> None:
        """Writes it into the manifest."""
        self.write(METRICS, read_bytes(self.path / METRICS))

    def rewind(self, step: int) -> None:
        """Drops the checkpoints and the log's lines after `step`, which a resumed run writes again."""
        kept = b"".join(to_json(r, None) for r in self.metrics() if r["step"] <= step)
        self.remove_checkpoints(after=step)
        write_atomic(self.path / METRICS, kept)

    def checkpoints(self) -> list[Path]:
        """Checkpoint files, oldest first; TinyldError where their folder is a link."""
        folder = self.path / CHECKPOINTS
        if folder.is_symlink():
            raise TinyldError(f"{folder}: is a link; put the folder itself in its place, or remove the link")
        found = folder.iterdir() if folder.is_dir() else ()
        return sorted(path for path in found if path.name.isdecimal() and path.is_file())

    def last_good(self) -> str:
        """For an error: what can be gone on with."""
        found = self.checkpoints()
        return f"the last good checkpoint is {found[-1]}" if found else "there is no good checkpoint"

    def save_checkpoint(self, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any], keep: int) -> None:
        """Writes `checkpoints/<step>`, with the state's JSON as a tensor, then removes all but the newest `keep`."""
        import torch

        about = torch.frombuffer(bytearray(to_json({"step": step, **state})), dtype=torch.uint8)
        self.checkpoints()  # refuses a link
        folder = RunFolder(self.path / CHECKPOINTS)
        try:
            with failing(self.path, "written"):
                folder.path.mkdir(exist_ok=True)
            folder.write_tensors(f"{step:08d}", {**tensors, "state": about})
        except TinyldError as error:
            raise TinyldError(f"{error}; {self.last_good()}") from None
        clear(folder.path, [old.name for old in self.checkpoints()[:-keep]])

    def load_checkpoint(self) -> tuple[dict[str, Tensor], Record] | None:
        """(tensors, state) of the newest checkpoint; None when there is none to go on from."""
        folder, found = RunFolder(self.path / CHECKPOINTS), self.checkpoints()
        if not found:
            return None
        try:
            tensors = folder.read_tensors(found[-1].name)
            state = tensors.pop("state", None)
            if state is None or str(state.dtype) != "torch.uint8":
                raise TinyldError(f"{found[-1]}: damaged, its state is not there")
            return tensors, parse_json(state.numpy().tobytes(), found[-1], TYPES[CHECKPOINTS])
        except TinyldError as error:
            raise TinyldError(f"{error}; delete it to go on from the one before, or else from the start") from None

    def remove_checkpoints(self, after: int = -1) -> None:
        """Removes the checkpoints of steps after `after`, by default all of them, and what is half-written."""
        folder, found = RunFolder(self.path / CHECKPOINTS), self.checkpoints()
        listed = folder.files() if found else {}
        later = [path.name for path in found if int(path.name) > after and path.name in listed]
        clear(self.path)
        clear(folder.path, later if len(later) < len(found) else [*later, MANIFEST])
        with contextlib.suppress(OSError):  # something else is in it
            folder.path.rmdir()


def to_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: tensors[name].detach().contiguous().cpu() for name in sorted(tensors)})


def _found(path: Path) -> str:
    none = "a file, no folder" if os.path.isfile(path) else "no such folder"
    with failing(path, "read"):
        names = sorted(os.listdir(path)) if os.path.isdir(path) else [none]
    return f"found {', '.join(names[:8]) or 'an empty folder'}"


class Spectator(RunFolder):
    """A run folder that another process of the same run writes: reading works, writing does nothing."""

    locked = contextlib.nullcontext  # type: ignore[assignment]
    write = write_tensors = log = close_log = rewind = save_checkpoint = remove_checkpoints = lambda *_, **__: None


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_writer() -> bool:
    """Whether this is the process that writes: the only one, or torchrun's first."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def environment(device: str = "auto") -> dict[str, Any]:
    """Versions and machine facts that a result depends on, which came about on that device."""
    import torch

    from tinyld.device import fast_dtype, resolve_device

    on = resolve_device(device)
    return {
        "tinyld": tinyld.__version__, "torch": torch.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "processes": int(os.environ["WORLD_SIZE"]) if under_torchrun() else 1,
        "machine": platform.machine(), "instructions": torch.backends.cpu.get_cpu_capability(),
        "fast_dtype": fast_dtype(on),  # what `auto` is there
        "device": torch.cuda.get_device_name(on) if on.type == "cuda" else "cpu",
        "command": shlex.join(["tinyld", *sys.argv[1:]]) if "tinyld.cli" in sys.modules else "in Python",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
