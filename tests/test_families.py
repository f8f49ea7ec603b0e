"""Public diffusion language models: our logits are theirs, or the folder is refused in one line."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from tinyld import families, foreign
from tinyld.config import ModelConfig, Reading, SampleConfig
from tinyld.costs import describe
from tinyld.data import TaskRows
from tinyld.device import shrink, stored_bytes
from tinyld.errors import TinyldError, UsageError
from tinyld.families import FAMILIES
from tinyld.foreign import load_foreign
from tinyld.methods import METHODS, make_config
from tinyld.model import Denoiser, look_up
from tinyld.sampler import decode
from tinyld.tasks import Example, load_task
from tinyld.tokenizer import Tokenizer

Reference = Callable[[Tensor, Tensor], Tensor]  # (ids, attention mask) -> logits, of the model that was saved
TEXT = ["the film was not great, but very good", "a dull plot, naïve cafés", "it's bright: 漢字 and 🙂"] * 4
HF = ("a2d-qwen3", "a2d-qwen2", "a2d-llama", "Dream")
KINDS = tuple(kind for kind, family in FAMILIES.items() if not family.prefix)


@pytest.fixture(autouse=True)
def a_tiny_smdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "SMDM_WIDTHS", (128,))


SPARE = ("<|spare|>", "<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def write_tokenizer(folder: Path, mask: str | None) -> int:
    """A byte-level BPE with an end and, unless None, a mask token; returns how many tokens it has."""
    inner = HFTokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False))
    inner.add_special_tokens([*SPARE, "<|endoftext|>", "<|im_end|>", *([mask] if mask else [])])
    inner.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return inner.get_vocab_size()


def draw(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Norms near 1, all else near 0, and all of it large enough to show in the logits."""
    generator = torch.Generator().manual_seed(seed)
    return {n: ("norm" in n or "ln_f" in n) + 0.15 * torch.randn(s, generator=generator) for n, s in shapes.items()}


