"""What a public model is and what adapting it takes, by method, before any weights are read."""

from pathlib import Path
from typing import Any

import torch

from tinyld.config import BASE_DTYPES, ModelConfig, Reading
from tinyld.device import shrink, stored_bytes
from tinyld.errors import UsageError
from tinyld.foreign import read_foreign
from tinyld.methods import METHODS, make_config
from tinyld.model import Denoiser


def describe(folder: Path, reading: Reading | None = None, rows: int = 8, length: int = 256) -> dict[str, Any]:
    """What a folder is, and what adapting it takes; no weights are read."""
    foreign = read_foreign(folder, reading)
    config, tokenizer = foreign.model.config, foreign.tokenizer
    return {
        "family": foreign.family, "parameters": config.num_parameters(), "layers": config.num_layers,
        "d_model": config.d_model, "heads": config.num_heads, "vocab_size": config.vocab_size,
        "longest_row": foreign.longest, "shifted": config.shifted,
        "mask_token": tokenizer.inner.id_to_token(tokenizer.mask_id),
        "end_token": tokenizer.inner.id_to_token(tokenizer.eos_id), "batch_rows": rows, "batch_tokens": length,
        **{f"{dtype}_bytes": base_bytes(config, dtype) for dtype in BASE_DTYPES},
        "methods": costs(config, rows, length),
    }  # fmt: skip


def base_bytes(config: ModelConfig, dtype: str) -> int:
    with torch.device("meta"):
        model = Denoiser(config)
    shrink(model, dtype)
    return stored_bytes(model)


def costs(config: ModelConfig, rows: int, length: int) -> list[dict[str, Any]]:
    """By method what is stored, and the memory that batches of `rows` rows of `length` tokens take to train, in bytes.

    An estimate, at most a fifth off what data/results/foreign.csv has: Python and torch; the base, in fp32 for full;
    16 bytes a number that is trained, for its gradient, AdamW's moments and its update; beside a frozen base in fp32
    its matrices in bf16; what the backward pass needs of every block that it goes through, or for `fast` the prompt's
    states, keys and values. States kept for later epochs (--cache-gb) come on top. To read a base into int8 takes more
    than to train little of it.
    """
    kept, d, found = {t: base_bytes(config, t) for t in BASE_DTYPES}, config.d_model, []
    block = rows * length * (16 * d + 5 * sum(outputs for _, outputs in config.matrices().values()))
    fixed = 450_000_000
    reading = fixed + kept["int8"] + 3 * config.vocab_size * config.embedding_width  # in int8: its vocabulary, 3 bytes
    for name in METHODS:
        for recipe in ("fast", "best") if name == "trajectory-lora" else (None,):
            try:
                settings = make_config(name, {"recipe": recipe} if recipe else {}, config)
            except UsageError:
                continue
            own = METHODS[name].expected_parameters(settings, config)
            if own == 0:  # bitfit, where there are no biases
                continue
            needed = block * getattr(settings, "blocks", config.num_layers)
            needed += block * config.num_layers // 5 * (name == "weight-lora")  # its own products, beside the base's
            if recipe == "fast":
                needed = 4 * rows * length * (d + config.num_heads * config.width_of_head) * settings.blocks
            memory = {t: fixed + 16 * own + needed + kept[t] if t == "fp32" or name != "full" else None for t in kept}
            if name != "full":
                memory["int8"] = max(memory["int8"], reading)
            memory["fp32"] += 2 * config.vocab_size * config.embedding_width if name == "full" else kept["bf16"]
            found.append({"method": f"{name} {recipe or ''}".strip(), "stored_parameters": own,
                          "stored_bytes": 4 * own, **{f"memory_{t}": size for t, size in memory.items()}})  # fmt: skip
    return found
