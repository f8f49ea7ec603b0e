"""Public models, diffusion models and encoders: our logits are theirs, or the folder is refused in one line."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import byte_level, cli, good, refuses, seeded
from safetensors.torch import load_file, save_file
from test_sampler import one_by_one
from tokenizers import BertWordPieceTokenizer
from torch import Tensor

from tinyld import families, foreign
from tinyld.config import Reading, SampleConfig
from tinyld.costs import describe
from tinyld.data import TaskRows
from tinyld.device import look_up, shrink, stored_bytes
from tinyld.errors import TinyldError, UsageError
from tinyld.families import FAMILIES
from tinyld.foreign import load_foreign
from tinyld.methods import METHODS, make_config
from tinyld.model import head_nll
from tinyld.predict import load
from tinyld.rows import Example
from tinyld.tasks import load_task
from tinyld.tokenizer import Tokenizer

Reference = Callable[[Tensor, Tensor], Tensor]  # (ids, attention mask) -> logits, of the model that was saved
TEXT = ["the film was not great, but very good", "a dull plot, naïve cafés", "it's bright: 漢字 and 🙂"] * 4
WEIGHTS = "model.safetensors"
HF = ("a2d-qwen3", "a2d-qwen2", "a2d-llama", "Dream")
KINDS = tuple(kind for kind, family in FAMILIES.items() if not family.prefix)
ENCODERS = tuple(kind for kind in FAMILIES if kind not in KINDS)
SPARE = ("<|spare|>", "<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


@pytest.fixture(autouse=True)
def a_tiny_smdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "SMDM_WIDTHS", (128,))


def write_tokenizer(folder: Path, mask: str | None) -> int:
    """A byte-level BPE with an end and, unless None, a mask token; returns how many tokens it has."""
    inner = byte_level(TEXT, [*SPARE, "<|endoftext|>", "<|im_end|>", *([mask] if mask else [])])
    inner.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return inner.get_vocab_size()


def write_pieces(folder: Path) -> int:
    """A WordPiece tokenizer of letters and a few words; returns how many tokens it has."""
    letters, words = "abcdefghijklmnopqrstuvwxyz'.,", "the film plot was is not great good bad dull but very of to in"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *words.split()]
    BertWordPieceTokenizer({piece: i for i, piece in enumerate(pieces)}).save(str(folder / "tokenizer.json"))
    return len(pieces)


def draw(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Norms near 1, all else near 0, and all of it large enough to show in the logits."""
    generator = seeded(seed)
    return {n: ("norm" in n or "ln_f" in n) + 0.15 * torch.randn(s, generator=generator) for n, s in shapes.items()}