def make(kind: str, folder: Path, seed: int = 0) -> Reference:
    """A tiny random model of a family, as a folder; returns what it computes."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind in HF or kind == "modernbert":
        return make_by_transformers(kind, folder, seed)
    size = write_tokenizer(folder, "<|mdm_mask|>" if kind == "llada" else None)
    return {"llada": make_llada, "mdlm": make_mdlm, "smdm": make_smdm}[kind](folder, size, seed)


def make_by_transformers(kind: str, folder: Path, seed: int) -> Reference:
    transformers = pytest.importorskip("transformers", reason="needs the extra `interop`")
    rows = write_tokenizer(folder, "[MASK]" if kind == "modernbert" else "<|mask|>") + 5  # the last ones pad
    torch.manual_seed(seed)
    common = dict(
        vocab_size=rows, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    if kind == "modernbert":
        common |= dict(local_attention=6, decoder_bias=True, cls_token_id=None, sep_token_id=None)
        name, cls = "ModernBert", "ForMaskedLM"
    else:
        common |= dict(num_key_value_heads=2, rms_norm_eps=1e-5)
        name, cls = {"a2d-qwen3": "Qwen3", "a2d-llama": "Llama"}.get(kind, "Qwen2"), "ForCausalLM"
        common |= dict(head_dim=16, tie_word_embeddings=True) if kind == "a2d-qwen3" else {}
        common |= dict(attention_bias=seed % 2 == 1, mlp_bias=seed % 2 == 1) if kind == "a2d-llama" else {}
    config = getattr(transformers, f"{name}Config")(**common)
    if kind == "Dream":
        config.rope_parameters["rope_theta"] = 5e4
    model = getattr(transformers, name + cls)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="20KB")
    if kind != "modernbert":
        edit(folder, model_type=kind)
    if kind == "Dream":
        edit(folder, architectures=["DreamModel"])

    def logits(x: Tensor, mask: Tensor) -> Tensor:
        wide = mask.long() if kind == "modernbert" else mask[:, None, None, :].expand(-1, 1, x.shape[1], -1)
        out = model(input_ids=x, attention_mask=wide).logits
        return torch.cat([out[:, :1], out[:, :-1]], 1) if kind == "Dream" else out

    return logits


# ------------------------------------------------------------------ references from the published formulas


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, theta: float) -> Tensor:
    """q, k, v: (B, L, H, W), rotated by complex numbers, the halves of a head being real and imaginary parts."""
    length, width = q.shape[1], q.shape[-1]
    angle = torch.arange(length)[:, None] / theta ** (torch.arange(0, width, 2) / width)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    q, k = (torch.complex(x[..., : width // 2], x[..., width // 2 :]) * turn for x in (q, k))
    scores = torch.einsum("blhw,bmhw->bhlm", q, k.conj()).real / width**0.5
    weights = scores.masked_fill(~mask[:, None, None, :], -torch.inf).softmax(-1)
    return torch.einsum("bhlm,bmhw->blhw", weights, v).flatten(2)


def save_llama(
    folder: Path, seed: int, shapes: dict[str, Any], block: dict[str, Any], blocks: str, names: str, theta: float,
    split: Callable[..., Any],
) -> Reference:  # fmt: skip
    """Llama's formulas, in a family's names (`names`: embedding, two norms, out, gate, up, down, last norm, head)."""
    for i in range(2):
        shapes |= {f"{blocks.format(i)}{n}.weight": s for n, s in block.items()}
    w = draw(shapes, seed)
    save_file(w, folder / "model.safetensors")
    embedding, norm_1, norm_2, out, gate, up, down, last, head = names.split()

    def logits(x: Tensor, mask: Tensor) -> Tensor:
        h = w[f"{embedding}.weight"][x]
        for i in range(2):
            p = {n: w[f"{blocks.format(i)}{n}.weight"] for n in block}
            q, k, v = split(p, rms(h, p[norm_1], 1e-5))
            k, v = (y.repeat_interleave(q.shape[2] // k.shape[2], 2) for y in (k, v))
            h = h + attend(q, k, v, mask, theta) @ p[out].T
            a = rms(h, p[norm_2], 1e-5)
            h = h + (F.silu(a @ p[gate].T) * (a @ p[up].T)) @ p[down].T
        return rms(h, w[f"{last}.weight"], 1e-5) @ w[f"{head}.weight"].T

    return logits


def make_llada(folder: Path, size: int, seed: int) -> Reference:
    d, f, rows, top, groups = 32, 48, size + 3, "model.transformer", (4, 2)[seed % 2]
    shapes = {f"{top}.wte.weight": (rows, d), f"{top}.ln_f.weight": (d,), f"{top}.ff_out.weight": (rows, d)}
    block = {"attn_norm": (d,), "ff_norm": (d,), "q_proj": (d, d), "k_proj": (8 * groups, d), "ff_out": (d, f),
             "v_proj": (8 * groups, d), "attn_out": (d, d), "ff_proj": (f, d), "up_proj": (f, d)}  # fmt: skip
    config = {
        "model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": d, "n_heads": 4, "n_kv_heads": groups,
        "n_layers": 2, "mlp_hidden_size": f, "embedding_size": rows, "vocab_size": rows, "block_type": "llama",
        "activation_type": "silu", "layer_norm_type": "rms", "rms_norm_eps": 1e-5, "rope": True, "rope_theta": 5e5,
        "rope_full_precision": True, "weight_tying": False, "include_bias": False, "include_qkv_bias": False,
        "attention_layer_norm": False, "scale_logits": False, "max_sequence_length": 64, "mask_token_id": size - 1,
        "eos_token_id": size - 3, "pad_token_id": size - 3,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    names = f"{top}.wte attn_norm ff_norm attn_out ff_proj up_proj ff_out {top}.ln_f {top}.ff_out"
    return save_llama(
        folder, seed, shapes, block, top + ".blocks.{}.", names, 5e5,
        lambda p, a: ((a @ p[f"{n}_proj"].T).unflatten(-1, (-1, 8)) for n in "qkv"),
    )  # fmt: skip


def make_smdm(folder: Path, size: int, seed: int) -> Reference:
    d = 128
    shapes = {"transformer.wte.weight": (size + 1, d), "lm_head.weight": (size, d), "transformer.ln_f.weight": (d,)}
    block = {"norm_1": (d,), "norm_2": (d,), "attn.attn": (3 * d, d), "attn.proj": (d, d),
             "mlp.swiglu.w1": (4 * d, d), "mlp.swiglu.w2": (4 * d, d), "mlp.swiglu.w3": (d, 4 * d)}  # fmt: skip
    names = "transformer.wte norm_1 norm_2 attn.proj mlp.swiglu.w1 mlp.swiglu.w2 mlp.swiglu.w3 transformer.ln_f lm_head"
    logits = save_llama(
        folder, seed, shapes, block, "transformer.h.{}.", names, 1e4,
        lambda p, a: (a @ p["attn.attn"].T).unflatten(-1, (2, 3, 64)).unbind(-2),
    )  # fmt: skip
    return lambda x, mask: F.pad(logits(x, mask), (0, 1), value=-torch.inf)


def make_mdlm(folder: Path, size: int, seed: int) -> Reference:
    d, heads, layers, cond, rows = 32, 4, 2, 12, size + 1
    shapes = {"vocab_embed.embedding": (rows, d), "sigma_map.mlp.0.weight": (cond, 16), "sigma_map.mlp.0.bias": (cond,),
              "sigma_map.mlp.2.weight": (cond, cond), "sigma_map.mlp.2.bias": (cond,),
              "output_layer.norm_final.weight": (d,), "output_layer.linear.weight": (rows, d),
              "output_layer.linear.bias": (rows,), "output_layer.adaLN_modulation.weight": (2 * d, cond),
              "output_layer.adaLN_modulation.bias": (2 * d,), "rotary_emb.inv_freq": (4,)}  # fmt: skip
    for i in range(layers):
        block = {"norm1.weight": (d,), "norm2.weight": (d,), "attn_qkv.weight": (3 * d, d), "attn_out.weight": (d, d),
                 "mlp.0.weight": (4 * d, d), "mlp.0.bias": (4 * d,), "mlp.2.weight": (d, 4 * d), "mlp.2.bias": (d,),
                 "adaLN_modulation.weight": (6 * d, cond), "adaLN_modulation.bias": (6 * d,)}  # fmt: skip
        shapes |= {f"blocks.{i}.{n}": s for n, s in block.items()}
    w = {n: 3 * t if "adaLN" in n else t for n, t in draw(shapes, seed).items()}
    save_file({f"backbone.{n}": t for n, t in w.items()}, folder / "model.safetensors")
    config = {
        "model_type": "mdlm", "hidden_dim": d, "n_blocks": layers, "n_heads": heads, "cond_dim": cond,
        "model_length": 64, "vocab_size": rows, "dropout": 0.1, "time_conditioning": False, "return_dict": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))

    def modulate(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, (d,)) * weight * (1 + scale) + shift

    def logits(x: Tensor, mask: Tensor) -> Tensor:
        frequency = torch.exp(-torch.arange(8) / 8 * 9.21)
        time = torch.cat([torch.cos(0 * frequency), torch.sin(0 * frequency)])
        c = F.linear(time, w["sigma_map.mlp.0.weight"], w["sigma_map.mlp.0.bias"])
        c = F.silu(F.linear(F.silu(c), w["sigma_map.mlp.2.weight"], w["sigma_map.mlp.2.bias"]))
        h = w["vocab_embed.embedding"][x]
        for i in range(layers):
            p = {n: w[f"blocks.{i}.{n}"] for n in block}
            m = F.linear(c, p["adaLN_modulation.weight"], p["adaLN_modulation.bias"]).chunk(6)
            a = modulate(h, p["norm1.weight"], m[0], m[1]) @ p["attn_qkv.weight"].T
            h = h + m[2] * (attend(*a.unflatten(-1, (3, heads, 8)).unbind(2), mask, 1e4) @ p["attn_out.weight"].T)
            a = F.linear(modulate(h, p["norm2.weight"], m[3], m[4]), p["mlp.0.weight"], p["mlp.0.bias"])
            h = h + m[5] * F.linear(F.gelu(a, approximate="tanh"), p["mlp.2.weight"], p["mlp.2.bias"])
        last = {n: w[f"output_layer.{n}"] for n in ("linear.weight", "linear.bias", "norm_final.weight")}
        m = F.linear(c, w["output_layer.adaLN_modulation.weight"], w["output_layer.adaLN_modulation.bias"]).chunk(2)
        return F.linear(modulate(h, last["norm_final.weight"], *m), last["linear.weight"], last["linear.bias"])

    return logits


def edit(folder: Path, drop: tuple[str, ...] = (), **values: Any) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in raw.items() if k not in drop}))


def batch(vocab: int, length: int = 24, rows: int = 3) -> tuple[Tensor, Tensor]:
    x = torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[1, 9:] = False
    mask[2, 2:] = False
    return x, mask


@torch.no_grad()
def gap(folder: Path, reference: Reference, real: Tensor | None = None) -> float:
    """The largest difference between our logits and theirs at real tokens, the mask's own logit left out."""
    base = load_foreign(folder)
    vocab = base.model.config.vocab_size
    x, mask = batch(vocab)
    mask = mask if real is None else real
    kept = [i for i in range(vocab) if i != base.tokenizer.mask_id]
    ours = base.model(x, attention_mask=None if bool(mask.all()) else mask)
    return float((ours[mask][:, kept] - reference(x, mask)[mask][:, kept]).abs().max())


