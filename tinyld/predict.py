"""A run that was loaded and answers, and several that share one pass of their base."""

import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from tinyld.answers import Record, answers, answers_in_one_pass, as_rows, examples_of, kept_columns
from tinyld.checkpoint import Base, load_adapter, load_base, load_base_of
from tinyld.composition import NONE, load_composition, members, task_features
from tinyld.config import FREELY, Reading, SampleConfig, check, check_ours
from tinyld.data import Batch, TaskRows, seed_of, slot_width
from tinyld.device import autocast, resolve_device, resolve_dtype
from tinyld.errors import TinyldError, show
from tinyld.methods import TrajectoryLora
from tinyld.model import Denoiser
from tinyld.options import base_folder, several
from tinyld.progress import Advance, further, unheard
from tinyld.rows import GAP, Example, Row
from tinyld.runs import CONFIG, RunFolder, is_foreign
from tinyld.sampler import decode
from tinyld.tasks import KEPT, Task, builtin_names, from_record, load_task, to_record, trained, unlike

MOST_AT_ONCE = 1 << 20  # tokens of texts that are written together
# Threads may ask at once, and runs that share a base hang their pushes on it by turns.
ONE_AT_A_TIME = threading.RLock()
os.register_at_fork(  # a child has this thread alone, and so must not wait for another
    before=ONE_AT_A_TIME.acquire, after_in_parent=ONE_AT_A_TIME.release, after_in_child=ONE_AT_A_TIME.release
)


