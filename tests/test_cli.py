"""The command line: every verb once on a tiny base, what goes to stdout and stderr, and every error as one line."""

import dataclasses
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import Ran, assert_refused, cli, good, pressing_ctrl_c, python

from tinyld import verbs
from tinyld.cli import MAIN, VERBS
from tinyld.config import ModelConfig, from_dict
from tinyld.data import TaskRows
from tinyld.evaluate import label_scores
from tinyld.methods import METHODS as METHOD_CLASSES
from tinyld.options import ARGUMENT, DemoOptions, EvalOptions
from tinyld.runs import ADAPTER, MANIFEST, MODEL, RESULTS, RunFolder
from tinyld.scores import show, show_classes

pytestmark = pytest.mark.usefixtures("elsewhere")
TINY = "--preset nano --set d_model=32 --set num_layers=2 --set num_heads=2 --set d_ff=64".split()
TINY += ["--max-length", "48", "--vocab-size", "300"]
METHODS: dict[str, list[str]] = {
    "full": [],
    "weight-lora": ["--set", "rank=2"],
    "adapters": ["--set", "rank=2"],
    "bitfit": [],
    "trajectory-lora": ["--set", "ranks=4,2,1", "--set", "blocks=1"],
}
Adapters = dict[str, tuple[Path, Ran]]  # method -> the run, what finetune said
TRAJECTORY = ["--method", "trajectory-lora", *METHODS["trajectory-lora"]]


@pytest.fixture(scope="session")
def place(place: Path) -> Path:
    """Beside a tiny base and its tasks another base, a task of one-token answers, broken files. Tests leave it as it
    is."""
    toml = 'template = "{text} it is {answer} ."\nverbalizer = {red = "sun", blue = "sea"}\n'
    (place / "colours.toml").write_text(toml + 'data = {train = "colours.csv", dev = "colours.csv"}\n')
    (place / "colours.csv").write_text("text,label\nthe rose,red\nthe sky,blue\na sea,blue\n")
    (place / "rule.txt").write_text("a line\n________\n")
    (place / "tabs.txt").write_text("sad\train\nhappy\tsun\n")
    (place / "twice.csv").write_text("text,label\nrain,sad\nsun,happy\ntext,label\nsea,sad\n")
    (place / "sparse.jsonl").write_text('{"text": "rain", "id": 1}\n{"text": "sun", "id": 2, "label": "happy"}\n')
    (place / "colours.txt").write_bytes((place / "colours.csv").read_bytes())
    (place / "quoted.tsv").write_text('text\t"label"\na b\t"x"\nc d\t"y"\ne f\t"x"\n')
    (place / "latin1" / "mood").mkdir(parents=True)
    for split in ("train", "dev"):
        for folder in (place / "latin1", place / "latin1" / "mood"):
            (folder / f"{split}.csv").write_bytes(b"text,label\ncaf\xe9,sad\n")
    (place / "latin1.txt").write_bytes(b"the sky\n" * 50 + b"caf\xe9\n")
    (place / "loop.csv").symlink_to("loop.csv")
    good("pretrain", "--data", place / "text.txt", *TINY, "--steps", 5, "--out", place / "other", "--quiet")
    return place


@pytest.fixture(scope="session")
def adapters(place: Path) -> Adapters:
    """A run of each method on the mood task, with what it printed."""
    outs = {method: place / f"mood-{method}" for method in METHODS}
    return {m: (out, finetune(place, out, "--method", m, *METHODS[m], "--json")) for m, out in outs.items()}


@pytest.fixture(scope="session")
def pair(place: Path, adapters: Adapters) -> tuple[Path, Path]:
    """Two trajectory-lora runs of one base."""
    finetune(place, place / "colours", "--task", place / "colours.toml", *TRAJECTORY, "--quiet")
    return adapters["trajectory-lora"][0], place / "colours"