# ------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_family_on_padded_batches_too(kind: str, seed: int, tmp_path: Path) -> None:
    reference = make(kind, tmp_path, seed)
    model = load_foreign(tmp_path).model
    assert model.config.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.config.num_biases() == sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    assert gap(tmp_path, reference) < 1e-4
    assert gap(tmp_path, reference, torch.ones(3, 24, dtype=torch.bool)) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_chosen_positions_have_the_logits_and_the_nll_of_the_whole_pass(kind: str, tmp_path: Path) -> None:
    make(kind, tmp_path)
    model = load_foreign(tmp_path).model
    x, mask = batch(model.config.vocab_size - 1)
    for columns in ([5, 6], [0, 1, 8]):
        where = torch.zeros_like(mask)
        where[:, columns] = True
        where &= mask
        with torch.no_grad():
            whole = model(x, attention_mask=mask)[where]
            torch.testing.assert_close(model(x, attention_mask=mask, where=where), whole, atol=1e-4, rtol=1e-4)
            nll = model.nll(model.states(x, attention_mask=mask, where=where), x[where])
        torch.testing.assert_close(nll, F.cross_entropy(whole, x[where], reduction="none"), atol=1e-4, rtol=1e-4)


WRONG: list[tuple[str, dict[str, Any]]] = [
    *((kind, {"norm": "layer", "norm_bias": False}) for kind in (*HF, "llada", "smdm")),
    ("Dream", {"shifted": False}), ("a2d-qwen2", {"shifted": True}), ("a2d-qwen3", {"rope_theta": 9e3}),
    ("mdlm", {"activation": "gelu"}), ("llada", {"activation": "gelu"}), ("modernbert", {"local_window": 8}),
    ("modernbert", {"local_theta": 16e4}), ("modernbert", {"global_every": 2}), ("llada", {"embedding_scale": 2.0}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "change"), WRONG)
