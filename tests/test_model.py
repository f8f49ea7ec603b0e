"""The denoiser: what a row's logits depend on, and that every shortcut equals the long way."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import fresh_base, refuses, seeded
from torch import Tensor

from tinyld.block import take
from tinyld.config import ModelConfig, from_dict
from tinyld.device import shrink
from tinyld.model import Denoiser, PushAt, head_nll


def random_ids(model: Denoiser, rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(5, model.config.vocab_size, (rows, length), generator=seeded(seed))


def test_fewer_rows_are_read_at_once_where_their_states_would_fill_the_memory() -> None:
    def rows(d_model: int, num_layers: int, length: int) -> int:
        with torch.device("meta"):
            return Denoiser(ModelConfig(9, d_model, num_layers, 2, 8)).rows_at_once(length, 128)

    assert rows(384, 6, 256) == 128, "the released base, as ever"
    assert (rows(1024, 28, 256), rows(4096, 32, 256), rows(4096, 32, 131_072)) == (17, 3, 1)


@pytest.mark.parametrize(("values", "message"), [
    ([], r"'\[\]' is not of type dict"),
    ({"vocab_size": True}, "vocab_size: 'True' is not of type int"),
    ({"vocab_size": 10**12}, "a denoiser of [0-9,]+ parameters is asked for; at most 20,000,000,000"),
    ({"vocab_size": 9, "d_model": 30, "num_heads": 4}, "num_heads must divide d_model"),
    ({"vocab_size": 9, "head_width": 2_000, "max_length": 131_072}, r"max_length \* head_width must be at most 134"),
    ({"vocab_size": 9, "d_model": 12, "num_heads": 4}, ".* must be even"),
    ({"vocab_size": 9, "num_layers": 0}, "num_layers must be at least 1, got 0"),
    ({"vocab_size": 9, "num_layers": 10**8}, "num_layers must be at most 100000, got 100000000"),
    ({"vocab_size": 9, "norm_eps": 1e39}, "norm_eps must be below 1"),
    ({"vocab_size": 9, "norm_eps": float("nan")}, "norm_eps must be above 0, got nan"),
])  # fmt: skip
def test_an_impossible_shape_is_refused_with_its_value(values: Any, message: str) -> None:
    refuses(f"a.json: {message}", from_dict, ModelConfig, values, "a.json")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("first_depth", [None, 0, 1, 2])
@pytest.mark.parametrize("asked", [(0, 0, 0), (1, 0, 2), (1, 1, 1), (4, 1, 3), (5, 9, 0)])
@pytest.mark.parametrize("family", [{}, {"norm_first": False}, {"rotary": False}, {"shifted": True}])
def test_states_at_few_positions_are_those_of_the_whole_pass_and_so_are_the_gradients(
    config: ModelConfig, family: dict[str, bool], asked: tuple[int, ...], first_depth: int | None, recompute: bool
) -> None:
    model = Denoiser(replace(config, **family), seeded()).eval()
    model.recompute, model.push = recompute, None if first_depth is None else RecordingPush(first_depth)
    x, seen = random_ids(model, 3, 10), []
    mask = torch.arange(10)[None, :] < torch.tensor([7, 10, 9])[:, None]
    order = torch.rand(3, 10, generator=seeded(1)).masked_fill(~mask, 2.0).argsort(1).argsort(1)
    where = (order < torch.tensor(asked)[:, None]) & mask
    model.blocks[1].up.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    found = []
    for narrow in (True, False):
        model.zero_grad()
        given = {"attention_mask": mask, "t": torch.ones(3), "prompt_mask": mask & ~where}
        h = model.states(x, **given, where=where) if narrow else model.states(x, **given)[where]
        h.square().sum().backward()
        found.append([h, *(p.grad for p in model.parameters() if p.grad is not None)])
    few = 0 < max(asked) <= 5 and first_depth != 2  # a push on the final state alone gets all of it
    assert seen[0] == (max(asked) if few else 10) and seen[-1] == 10, "tokens through the last MLP"
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rest", [0.02, 0.002, 0.0002])
def test_a_nearly_certain_token_has_its_gradient_in_bf16(rest: float) -> None:
    """Its probability is 1 to that type. The reference has the same operands and rounds nothing."""
    generator = seeded()
    h = torch.randn(1, 16, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(50, 16, generator=generator).bfloat16()
    exact = F.linear(h, weight).double().log_softmax(1)[0]
    bias = torch.zeros(50, dtype=torch.bfloat16)
    bias[3] = float((exact[torch.arange(50) != 3].logsumexp(0) - exact[3]).detach()) - math.log(rest)
    target = torch.tensor([3])
    head_nll(h, weight, bias, target).backward()
    found, double = h.grad, h.detach().double().requires_grad_()
    F.cross_entropy(F.linear(double, weight.double(), bias.double()), target).backward()
    error = float((found.double() - double.grad).norm() / double.grad.norm())
    assert error < 0.05, "bf16 rounds each of 50 logits by up to 1%"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "nats"), [(torch.float16, 20.0), (torch.float32, 200.0), (torch.bfloat16, 200.0)])
def test_a_token_that_is_all_but_impossible_counts_all_its_nats(dtype: torch.dtype, nats: float, bias: bool) -> None:
    """An upper bound on the NLL must not end where a probability is 0 in that type."""
    h, weight = torch.ones(2, 1, dtype=dtype, requires_grad=True), torch.tensor([[nats / 2], [-nats / 2]], dtype=dtype)
    nll = head_nll(h, weight, torch.zeros(2, dtype=dtype) if bias else None, torch.tensor([1, 0]))
    assert nll.tolist() == pytest.approx([nats, 0.0])
    nll.sum().backward()
    assert h.grad[:, 0].tolist() == pytest.approx([nats, 0.0], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("frozen", [(), ("h",), ("embedding.weight", "output_bias"), ("h", "output_bias")])
def test_nll_and_its_gradients_are_those_of_the_cross_entropy(lively: Denoiser, frozen: tuple[str, ...]) -> None:
    """Each row of another weight, as the ELBO gives."""
    generator = seeded()
    h, target = torch.randn(12, lively.config.d_model, generator=generator), random_ids(lively, 1, 12)[0]
    leaves = {"h": h, **{n: p for n, p in lively.named_parameters() if not n.startswith("blocks.")}}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in frozen)
    learned, found = [leaf for leaf in leaves.values() if leaf.requires_grad], []
    upstream = torch.rand(12, generator=generator)
    for nll in (lively.nll, lambda h, y: F.cross_entropy(lively.head(h), y, reduction="none")):
        values = nll(h, target)
        found.append([values.detach(), *torch.autograd.grad((values * upstream).sum(), learned)])
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_a_frozen_vocabulary_in_fewer_bits_has_its_logits_bias_and_nll(
    config: ModelConfig, dtype: str, tied: bool
) -> None:
    model = fresh_base(replace(config, tied=tied)).requires_grad_(False)
    model.output_bias[3] = 5.0
    h, target = torch.randn(6, config.d_model, requires_grad=True), torch.tensor([3, 3, 3, 0, 1, 2])
    wide = model.head(h)
    shrink(model, dtype)
    torch.testing.assert_close(model.head(h), wide, atol=0.1, rtol=0.02)  # of rounding to 8 bits
    with torch.autocast("cpu", torch.bfloat16):
        nll, logits = model.nll(h, target), model.head(h).float()
    torch.testing.assert_close(nll, F.cross_entropy(logits, target, reduction="none"), rtol=0.02, atol=0.02)
    assert float(torch.autograd.grad(nll.sum(), h)[0].abs().sum()) > 0


class RecordingPush:
    """A push that adds its own depth, scaled by t, and what it reads; it writes down where it was asked."""

    pointer = None

    def __init__(self, first_depth: int, reads_others: bool = False, answer_only: bool = False):
        self.first_depth, self.reads_others, self.answer_only = first_depth, reads_others, answer_only
        self.seen: list[int] = []

    def start(self, t: Tensor, prompt_mask: Tensor) -> PushAt:
        def push_at(depth: int, h: Tensor, positions: Tensor | None = None) -> Tensor:
            self.seen.append(depth)
            push = 0.1 * (depth + 1) * t[:, None, None] + 0.1 * h.tanh()
            push = push + h.mean(1, keepdim=True) if self.reads_others else push
            return push if positions is None else take(push, positions)

        return push_at


def rows_with_prompts(model: Denoiser) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """xt, t, attention mask and prompt mask of rows whose prompts and answers differ in length."""
    mask = torch.arange(9)[None, :] < torch.tensor([9, 4, 6])[:, None]
    prompt = mask & ((torch.arange(9)[None, :] < torch.tensor([2, 3, 1])[:, None]) | (torch.arange(9)[None, :] > 6))
    return random_ids(model, 3, 9), torch.tensor([0.2, 0.5, 1.0]), mask, prompt


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("how", ["plain", "reads_others", "answer_only"])
@pytest.mark.parametrize("first_depth", [0, 1, 2])
def test_a_cached_pass_equals_the_uncached_one(config: ModelConfig, first_depth: int, how: str, shifted: bool) -> None:
    model = Denoiser(replace(config, shifted=shifted), seeded()).eval()
    x, t, mask, prompt = rows_with_prompts(model)
    depths, _ = model.frozen(x, mask, 0, config.num_layers)
    model.push = RecordingPush(first_depth, **({} if how == "plain" else {how: True}))
    where = mask & ~prompt if how == "answer_only" else None
    uncached = model.states(x, t, mask, prompt, where=where)
    assert model.push.seen == list(range(first_depth, 3)), "at every depth from first_depth to the end"
    other_ids = torch.zeros_like(x)  # shows that nothing that is kept runs again
    kept = torch.stack(depths[first_depth : config.num_layers + 1 if where is not None else first_depth + 1], 2)
    assert torch.equal(model.states(other_ids, t, mask, prompt, kept, where), uncached)


@pytest.mark.parametrize(("is_kept", "rotary", "asked", "made"), [
    (True, False, 1, 0), (True, False, 9, 2), (True, True, 1, 2), (False, True, 1, 2), (False, False, 9, 2),
])  # fmt: skip
def test_keys_are_made_once_where_many_positions_read_them_or_their_place_counts(
    config: ModelConfig, is_kept: bool, rotary: bool, asked: int, made: int
) -> None:
    """Of states that were kept, though blocks run again in the backward pass; else by the frozen pass, for the push."""
    model = fresh_base(replace(config, rotary=rotary))
    model.recompute = is_kept
    x, calls = random_ids(model, 3, 9), []
    kept = torch.stack(model.frozen(x, None, 0, 1)[0], 2).requires_grad_(True) if is_kept else None
    for block in model.blocks:
        block.key.register_forward_hook(lambda *_: calls.append(1))
    model.push = RecordingPush(0, answer_only=True)
    where = (torch.arange(9) < asked).expand(3, 9)
    model.states(x, torch.ones(3), None, ~where, kept, where).sum().backward()
    assert len(calls) == made


@pytest.mark.parametrize("case", ["pre-norm", "post-norm", "rotary, grouped", "shifted"])
@pytest.mark.parametrize("first_depth", [0, 1, 2])
def test_a_pushed_answer_reads_all_else_as_the_base_has_it(config: ModelConfig, first_depth: int, case: str) -> None:
    """Behind every row stand copies of its tokens, which nothing reads; they are pushed, the row itself is not."""
    changes: dict[str, dict[str, Any]] = {
        "pre-norm": {"rotary": False}, "post-norm": {"rotary": False, "norm_first": False},
        "rotary, grouped": {"kv_heads": 1}, "shifted": {"shifted": True},
    }  # fmt: skip
    model = fresh_base(replace(config, **changes[case]))
    x, t, mask, prompt = rows_with_prompts(model)
    push, answer, unread = RecordingPush(first_depth, answer_only=True), mask & ~prompt, torch.zeros_like(mask)
    angles, h = model.angles(9), model.embed(x)
    angles = None if angles is None else tuple(torch.cat([angle, angle]) for angle in angles)
    with torch.no_grad():
        copies = h
        for depth in range(config.num_layers):
            copies = copies + push.start(t, prompt)(depth, copies) if depth >= first_depth else h
            both = model.blocks[depth](torch.cat([h, copies], 1), angles, torch.cat([mask, unread], 1))
            h, copies = both.chunk(2, 1)
        copies = (copies if first_depth < config.num_layers else h) + push.start(t, prompt)(config.num_layers, copies)
        if case == "shifted":
            copies = torch.cat([copies[:, :1], copies[:, :-1]], 1)
        model.push = push
        found = model.states(x, t, mask, prompt, where=answer)
        torch.testing.assert_close(found, copies[answer], atol=1e-4, rtol=1e-4)