def finetune(place: Path, out: Path, *args: object) -> Ran:
    task = [] if "--task" in args else ["--task", place / "mood.toml"]
    return good("finetune", "--base", place / "base", *task, "--steps", 3, "--batch-size", 4, "--out", out, *args)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    ran = good(verb, "--help")
    assert f"{verb} [OPTIONS]" in ran.stdout and VERBS[verb].example in ran.stdout and ran.stderr == ""
    assert ran.stdout == good(verb, "-h").stdout and all(len(line) <= 80 for line in ran.stdout.splitlines())
    options = [line.split()[0] for line in ran.stdout.splitlines() if line.startswith("  -")]
    assert len(options) <= 24 and "-h," in options
    fields = [f for f in dataclasses.fields(VERBS[verb].options) if f.metadata["group"] != ARGUMENT]
    if "--set" in options:  # also where a run is required
        shown = good(verb, "--set", "help").stdout
        assert all(f.name in shown for f in fields) and not list(Path().iterdir())
    else:
        assert all(f.metadata["group"] for f in fields), "no option is out of reach"


def test_the_help_lists_every_verb_and_the_version_is_printed() -> None:
    text = good("--help").stdout
    assert text == cli().stdout == good("-h").stdout, "and without any word"
    lines = [line for line in text.splitlines() if line.startswith("  ") and line[2] != " "]
    assert [line.split()[0] for line in lines] == list(VERBS) and all(len(line) <= 80 for line in text.splitlines())
    assert all((VERBS[name].example in text) == (i < MAIN) for i, name in enumerate(VERBS))
    assert good("--version").stdout.startswith("tinyld 0.")


def test_help_info_and_tasks_import_no_torch(place: Path) -> None:
    code = """
import sys
import tinyld
from tinyld.cli import app
for args in (["--help"], ["finetune", "--help"], ["info", sys.argv[1]], ["info", sys.argv[1], "--json"], ["tasks"]):
    try:
        app(args)
    except SystemExit as end:
        assert end.code == 0, args
    assert not {"torch", "numpy", "tokenizers", "safetensors"} & set(sys.modules), args
"""
    ended = python("-c", code, str(place / "mood"))
    assert ended.returncode == 0, ended.stderr


def test_pretraining_goes_by_default_to_a_folder_named_by_preset_and_seed(place: Path) -> None:
    made = ["--data", place / "text.txt", *TINY, "--tokens", 100, "--seed", 3, "--dtype", "fp32", "--json"]
    ran = good("pretrain", *made)
    assert "parameters" in ran.stderr and ran.json["run"] == "runs/base-nano-s3" and ran.json["nll_bound"] > 0
    config = RunFolder(Path("runs/base-nano-s3")).config
    assert (config["train"]["batch_size"], config["train"]["flat"]) == (16, 0.8)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_finetuned_and_evaluated(method: str, place: Path, adapters: Adapters) -> None:
    out, ran = adapters[method]
    summary = ran.json
    assert (summary["method"], summary["steps"], summary["rows"]) == (method, 3, 40) and method in ran.stderr
    assert summary["trainable_parameters"] == summary["stored_parameters"] > 0
    config = RunFolder(out).config
    assert config["method"]["name"] == method and config["train"]["steps"] == 3
    usual = METHOD_CLASSES[method].usual(from_dict(ModelConfig, RunFolder(place / "base").config["model"], "base"))
    assert (config["train"]["lr"], config["train"]["optimizer"]) == usual
    assert not (out / "checkpoints").exists()
    (found,) = good("eval", out, "--json").json
    assert found["n"] == 40 and found["run"] == str(out)
    assert found["accuracy"] == pytest.approx(summary["dev_accuracy"])
    assert found["scored_accuracy"] == pytest.approx(summary["dev_scored_accuracy"])
    assert ("are no label's word, and wrong; predict's" in ran.stderr) == (found["unreadable"] > 0.05)
    assert found["nll_bound"] == pytest.approx(summary["dev_nll_bound"], rel=0.05)
    assert RunFolder(out).read_json(RESULTS)["eval"]["mood/dev"]["accuracy"] == found["accuracy"]


