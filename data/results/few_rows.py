"""How accurate each method is with few rows to learn from: 8 to 64 a label, several draws.

    python data/results/few_rows.py --data $TINYLD_DATA --csv data/results/few-rows.csv [--tasks trec,subj]
        [--sizes 8,64] [--draws 3] [--methods best,fast,...] [--tested 500]

Every method has its usual settings, the same for 8 rows and for 64. Accuracy is of `predict`'s label on rows of the
test split (dev's where a task has none). "words alone" is the base's own choice among the labels' words, untrained;
"frozen states" a logistic regression (scikit-learn, extra `baselines`; C = 0.01, fixed) on the base's states of all
depths, mean-pooled and at the mask; "setfit" its published protocol on MiniLM, from which the default base began
(extras `minilm`, `interop`; run where it is named). The CSV is added to row by row; what is in it is not run again.
"""

import argparse
import csv
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from baselines import frozen_states, setfit
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from table import tables, write

import tinyld
from tinyld.checkpoint import load_base
from tinyld.data import TaskRows, seeded, spread_over
from tinyld.rows import load_split
from tinyld.tables import print_table
from tinyld.tasks import load_task
from tinyld.workspace import default_base

METHODS: dict[str, dict[str, Any]] = {
    "best": {"method": "trajectory-lora", "recipe": "best"},
    "fast": {"method": "trajectory-lora", "recipe": "fast"},
    "weight-lora": {"method": "weight-lora", "targets": ("query", "key", "value", "out"), "budget": "0.7%"},
    "bitfit": {"method": "bitfit"},
    "full": {"method": "full"},
}
COLUMNS = ("task", "method", "rows_a_label", "draw", "n", "accuracy", "seconds")


def read(path: Path) -> tuple[str, list[str], np.ndarray]:
    """(header, rows, their labels) of a task's TSV."""
    header, *rows = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    return header, rows, np.array([row.rsplit("\t", 1)[1] for row in rows])


def measure(name: str, kind: str, size: int, draw: int, data: Path, tested: int) -> dict[str, Any]:
    header, rows, labels = read(data / name / "train.tsv")
    rng = seeded(draw, size)
    drawn = [i for label in np.unique(labels) for i in rng.permutation(np.flatnonzero(labels == label))[:size]]
    test = next(path for split in ("test", "dev") if (path := data / name / f"{split}.tsv").exists())
    lines = read(test)[1]
    lines = [lines[i] for i in spread_over(len(lines), tested)]
    texts = [line.rsplit("\t", 1)[0] for line in lines]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        root, task = Path(folder), load_task(name)
        (root / name).mkdir()
        for split, of in (("train", [rows[i] for i in drawn]), ("dev", [rows[i] for i in drawn]), ("test", lines)):
            (root / name / f"{split}.tsv").write_text("\n".join([header, *of]) + "\n", encoding="utf-8")
        few, asked = (load_split(task, split, root) for split in ("train", "test"))
        gold = np.array([e.label for e in asked])
        if kind == "frozen states":
            base = load_base(default_base())
            encoded = [TaskRows(of, task, base.tokenizer, base.model.config.max_length) for of in (few, asked)]
            states = [frozen_states(base, of)["all depths, mean and mask"] for of in encoded]
            model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
            found = model.fit(states[0], [e.label for e in few]).predict(states[1])
        elif kind == "setfit":
            learned = [rows[i].rsplit("\t", 1)[0] for i in drawn]
            found = setfit(learned, np.array([e.label for e in few]), texts, draw)
        else:
            words_alone = kind == "words alone"
            run = (
                tinyld.load(default_base())
                if words_alone
                else tinyld.finetune(name, data=root, out=root / "run", seed=draw, **METHODS[kind])
            )
            answers = run.predict(texts, task=name)
            found = np.array([task.labels.index(a["label"]) for a in answers])
    values = (name, kind, size, draw, len(gold), float((found == gold).mean()), round(time.perf_counter() - started, 1))
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--tasks", default="trec,subj,sst2-sentences")
    parser.add_argument("--sizes", default="8,16,32,64")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--methods", default="words alone,frozen states,fast,best,weight-lora,bitfit,full")
    parser.add_argument("--tested", type=int, default=500)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if options.csv.exists():
        rows = list(csv.DictReader(options.csv.read_text(encoding="utf-8").splitlines()))
    done = {tuple(str(r[c]) for c in COLUMNS[:4]) for r in rows}
    for task in options.tasks.split(","):
        for size in map(int, options.sizes.split(",")):
            for draw in range(options.draws):
                for method in options.methods.split(","):
                    if (task, method, str(size), str(draw)) in done or (method == "words alone" and draw > 0):
                        continue
                    rows.append(measure(task, method, size, draw, options.data, options.tested))
                    write(options.csv, rows, COLUMNS)
    for title, columns, cells in tables(options.csv):
        print_table(title, columns, cells)


if __name__ == "__main__":
    main()
