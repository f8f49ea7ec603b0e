"""Compositions: pushes that add up, routing by the prompt, and what is refused."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import FAST, WEATHER, fresh_base, refuses, seeded
from test_methods import attach, train
from torch import Tensor

import tinyld
from tinyld import composition
from tinyld.checkpoint import Base, method_record
from tinyld.compose import LEAST_RIGHT, compose, measure_routing, share, show
from tinyld.composition import NONE, RoutedPush, Router, batch_features, members, prompt_prototype
from tinyld.config import ModelConfig
from tinyld.data import Batch
from tinyld.errors import TinyldError, UsageError
from tinyld.methods.trajectory import TrajectoryPush
from tinyld.model import Denoiser
from tinyld.options import ComposeOptions, EvalOptions
from tinyld.predict import load
from tinyld.runs import RunFolder
from tinyld.scores import eval


def base_of(model: Denoiser) -> Base:
    return Base(Path("base"), model, None, "fingerprint")  # type: ignore[arg-type]


def trained_member(config: ModelConfig, case: str, seed: int = 0) -> tuple[dict[str, Any], TrajectoryPush]:
    """(its record, its push), of a training of its own."""
    model = fresh_base(config)
    method = attach(model, case, seed)
    train(model, method, updates=2 + seed)
    return {"run": f"run{seed}", "task": {"name": f"task{seed}"}, "method": method_record(method)}, method.push


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: c.update(members=[]), "needs at least one adapter"),
    (lambda c: c["members"][0].update(method="heavy"), "members: 1: method: 'heavy' is not of type dict"),
    (lambda c: c["members"][0]["method"].update(ranks=[10**12] * 3), r"holds [\d,]+ values, but config.json asks"),
    (lambda c: c["members"][0].update(method={"name": "weight-lora"}), "weight-lora; only trajectory-lora adapters"),
    (lambda c: c["members"].append(c["members"][0]), "holds 0 values, but config.json asks"),
])  # fmt: skip
def test_a_composition_that_is_off_is_refused(config: ModelConfig, tmp_path: Path, change: Any, message: str) -> None:
    folder, (record, push) = RunFolder.create(tmp_path / "both"), trained_member(config, "best-1")
    routed = RoutedPush([push], Router(1, config.d_model))
    composition.save_composition(folder, base_of(fresh_base(config)), [record | {"data": {}}], routed, False)
    written = folder.config
    change(written)
    folder.write_json("config.json", written)
    refuses(message, composition.load_composition, folder, base_of(fresh_base(config)))


def prompts(config: ModelConfig, rows: int = 6) -> tuple[Tensor, Tensor]:
    """(x, prompt_mask): rows of 12 tokens, the answer at 6, row 1 padded behind 9."""
    x = torch.randint(5, config.vocab_size, (rows, 12), generator=seeded(3))
    prompt_mask = torch.ones_like(x, dtype=torch.bool)
    prompt_mask[:, 6] = prompt_mask[1, 9:] = False
    return x, prompt_mask


def test_features_are_the_prompts_own_whatever_the_padding(config: ModelConfig) -> None:
    model, (x, prompt_mask) = fresh_base(config), prompts(config)

    def features(x: Tensor, prompt_mask: Tensor = prompt_mask) -> Tensor:
        return batch_features(model, Batch(x, ~prompt_mask, torch.ones_like(prompt_mask), torch.arange(len(x))))

    before = features(x)
    torch.testing.assert_close(before[1:2], features(x[1:2, :9], prompt_mask[1:2, :9]))
    changed = x.clone()
    changed[0, 6], changed[1, 10] = 4, 5  # neither the answer is read, nor padding
    torch.testing.assert_close(features(changed), before)
    changed[0, 3] = x[0, 3] % 90 + 10
    moved = (features(changed) - before).abs().amax(1)
    assert (moved > 1e-3).tolist() == [True, *[False] * 5]


def test_what_a_tasks_own_prompts_vary_by_is_not_far() -> None:
    router = Router(2, 2)
    router.prototype[1] = torch.tensor([4.0, 1.0])
    features = torch.tensor([[3.9, 0.1], [0.1, 0.9]])
    assert router.nearest(features).tolist() == [1, 0], "by the means alone"
    router.directions[:, 0] = torch.tensor([0.99, 0.0])  # both vary in the first feature, and not in the second
    assert router.nearest(features).tolist() == [0, 1]


def test_a_prompt_that_is_unlike_all_of_a_tasks_own_is_refused() -> None:
    """What lies off the directions in which a task's prompts vary is strange; along them it may lie far."""
    router = Router(2, 2)
    router.directions, router.prototype[1, 0] = torch.tensor([[[0.99, 0.0]], [[0.0, 0.99]]]), 20.0
    along = torch.linspace(-3, 3, 200)[:, None]
    own = [torch.zeros(200, 2), torch.zeros(200, 2)]
    own[0][:, :1], own[1][:, 1:2] = along, along
    own[1][:, 0] += 20.0
    assert (router.choose(torch.full((1, 2), 99.0)) != NONE).all(), "nothing is refused before limits are known"
    router.set_limits(own)
    assert float((router.choose(own[0]) == 0).float().mean()) >= 0.98
    assert float((router.choose(own[1]) == 1).float().mean()) >= 0.98
    strange = torch.zeros(2, 2)
    strange[0, 1], strange[1, 0] = 2.0, 23.0
    assert router.choose(strange).tolist() == [NONE, NONE] and router.nearest(strange).tolist() == [0, 1]