def test_a_table_says_what_the_json_says_and_quiet_ends_all_notes(place: Path, adapters: Adapters) -> None:
    run, loud = adapters["bitfit"]
    found = good("eval", run, "--json", "--split", "test").json[0]
    table = good("eval", run, "--split", "test", "--quiet")
    assert table.stderr == "" and f"{found['nll_bound']:.4f}" in table.stdout and " test " in table.stdout
    quiet = finetune(place, Path("quiet"), "--method", "bitfit", "--quiet")
    assert "bitfit on mood" in loud.stderr and quiet.stderr == ""
    assert re.search(r"dev rows +\d+ *\ndev accuracy % +\d+\.\d", quiet.stdout)


@pytest.mark.parametrize(("letters", "fits"), [(5, True), (15, False)])
def test_mistakes_are_listed_where_no_matrix_fits(letters: int, fits: bool, capsys: pytest.CaptureFixture[str]) -> None:
    labels, gold = [letter * letters for letter in "abcde"], np.repeat(np.arange(5), 4)
    scores = label_scores(gold, np.where(np.arange(20) < 3, 4, gold), gold, labels)
    show_classes({"task": "t", "split": "dev"} | scores, "x: ")
    out = capsys.readouterr().out
    assert ("by what was answered" in out) == fits != ("most frequent mistakes" in out)
    assert fits or out.splitlines()[-1].split() == [labels[0], labels[4], "3"]
    assert max(map(len, out.splitlines())) <= 80
    show_classes({"task": "t", "split": "dev"} | label_scores(gold, gold, gold, labels), "")
    assert "mistakes" not in capsys.readouterr().out, "there are none"


def test_where_answers_are_unreadable_the_share_that_predict_labels_rightly_is_shown(
    adapters: Adapters, capsys: pytest.CaptureFixture[str]
) -> None:
    record = good("eval", adapters["bitfit"][0], "--json").json[0]
    for unreadable in (0.0, 0.5):
        show([record | {"unreadable": unreadable, "scored_accuracy": 0.123}], EvalOptions())
        out = capsys.readouterr().out
        assert ("12.3" in out) == ("of the likeliest labels, which predict gives" in out) == (unreadable > 0)


def test_a_builtin_task_is_finetuned_with_a_limit(place: Path) -> None:
    good("finetune", "--base", place / "base", "--task", "reviews", "--limit", 8, "--method", "adapters", "--epochs", 1,
         "--seed", 2, "--quiet")  # fmt: skip
    out = Path("runs/reviews-adapters-s2")
    assert RunFolder(out).config["data"]["rows"] == 8
    assert good("eval", out, "--split", "test", "--limit", 20, "--json").json[0]["n"] == 20


def test_what_was_decoded_otherwise_or_of_other_data_is_shown_and_not_kept(place: Path, adapters: Adapters) -> None:
    shutil.copytree(adapters["trajectory-lora"][0], "mine")
    kept = good("eval", "mine", "--json").json
    results = Path("mine", RESULTS).read_bytes()
    Path("data", "mood").mkdir(parents=True)
    shutil.copy(place / "mood.csv", "data/mood/dev.csv")
    for asked, why in (
        (("--temperature", 5, "--sampler", "ancestral"), "--sampler ancestral, --temperature 5.0"),
        (("--data", "data"), "--data data"),
        (("--limit", 100), "--limit 100"),
        (("--set", "draws=9"), "--draws 9"),
        (("--set", "base_dtype=int8"), "--base-dtype int8"),
    ):
        ran = good("eval", "mine", *asked, "--json")
        assert ran.json[0]["n"] == kept[0]["n"] and Path("mine", RESULTS).read_bytes() == results
        assert f"mine: mood/dev is not kept in results.json, as it is by {why}" in ran.stderr
        assert "is not kept" not in good("eval", "mine", *asked, "--json", "--quiet").stderr
    assert ran.json[0]["nll_bound"] != kept[0]["nll_bound"], "127 levels a row"
    assert ran.json[0]["nll_bound"] == pytest.approx(kept[0]["nll_bound"], rel=0.05)