def test_a_wrong_norm_shift_or_rotation_would_show(
    kind: str, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison of logits is sharp enough to tell a model that is read almost right."""
    reference = make(kind, tmp_path)
    right = gap(tmp_path, reference)
    plain = foreign.ModelConfig
    monkeypatch.setattr(foreign, "ModelConfig", lambda **values: plain(**values | change))
    foreign._read.cache_clear()
    assert gap(tmp_path, reference) > 10 * max(right, 5e-5)


@pytest.mark.parametrize(
    ("kind", "part"),
    [("Dream", "k_proj.bias"), ("a2d-qwen3", "k_norm.weight"), ("mdlm", "mlp.2.bias"), ("modernbert", "decoder.bias"),
     ("mdlm", "sigma_map.mlp.2.bias"), ("llada", "up_proj.weight"), ("smdm", "w2.weight")],
)  # fmt: skip
def test_every_tensor_counts(kind: str, part: str, tmp_path: Path) -> None:
    reference = make(kind, tmp_path)
    path = next(p for p in tmp_path.glob("*.safetensors") if any(n.endswith(part) for n in load_file(p)))
    save_file({n: torch.zeros_like(t) if n.endswith(part) else t for n, t in load_file(path).items()}, path)
    assert gap(tmp_path, reference) > 1e-2


# ------------------------------------------------------------------ everything works on them


def answer_batch(base: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, answer mask of three tokens a row, mask of real tokens) of three rows, the last one shorter."""
    x = torch.randint(0, 250, (3, 12), generator=torch.Generator().manual_seed(3))
    answer, real = torch.zeros_like(x, dtype=torch.bool), torch.ones_like(x, dtype=torch.bool)
    answer[:, 5:8], real[2, 9:] = True, False
    x[:, 0], x[:, 7] = base.tokenizer.bos_id, base.tokenizer.eos_id
    return x, answer, real


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_learns_an_answer_of_several_tokens(kind: str, method: str, dtype: str, tmp_path: Path) -> None:
    if dtype != "fp32" and method == "full":
        pytest.skip("full trains all weights")
    make(kind, tmp_path)
    base = load_foreign(tmp_path, dtype=dtype)
    config = base.model.config
    settings = METHODS[method].Config() if method != "trajectory-lora" else make_config(method, {}, config)
    attached = METHODS[method](settings, config)
    if method == "bitfit" and config.num_biases() == 0:
        with pytest.raises(UsageError, match="this base has none"):
            attached.attach(base.model)
        return
    x, answer, real = answer_batch(base)
    t, prompt = torch.ones(len(x)), real & ~answer
    masked = torch.where(answer, base.tokenizer.mask_id, x)
    before = base.model(masked, t, real, prompt, where=answer).detach()
    attached.attach(base.model, torch.Generator().manual_seed(0))
    torch.testing.assert_close(base.model(masked, t, real, prompt, where=answer).detach(), before)
    optimizer = torch.optim.AdamW(attached.own.values(), lr=1e-3 if method == "full" else 5e-3)
    losses = []
    for _ in range(6):
        loss = base.model.nll(base.model.states(masked, t, real, prompt, None, answer), x[answer]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    mask_id, never, end = base.tokenizer.mask_id, base.tokenizer.never_written, base.tokenizer.eos_id
    out, _ = decode(base.model, x, answer, real, mask_id, never, SampleConfig(), eos_id=end)
    assert not set(never) & set(out[answer].tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_bits_are_those_of_a_model_that_is_shrunk_afterwards(kind: str, tmp_path: Path) -> None:
    make(kind, tmp_path)
    x, mask = batch(load_foreign(tmp_path).model.config.vocab_size - 1)
    for dtype in ("bf16", "int8"):
        base, whole = load_foreign(tmp_path, dtype=dtype), load_foreign(tmp_path).model
        shrink(whole, dtype)
        assert base.bytes == stored_bytes(whole) == describe(tmp_path)[f"{dtype}_bytes"]
        assert torch.equal(base.model(x, attention_mask=mask), whole(x, attention_mask=mask))
        assert torch.equal(look_up(whole.embedding, x), whole.embedding(x))


@pytest.mark.parametrize("kind", ["a2d-qwen3", "Dream", "modernbert"])
def test_kept_states_give_the_same_answer_logits(kind: str, tmp_path: Path) -> None:
    make(kind, tmp_path)
    base = load_foreign(tmp_path)
    model, config = base.model, base.model.config
    method = METHODS["trajectory-lora"](make_config("trajectory-lora", {"recipe": "fast"}, config), config)
    method.attach(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in method.own.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    x, answer, real = answer_batch(base)
    history: list[Tensor] = []
    with torch.no_grad():
        h = model.run_blocks(model.embed(x), real, 0, method.push.first_depth, history=history)
        kept = torch.stack([*history, h], 2)
        told = (x, torch.ones(len(x)), real, real & ~answer)
        whole = model(*told, where=answer)
        torch.testing.assert_close(model(*told, where=answer, cached=kept), whole, atol=1e-5, rtol=1e-5)


def test_byte_level_text_comes_back_and_special_names_in_it_are_plain_text(tmp_path: Path) -> None:
    make("llada", tmp_path)
    tokenizer = load_foreign(tmp_path).tokenizer
    for text in (*TEXT[:3], "a <|mdm_mask|> b <|im_end|>"):
        ids = tokenizer.encode(text)
        assert not {tokenizer.mask_id, tokenizer.eos_id, *tokenizer.never_written} & set(ids)
        assert tokenizer.decode([*ids, tokenizer.eos_id, 7]).replace(" ", "") == text.replace(" ", "")
    assert tokenizer.decode([*tokenizer.encode("漢"), tokenizer.mask_id, *tokenizer.encode("字")]) == "漢_字"
    (tmp_path / "ours.json").write_text(tokenizer.to_json())
    again = Tokenizer.load(tmp_path / "ours.json")
    assert (again.roles, again.encode(TEXT[1])) == (tokenizer.roles, tokenizer.encode(TEXT[1]))


def test_the_mask_is_found_or_said_and_a_doubt_is_refused(tmp_path: Path) -> None:
    make("llada", tmp_path)
    size = load_foreign(tmp_path).model.config.vocab_size
    assert load_foreign(tmp_path).tokenizer.mask_id == size - 1
    edit(tmp_path, mask_token_id=size + 1)  # Dream's, in the tokenizer that it was begun with
    assert (base := load_foreign(tmp_path)).tokenizer.mask_id == size + 1 == base.model.config.vocab_size - 1
    edit(tmp_path, mask_token_id=size - 1)
    assert load_foreign(tmp_path, reading=Reading(mask_token="<|im_end|>")).tokenizer.mask_id == size - 2
    with pytest.raises(TinyldError, match="is no token"):
        load_foreign(tmp_path, reading=Reading(mask_token="<|other|>"))
    names = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | {"mask_token": {"content": "<|im_end|>"}}))
    with pytest.raises(TinyldError, match="say --set mask_token"):
        load_foreign(tmp_path)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content"
    " + '<|eot_id|>' }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


@pytest.mark.parametrize(("template", "last"), [(CHATML, "<|im_end|>"), (HEADERS, "<|eot_id|>")])
def test_a_chat_template_of_a_known_form_frames_every_row_and_another_is_refused_unrun(
    template: str, last: str, tmp_path: Path
) -> None:
    jinja2 = pytest.importorskip("jinja2", reason="needs the extra `interop`")
    make("Dream", tmp_path)
    chat = Reading(chat=True)
    with pytest.raises(TinyldError, match="leave chat out"):
        load_foreign(tmp_path, reading=chat)
    path = tmp_path / "chat_template.jinja"
    for unknown in ("{{ messages }}", CHATML + HEADERS, 7 * "{{ '<|user|>' }}"):
        path.write_text(unknown)
        with pytest.raises(TinyldError, match="of no form that tinyld knows"):
            load_foreign(tmp_path, reading=chat)
    path.write_text(template)
    names = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"bos_token": "<|spare|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer, plain = load_foreign(tmp_path, reading=chat).tokenizer, load_foreign(tmp_path).tokenizer
    said = [{"role": "user", "content": "was the film good? it was"}]
    text = jinja2.Template(template, keep_trailing_newline=True)
    theirs = text.render(messages=said, add_generation_prompt=True, bos_token="<|spare|>")
    end = plain.inner.token_to_id(last)
    task = load_task("reviews")
    for of in (tokenizer, Tokenizer.parse(tokenizer.to_json().encode(), path)):
        rows = TaskRows([Example(said[0]["content"], ".", " good", 1)], task, of, 64)
        assert of.inner.decode(rows.ids[0], skip_special_tokens=False).startswith(theirs)
        assert rows.ids[0].tolist() == [*of.inner.encode(theirs).ids, *rows.ids[0][rows.starts[0] :]]
        assert rows.ids[0][-1] == of.eos_id == end and of.eos_id not in of.never_written
    rows = TaskRows([Example("a b", ".", " good", 1)], task, plain, 64)
    assert rows.ids[0].tolist()[:3] == [plain.bos_id, *plain.encode("a b")][:3] and end not in rows.ids[0]


def test_what_adapting_takes_is_said_without_reading_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("llada", tmp_path)
    monkeypatch.setattr(foreign.Weights, "read", None)
    said = describe(tmp_path)
    assert said["family"] == "llada" and said["mask_token"] == "<|mdm_mask|>" and said["longest_row"] == 64
    methods = {found["method"]: found for found in said["methods"]}
    assert set(methods) == {"trajectory-lora fast", "trajectory-lora best", "weight-lora", "adapters", "full"}
    assert methods["full"]["stored_parameters"] == said["parameters"]
    assert methods["full"]["memory_fp32"] > methods["weight-lora"]["memory_bf16"] > said["bf16_bytes"]
    assert methods["trajectory-lora fast"]["memory_int8"] < methods["trajectory-lora fast"]["memory_bf16"]


# ------------------------------------------------------------------ what is not understood

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llada", {"model_type": "lladamoe"}, "mixture of experts"), ("llada", {"model_type": "bd3lm"}, "block by block"),
    ("llada", {"model_type": "qwen3"}, "must be one of"), ("llada", {"rope_scaling": {"type": "yarn"}}, "rope"),
    ("llada", {"scale_logits": True}, "scale_logits must be False"), ("llada", {"num_experts": 8}, "num_experts"),
    ("mdlm", {"backbone_config": {}}, "e2d2"), ("mdlm", {"time_conditioning": True}, "time_conditioning"),
    ("llada", {"d_model": 10**12}, "asked for|at most"), ("llada", {"n_layers": 10**5}, "asks for|at most"),
    ("llada", {"n_heads": 3}, "n_heads|kv_heads|num_heads"), ("mdlm", {"noise": "uniform"}, "noise"),
    ("llada", {"_name_or_path": "x/a-bd3lm-v0.1"}, "block-causal"), ("llada", {"rms_norm_eps": "small"}, "type float"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "part"), REFUSED)
def test_what_is_not_understood_is_refused_by_name(
    kind: str, change: dict[str, Any], part: str, tmp_path: Path
) -> None:
    make(kind, tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(TinyldError, match=part) as raised:
        load_foreign(tmp_path)
    assert "\n" not in str(raised.value)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    make("llada", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(TinyldError, match="safe_serialization=True"):
        load_foreign(tmp_path)


def damage(folder: Path, rng: random.Random) -> str:
    """One seeded change to a folder; returns what it was."""
    shard = rng.choice(sorted(folder.glob("*.safetensors")))
    tensors = load_file(shard)
    name = rng.choice(sorted(tensors))
    what = rng.choice(("drop", "rename", "shape", "cut", "nan", "extra", "ints", "flip", "index", "file", "key", "huge",
                       "type", "tokenizer"))  # fmt: skip
    config = folder / "config.json"
    if what in ("key", "huge", "type") and config.is_file():
        raw = json.loads(config.read_text())
        key = rng.choice([k for k, v in raw.items() if what == "key" or (isinstance(v, int) and v is not False)])
        if what == "key":
            del raw[key]
        else:
            raw[key] = rng.choice((2**31, 10**30, -1)) if what == "huge" else rng.choice(("many", [1, 2], {"a": 1}))
        config.write_text(json.dumps(raw))
        return f"{what} {key}"
    if what in ("index", "file") and (folder / foreign.INDEX).is_file():
        index = json.loads((folder / foreign.INDEX).read_text())
        outside = rng.choice(("../x", "/etc/passwd", "none", 3, None))
        index["weight_map"][rng.choice(sorted(index["weight_map"]))] = outside
        (folder / foreign.INDEX).write_text(json.dumps(index))
    elif what == "tokenizer":
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text[: rng.randrange(len(text))])
    elif what in ("cut", "file"):
        content = shard.read_bytes()
        shard.write_bytes(content[: rng.randrange(len(content))])
    elif what == "flip":
        content = bytearray(shard.read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        content[rng.randrange(header)] ^= 1 << rng.randrange(8)  # in a value nobody could tell
        shard.write_bytes(bytes(content))
    else:
        tensor = tensors.pop(name)
        if what == "nan":
            tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice((float("nan"), float("inf")))
        new = {
            "rename": {name + "s": tensor}, "shape": {name: torch.cat([tensor, tensor[:1]])}, "nan": {name: tensor},
            "extra": {name: tensor, "model.extra.weight": torch.ones(2)}, "ints": {name: tensor.to(torch.int32)},
        }.get(what, {})  # fmt: skip
        save_file(tensors | new, shard)
    return f"{what} {name}"


FEW_AND_MANY = pytest.mark.parametrize("changes", [40, pytest.param(200, marks=pytest.mark.faults)])


def check_damaged(kind: str, tmp_path: Path, changes: int, least: float) -> None:
    """Of seeded changes to the folder `good` a share of `least` or more is refused, and the others change nothing."""
    good = load_foreign(tmp_path / "good")
    x, mask = batch(50, min(24, good.model.config.max_length))
    expected, roles = good.model(x, attention_mask=mask), good.tokenizer.roles
    refused = 0
    for seed in range(changes):
        shutil.copytree(tmp_path / "good", tmp_path / "bad", dirs_exist_ok=True)
        what = damage(tmp_path / "bad", random.Random(f"{kind} {seed}"))
        try:
            base = load_foreign(tmp_path / "bad")
        except TinyldError as error:
            assert "\n" not in str(error) and len(str(error)) < 600, what
            refused += 1
        else:  # a key that says nothing, or what is found elsewhere as well: the same model to the last bit
            assert torch.equal(base.model(x, attention_mask=mask), expected) and base.tokenizer.roles == roles, what
        shutil.rmtree(tmp_path / "bad")
    assert refused >= least * changes


@FEW_AND_MANY
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_folders_are_refused_in_one_line_and_none_loads_otherwise(
    kind: str, changes: int, tmp_path: Path
) -> None:
    make(kind, tmp_path / "good")
    check_damaged(kind, tmp_path, changes, 0.8)


@pytest.mark.parametrize("kind", ["llada", "mdlm"])
def test_a_public_model_is_adapted_answers_and_is_described_by_its_folder(kind: str, tmp_path: Path) -> None:
    """finetune, predict, sample, eval and info take the folder as it is; a changed one is refused by its run."""
    from typer.testing import CliRunner

    from tinyld.cli import app

    make(kind, tmp_path / "model")
    texts = [f"{a} {b}" for a in "abcdefgh" for b in "abcdefgh"]
    rows = "".join(f"{text},{'yes' if text[0] < 'e' else 'no'}\n" for text in texts)
    (tmp_path / "rows.csv").write_text("text,label\n" + rows)

    def run(*words: str) -> str:
        ran = CliRunner().invoke(app, list(words))
        assert ran.exit_code == 0, ran.output
        return ran.stdout

    base, out = str(tmp_path / "model"), str(tmp_path / "run")
    for method in ("trajectory-lora", "weight-lora"):
        run("finetune", "--data", str(tmp_path / "rows.csv"), "--base", base, "--method", method, "--steps", "2",
            "--out", out, "--force", "--quiet")  # fmt: skip
        assert json.loads(run("predict", out, "--text", "a b"))["label"] in ("yes", "no")
    assert json.loads(run("eval", out, "--json", "--quiet"))[0]["n"] > 0
    assert json.loads(run("sample", base, "--length", "2", "--num", "1", "--json"))["samples"]
    assert json.loads(run("info", base, "--json"))["family"] == kind
    read_so = ("--set", "mask_token=<|spare|>", "--set", "max_length=40", "--set", "chat=true")
    (tmp_path / "model" / "chat_template.jinja").write_text(CHATML)
    for name in ("one", "two"):  # how a model was read is kept in a run and a composition of runs
        (tmp_path / f"{name}.toml").write_text(
            f'template = "{{text}} {name} {{answer}} ."\n[verbalizer]\nyes = "yes"\nno = "no"\n'
            '[data]\ntrain = "rows.csv"\ndev = "rows.csv"'
        )
        run("finetune", "--task", str(tmp_path / f"{name}.toml"), "--base", base, "--set", "blocks=1", "--quiet",
            "--set", "ranks=2,2,2", "--steps", "2", "--out", str(tmp_path / name), *read_so)  # fmt: skip
    kept = {"mask_token": "<|spare|>", "max_length": 40, "chat": True}
    assert json.loads((tmp_path / "one" / "config.json").read_text())["base"]["reading"] == kept
    both = str(tmp_path / "both")
    run("compose", str(tmp_path / "one"), str(tmp_path / "two"), "--limit", "4", "--out", both, "--quiet",
        "--set", "least_right=0")  # fmt: skip
    for path in ([str(tmp_path / "one")], [both, "--task", "two"]):
        assert json.loads(run("predict", *path, "--text", "a b"))["label"] in ("yes", "no")
    make(kind, tmp_path / "model", seed=1)
    ran = CliRunner().invoke(app, ["predict", out, "--text", "a b"])
    assert ran.exit_code == 1 and "was trained on base" in ran.output


def test_fewer_rows_are_read_at_once_where_their_states_would_fill_the_memory() -> None:
    def rows(d_model: int, num_layers: int, length: int) -> int:
        with torch.device("meta"):
            model = Denoiser(ModelConfig(vocab_size=9, d_model=d_model, num_layers=num_layers, num_heads=2, d_ff=8))
        return model.rows_at_once(length, 128)

    assert rows(384, 6, 256) == 128, "the released base, as ever"
    assert (rows(1024, 28, 256), rows(4096, 32, 256), rows(4096, 32, 131_072)) == (17, 3, 1)
