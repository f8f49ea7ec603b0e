"""What copies from a prompt: chances that add up, the token that is pointed at, names that were never learned."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import QUICK, assert_refused, cli, fresh_base, seeded
from test_methods import attach, noised_batch, train

import tinyld
from tinyld.config import ModelConfig, TrainConfig
from tinyld.data import Batch
from tinyld.diffusion import noise_counted, token_nll
from tinyld.optim import Optimizer
from tinyld.pointer import Copies, Pointer

pytestmark = pytest.mark.usefixtures("elsewhere")
MASK, COLON = 4, 5


def test_chances_add_up_and_are_the_same_by_logits_and_by_nats() -> None:
    """Of a token that stands in the row twice, of unlikely ones, and where nothing may be copied."""
    logits = 8 * torch.randn(3, 50, generator=seeded())
    ids = torch.tensor([[7, 9, 7, 11]]).expand(3, 4)
    odds = torch.tensor([[0.2, 0.1, 0.0, 0.0], [1e6, 0.0, 0.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
    copies, targets = Copies(odds, ids), torch.arange(50)
    nll = torch.stack([-logits.log_softmax(1)[:, v] for v in targets])
    found = torch.stack([copies.nll(nll[v], targets[v].expand(3)) for v in targets], 1)
    torch.testing.assert_close(found.neg().exp().sum(1), torch.ones(3))
    torch.testing.assert_close(copies.logits(logits).log_softmax(1), -found, rtol=1e-4, atol=1e-4)
    expected = logits.softmax(1)
    for token, its in ((7, 0), (9, 1), (11, 3)):
        expected[:, token] += odds[:, its]
    torch.testing.assert_close(found.neg().exp(), expected / expected.sum(1, keepdim=True), rtol=1e-3, atol=1e-7)


def test_a_token_without_logits_is_not_copied_and_spoils_nothing() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    odds = torch.tensor([[3.0, 2.0, 0.0]], requires_grad=True)
    found, before = Copies(odds, torch.tensor([[2, 0, 1]])).logits(logits), logits.log_softmax(1)
    assert found[0, 2] == -torch.inf and found[0, 1] == before[0, 1] and found[0, 0] > before[0, 0]
    found[:, :2].sum().backward()
    assert odds.grad.isfinite().all(), "also of odds that are none"


def test_what_is_pointed_at_is_in_the_prompt_and_counts_where_its_token_stands_first() -> None:
    pointer = Pointer(16, 16, None)
    states, h = torch.randn(2, 6, 16, generator=seeded()), torch.zeros(2, 1, 16)
    ids = torch.tensor([[7, 8, 9, 8, 6, 6], [7, 8, 9, 10, 6, 6]])
    prompt = torch.tensor([[True] * 4 + [False] * 2, [False] * 6])
    h[:, 0] = states[:, 3]  # asks for what stands there
    with torch.no_grad():
        for matrix in (pointer.query, pointer.key):
            matrix.copy_(3 * torch.eye(16))
        pointer.bias.fill_(2.0)
        odds = pointer(h, states, prompt, torch.tensor([[4], [4]]))(ids).odds
    assert odds.shape == (2, 1, 6) and odds[0, 0].argmax() == 1, "the first place of the token at 3"
    torch.testing.assert_close(odds[0].sum(), torch.tensor(2.0).exp())
    assert odds[0, 0, 3:].eq(0).all() and odds[1].eq(0).all(), "nothing of what is no prompt, nor where there is none"


@torch.no_grad()
def test_what_is_written_beside_a_mask_and_before_says_what_is_copied_next() -> None:
    """f, position by position, of a prompt on both sides of the answer."""
    pointer, x = Pointer(2, 8, seeded()), [7, 8, 9, 7, MASK, 8, MASK, 9, 8, 6]
    pointer.written.copy_(torch.rand(26, generator=seeded()))
    weights = 10 * pointer.written[:25].view(5, 5)
    prompt, positions = torch.tensor([[True] * 4 + [False] * 3 + [True] * 3]), torch.tensor([[6, 4]])
    found = pointer.by_written(torch.tensor([x]), prompt, positions)
    for nth, i in enumerate(positions[0].tolist()):
        for j in range(len(x)):
            beside = [(a, b) for a in range(-2, 3) for b in range(-2, 3) if max(i + a, j + b) < len(x) and j + b >= 0]
            alike = [
                (a, b)
                for a, b in beside
                if x[i + a] == x[j + b] and (a == b or x[j + b] != (x[j + a] if 0 <= j + a < len(x) else None))
            ]
            expected = sum(float(weights[a + 2, b + 2]) for a, b in alike)
            expected += 10 * float(pointer.written[25]) * (x[j] in x[4:7])
            assert float(found[0, nth, j]) == pytest.approx(expected, rel=1e-5), (i, j)
    h, read = torch.randn(1, 2, 8, generator=seeded()), torch.randn(1, 10, 8, generator=seeded())
    copies, ids = pointer(h, read, prompt, positions), torch.arange(10)[None]
    odds, factor = copies(ids).odds, pointer.by_written(ids, prompt, positions).exp()
    pointer.written.zero_()
    torch.testing.assert_close(odds, factor * copies(ids).odds)


@pytest.mark.parametrize("case", ["pointer", "fast-pointer", "weight-lora-pointer"])
def test_names_that_were_never_learned_are_copied(config: ModelConfig, case: str) -> None:
    """Rows `name :` -> the name. Half of the names are learned; without a pointer the others have next to no chance."""
    names = torch.arange(20, config.vocab_size)
    learned, new = names[::2], names[1::2]

    def rows(of: torch.Tensor) -> Batch:
        x = torch.stack([of, torch.full_like(of, COLON), of], 1)
        return Batch(
            x, torch.tensor([False, False, True]).expand_as(x), torch.ones_like(x).bool(), torch.arange(len(x))
        )

    def chance(of: torch.Tensor) -> float:
        with torch.no_grad():
            return float(token_nll(model, noise_counted(rows(of), MASK, seeded()))[0].neg().exp().mean())

    found = {}
    for width in (0, 4):
        model = fresh_base(config)
        method = attach(model, case, pointer=width)
        optimizer = Optimizer(method.own, TrainConfig(steps=60, lr=0.03))
        for _ in range(60):
            model.zero_grad()
            token_nll(model, noise_counted(rows(learned), MASK, seeded()))[0].mean().backward()
            optimizer.step()
        found[width] = chance(new)
    assert found[4] > 0.5 > 0.1 > found[0]


def test_only_what_writes_has_a_pointer_of_at_most_a_third_of_what_is_stored(place: Path) -> None:
    made = {**QUICK, "method": "trajectory-lora", "base": place / "base"}
    for options, width in (({"ranks": "2,2,2"}, 32), ({"pointer": 3, "ranks": "2,2,2"}, 3), ({"budget": "9%"}, None)):
        run = tinyld.finetune(place / "tell.toml", out="run", force=True, **made, **options)
        own, limit = run.config["method"]["pointer"], 0.09 * run.config["parameters"]["base_parameters"]
        stored = run.config["parameters"]["stored_parameters"]
        assert own == width or (0 < own < 32 and Pointer.num_parameters(own, 32) < 0.4 * limit and stored <= limit)
        assert tinyld.load("run").write(["rain"]) == run.write(["rain"])
    for options in ({"blocks": 0}, {"recipe": "paper", "blocks": 0}, {"pointer": 0}):
        run = tinyld.finetune(place / "tell.toml", out="run", force=True, **{"ranks": "2,2,2"} | made | options)
        assert run.config["method"]["pointer"] == 0
    assert tinyld.finetune(place / "mood.toml", out="labels", **made, budget="9%").config["method"]["pointer"] == 0
    for method in ("full", "weight-lora", "bitfit"):
        run = tinyld.finetune(place / "tell.toml", out=method, **made | {"method": method})
        assert run.config["method"]["pointer"] == 32 and tinyld.load(method).write(["rain"]) == run.write(["rain"])
    assert_refused(cli("merge", "weight-lora", "--out", "no"), 1, "by a pointer, which no base has")
    asked = ["--set", "pointer=4", "--base", place / "base", "--out", "no"]
    assert_refused(cli("finetune", "--task", place / "mood.toml", *asked), 2, "it has no effect on labels")
    assert_refused(cli("finetune", "--task", place / "tell.toml", *asked, "--set", "blocks=0"), 2, "blocks must be 1")


def test_gradients_are_finite_however_unlikely_a_token_is() -> None:
    logits = torch.tensor([[0.0, -200.0, -90.0]], requires_grad=True)
    odds = torch.tensor([[0.05, 0.0]], requires_grad=True)
    for target in (1, 2):
        nll = F.cross_entropy(logits, torch.tensor([target]), reduction="none")
        Copies(odds, torch.tensor([[1, 0]])).nll(nll, torch.tensor([target])).sum().backward()
    assert logits.grad.isfinite().all() and odds.grad.isfinite().all()  # type: ignore[union-attr]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("case", ["pointer", "fast-pointer", "full", "best-0", "best-2", "paper"])
@torch.no_grad()
def test_logits_and_nats_of_a_pass_are_those_of_one_distribution(config: ModelConfig, case: str, shifted: bool) -> None:
    """Of all positions or few; without a pointer, too."""
    model, noised = fresh_base(replace(config, shifted=shifted)), noised_batch(config)
    with torch.enable_grad():
        train(model, attach(model, case))
    told = noised.xt, noised.t, noised.attention_mask, noised.prompt_mask
    found = model(*told, where=torch.ones_like(noised.is_masked)).unflatten(0, noised.xt.shape)
    nll = -found.log_softmax(-1).gather(-1, noised.x0[..., None])[..., 0][noised.is_masked]
    torch.testing.assert_close(token_nll(model, noised)[0], nll, rtol=1e-4, atol=1e-4)
    first = noised.is_masked & (noised.is_masked.cumsum(1) == 1)
    torch.testing.assert_close(model(*told, where=first), found[first], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shifted", [False, True])
@torch.no_grad()
def test_fresh_pushes_of_all_positions_and_of_the_answer_alone_copy_the_same(
    config: ModelConfig, shifted: bool
) -> None:
    """And when they look again, at what is written by now."""
    found, by_now, noised, close = {}, {}, noised_batch(config), {"rtol": 1e-4, "atol": 1e-4}
    for case in ("pointer", "fast-pointer"):
        model = fresh_base(replace(config, shifted=shifted))
        method = attach(model, case)
        method.push.pointer.written.copy_(torch.rand(26, generator=seeded()))
        told = noised.xt, noised.t, noised.attention_mask, noised.prompt_mask
        found[case], copies = model.look(*told, where=noised.is_masked)
        by_now[case] = copies(noised.x0).odds
        _, everywhere = model.look(*told, where=torch.ones_like(noised.is_masked))
        whole = everywhere(noised.x0).odds.view(*noised.xt.shape, -1)[noised.is_masked]
        torch.testing.assert_close(by_now[case], whole, **close)
        assert not torch.allclose(copies(noised.xt).odds, by_now[case], **close)
    torch.testing.assert_close(*found.values(), **close)
    torch.testing.assert_close(*by_now.values(), **close)


def test_what_is_likeliest_to_be_copied_is_not_what_may_not_be_written_nor_what_the_base_alone_would_write() -> None:
    copies = Copies(torch.tensor([[1.0, 3.0, 0.0, 5.0], [0.0] * 4]), torch.tensor([[7, 9, 7, 11]]).expand(2, 4))
    for forbidden, first, chance in (([], 11, 0.5), ([11, 2], 9, 0.6), ([9, 11], 7, 0.5)):
        token, likely = copies.likeliest(forbidden)
        assert token[0] == first and likely.tolist() == pytest.approx([chance, 0.0])


@torch.no_grad()
def test_a_number_with_a_digit_twice_is_copied_whole() -> None:
    """That the prompt's second 8 is like the first says nothing against it once the first is written."""
    pointer, x = Pointer(2, 8, seeded()), [31, 8, 8, 7, 9, 31, 8, MASK, 9]
    weights = torch.zeros(5, 5)
    weights[1, 1], weights[0, 0], weights[1, 2], weights[1, 0] = 3.4, 2.1, -2.7, 0.9  # as webnlg teaches them
    pointer.written[:25] = weights.flatten() / 10
    prompt = torch.tensor([[True] * 5 + [False] * 4])
    assert int(pointer.by_written(torch.tensor([x]), prompt, torch.tensor([[7]]))[0, 0, :5].argmax()) == 2
