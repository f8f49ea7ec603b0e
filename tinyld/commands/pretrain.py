"""`tinyld pretrain`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from tinyld.commands.workspace import finish, keep_freed_memory, refuse_inside, say_to_stderr
from tinyld.config import DiffusionConfig, ModelConfig, TrainConfig
from tinyld.distributed import Processes, is_writer
from tinyld.runs import RunFolder
from tinyld.tasks import bundled_data_dir


def pretrain(
    out: Path,
    data: list[Path],
    valid: list[Path],
    shape: dict[str, int],
    vocab_size: int,
    diffusion: DiffusionConfig,
    config: TrainConfig,
    save_dtype: str,
    init: str | None,
    trim_vocab: int | None,
    keep_init: float,
    convert_only: bool,
    force: bool,
    json: bool,
    quiet: bool,
) -> None:
    from tinyld.device import DTYPES, resolve_device, resolve_dtype
    from tinyld.hf import find_encoder
    from tinyld.pretrain import load_start
    from tinyld.pretrain import pretrain as run
    from tinyld.tokenizer import find_text_files

    keep_freed_memory()
    quiet = quiet or not is_writer()
    data = data or [bundled_data_dir() / "corpus.txt.gz"]
    find_text_files([*data, *valid])
    ModelConfig(vocab_size=vocab_size, **shape)
    device = resolve_device(config.device)
    resolve_dtype(config.dtype, device)
    if is_writer():
        RunFolder.check_free(out, force)
    encoder = None
    if init is not None:
        encoder = load_start(find_encoder(init), shape["max_length"])
        refuse_inside(out, [find_encoder(init)])
    processes = Processes.join(device)
    with ExitStack() as stack:

        def open_folder() -> RunFolder:
            folder = processes.open_run(out, lambda: RunFolder.create(out, force))
            stack.enter_context(folder.locked())
            return folder

        summary = run(
            open_folder, data, valid, shape, vocab_size, diffusion, config, DTYPES[save_dtype], encoder,
            trim_vocab, keep_init, convert_only, processes=processes, quiet=quiet, say=say_to_stderr(quiet),
        )  # fmt: skip
    finish("pretrained base", {"run": str(out), **summary}, json)