def test_running_text_is_measured_under_a_base_and_an_adapter(place: Path, pair: tuple[Path, Path]) -> None:
    shutil.copytree(pair[0], "mine")
    below, on = good("eval", place / "base", "mine", "--text", place / "text.txt", "--json").json
    assert [below["run"], on["run"]] == [str(place / "base"), "mine"]
    assert all(0 < r["nll_bound"] < 7 and r["tokens"] > 1000 for r in (below, on))
    assert on["base_nll_bound"] == below["nll_bound"] != on["nll_bound"], "the base alone, under the same masks"
    assert on["forgotten"] == pytest.approx(on["nll_bound"] - below["nll_bound"], abs=1e-5)
    assert 0 < on["forgotten_stderr"] < on["nll_stderr"] + below["nll_stderr"], "of pairs"
    assert "forgotten" not in below
    assert "NLL bound" in good("eval", place / "base", "--text", place / "text.txt").stdout


def test_what_cannot_be_kept_is_shown_all_the_same(place: Path, pair: tuple[Path, Path]) -> None:
    shutil.copytree(pair[0], "mine")
    Path("mine/results.json").write_text("{")
    for asked in (("--text", place / "text.txt"), ("--split", "dev")):
        ran = cli("eval", "mine", *asked, "--json")
        assert ran.code == 1 and "results.json" in ran.stderr
        assert ran.json[0]["nll_bound"] > 0


def test_a_merged_weight_lora_is_a_base_that_answers_as_the_adapter(place: Path, adapters: Adapters) -> None:
    run, mood = adapters["weight-lora"][0], place / "mood.toml"
    good("merge", run, "--out", "merged")
    expected = good("eval", run, "--json").json[0]["nll_bound"]
    for asked in (["--task", mood], []):
        merged = good("eval", "merged", *asked, "--json").json[0]["nll_bound"]
        assert merged == pytest.approx(expected, rel=1e-3)
    assert good("predict", "merged", "--text", "rain", "--json").json["label"] in ("sad", "happy")
    assert good("eval", place / "base", "--task", mood, "--json").json[0]["nll_bound"] != pytest.approx(expected)
    assert_refused(cli("pretrain", "--resume", "merged"), 2, "made by tinyld compose or merge")


def test_an_adapter_on_a_base_in_int8_is_used_on_one(place: Path, pair: tuple[Path, Path]) -> None:
    summary = finetune(place, Path("small"), *TRAJECTORY, "--set", "base_dtype=int8", "--json").json
    assert summary["base_bytes"] < RunFolder(pair[0]).config["parameters"]["base_bytes"] / 1.8
    found = good("eval", "small", "--json").json[0]["nll_bound"]
    assert found == pytest.approx(summary["dev_nll_bound"], rel=1e-4)
    (on,) = good("eval", "small", "--text", place / "text.txt", "--json").json
    (fp32,) = good("eval", place / "base", "--text", place / "text.txt", "--json").json
    assert on["base_nll_bound"] != fp32["nll_bound"], "its base alone is measured in int8, too"
    refused = cli("compose", pair[1], "small", "--out", "new")
    assert refused.code == 1 and re.search(r"was trained on base \w+ in int8, the others .* in fp32", refused.stderr)


@pytest.mark.parametrize("sampler", ["threshold", "revise"])
def test_text_is_sampled_from_a_base_and_an_adapter(sampler: str, place: Path, pair: tuple[Path, Path]) -> None:
    for run in (place / "base", pair[0]):
        args = ["sample", run, "--prompt", "the {answer} .", "--length", 4, "--num", 2, "--sampler", sampler, "--json"]
        first = good(*args)
        assert len(first.json["samples"]) == 2
        assert 1 <= first.json["forward_passes"] <= (5 if sampler == "threshold" else 32)
        assert first == good(*args)
        assert all("[MASK]" not in s and "_" not in s for s in first.json["samples"])
    shown = good("sample", "--base", place / "base", "--num", 1, "--length", 12, "--show-steps").stdout.splitlines()
    assert shown[0].count("_") > shown[-2].count("_") == 0 and shown[0].strip().startswith("1 ")