@dataclass
class Run:
    """A run that was loaded: an adapter, composition, full fine-tuning or base, ready to answer."""

    path: Path
    base: Base = field(repr=False)  # with the adapters on it, but for `push`
    tasks: list[Task] = field(repr=False)  # that it was made for; none for a base, unless an adapter is folded in
    config: dict[str, Any] = field(repr=False)  # the run's config.json
    dtype: str = field(default="auto", repr=False)
    push: nn.Module | None = field(default=None, repr=False)  # on the base, which trajectory adapters share
    named: str | None = None  # the task that it was loaded for
    member: int | None = field(default=None, repr=False)  # of a composition, if one answers all rows

    @property
    def results(self) -> dict[str, Any]:
        """What training ("finetune") and `tinyld eval` ("eval") found of it."""
        return RunFolder(self.path).results

    @property
    def is_composition(self) -> bool:
        return self.config.get("kind") == "composition"

    @property
    def is_routed(self) -> bool:
        """Whether it is a composition whose tasks are told apart by their texts: each row goes to its own adapter."""
        return self.is_composition and not self.config.get("by_name")

    @property
    def adapters(self) -> list[str]:
        """A composition's members, by their runs' folders, as answers tell them."""
        paths = [Path(m["run"]) for m in self.config.get("members", [])]
        return [path.name if [p.name for p in paths].count(path.name) == 1 else str(path) for path in paths]

    @property
    def model(self) -> Denoiser:
        """The base's denoiser, pushed as this run does."""
        self.base.model.push = self.push if self.member is None else self.push.pushes[self.member]
        return self.base.model

    def rows(self, examples: Sequence[Example], task: Task) -> TaskRows:
        return TaskRows(examples, task, self.base.tokenizer, self.base.model.config.max_length)

    def predict(self, texts: Iterable[Any], task: str | None = None, **sampling: Any) -> list[Record]:
        """A dict for each text, in their order: `text`, `label`, `probability`, `probabilities`, `decoded`,
        `truncated`; `answer` where the task writes, and `filled` where it fills gaps; of a composition `adapter`, and
        `foreign` where the text is like no task's. A text is a string, or a dict by column where a task reads two,
        whose other columns are kept. A composition's adapter answers the texts that are like its own prompts or, where
        its task is named, all. `sampling`: how texts are written, the fields of SampleConfig. UsageError for a task
        that the run has not, TinyldError for a row that lacks a text."""
        task = self.named if task is None else task
        chosen = self.task_named(task)
        rows = as_rows(texts, chosen)  # which may be made while others ask
        with ONE_AT_A_TIME:
            self.let_answer(task and chosen)
            return self.answer(rows, chosen, SampleConfig.named(sampling))

    def let_answer(self, task: Task | None) -> None:
        """Lets a composition's member of that task answer all rows, or the one that was taught to read and answer as it
        does; None, and a task of no member: each row's own."""
        if self.is_composition:
            alike = [i for i, own in enumerate(self.tasks) if task and own.asks == task.asks]
            found = [i for i in alike if task and self.tasks[i].name == task.name] or alike
            several = " and ".join(self.tasks[i].name for i in found)
            check(len(found) < 2, f"{self.path}: {several} are asked as {task and task.name} is; say which by its name")
            self.member = found[0] if found else None

    def write(
        self, prompts: str | Iterable[str], length: int | None = None, temperature: float | None = None,
        seed: int = 0, **sampling: Any,
    ) -> list[str]:  # fmt: skip
        """A text for each prompt: by the run's generation task, or what fills `length` tokens, 24, at `{answer}`, on a
        base of ours as `tinyld sample` does (labels, once it has learned to write those). If no temperature is given it
        is 0.6 there, else 0. `sampling`: other fields of SampleConfig."""
        prompts = several(prompts, "prompts")
        check(all(isinstance(prompt, str) for prompt in prompts), f"a prompt is a text, got {prompts!r}")
        writers = [t for t in ([self.task_named(self.named)] if self.named else self.tasks) if t.is_generation]
        names = " and ".join(t.name for t in writers)
        check(len(writers) < 2, f"{self.path} writes for {names}: load it for one of them, task=NAME")
        writer, (sampler, usual) = next(iter(writers), None), FREELY
        if writer is not None or is_foreign(self.base.path):
            sampler, usual = SampleConfig.sampler, SampleConfig.temperature
        usual = usual if temperature is None else temperature
        how = SampleConfig.named({"sampler": sampler, "temperature": usual, "seed": seed} | sampling)
        with ONE_AT_A_TIME:
            if writer is None:
                each = [replace(how, seed=seed_of(seed, i) if i else seed) for i in range(len(prompts))]
                width = 24 if length is None else length
                return [self.fill(p, width, 1, own)[0][0] for p, own in zip(prompts, each, strict=True)]
            check(length is None, f"length has no effect: task {writer.name} says how long its texts are")
            self.let_answer(writer)
            return [found["answer"] for found in self.answer(as_rows(prompts, writer), writer, how)]

    def task_named(self, name: str | None) -> Task:
        """The run's task of that name, or its only one; for a run without tasks, any task."""
        known = {task.name: task for task in self.tasks}
        if name is None:
            made_for = f"has tasks {', '.join(known)};" if known else "was made for no task:"
            check(len(self.tasks) == 1 or self.is_routed, f"{self.path} {made_for} say which with --task")
            return self.tasks[0]
        if own := (dict(zip(self.adapters, self.tasks, strict=False)) | known).get(name):
            return own
        is_known = not known or name in builtin_names() or str(name).endswith(".toml")
        lacks = f"{self.path} has no task {show(name)}; it has {', '.join(known)}"
        check(is_known, lacks)
        asked = load_task(name)  # maybe another set of reviews, which the run knows how to read
        own = known.get(asked.name)
        if own or (known and asked.asks not in [task.asks for task in self.tasks]):
            check(own or len(known) == 1, lacks)
            before, keys = (own, KEPT) if own else (self.tasks[0], ("template", "verbalizer", "answer_tokens"))
            if differs := unlike(to_record(before), to_record(asked), keys):
                raise TinyldError(f"{self.path} was made for another task {before.name}: {differs}")
        alike = next((task for task in self.tasks if task.asks == asked.asks), asked)
        return own or asked.learned_as(alike)

    def answer(
        self, rows: Sequence[Row], task: Task, sampling: SampleConfig, advance: Advance = unheard
    ) -> list[Record]:
        """What is found of each row, (where it stands, column -> value), with the row's other columns. `advance` gets
        how many rows are done. Rows of a composition that is routed go each to the adapter whose prompts it is like."""
        found = self.found(rows, task, sampling, advance)
        return [kept | own for kept, own in zip(kept_columns(rows, task), found, strict=True)]

    def found(self, rows: Sequence[Row], task: Task, sampling: SampleConfig, advance: Advance) -> list[Record]:
        """`answer` without the rows' other columns."""
        examples, parts, found = examples_of(rows, task), [(task, list(range(len(rows))))], [Record()] * len(rows)
        if self.is_composition and rows:
            nearest, found = self.owners(examples, task)
            if self.is_routed and task is self.tasks[0]:
                parts = [(own, (nearest == i).nonzero()[:, 0].tolist()) for i, own in enumerate(self.tasks)]
        done = 0
        for own, which in parts:
            asked = [examples[i] for i in which]
            answered = answers(self, own, asked, sampling, further(advance, done)) if asked else []
            done += len(which)
            for i, record in zip(which, answered, strict=True):
                found[i] = record | found[i]
        for (_, row), record in zip(rows, found, strict=True) if task.is_infill else ():
            text = str(row[task.inputs[0]])
            record["answer"] = record["answer"] if GAP.search(text) else ""  # nothing in a blank line
            record["filled"] = record["answer"].join(GAP.split(text))
        return found

    def owners(self, examples: Sequence[Example], task: Task) -> tuple[Tensor, list[Record]]:
        """Of a composition: (the member that answers each row; its name, and whether the row is unlike all of its
        task's own, which is not asked where one member answers all)."""
        names, router = self.adapters, self.push.router
        if self.member is not None:
            found = Record(adapter=names[self.member], foreign=False)
            return torch.full((len(examples),), self.member), [found] * len(examples)
        with autocast(self.base.model.device, self.dtype):  # as the pass that pushes them reads them
            features = task_features(self.base, self.rows(examples, task))
        nearest, foreign = router.nearest(features), router.choose(features) == NONE
        pairs = zip(nearest.tolist(), foreign.tolist(), strict=True)
        return nearest, [{"adapter": names[i], "foreign": is_foreign} for i, is_foreign in pairs]

    def fill(
        self, prompt: str, length: int, num: int, sampling: SampleConfig, watch: Any = None
    ) -> tuple[list[str], int]:
        """(num texts of `length` tokens at {answer} or after the prompt, forward passes). `watch` gets the texts after
        every pass, with a `_` for each token that is not written yet. A public model that learned no task of writing
        here is asked as it was published (LLaDA's `generate`): [EOS] is a token like others."""
        way_out = "write with one of the runs that it was made of, or load it for one task in Python"
        check(self.named or not self.config.get("by_name"), f"{self.path} is asked by a task's name: {way_out}")
        self.let_answer(self.named and self.task_named(self.named))  # whoever was named in an earlier call
        tokenizer, model = self.base.tokenizer, self.model
        before, mark, after = prompt.partition("{answer}")
        check(mark or not GAP.search(prompt), f"a place in a prompt is marked by {{answer}}, got {prompt!r}")
        check("{answer}" not in after, f"a prompt holds {{answer}} once, got {prompt!r}")
        check(type(length) is int and length >= 1, f"length must be a whole number, at least 1, got {length!r}")
        begun = tokenizer.encode(before.strip())
        if not begun and not is_foreign(self.base.path):
            begun = [tokenizer.eos_id]  # in running text another text's end is before a beginning
        head = [*tokenizer.start, *begun, *tokenizer.turn]
        tail = tokenizer.encode(after.strip() and tokenizer.blank + after.strip())
        total, most = len(head) + length + len(tail) + 1, model.config.max_length
        check(total <= most, f"prompt and answer have {total} tokens, the base takes {most}")
        check(num * total <= MOST_AT_ONCE, f"{num:,} texts of {total} tokens are over {MOST_AT_ONCE:,}; lower --num")
        row = [*head, *[tokenizer.mask_id] * length, *tail, *([tokenizer.eos_id] if tail else [])]
        slot = slice(len(head), len(head) + length)
        at_once = model.rows_at_once(total, num, length)
        check(watch is None or sampling.lengths == 1, "the steps of one length are shown: leave lengths as it is")
        check(watch is None or num <= at_once, f"the steps of at most {at_once} such texts are shown; lower --num")

        def steps(x: Tensor, **_: int) -> None:
            slots = x[:, slot].tolist()
            watch([" ".join("_" if i == tokenizer.mask_id else tokenizer.decode([i]) for i in s) for s in slots])

        as_published = is_foreign(self.base.path) and not any(task.is_generation for task in self.tasks)
        never, end = ([tokenizer.mask_id], None) if as_published else (tokenizer.never_written, tokenizer.eos_id)
        texts, used, generator = [], 0, torch.Generator(model.device).manual_seed(sampling.seed)
        with autocast(model.device, self.dtype):
            for some in torch.tensor([row] * num, device=model.device).split(at_once):
                answer_mask = some == tokenizer.mask_id
                same = Batch(some, answer_mask, torch.ones_like(answer_mask), torch.arange(len(some)))
                for _, part in members(model, same):  # one, as all have the same prompt
                    out, passes = decode(
                        model, part.x0, part.answer_mask, part.attention_mask, tokenizer.mask_id, never, sampling,
                        generator, end, watch and steps,
                    )  # fmt: skip
                    texts += [tokenizer.decode(row) for row in out[:, slot].tolist()]
                    used = max(used, int(passes.max()))
        return texts, used


