"""Weight LoRA in PEFT's layout: with the real peft where it is installed, and what is refused without it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_methods import attach, fresh_base, logits, noised_batch, train
from torch import Tensor

from tinyld.checkpoint import load_exactly
from tinyld.config import ModelConfig
from tinyld.errors import TinyldError
from tinyld.methods import WeightLora
from tinyld.model import Denoiser
from tinyld.peft import CONFIG, WEIGHTS, export_peft, is_peft, load_peft

PLAIN_CASES = ("weight-lora", "weight-lora-targets", "weight-lora-rslora")


def exported(config: ModelConfig, case: str, out: Path) -> Tensor:
    """Writes a trained adapter and returns its logits."""
    model = fresh_base(config)
    method = attach(model, case)
    train(model, method)
    export_peft(method.config, method.own, "fingerprint", out)
    return logits(model, noised_batch(config))


def with_lora(config: ModelConfig, folder: Path) -> Denoiser:
    model = fresh_base(config)
    settings, tensors = load_peft(folder, config)
    method = WeightLora(settings, config)
    method.attach(model)
    load_exactly(method.own, tensors, folder)
    return model


@pytest.mark.parametrize("case", PLAIN_CASES)
def test_what_is_written_is_read_back_with_the_same_logits(config: ModelConfig, tmp_path: Path, case: str) -> None:
    expected = exported(config, case, tmp_path / "lora")
    assert is_peft(tmp_path / "lora") and not is_peft(tmp_path)
    assert torch.equal(logits(with_lora(config, tmp_path / "lora"), noised_batch(config)), expected)
    with pytest.raises(TinyldError, match="is not empty"):
        exported(config, case, tmp_path / "lora")


@pytest.mark.parametrize("case", PLAIN_CASES)
def test_peft_loads_ours_with_our_logits_and_no_warning(config: ModelConfig, tmp_path: Path, case: str) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra `interop`")
    expected = exported(config, case, tmp_path / "lora")
    base, noised = fresh_base(config), noised_batch(config)
    assert not torch.allclose(logits(base, noised), expected, atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped = peft.PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    found = logits(wrapped.base_model.model.eval(), noised)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_that_peft_trained_gives_its_logits_here(config: ModelConfig, tmp_path: Path, rslora: bool) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra `interop`")
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["query", "down", "value"], use_rslora=rslora)
    model, noised = peft.get_peft_model(fresh_base(config), settings), noised_batch(config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(3):
        optimizer.zero_grad()
        model.base_model.model(noised.xt, noised.t, noised.attention_mask, noised.prompt_mask).logsumexp(
            -1
        ).mean().backward()
        optimizer.step()
    expected = logits(model.base_model.model.eval(), noised)
    model.save_pretrained(str(tmp_path / "theirs"))
    found = logits(with_lora(config, tmp_path / "theirs"), noised)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, logits(fresh_base(config), noised), atol=1e-3)


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "peft_type must be 'LORA' to be a plain LoRA, got 'LOHA'"),
    ({"use_dora": True}, "use_dora must be None"),
    ({"bias": "all"}, "bias must be 'none'"),
    ({"rank_pattern": {"query": 2}}, "rank_pattern must be None"),
    ({"modules_to_save": ["head"]}, "modules_to_save must be None"),
    ({"target_modules": "all-linear"}, "target_modules must be a list of query"),
    ({"target_modules": ["query"]}, "not a LoRA of this base"),
    ({"r": "3"}, "rank: '3' is not of type int"),
    ({"lora_alpha": "inf"}, "lora_alpha must be a number"),
    ({"use_rslora": "false"}, "rslora: 'false' is not of type bool"),
    ({"use_dora": "no"}, "use_dora must be None"),
    ({"inference_mode": "yes"}, "inference_mode is of the wrong type: 'yes'"),
    ({"init_lora_weights": 1}, "init_lora_weights '1' changes the base's own weights"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens must be None"),
    ({"a_setting_of_tomorrow": 1}, "a_setting_of_tomorrow must be None"),
    ({"r": 0}, "rank must be at least 1"),
    ({"r": 2}, "not a LoRA of this base"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_another_kind_of_adapter_is_refused(
    config: ModelConfig, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    exported(config, "weight-lora", tmp_path / "lora")
    path = tmp_path / "lora" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(TinyldError, match=message):
        load_peft(tmp_path / "lora", config)


def change_type(tensors: dict[str, Tensor], dtype: torch.dtype, value: float = 0.0) -> None:
    name = next(iter(tensors))
    tensors[name] = torch.full(tensors[name].shape, value, dtype=torch.float64).to(dtype)


TENSORS: list[tuple[Callable[[dict[str, Tensor]], Any], str]] = [
    (lambda t: t.update(extra=torch.zeros(1)), "'extra' does not begin with base_model.model."),
    (lambda t: t.pop(next(iter(t))), "not a LoRA of this base"),
    (lambda t: next(iter(t.values())).fill_(float("nan")), "values that are not finite"),
    (lambda t: change_type(t, torch.int32), "wrong type: torch.int32, expected floats"),
    (lambda t: change_type(t, torch.complex64), "has the type torch.complex64, which tinyld does not read"),
    (lambda t: change_type(t, torch.float8_e4m3fn), "has the type torch.float8_e4m3fn, which tinyld does not read"),
    (lambda t: change_type(t, torch.float64, 1e300), "values that are not finite in float32"),
]


@pytest.mark.parametrize(("change", "message"), TENSORS)
def test_damaged_weights_are_refused(
    config: ModelConfig, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    exported(config, "weight-lora", tmp_path / "lora")
    path = tmp_path / "lora" / WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(TinyldError, match=message):
        load_peft(tmp_path / "lora", config)


def test_a_folder_without_safetensors_is_refused(config: ModelConfig, tmp_path: Path) -> None:
    exported(config, "weight-lora", tmp_path / "lora")
    (tmp_path / "lora" / WEIGHTS).rename(tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises(TinyldError, match="pickled adapters are not read"):
        load_peft(tmp_path / "lora", config)