def test_info_says_what_a_run_is_and_tasks_which_there_are(place: Path, adapters: Adapters) -> None:
    record = good("info", place / "base", "--json").json
    assert record["kind"] == "base" and record["model"]["d_model"] == 32 and record["files"][MODEL]["bytes"] > 0
    run, ran = adapters["weight-lora"]
    record = good("info", run, "--json").json
    kept = record["method"]["name"], record["stored_parameters"], record["training"]["steps"]
    assert kept == ("weight-lora", ran.json["stored_parameters"], ran.json["steps"])
    shown = good("info", run).stdout
    assert all(f"{name} {record['method'][name]}" in " ".join(shown.split()) for name in ("name", "rank"))
    names = [t["task"] for t in good("tasks", "--json").json]
    assert {"reviews", "topics", "sst2", "write"} <= set(names) and all(n in good("tasks").stdout for n in names)


def test_the_demo_is_commands_with_options_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr("tinyld.cli.load", lambda name: seen.append)
        verbs.demo(DemoOptions(out=Path("my demo"), limit=8, quiet=True))
    assert [type(options) for options in seen] == [VERBS[line.split()[0]].options for line in verbs.DEMO]
    assert all(options.quiet for options in seen) and [getattr(options, "limit", 8) for options in seen[:2]] == [8, 8]
    written, last = [options.out for options in seen[:2]], seen[-1]
    assert last.runs == seen[2].runs == tuple(written) and last.out == Path("my demo/composed")
    Path("my demo/reviews/mine").mkdir(parents=True)
    for more in ([], ["--force"]):
        assert_refused(cli("demo", "--out", "my demo", "--quiet", *more), 1, "my demo/reviews exists and is not empty")


def interrupt(at: int, *args: object) -> Ran:
    """Runs tinyld and presses Ctrl-C at that step."""
    with pressing_ctrl_c(TaskRows, at):
        return cli(*args)


def begun(place: Path, method: str, sets: str = "save_minutes=1e-9") -> list[object]:
    """A command that trains seven steps and, if nothing else is set, saves after each."""
    args = ["finetune", "--base", place / "base", "--task", place / "mood.toml", "--method", method, *METHODS[method]]
    return [*args, "--steps", 7, "--batch-size", 4, *(word for one in sets.split() for word in ("--set", one))]


@pytest.mark.parametrize(("method", "sets"), [
    *((method, "save_minutes=1e-9") for method in METHODS), ("full", "save_minutes=1e-9 optimizer=muon"),
    ("full", "save_minutes=1e-9 accumulate=2 flat=0.3 clip=0"), ("trajectory-lora", "save_minutes=1e-9 dropout=0.3"),
    ("adapters", "save_minutes=5"),  # stopped before its first checkpoint
])  # fmt: skip
def test_a_finetune_cut_short_resumes_or_begins_again_to_the_same_adapter(method: str, sets: str, place: Path) -> None:
    args = begun(place, method, f"eval_every=3 {sets}")
    good(*args, "--out", "whole", "--json")
    ran = interrupt(5, *args, "--out", "cut")
    assert ran.code != 0 and "Traceback" not in ran.stderr
    assert bool(RunFolder(Path("cut")).checkpoints()) == ("=5" not in sets)
    assert not (Path("cut") / ADAPTER).exists()
    resumed = good("finetune", "--resume", "cut", "--json").json
    whole, cut = RunFolder(Path("whole")), RunFolder(Path("cut"))
    assert whole.digest(ADAPTER) == cut.digest(ADAPTER) and not (Path("cut") / "checkpoints").exists()
    for one, other in zip(whole.metrics(), cut.metrics(), strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}, "loss, norm, rate and tokens, too"
    again = good("finetune", "--resume", "cut", "--json")
    assert "cut is finished already" in again.stderr and again.json["steps"] == resumed["steps"] == 7


