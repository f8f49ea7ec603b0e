"""Weight LoRA in PEFT's layout, both ways: names and two JSON keys only, no peft.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, whose names are ours behind `base_model.model.`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tinyld.config import ModelConfig
from tinyld.errors import TinyldError, UsageError
from tinyld.methods import WeightLora
from tinyld.methods.weight_lora import ALPHA, WeightLoraConfig
from tinyld.model import LINEARS
from tinyld.runs import make_folder, parse_tensors, read_json, to_json, write_atomic

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
BASE = "tinyld base "

# Settings of PEFT that change what an adapter computes and that ours has no counterpart of: only these values load.
PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "modules_to_save": None,
    "lora_bias": False,
    "target_parameters": None,
}


def is_peft(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def export_peft(config: WeightLoraConfig, tensors: Mapping[str, Tensor], fingerprint: str, out: Path) -> None:
    """Writes a folder that `PeftModel.from_pretrained(denoiser, out)` loads."""
    from safetensors.torch import save

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TinyldError(f"{out} exists and is not empty: choose another --out")
    make_folder(out)
    settings = PLAIN | {
        "task_type": None,
        "base_model_name_or_path": BASE + fingerprint,
        "target_modules": list(config.targets),
        "r": config.rank,
        "lora_alpha": ALPHA,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "inference_mode": True,
    }
    write_atomic(out / WEIGHTS, save({PREFIX + n: tensors[n].detach().contiguous().cpu() for n in sorted(tensors)}))
    write_atomic(out / CONFIG, to_json(settings))


def load_peft(
    folder: Path, model_config: ModelConfig, fingerprint: str | None = None
) -> tuple[WeightLoraConfig, dict[str, Tensor]]:
    """(config, tensors) of a LoRA that PEFT trained on our denoiser; TinyldError for any other.

    A folder that `export_peft` wrote names its base, which must then be the one of `fingerprint`.
    """
    where = folder / CONFIG
    raw = read_json(where)
    if not isinstance(raw, dict):
        raise TinyldError(f"{where}: expected an object")
    for key, value in PLAIN.items():
        if raw.get(key, value) not in (value, None) and not (value is None and raw.get(key) in ([], {})):
            raise TinyldError(f"{where}: {key} must be {value!r} to be a plain LoRA, got {raw[key]!r}")
    if raw.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise TinyldError(f"{where}: init_lora_weights {raw['init_lora_weights']!r} changes the base's own weights")
    named = str(raw.get("base_model_name_or_path"))
    if fingerprint is not None and named.startswith(BASE) and named != BASE + fingerprint:
        raise TinyldError(
            f"{folder} is for base {named.removeprefix(BASE)}, not {fingerprint}; give its own with --base"
        )
    targets, rank, alpha = raw.get("target_modules"), raw.get("r"), raw.get("lora_alpha")
    if not isinstance(targets, list) or not all(isinstance(t, str) and t in LINEARS for t in targets):
        raise TinyldError(f"{where}: target_modules must be a list of {', '.join(LINEARS)}, got {targets!r}")
    if not isinstance(rank, int) or isinstance(rank, bool) or not isinstance(alpha, int | float):
        raise TinyldError(f"{where}: r must be a whole number and lora_alpha a number, got {rank!r} and {alpha!r}")
    try:
        ordered = tuple(name for name in LINEARS if name in targets)
        config = WeightLoraConfig(rank, ordered, bool(raw.get("use_rslora", False)))
    except UsageError as error:
        raise TinyldError(f"{where}: {error}") from None
    path = folder / WEIGHTS
    if not path.is_file():
        raise TinyldError(f"no {WEIGHTS} in {folder}; pickled adapters are not read")
    tensors = parse_tensors(path.read_bytes(), path)
    foreign = [name for name in tensors if not name.startswith(PREFIX)]
    if foreign:
        raise TinyldError(f"{path}: tensor {foreign[0]!r} does not begin with {PREFIX}")
    found = {name.removeprefix(PREFIX): tensor.float() for name, tensor in tensors.items()}
    expected = WeightLora.expected_parameters(config, model_config)
    if sum(t.numel() for t in found.values()) != expected:
        raise TinyldError(f"{path}: not a LoRA of this base: {expected:,} parameters expected")
    return config, {n: t * (alpha / ALPHA) if n.endswith("lora_B.weight") else t for n, t in found.items()}