def make(kind: str, folder: Path, seed: int = 0, head: bool = True) -> Reference:
    """A tiny random model of a family, as a folder; returns what it computes. Encoders may lack a head, and then give
    states."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind in (*HF, *ENCODERS, "modernbert"):
        return make_by_transformers(kind, folder, seed, head)
    size = write_tokenizer(folder, "<|mdm_mask|>" if kind == "llada" else None)
    return make_mdlm(folder, size, seed) if kind == "mdlm" else make_llama(kind, folder, size, seed)


def make_by_transformers(kind: str, folder: Path, seed: int, head: bool) -> Reference:
    transformers = pytest.importorskip("transformers", reason="needs the extra `interop`")
    transformers.logging.set_verbosity_error()
    mask = "[MASK]" if kind == "modernbert" else "<|mask|>"
    rows = write_pieces(folder) if kind in ENCODERS else write_tokenizer(folder, mask) + 5  # the last ones pad
    torch.manual_seed(seed)
    llama, odd = dict(num_key_value_heads=2, rms_norm_eps=1e-5), seed % 2 == 1
    name, own = {
        "bert": ("Bert", {}),
        "roberta": ("Roberta", dict(pad_token_id=1)),
        "distilbert": ("DistilBert", dict(dim=32, n_layers=3, n_heads=4, hidden_dim=40)),
        "electra": ("Electra", dict(embedding_size=36)),
        "modernbert": ("ModernBert", dict(local_attention=6, decoder_bias=True, cls_token_id=None, sep_token_id=None)),
        "a2d-qwen3": ("Qwen3", llama | dict(head_dim=16, tie_word_embeddings=True)),
        "a2d-llama": ("Llama", llama | dict(attention_bias=odd, mlp_bias=odd)),
    }.get(kind, ("Qwen2", llama))
    shape = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40, vocab_size=rows)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = getattr(transformers, f"{name}Config")(**shape | special | own, max_position_embeddings=64)
    if kind == "Dream":
        config.rope_parameters["rope_theta"] = 5e4
    ending = "Model" if not head else "ForCausalLM" if kind in HF else "ForMaskedLM"
    model = getattr(transformers, name + ending)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="1MB" if kind in ENCODERS else "20KB")
    if kind in HF:
        edit(folder, model_type=kind, **({"architectures": ["DreamModel"]} if kind == "Dream" else {}))

    def logits(x: Tensor, mask: Tensor) -> Tensor:
        wide = mask[:, None, None, :].expand(-1, 1, x.shape[1], -1) if kind in HF else mask.long()
        found = model(input_ids=x, attention_mask=wide)
        out = found.logits if head else found.last_hidden_state
        return torch.cat([out[:, :1], out[:, :-1]], 1) if kind == "Dream" else out

    return logits


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, theta: float) -> Tensor:
    """q, k, v: (B, L, H, W), rotated by complex numbers, the halves of a head being real and imaginary parts. There
    may be fewer heads of k and v, each for a group of q."""
    angle = torch.arange(q.shape[1])[:, None] / theta ** torch.arange(0, 1, 2 / q.shape[-1])
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    turned = (torch.complex(*x.chunk(2, -1)) * turn for x in (q, k))
    heads = [x.transpose(1, 2) for x in (*(torch.cat([x.real, x.imag], -1) for x in turned), v)]
    found = F.scaled_dot_product_attention(*heads, mask[:, None, None, :], enable_gqa=True)
    return found.transpose(1, 2).flatten(2)


LLAMA = {  # a family's names: embedding, last norm, head, blocks; and of a block two norms, out, gate, up, down
    "llada": ("model.transformer.wte model.transformer.ln_f model.transformer.ff_out model.transformer.blocks.{}.",
              "attn_norm ff_norm attn_out ff_proj up_proj ff_out"),
    "smdm": ("transformer.wte transformer.ln_f lm_head transformer.h.{}.",
             "norm_1 norm_2 attn.proj mlp.swiglu.w1 mlp.swiglu.w2 mlp.swiglu.w3"),
}  # fmt: skip


def make_llama(kind: str, folder: Path, size: int, seed: int) -> Reference:
    """Llama's formulas in a family's names; SMDM has one matrix for queries, keys and values, and no config."""
    is_llada, groups = kind == "llada", (4, 2)[seed % 2]
    d, f, rows, theta = (32, 48, size + 3, 5e5) if is_llada else (128, 512, size + 1, 1e4)
    (embedding, last, head, blocks), (norm_1, norm_2, out, gate, up, down) = (names.split() for names in LLAMA[kind])
    block = {norm_1: (d,), norm_2: (d,), out: (d, d), gate: (f, d), up: (f, d), down: (d, f)}
    block |= {"q_proj": (d, d), "k_proj": (8 * groups, d), "v_proj": (8 * groups, d)} if is_llada else {}
    block |= {} if is_llada else {"attn.attn": (3 * d, d)}
    shapes = {embedding: (rows, d), last: (d,), head: (rows - (not is_llada), d)}
    shapes |= {blocks.format(i) + n: s for i in range(2) for n, s in block.items()}
    w = draw({f"{n}.weight": s for n, s in shapes.items()}, seed)
    save_file(w, folder / WEIGHTS)
    config = {
        "model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": d, "n_heads": 4, "n_kv_heads": groups,
        "n_layers": 2, "mlp_hidden_size": f, "embedding_size": rows, "vocab_size": rows, "block_type": "llama",
        "activation_type": "silu", "layer_norm_type": "rms", "rms_norm_eps": 1e-5, "rope": True, "rope_theta": theta,
        "rope_full_precision": True, "weight_tying": False, "include_bias": False, "include_qkv_bias": False,
        "attention_layer_norm": False, "scale_logits": False, "max_sequence_length": 64, "mask_token_id": size - 1,
        "eos_token_id": size - 3, "pad_token_id": size - 3,
    }  # fmt: skip
    if is_llada:
        (folder / "config.json").write_text(json.dumps(config))

    def logits(x: Tensor, mask: Tensor) -> Tensor:
        h = w[f"{embedding}.weight"][x]
        for i in range(2):
            p = {n: w[f"{blocks.format(i)}{n}.weight"] for n in block}
            a = F.rms_norm(h, (d,), p[norm_1], 1e-5)
            if is_llada:
                heads = [(a @ p[f"{n}_proj"].T).unflatten(-1, (-1, 8)) for n in "qkv"]
            else:
                heads = (a @ p["attn.attn"].T).unflatten(-1, (2, 3, 64)).unbind(-2)
            h = h + attend(*heads, mask, theta) @ p[out].T
            a = F.rms_norm(h, (d,), p[norm_2], 1e-5)
            h = h + (F.silu(a @ p[gate].T) * (a @ p[up].T)) @ p[down].T
        found = F.rms_norm(h, (d,), w[f"{last}.weight"], 1e-5) @ w[f"{head}.weight"].T
        return found if is_llada else F.pad(found, (0, 1), value=-torch.inf)

    return logits


def make_mdlm(folder: Path, size: int, seed: int) -> Reference:
    d, cond, rows = 32, 12, size + 1
    matrices = {"sigma_map.mlp.0": (cond, 16), "sigma_map.mlp.2": (cond, cond), "output_layer.linear": (rows, d),
                "output_layer.adaLN_modulation": (2 * d, cond)}  # fmt: skip
    shapes: dict[str, Any] = {"vocab_embed.embedding": (rows, d), "output_layer.norm_final.weight": (d,),
                              "rotary_emb.inv_freq": (4,)}  # fmt: skip
    for at in ("blocks.0.", "blocks.1."):
        matrices |= {f"{at}mlp.0": (4 * d, d), f"{at}mlp.2": (d, 4 * d), f"{at}adaLN_modulation": (6 * d, cond)}
        shapes |= {f"{at}{n}.weight": (d,) for n in ("norm1", "norm2")}
        shapes |= {f"{at}attn_qkv.weight": (3 * d, d), f"{at}attn_out.weight": (d, d)}
    shapes |= {f"{n}.{part}": s for n, size in matrices.items() for part, s in (("weight", size), ("bias", size[:1]))}
    w = {n: 3 * t if "adaLN" in n else t for n, t in draw(shapes, seed).items()}
    save_file({f"backbone.{n}": t for n, t in w.items()}, folder / WEIGHTS)
    config = {
        "model_type": "mdlm", "hidden_dim": d, "n_blocks": 2, "n_heads": 4, "cond_dim": cond, "model_length": 64,
        "vocab_size": rows, "dropout": 0.1, "time_conditioning": False, "return_dict": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x: Tensor, name: str, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, (d,)) * w[f"{name}.weight"] * (1 + scale) + shift

    def logits(x: Tensor, mask: Tensor) -> Tensor:
        time = torch.cat([torch.zeros(8).cos(), torch.zeros(8).sin()])  # of sigma = 0
        c = F.silu(linear(F.silu(linear(time, "sigma_map.mlp.0")), "sigma_map.mlp.2"))
        h = w["vocab_embed.embedding"][x]
        for at in ("blocks.0.", "blocks.1."):
            m = linear(c, f"{at}adaLN_modulation").chunk(6)
            heads = linear(norm(h, f"{at}norm1", m[0], m[1]), f"{at}attn_qkv").unflatten(-1, (3, 4, 8)).unbind(2)
            h = h + m[2] * linear(attend(*heads, mask, 1e4), f"{at}attn_out")
            a = linear(norm(h, f"{at}norm2", m[3], m[4]), f"{at}mlp.0")
            h = h + m[5] * linear(F.gelu(a, approximate="tanh"), f"{at}mlp.2")
        shift, scale = linear(c, "output_layer.adaLN_modulation").chunk(2)
        return linear(norm(h, "output_layer.norm_final", shift, scale), "output_layer.linear")

    return logits


def edit(folder: Path, name: str = "config.json", drop: str = "", **values: Any) -> None:
    raw = json.loads((folder / name).read_text()) | values
    (folder / name).write_text(json.dumps({k: v for k, v in raw.items() if k != drop}))


def batch(vocab: int, length: int = 24) -> tuple[Tensor, Tensor]:
    """Three rows of ids from 5 up (RoBERTa finds padding by its id), of which two are padded, and their mask."""
    x = torch.randint(5, vocab, (3, length), generator=seeded(1))
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[1, 9:] = False
    mask[2, 2:] = False
    return x, mask


def test_a_head_that_is_stored_though_it_is_the_embedding_must_be_the_same(tmp_path: Path) -> None:
    make("a2d-qwen3", tmp_path)
    tensors = {name: tensor for path in tmp_path.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in [*tmp_path.glob("*.safetensors"), *tmp_path.glob(foreign.INDEX)]:
        path.unlink()
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, tmp_path / WEIGHTS)
    rows = load_foreign(tmp_path).model.embedding.weight
    assert torch.equal(rows, embedding[: len(rows)])
    (tmp_path / foreign.INDEX).write_text('{"weight_map": {"x": "model-00001-of-00001.safetensors"}}')
    assert torch.equal(load_foreign(tmp_path).model.embedding.weight, rows), "an older index is left aside"
    save_file(tensors | {"lm_head.weight": embedding + 1}, tmp_path / WEIGHTS)
    refuses("'lm_head.weight' is not the embedding's matrix", load_foreign, tmp_path)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("kind", "head"), [*((k, True) for k in FAMILIES), *((k, False) for k in ENCODERS)])
@torch.no_grad()
def test_logits_or_states_are_the_familys_in_padded_batches(kind: str, head: bool, seed: int, tmp_path: Path) -> None:
    reference = make(kind, tmp_path, seed, head)
    base = load_foreign(tmp_path, headless=not head)
    model, vocab = base.model, base.model.config.vocab_size
    assert model.config.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.config.num_biases() == sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    x, mask = batch(vocab)
    kept = [i for i in range(vocab) if i != base.tokenizer.mask_id] if head else slice(None)
    for given in (None, mask):
        real = torch.ones_like(mask) if given is None else mask
        ours, theirs = (model if head else model.states)(x, attention_mask=given), reference(x, real)
        assert float((ours[real][:, kept] - theirs[real][:, kept]).abs().max()) < 1e-4
    some = mask & (torch.arange(24) % 7 < 2) & (x != base.tokenizer.mask_id)  # the rest is not computed
    if head:
        logits, states = (f(x, attention_mask=mask, where=some) for f in (model, model.states))
        torch.testing.assert_close(logits, ours[some], atol=1e-4, rtol=1e-4)
        nll = F.cross_entropy(ours[some], x[some], reduction="none")
        torch.testing.assert_close(model.nll(states, x[some]), nll, atol=1e-4, rtol=1e-4)


def test_what_mdlm_never_writes_has_a_finite_gradient_in_fp16_too(tmp_path: Path) -> None:
    make("mdlm", tmp_path)
    model = load_foreign(tmp_path).model
    h, weight = torch.randn(4, model.config.d_model).half(), model.output.weight.detach().half()
    nll = head_nll(h.requires_grad_(), weight, model.output_bias.detach().half(), torch.arange(4))
    nll.sum().backward()
    assert bool(nll.isfinite().all()) and bool(h.grad.isfinite().all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_learns_an_answer_of_several_tokens(kind: str, method: str, tmp_path: Path) -> None:
    make(kind, tmp_path)
    base = load_foreign(tmp_path, dtype="fp32" if method == "full" else "int8")
    config = base.model.config
    if method == "bitfit" and config.num_biases() == 0:
        refuses("this base has none", METHODS[method], make_config(method, {}, config), base.model, kind=UsageError)
        return
    x = torch.randint(0, 250, (3, 12), generator=seeded(3))
    answer, real = torch.zeros_like(x, dtype=torch.bool), torch.ones_like(x, dtype=torch.bool)
    answer[:, 5:8], real[2, 9:] = True, False  # three tokens a row, the last one shorter
    x[:, 0], x[:, 7] = base.tokenizer.bos_id, base.tokenizer.eos_id
    told = (torch.where(answer, base.tokenizer.mask_id, x), torch.ones(len(x)), real, real & ~answer)
    before = base.model(*told, where=answer).detach()
    settings = make_config(method, {}, config)
    own = METHODS[method](settings, base.model, seeded()).own
    torch.testing.assert_close(base.model(*told, where=answer).detach(), before)
    optimizer = torch.optim.AdamW(own.values(), lr=1e-3 if method == "full" else 5e-3)
    losses = []
    for _ in range(6):
        loss = base.model.nll(base.model.states(*told, where=answer), x[answer]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


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


def test_byte_level_text_comes_back_and_special_names_in_it_are_plain_text(tmp_path: Path) -> None:
    make("llada", tmp_path)
    tokenizer = load_foreign(tmp_path).tokenizer
    for text in (*TEXT[:3], "a <|mdm_mask|> b <|im_end|>"):
        ids = tokenizer.encode(text)
        assert not {tokenizer.mask_id, tokenizer.eos_id, *tokenizer.never_written} & set(ids)
        assert tokenizer.decode([*ids, tokenizer.eos_id, 7]).replace(" ", "") == text.replace(" ", "")
    assert tokenizer.decode([*tokenizer.encode("漢"), tokenizer.mask_id, *tokenizer.encode("字")]) == "漢_字"
    again = Tokenizer.parse(tokenizer.to_json().encode(), tmp_path)
    assert (again.roles, again.encode(TEXT[1])) == (tokenizer.roles, tokenizer.encode(TEXT[1]))


def test_the_mask_is_found_or_said_and_a_doubt_is_refused(tmp_path: Path) -> None:
    make("llada", tmp_path)
    size = load_foreign(tmp_path).model.config.vocab_size
    assert load_foreign(tmp_path).tokenizer.mask_id == size - 1
    edit(tmp_path, mask_token_id=size + 1)  # Dream's, in the tokenizer that it was begun with
    assert (base := load_foreign(tmp_path)).tokenizer.mask_id == size + 1 == base.model.config.vocab_size - 1
    edit(tmp_path, mask_token_id=size - 1)
    assert load_foreign(tmp_path, reading=Reading(mask_token="<|im_end|>")).tokenizer.mask_id == size - 2
    refuses("is no token", load_foreign, tmp_path, reading=Reading(mask_token="<|other|>"))
    edit(tmp_path, "tokenizer_config.json", mask_token={"content": "<|im_end|>"})
    refuses("say --set mask_token", load_foreign, tmp_path)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content"
    " + '<|eot_id|>' }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


@pytest.mark.parametrize(("template", "last"), [(CHATML, "<|im_end|>"), (HEADERS, "<|eot_id|>")])
def test_known_chat_templates_frame_rows_and_others_are_refused_unrun(template: str, last: str, tmp_path: Path) -> None:
    jinja2 = pytest.importorskip("jinja2", reason="needs the extra `interop`")
    make("Dream", tmp_path)
    chat, path, said = Reading(chat=True), tmp_path / "chat_template.jinja", "was the film good? it was"
    for unknown in (None, "{{ messages }}", CHATML + HEADERS, 7 * "{{ '<|user|>' }}"):
        if unknown:
            path.write_text(unknown)
        with pytest.raises(TinyldError, match="no chat template of a form that tinyld knows") as raised:
            load_foreign(tmp_path, reading=chat)
        assert str(raised.value).endswith("leave chat out")
    path.write_text(template)
    edit(tmp_path, "tokenizer_config.json", bos_token="<|spare|>")
    tokenizer, plain = load_foreign(tmp_path, reading=chat).tokenizer, load_foreign(tmp_path).tokenizer
    theirs = jinja2.Template(template, keep_trailing_newline=True).render(
        messages=[{"role": "user", "content": said}], add_generation_prompt=True, bos_token="<|spare|>"
    )
    end, task = plain.inner.token_to_id(last), load_task("reviews")
    for of in (tokenizer, Tokenizer.parse(tokenizer.to_json().encode(), path)):
        rows = TaskRows([Example(said, ".", "good", 1)], task, of, 64)
        assert of.inner.decode(rows.ids[0], skip_special_tokens=False).startswith(theirs)
        assert rows.ids[0].tolist() == [*of.inner.encode(theirs).ids, *rows.ids[0][rows.starts[0] :]]
        assert rows.ids[0][-1] == of.eos_id == end and of.eos_id not in of.never_written
    rows = TaskRows([Example("a b", ".", "good", 1)], task, plain, 64)
    assert rows.ids[0].tolist()[:3] == [plain.bos_id, *plain.encode("a b")][:3] and end not in rows.ids[0]


def test_what_adapting_takes_is_said_without_reading_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("llada", tmp_path)
    monkeypatch.setattr(foreign.Stored, "read", None)
    said = describe(tmp_path)
    assert said["family"] == "llada" and said["mask_token"] == "<|mdm_mask|>" and said["longest_row"] == 64
    methods = {found["method"]: found for found in said["methods"]}
    assert set(methods) == {"trajectory-lora fast", "trajectory-lora best", "weight-lora", "adapters", "full"}
    assert methods["full"]["stored_parameters"] == said["parameters"]
    assert methods["full"]["memory_fp32"] > methods["adapters"]["memory_bf16"] > said["bf16_bytes"]
    assert methods["trajectory-lora fast"]["memory_int8"] < methods["trajectory-lora fast"]["memory_bf16"]


def store_twice(folder: Path) -> None:
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    save_file(load_file(second) | load_file(first), second)


@pytest.mark.parametrize(("kind", "change", "part"), [
    ("llada", {"model_type": "lladamoe"}, "must be one of"), ("llada", {"rope_scaling": {"type": "yarn"}}, "rope"),
    ("llada", {"scale_logits": True}, "scale_logits must be False"), ("llada", {"num_experts": 8}, "num_experts"),
    ("mdlm", {"backbone_config": {"a": 1}}, "backbone_config"), ("mdlm", {"time_conditioning": True}, "must be False"),
    ("Dream", {"architectures": ["DreamForCausalLM"]}, "architectures"),
    ("modernbert", {"layer_types": ["sliding_attention"]}, "full_attention for every n-th block"),
    ("a2d-qwen3", {"layer_types": ["sliding_attention"]}, "full_attention throughout"),
    ("a2d-llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 1e4}},
     "rope_scaling must be plain rotary positions"),
    ("a2d-llama", lambda folder: edit(folder, foreign.INDEX, weight_map={"x": "../x"}), "weight_map must name a file"),
    ("a2d-llama", store_twice, "00002-of-.*: tensor '.*' is in .*00001-of-.* already"),
    ("llada", {"d_model": 10**12}, "asked for|at most"), ("llada", {"n_layers": 10**5}, "asks for|at most"),
    ("llada", {"n_heads": 3}, "n_heads|kv_heads|num_heads"), ("mdlm", {"noise": "uniform"}, "noise"),
    ("llada", {"_name_or_path": "x/a-bd3lm-v0.1"}, "block-causal"), ("llada", {"rms_norm_eps": "small"}, "type float"),
    ("llada", {"eos_token_id": "7"}, "eos_token_id: '7' is not of type"),
    ("llada", lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), "safe_serialization=True"),
    ("llada", lambda folder: (folder / WEIGHTS).unlink(), "expected model.safetensors"),
    ("llada", lambda folder: (folder / "tokenizer.json").unlink(), "expected tokenizer.json"),
    ("bert", {"hidden_act": "relu"}, "hidden_act must be 'gelu'"), ("bert", {"is_decoder": True}, "is_decoder must be"),
    ("roberta", {"pad_token_id": 0}, "pad_token_id must be 1"),
    ("distilbert", {"layer_norm_eps": 0.1}, "layer_norm_eps must be 1e-12"),
    ("bert", {"num_hidden_layers": 4}, "no tensor bert.encoder.layer"),
    ("bert", {"max_position_embeddings": 99}, r"'positions.weight' has the wrong shape: \(64, "),
    ("bert", {"vocab_size": 60}, "has [0-9]+ tokens, the model 60"),
])  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(kind: str, change: Any, part: str, tmp_path: Path) -> None:
    make(kind, tmp_path)
    edit(tmp_path, **change) if isinstance(change, dict) else change(tmp_path)
    refuses(part, load_foreign, tmp_path)


def test_an_encoder_without_a_head_to_write_with_is_no_base_but_one_may_begin_with_it(tmp_path: Path) -> None:
    make("roberta", tmp_path, head=False)
    refuses("begin a base with it: tinyld pretrain --init", load_foreign, tmp_path)
    config = load_foreign(tmp_path, reading=Reading(max_length=20), headless=True).model.config
    assert config.max_length == 20 and config.head_transform
    with pytest.raises(UsageError, match="max_length must be at most the .* got 1000"):
        load_foreign(tmp_path, reading=Reading(max_length=1_000), headless=True)


def damage(folder: Path, rng: random.Random) -> str:
    """One seeded change to a folder; returns what it was."""
    what = rng.choice("drop rename shape nan extra ints cut cut key huge type".split())
    path, config = rng.choice(sorted(folder.iterdir())), folder / "config.json"
    if what == "cut":
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
        return f"{what} {path.name}"
    if what in ("key", "huge", "type") and config.is_file():
        raw = json.loads(config.read_text())
        key = rng.choice([k for k, v in raw.items() if what == "key" or (isinstance(v, int) and v is not False)])
        wrong = {"huge": (2**31, 10**30, -1), "type": ("many", [1, 2], {"a": 1})}
        edit(folder, drop=key) if what == "key" else edit(folder, **{key: rng.choice(wrong[what])})
        return f"{what} {key}"
    shard = rng.choice(sorted(folder.glob("*.safetensors")))
    tensors = load_file(shard)
    tensor = tensors.pop(name := rng.choice(sorted(tensors)))
    spoilt = tensor.index_fill(0, torch.tensor(rng.randrange(len(tensor))), rng.choice((torch.nan, torch.inf)))
    new = {
        "rename": {name + "s": tensor}, "shape": {name: torch.cat([tensor, tensor[:1]])}, "nan": {name: spoilt},
        "extra": {name: tensor, "model.extra.weight": torch.ones(2)}, "ints": {name: tensor.to(torch.int32)},
    }.get(what, {})  # fmt: skip
    save_file(tensors | new, shard)
    return f"{what} {name}"


@pytest.mark.parametrize("changes", [20, pytest.param(200, marks=pytest.mark.faults)])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_damaged_folder_is_refused_in_one_line_or_is_the_same_model(kind: str, changes: int, tmp_path: Path) -> None:
    make(kind, tmp_path / "good")
    whole = load_foreign(tmp_path / "good")
    x, mask = batch(50)
    expected = whole.model(x, attention_mask=mask)
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
            assert torch.equal(base.model(x, attention_mask=mask), expected), what
            assert base.tokenizer.roles == whole.tokenizer.roles, what
        shutil.rmtree(tmp_path / "bad")
    least = 0.8 if kind in KINDS else 0.55  # fewer of an encoder's, which may hold what is others'
    assert refused >= least * changes


@pytest.mark.parametrize("kind", ["llada", "Dream"])
@torch.no_grad()
def test_a_public_model_writes_by_its_published_loop(kind: str, tmp_path: Path) -> None:
    reference = make(kind, tmp_path, seed=1)
    run, texts = load(tmp_path, dtype="fp32"), set[str]()
    tokenizer, mask_id = run.base.tokenizer, run.base.tokenizer.mask_id

    def logits(x: Tensor) -> Tensor:
        found = reference(x, torch.ones_like(x, dtype=torch.bool))
        found[..., mask_id:] = -torch.inf  # the last token, behind which rows pad: what a trained one never gives
        return found

    for prompt in ("the film", "a dull", "was not", "very good", "plot"):
        ids = [*tokenizer.start, *tokenizer.encode(prompt)]
        for passes, block in ((12, 4), (6, 4), (12, 12), (3, 12)):
            x = torch.tensor([*ids, *[mask_id] * 12])
            for begin in range(len(ids), len(x), block):  # arXiv 2502.09992, algorithms 4 and 5
                x = one_by_one(logits, x, list(range(begin, begin + block)), passes * block // 12, mask_id)
            texts.add(theirs := tokenizer.decode(x[len(ids) :].tolist()))
            sampling = SampleConfig("low_confidence", steps=passes, block=block)
            assert run.fill(prompt, 12, 1, sampling)[0] == [theirs]
    assert len(texts) > 5


@pytest.mark.usefixtures("elsewhere")
def test_a_public_model_is_adapted_answers_and_is_described_by_its_folder() -> None:
    """finetune, predict, sample, eval and info take the folder as it is; a changed one is refused by its run."""
    make("llada", Path("model"))
    texts = [f"{a} {b}" for a in "abcdefgh" for b in "abcdefgh"]
    rows = "".join(f"{text},{'yes' if text[0] < 'e' else 'no'}\n" for text in texts)
    Path("rows.csv").write_text("text,label\n" + rows)

    def answers(words: str) -> bool:
        return good(*f"predict {words} --text ab --json".split()).json["label"] in ("yes", "no")

    for method in ("trajectory-lora", "weight-lora"):
        good(*f"finetune --data rows.csv --base model --method {method} --steps 2 --out run --force".split())
        assert answers("run")
    assert good("eval", "run", "--json").json[0]["n"] > 0
    assert good("sample", "model", "--length", 2, "--num", 1, "--json").json["samples"]
    assert good("info", "model", "--json").json["family"] == "llada"
    Path("model/chat_template.jinja").write_text(CHATML)
    small = "--set blocks=1 --set ranks=2,2,2 --steps 2 --set mask_token=<|spare|> --set max_length=40 --set chat=true"
    for name in ("one", "two"):  # how a model was read is kept in a run and a composition of runs
        labelled = f'template = "{{text}} {name} {{answer}} ."\n[verbalizer]\nyes = "yes"\nno = "no"\n'
        Path(f"{name}.toml").write_text(f'{labelled}[data]\ntrain = "rows.csv"\ndev = "rows.csv"')
        good(*f"finetune --task {name}.toml --base model --out {name} {small}".split())
    kept = {"mask_token": "<|spare|>", "max_length": 40, "chat": True}
    assert json.loads(Path("one/config.json").read_text())["base"]["reading"] == kept
    good("compose", "one", "two", "--limit", 4, "--out", "both")
    assert answers("one") and answers("both --task two")
    make("llada", Path("model"), seed=1)
    ran = cli("predict", "run", "--text", "ab")
    assert ran.code == 1 and "was trained on base" in ran.stderr