@dataclass
class Runs:
    """Several runs that answer each text. Adapters that push the answer alone (`--recipe fast`) share one pass of
    their base, where their prompts are the same tokens and the answer is one; another one costs little more."""

    options: Record = field(default_factory=dict)  # how runs are loaded
    runs: dict[str, Run] = field(default_factory=dict)  # by name: the folder's, or its whole path where two are alike

    def add(self, path: str | Path) -> Run:
        """Loads one more run; on a base that is loaded already that takes milliseconds."""
        path = Path(path)
        with ONE_AT_A_TIME:
            whole, short = path.resolve(), os.path.basename(os.path.abspath(path))
            name = next((n for n in (short, str(path)) if n not in self.runs), str(whole))
            check(whole not in [run.path.resolve() for run in self.runs.values()], f"{path} is given twice")
            bases = [run.base for run in self.runs.values() if run.push is not None]
            run = load(path, bases=bases, **self.options)
            check(not run.is_composition, f"{path} is a composition; name the runs that it was made of")
            run.task_named(None)  # refuses what has no task
            self.runs[name] = run
        return run

    def predict(self, texts: Iterable[Any], **sampling: Any) -> list[Record]:
        """A dict for each text: `text`, and under `tasks` what each run says of it, by the run's name."""
        rows = as_rows(texts, self.task)
        with ONE_AT_A_TIME:
            return self.answer(rows, self.task, SampleConfig.named(sampling))

    @property
    def task(self) -> Task:
        """The first run's, by whose columns rows are read."""
        return next(iter(self.runs.values())).tasks[0]

    def groups(self) -> list[list[str]]:
        """The names of the runs that share a pass, group by group."""
        found: dict[Any, list[str]] = {}
        for name, run in self.runs.items():
            task, key = run.tasks[0], (name,)
            answers_only = run.push is not None and run.push.answer_only
            if answers_only and not task.is_generation and slot_width(task, run.base.tokenizer) == 1:
                key = (id(run.base), task.asked_of(self.task))
            found.setdefault(key, []).append(name)
        return list(found.values())

    def answer(
        self, rows: Sequence[Row], task: Task, sampling: SampleConfig, advance: Advance = unheard
    ) -> list[Record]:
        examples_of(rows, task)  # refuses rows that lack a column
        if not rows:
            return []
        for name, run in self.runs.items():
            own, used = set(run.tasks[0].inputs), set(task.inputs)
            there = f"{name} reads {', '.join(own)}, which the rows have beside {', '.join(used)}"
            check(own == used or not any(own <= row.keys() for _, row in rows), f"{there}: ask it by itself")
        found: dict[str, list[Record]] = {}
        share = 1 / len(self.runs)  # of a row, that it is answered by one
        for names in self.groups() if sampling.temperature == 0 else [[name] for name in self.runs]:
            runs = [self.runs[name] for name in names]
            own = runs[0].tasks[0]
            columns = own.columns_in(task).items()
            asked = [(where, row | {k: row[v] for k, v in columns}) for where, row in rows]
            if len(runs) == 1:
                each = [runs[0].found(asked, own, sampling, further(advance, len(found) * len(rows) * share, share))]
            else:
                each = answers_in_one_pass(runs, examples_of(asked, own))
            found |= zip(names, each, strict=True)
            advance(len(found) * len(rows) * share)
        return [k | {"tasks": {n: found[n][i] for n in self.runs}} for i, k in enumerate(kept_columns(rows, task))]


