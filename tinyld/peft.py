"""Weight LoRA in PEFT's layout, both ways: names and two JSON keys only, no peft.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, whose names are ours behind `base_model.model.`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tinyld.config import ModelConfig, from_dict
from tinyld.errors import TinyldError, show
from tinyld.methods import WeightLora
from tinyld.methods.weight_lora import ALPHA, WeightLoraConfig
from tinyld.model import LINEARS
from tinyld.read import as_object, finite, parse_json, read_tensors, read_text
from tinyld.runs import RunFolder
from tinyld.write import to_json, write_atomic

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
BASE = "tinyld base "

# Settings that are read below, and those that say nothing of what an adapter computes when it is used.
READ = ("base_model_name_or_path", "target_modules", "r", "lora_alpha", "use_rslora", "init_lora_weights")
IDLE = (
    "auto_mapping", "ensure_weight_tying", "inference_mode", "lora_dropout", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
)  # fmt: skip
PLAIN = {"peft_type": "LORA", "bias": "none"}  # any other, and all else that is set, makes another kind of adapter

TYPES = {"inference_mode": bool, "ensure_weight_tying": bool}


def is_peft(folder: Path) -> bool:
    return os.path.isfile(folder / CONFIG)


def export_peft(config: WeightLoraConfig, tensors: Mapping[str, Tensor], fingerprint: str, out: Path) -> None:
    """Writes a folder that `PeftModel.from_pretrained(denoiser, out)` loads."""
    from safetensors.torch import save

    blocks = range(len(tensors) // (2 * len(config.targets)))
    names = {f"blocks.{i}.{target}.lora_{x}.weight" for i in blocks for target in config.targets for x in "AB"}
    shapes = all(t.dim() == 2 and t.shape["lora_B" in n] == config.rank for n, t in finite(tensors, "the run").items())
    if set(tensors) != names or not shapes:
        raise TinyldError("the run's tensors are not those of a LoRA of its settings")
    RunFolder.create(out)
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
    raw = as_object(parse_json(read_text(where), where, TYPES), where)
    for key, value in raw.items():
        if key not in READ + IDLE and not (value == PLAIN[key] if key in PLAIN else value in (None, False, [], {})):
            raise TinyldError(f"{where}: {key} must be {PLAIN.get(key)!r} to be a plain LoRA, got {show(value)}")
    if not isinstance(init := raw.get("init_lora_weights", True), bool) and init != "gaussian":
        raise TinyldError(f"{where}: init_lora_weights {show(init)} changes the base's own weights")
    named = str(raw.get("base_model_name_or_path"))
    if fingerprint is not None and named.startswith(BASE) and named != BASE + fingerprint:
        raise TinyldError(
            f"{folder} is for base {named.removeprefix(BASE)}, not {fingerprint}; give its own with --base"
        )
    targets = raw["target_modules"]
    if not isinstance(targets, list) or not all(target in LINEARS for target in targets):
        raise TinyldError(f"{where}: target_modules must be a list of {', '.join(LINEARS)}, got {targets!r}")
    alpha = raw["lora_alpha"]
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < 1e6:
        raise TinyldError(f"{where}: lora_alpha must be a number above 0, got {alpha!r}")
    settings = {"rank": raw["r"], "rslora": raw.get("use_rslora", False)}
    settings["targets"] = [name for name in LINEARS if name in targets]
    config = from_dict(WeightLoraConfig, settings, str(where))
    path = folder / WEIGHTS
    if not path.is_file():
        raise TinyldError(f"no {WEIGHTS} in {folder}; pickled adapters are not read")
    tensors = finite(read_tensors(path), path)
    foreign = [name for name in tensors if not name.startswith(PREFIX)]
    if foreign:
        raise TinyldError(f"{path}: tensor {foreign[0]!r} does not begin with {PREFIX}")
    expected = WeightLora.expected_parameters(config, model_config)
    if sum(t.numel() for t in tensors.values()) != expected:
        raise TinyldError(f"{path}: not a LoRA of this base: {expected:,} parameters expected")
    scaled = {n: t * (alpha / ALPHA) if n.endswith("lora_B.weight") else t for n, t in tensors.items()}
    return config, {name.removeprefix(PREFIX): tensor for name, tensor in finite(scaled, path).items()}