def test_a_row_gets_its_own_adapters_push(config: ModelConfig, tmp_path: Path) -> None:
    """Of a batch that mixes two tasks' rows, each member is asked for the rows whose prompts are like its own."""
    (x, prompt_mask), owner = prompts(config), [0, 1, 0, 0, 1, 1]
    for row in range(2, 6):  # rows 2, 3 are nearly row 0; rows 4, 5 nearly row 1
        x[row, 1:], prompt_mask[row] = x[owner[row], 1:], prompt_mask[owner[row]]
    records, pushes = zip(*(trained_member(config, case, i) for i, case in enumerate(("pointer", "fast"))), strict=True)
    base, answer = base_of(fresh_base(config)), torch.arange(12)[None] == torch.full((6, 1), 6)
    batch = Batch(x, answer, prompt_mask | answer, torch.arange(6) + 10)
    features = batch_features(base.model, batch).detach()
    router = Router(2, config.d_model)
    for i in (0, 1):
        router.prototype[i] = features[torch.tensor(owner) == i].mean(0)
    folder = RunFolder.create(tmp_path / "both")
    routed, recorded = RoutedPush(pushes, router), [record | {"data": {}} for record in records]
    composition.save_composition(folder, base, recorded, routed, False)
    composition.load_composition(folder, base)
    hung = base.model.push
    asked = list[list[int]]()
    for rows, own in members(base.model, batch):
        asked.append(rows.tolist())
        member = owner[asked[-1][0]]
        assert base.model.push is hung.pushes[member] and torch.equal(own.x0, x[rows]), "it hangs there meanwhile"
        assert own.rows.tolist() == [10 + row for row in asked[-1]]
        stored, trained = (dict(push.named_parameters()) for push in (base.model.push, pushes[member]))
        assert all(torch.equal(stored[name], tensor) for name, tensor in trained.items())
    assert asked == [[0, 2, 3], [1, 4, 5]] and base.model.push is hung
    base.model.push = pushes[0]
    assert [rows.tolist() for rows, _ in members(base.model, batch)] == [list(range(6))], "no composition"