def test_a_run_goes_on_with_a_lower_rate(place: Path) -> None:
    interrupt(5, *begun(place, "bitfit"), "--out", "cut")
    assert_refused(cli("finetune", "--resume", "cut", "--lr", -1), 2, "--lr must be above 0")
    other = cli("finetune", "--resume", "cut", "--steps", 9)
    assert_refused(other, 2, "--steps has no effect with --resume, which goes on as it began: leave it out")
    good("finetune", "--resume", "cut", "--lr", 1e-5, "--quiet")
    assert 0 < RunFolder(Path("cut")).metrics()[-1]["lr"] < RunFolder(Path("cut")).config["train"]["lr"] == 1e-5


def test_a_run_goes_on_on_its_own_base_and_data_and_says_what_differs(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (place / "mood.csv").read_text()
    Path("again.toml").write_text((place / "mood.toml").read_text().replace("mood.csv", "again.csv"))
    Path("again.csv").write_text(rows)
    shutil.copytree(place / "base", "base")
    interrupt(5, *begun(place, "bitfit"), "--base", "./base", "--task", "again.toml", "--out", "cut")
    Path("again.csv").write_text(rows.replace("rain", "sky"))
    assert_refused(cli("finetune", "--resume", "cut"), 1, "cut began with other data: put ")
    Path("again.csv").write_text(rows)
    Path("base").rename("mine")
    shutil.copytree(place / "other", "base")
    assert_refused(cli("finetune", "--resume", "cut"), 1, "was trained on base")
    shutil.rmtree("base")
    Path("mine").rename("base")
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    ran = good("finetune", "--resume", "cut", "--json")
    assert f"its last digits may differ: threads was {threads}, is {threads + 1}" in ran.stderr
    assert ran.json["steps"] == 7


@pytest.mark.parametrize("args", [
    "pretrain {tiny} --steps 1 --data {place}/latin1.txt",
    "finetune --base {place}/base --task {place}/mood.toml --data {place}/latin1 --steps 1",
    "compose {place}/mood-trajectory-lora {place}/colours --data {place}/latin1",
    "finetune --base old --task {place}/mood.toml --method bitfit --steps 1",
])  # fmt: skip
def test_force_keeps_the_old_run_where_the_new_one_fails(args: str, place: Path, pair: tuple[Path, Path]) -> None:
    shutil.copytree(place / "base", "old")
    files = {p.name: p.read_bytes() for p in Path("old").iterdir()}
    ran = cli(*fill(args, place), "--out", "old", "--force", "--quiet")
    assert ran.code == 1
    assert {p.name: p.read_bytes() for p in Path("old").iterdir()} == files


def fill(args: str, place: Path) -> list[str]:
    return args.format(place=place, tiny=" ".join(TINY)).split()


ON = "finetune --base {place}/base --task {place}/mood.toml --steps 1 --quiet --out new "
NOT_ON = "finetune --base {place}/base --steps 1 --quiet --out new "
EVAL = "eval {place}/mood-full --quiet "
ONE = EVAL.replace("mood-full", "colours")  # whose answers are one token
TEXT = "pretrain {tiny} --quiet --out new --data {place}/text.txt "
PAIR = "compose {place}/colours {place}/mood-trajectory-lora --out new "
INIT = TEXT.replace("{tiny}", "") + "--init {place}/base "
ERRORS = [
    # no such option, value or verb: how to get help
    ("finetune --method prefix", 2, "--method must be one of trajectory-lora, weight-lora, adapters,"),
    ("predict", 2, "(tinyld predict --help)"),
    ("train", 2, "(tinyld --help)"),
    # a run that is there
    (TEXT.replace("new", "{place}/colours") + "--steps 1", 1, "--force"),
    (PAIR.replace("new", "{place}/colours"), 1, "--force"),
    # rows, and files of rows without a task
    (ON + "--text-column words", 2, "--text-column has no effect but for --data without --task"),
    (NOT_ON + "--data {place}/loop.csv", 1, "loop.csv: cannot be read"),
    (NOT_ON + "--data {place}/base", 1, "no train.csv, .tsv or .jsonl in"),
    (NOT_ON + "--data {place}/mood.csv --text-column words", 2, "no column 'words'; it has text, label"),
    (NOT_ON + "--data {place}/mood.csv --set template={{title}}{{text}}{{answer}}", 2, "and no other; a task"),
    (NOT_ON + "--data {place}/rule.txt", 1, "rule.txt: line 2: no word to make a gap of"),
    (NOT_ON + "--data {place}/twice.csv", 2, "twice.csv: line 4: names the columns once more"),
    (NOT_ON + "--data {place}/sparse.jsonl", 1, "sparse.jsonl: line 1: no column 'label', found 'text, id'"),
    (NOT_ON + "--data {place}/tabs.txt", 2, "tabs.txt: all lines have a tab: name it .tsv"),
    (NOT_ON + "--data {place}/colours.txt", 1, "colours.txt: line 1 names columns, text among them: a table is"),
    ("finetune mine.csv", 2, "(mine.csv); a file is given by --data (tinyld finetune"),
    # options
    ("compare --limit 9 --limit 0", 2, "--limit must be at least 1, got 0"),
    (ON + "--set ranks=4,two,1", 2, "--set ranks: 'two' is not a whole number"),
    (ON + "--set ranks=4,2,1 --set blocks=7", 2, "blocks must be at most the base's 2, got 7"),
    (ON + "--set blocks=1 --budget 0.01%", 2, "too small for trajectory-lora"),
    (NOT_ON + "--data {place}/quoted.tsv", 2, 'label "x" is in quotes, which are letters to a .tsv; save it as .csv'),
    (ON + "--budget 0.05", 2, "--budget 0.05 would be 5% of the base: write 0.05% or 0.0005, or else 5%"),
    (ON + "--budget 500", 2, "--budget must be above 0 and at most 100%, such as 0.7% or 0.007, got '500'"),
    (ON + "--method bitfit --budget 1%", 2, "bitfit has no rank"),
    (ON + "--method full --set base_dtype=int8", 2, "is for frozen weights; full trains them all"),
    ("predict {place}/colours --text a --base_dtype bf16", 2, "--base-dtype goes by --set base_dtype=value"),
    (ON + "--set seed=0 --set seed=1", 2, "seed is given twice"),
    (ON + "--budget abc", 2, "--budget takes a share such as 0.7% or 0.007, got 'abc'"),
    (ON + "--set depth=3", 2, "--set depth=3: there is no option 'depth'; --set help"),
    (ON + "--set pointer", 2, "--set pointer: no =VALUE after it"),
    (ON + "--set lr=2 --lr 4", 2, "lr is given twice"),
    (ON + "--method bitfit --dtype fp16 --device cpu", 2, "fp16 needs a GPU"),
    (EVAL + "--data {place}/mood.csv --split test", 2, "--split has no effect on the file"),
    (EVAL + "--text {place}/text.txt --sampler entropy", 2, "--sampler has no effect on the running text"),
    ("eval {place}/base --base {place}/other --task {place}/mood.toml --quiet", 2, "--base has no effect on it"),
    ("predict {place}/mood-full {place}/mood.csv --csv --json", 2, "give --csv or --json, not both"),
    ("sample {place}/base --sampler ancestral --set block=4", 2, "block with all but ancestral and revise"),
    ("predict {place}/mood-full --text a --out -", 2, "- names no file: for stdout leave the option out"),
    ("compare --task {place}/mood.toml --base {place}/base --steps 1 --epochs 2", 2, "one budget of steps, tokens"),
    ("sample {place}/base --length 900", 2, "the base takes 24"),
    ("sample {place}/base --length 9 --num 99999999", 2, "lower --num"),
    ("predict {place}/mood-full --task mine --text rain", 2, "mood-full has no task 'mine'; it has mood"),
    # runs, bases and what is written
    ("eval --quiet", 1, "no finished run in runs/: name one, or make one"),
    (EVAL + "--predictions {place}/mood-full/results.json", 1, "it is an input or a file of a run"),
    ("merge {place}/mood-full --out new", 1, "is no weight-lora adapter"),
    ("export {place}/mood-full --out new", 1, "mood-full is no base; of a weight-lora adapter"),
    ("compose {place}/base {place}/colours --out new", 1, "holds a base; compose takes"),
    (ONE + "--sampler ancestral --seed 3", 2, "--sampler, --seed has no effect where every answer is one token"),
    (ONE + "--set draws=2 --set least=2", 2, "has no effect where every answer is one token"),
    ("predict {place}/colours --text a --set threshold=0.5", 2, "--set threshold has no effect where every answer is"),
    ("sample {place}/base --length 1 --steps 4", 2, "--steps has no effect where every answer is one token"),
    (EVAL + "--seed 3 --set kl=1", 2, "--seed, --set kl has no effect with --sampler threshold"),
    ("sample {place}/base --set chat=true", 2, "for the folder of a public model"),
    (ON + "--method bitfit --set cache_gb=1", 2, "--set cache_gb has no effect with --method bitfit"),
    (NOT_ON + "--data {place}/text.txt --label-column x", 2, "--label-column has no effect on the lines of"),
    (TEXT + "--steps 1 --set body_lr=0", 2, "--set body_lr has no effect without --init"),
    (TEXT + "--steps 1 --data {place}/text.txt", 1, "text.txt is named twice"),
    (INIT + "--preset nano --steps 1", 2, "--preset has no effect with --init"),
    ("pretrain --steps 1 --out {place}/new --data {place}", 1, "would be read as text; choose another"),
    ("finetune --resume {place}/base --base {place}/base", 2, "--base has no effect on"),
]


@pytest.mark.parametrize(("args", "code", "part"), ERRORS, ids=range(len(ERRORS)))
@pytest.mark.usefixtures("pair")
def test_an_error_is_one_line_and_writes_nothing(args: str, code: int, part: str, place: Path) -> None:
    before = (place / "colours" / MANIFEST).read_bytes()
    assert_refused(cli(*fill(args, place)), code, part)
    assert list(Path().iterdir()) == [] and (place / "colours" / MANIFEST).read_bytes() == before


def test_a_run_that_diverges_ends_in_one_line_and_no_adapter(place: Path) -> None:
    args = ON.replace("--steps 1", "--steps 9") + "--method full --lr 1e18 --set clip=0 --set save_minutes=0"
    ran = cli(*fill(args, place))
    assert_refused(ran, 1, "is not finite")
    assert "there is no good checkpoint; lower --lr" in ran.stderr and not RunFolder(Path("new")).checkpoints()
    assert not (Path("new") / ADAPTER).exists()
    unfinished = "new was not trained to its end: tinyld finetune --resume new goes on"
    assert_refused(cli("eval", "new", "--quiet"), 1, unfinished)
    assert_refused(cli(*fill(args, place)), 1, "go on with it by --resume new, choose another --out, or replace it")


def test_what_is_not_finite_is_neither_written_nor_merged(place: Path, adapters: Adapters) -> None:
    shutil.copytree(adapters["weight-lora"][0], "run")
    folder = RunFolder(Path("run"))
    tensors = folder.read_tensors(ADAPTER)
    for size, asked, part in (
        (1e30, ("merge", "run", "--out", "new"), "not finite in float32"),
        (1e15, ("sample", "run", "--length", 4), "logits are not finite"),
        (1e15, ("predict", "run", "--text", "rain"), "logits are not finite"),
        (1e15, ("eval", "run", "--quiet"), "not finite"),
    ):
        folder.write_tensors(ADAPTER, {name: torch.full_like(t, size) for name, t in tensors.items()})
        assert_refused(cli(*asked), 1, part)
    assert not Path("new").exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_is_one_line(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyld.cli.load", lambda name: Mock(side_effect=error))
    assert_refused(cli("finetune"), 1, "out of memory; lower --batch-size or --limit")


def test_an_error_of_a_real_process_has_no_traceback() -> None:
    ended = python("-m", "tinyld", "info", "nowhere")
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr == "tinyld: no run in nowhere: expected config.json, found no such folder\n"