@overload
def load(path: str | Path, *args: Any, **options: Any) -> Run: ...
@overload
def load(path: Sequence[str | Path], *args: Any, **options: Any) -> Runs: ...
def load(
    path: str | Path | Sequence[str | Path], base: str | Path | None = None, device: str = "auto", dtype: str = "auto",
    kept_in: str | None = None, task: str | None = None, reading: Reading | None = None, bases: Sequence[Base] = (),
) -> Run | Runs:  # fmt: skip
    """A run from its folder, on its base: where the run says, or in `base`, or the released one. Of several: `Runs`.
    `dtype` is the arithmetic's; the base's frozen matrices are kept in `kept_in`, or else as when it was trained. Of a
    composition all rows go to the adapter of `task` where that is named. `reading`: how the folder of a public model is
    read; a run says itself how its base was. A trajectory adapter is hung on its base among `bases`, of other such."""
    if not isinstance(path, str | Path):
        check(not (kept_in or task or reading), "base_dtype (kept_in), task and reading are for one run")
        together = Runs({"base": base, "device": device, "dtype": dtype})
        for each in several(path, "runs"):
            check(isinstance(each, str | Path), f"a run is the path of its folder, got {each!r}")
            together.add(each)
        check(len(together.runs) > 0, "no run is given")
        return together
    check(base is None or isinstance(base, str | Path), f"a base is the path of its folder, got {base!r}")
    path, base_path, on = base_folder(path, "run"), None if base is None else base_folder(base), resolve_device(device)
    resolve_dtype(dtype, on)
    config, where = {"kind": "base"} if is_foreign(path) else RunFolder.open(path).config, str(path / CONFIG)
    check_ours(None if config["kind"] == "base" else reading)
    if config["kind"] == "base":
        check(base_path is None, f"{path} is a base itself: --base has no effect on it")
        loaded = load_base(path, on, kept_in or "fp32", reading)
    elif config["kind"] == "composition":
        loaded = load_base_of(config, path, base_path, on, kept_in)
        load_composition(RunFolder(path), loaded)
    else:
        pushes = config["method"].get("name") == TrajectoryLora.name  # and so leaves its base to others
        loaded, _ = load_adapter(RunFolder(path), base_path, on, kept_in, bases if pushes else ())
    tasks = [from_record(made["task"], where) for made in trained(config)]
    run = Run(path, loaded, tasks, config, dtype, loaded.model.push, task)
    if task is not None:
        run.let_answer(run.task_named(task))  # which refuses another one
    run.model.requires_grad_(False)
    return run