def test_prompts_that_are_all_the_same_have_a_prototype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their covariance is 0, but in fp32 noise, of which some has no eigenvectors that LAPACK finds."""
    base: Any = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(d_model=384)))
    for seed in range(40):
        same = torch.randn(1, 384, generator=seeded(seed)).expand(60, -1) / 20
        monkeypatch.setattr("tinyld.composition.task_features", lambda *_, same=same: same)
        found = prompt_prototype(base, range(60))  # type: ignore[arg-type]
        assert all(tensor.isfinite().all() for tensor in found.values())


def test_what_is_refused_does_not_depend_on_the_order_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of labels by turns, of which one has texts that are more alike."""
    monkeypatch.setattr("tinyld.compose.task_features", lambda base, of: torch.tensor(of)[:, None].expand(-1, 2))
    monkeypatch.setattr("tinyld.compose.stranger_rows", lambda *_: None)

    class Rows(list[float]):
        task = None

    (found,) = measure_routing(None, Router(1, 2), {"a": Rows([0.1, 3.0] * 50)})  # type: ignore[arg-type, dict-item]
    assert found["wrongly_refused"] < 0.1


def test_tasks_that_can_be_told_apart_are_routed_and_measured(
    fast: list[Path], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = (tmp_path / "one", tmp_path / "two")
    for name, ending, out in zip("ae", ("sea sea", "down down"), runs, strict=True):
        texts = [f"the {a} {b} is {c}" for a in ("rain", "sun", "sky") for b in ("and", "of") for c in WEATHER[:9]]
        rows = [f'"{text} {ending}",{("sad", "happy")[i % 2]}' for i, text in enumerate(texts)]
        (tmp_path / f"{name}.toml").write_text((place / "a.toml").read_text().replace('"a.csv"', f'"{name}/dev.csv"'))
        (tmp_path / name).mkdir()
        (tmp_path / name / "dev.csv").write_text("\n".join(["text,label", *rows]))
        tinyld.finetune(tmp_path / f"{name}.toml", base=place / "base", out=out, **FAST)
    options = ComposeOptions(runs=runs, data=tmp_path, out=tmp_path / "both", quiet=True, dtype="fp32")
    result = compose(options)
    assert [r["right"] for r in result["routing"]] == [1.0, 1.0]
    for route in result["routing"]:
        assert route["n"] == 54 and route["wrongly_refused"] < 0.2
        assert route["wrongly_accepted"] < 0.2, "bundled text is like neither task"
    for drop in result["drops"]:
        assert drop["n"] == 54 and drop["own"] == drop["composed"] and drop["drop"] == 0
        assert drop["own_nats"] == pytest.approx(drop["composed_nats"], abs=1e-4)
    folder = RunFolder.open(tmp_path / "both")
    stored = sum(tensor.numel() for tensor in folder.read_tensors("adapter.safetensors").values())
    assert folder.read_json("results.json")["compose"] == result and result["parameters"] == stored
    show(result, options)
    title, *out = capsys.readouterr().out.splitlines()
    assert title.startswith(str(tmp_path)) and max(map(len, out)) <= 80 and any("points lost" in line for line in out)
    with pytest.raises(TinyldError, match="holds .*, which this command reads; choose another --out"):
        compose(replace(options, out=runs[0], force=True))
    tinyld.finetune(tmp_path / "a.toml", base=place / "base", out=tmp_path / "again", seed=1, **FAST)
    refuses("one and .*again are both of a task a", compose, replace(options, runs=(runs[0], tmp_path / "again")))
    (runs[0] / "prototype.safetensors").unlink()
    refuses("no prototype.safetensors in .*one", compose, replace(options, out=tmp_path / "new"))


def test_of_two_that_write_the_one_that_is_named_writes(place: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("tell", "told")):
        task = (place / "tell.toml").read_text().replace('"tell.csv"', f'"{place}/tell.csv"')
        (tmp_path / f"{name}.toml").write_text(task)
        tinyld.finetune(tmp_path / f"{name}.toml", base=place / "base", out=tmp_path / name, seed=seed, **FAST)
    both = tmp_path / "both"
    compose(ComposeOptions(runs=(tmp_path / "tell", tmp_path / "told"), out=both, limit=4, quiet=True))
    with pytest.raises(UsageError, match="both writes for tell and told: load it for one of them, task=NAME"):
        load(both).write("rain")
    for name in ("tell", "told"):
        assert load(both, task=name).write("rain") == load(tmp_path / name).write("rain")


def test_tasks_of_files_that_have_one_name_are_told_apart_by_their_runs(place: Path, tmp_path: Path) -> None:
    runs = tmp_path / "run-rain", tmp_path / "run-snow"
    for seed, (name, out) in enumerate(zip(("rain", "snow"), runs, strict=True)):
        for file in ("a.toml", "a.csv"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / file).write_bytes((place / file).read_bytes())
        tinyld.finetune(tmp_path / name / "a.toml", base=place / "base", out=out, seed=seed, **FAST)
    result = compose(ComposeOptions(runs=runs, out=tmp_path / "both", limit=20, quiet=True, dtype="fp32"))
    assert [drop["task"] for drop in result["drops"]] == ["run-rain", "run-snow"]
    both = load(tmp_path / "both", dtype="fp32")
    for path in runs:
        (own,), (alone,) = both.predict(["rain"], task=path.name), load(path, dtype="fp32").predict(["rain"])
        assert own["adapter"] == path.name and own["probability"] == alone["probability"]
    eval(EvalOptions(runs=(both.path,), quiet=True))
    assert list(both.results["eval"]) == ["run-rain/dev", "run-snow/dev"]
    with pytest.raises(UsageError, match="has no task 'a'; it has run-rain, run-snow"):
        both.predict(["rain"], task="a")


def test_a_composition_knows_its_tasks_by_their_runs_too(fast: list[Path], tmp_path: Path) -> None:
    compose(ComposeOptions(runs=tuple(fast[:2]), out=tmp_path / "both", limit=4, quiet=True))
    both = load(tmp_path / "both")
    for path, task in zip(fast[:2], both.tasks, strict=True):
        assert path.name != task.name and both.task_named(path.name) is task


def test_a_share_is_not_rounded_below_the_least_that_is_right() -> None:
    assert share(torch.arange(40) < 38) >= LEAST_RIGHT


def test_one_that_was_killed_is_made_again(fast: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ComposeOptions(runs=tuple(fast[:2]), limit=4, out=tmp_path / "both", quiet=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        compose(options)
    assert (tmp_path / "both" / "adapter.safetensors").exists()
    compose(options)


def test_tasks_that_cannot_be_told_apart_are_to_be_named(
    fast: list[Path], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ComposeOptions(runs=(fast[0], fast[2]), out=tmp_path / "both", dtype="fp32", limit=20)
    result = compose(options)
    assert min(r["right"] for r in result["routing"]) < 0.95 and result["by_name"]
    assert all(d["drop"] == 0 for d in result["drops"]), "each answers its own rows"
    assert "name the task of all texts when you ask" in capsys.readouterr().err
    of_ten = compose(replace(options, limit=10, out=tmp_path / "of-ten"))  # too few to refuse a text that is foreign
    assert sum(r["wrongly_accepted"] for r in of_ten["routing"]) == pytest.approx(1), "each is held for one task's own"
    with pytest.raises(UsageError, match="a.csv cannot be the rows of a, c all at once: give a folder with TASK/dev"):
        compose(replace(options, data=place / "a.csv", out=tmp_path / "new"))
    run = load(tmp_path / "both", dtype="fp32")
    (tmp_path / "alias.toml").write_text((place / "a.toml").read_text().replace('"a.csv"', f'"{place}/a.csv"'))
    with pytest.raises(UsageError, match="a and c are asked as alias is; say which by its name"):
        run.predict(["the rain is cold"], task=str(tmp_path / "alias.toml"))
    refuses("is asked by a task's name: write with one of the runs", run.write, "the rain", kind=UsageError)
    named, alone = load(run.path, dtype="fp32", task="c"), load(fast[2], dtype="fp32")
    assert named.write("the rain", 3) == alone.write("the rain", 3)
    for path, task in zip(options.runs, run.tasks, strict=True):
        (answer,) = run.predict(["the rain is cold"], task=task.name)
        assert answer["adapter"] == path.name, "named, it answers also what is unlike its own texts"
        assert answer["probability"] == load(path, dtype="fp32").predict(["the rain is cold"])[0]["probability"]
