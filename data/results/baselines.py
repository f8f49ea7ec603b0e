"""What an adapter must beat on your rows: logistic regressions, on words and on a base's frozen states.

    python data/results/baselines.py --task trec [--task mine.toml] [--base FOLDER] [--limit ROWS] [--csv FILE]

Needs the extra `baselines` (scikit-learn). The strength of each is chosen on dev out of seven; where a task has test
rows these are reported, else dev's. Of a task of writing it shows instead what people have: the first of several
references as the answer, beside the others (extra `metrics`).
"""

import argparse
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, StandardScaler
from table import write

from tinyld.checkpoint import Base, load_base
from tinyld.data import TaskRows
from tinyld.device import autocast, fast_dtype
from tinyld.evaluate import wilson
from tinyld.hf import find_encoder
from tinyld.rows import bundled_data_dir, load_split
from tinyld.tables import print_table
from tinyld.tasks import Task, load_task
from tinyld.writing import text_scores

STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # scikit-learn's C
COLUMNS = ("task", "base", "features", "rows", "split", "n", "dev_accuracy", "accuracy", "low", "high", "seconds")


@torch.no_grad()
def frozen_states(base: Base, rows: TaskRows) -> dict[str, np.ndarray]:
    """Features of every row with its answer masked, from the normalised states of the base alone."""
    model, found = base.model, {"mean": [], "mask": []}
    for chunk in np.array_split(np.arange(len(rows)), -(-len(rows) // 64)):
        batch = rows.take(chunk)
        x = torch.where(batch.answer_mask, base.tokenizer.mask_id, batch.x0)
        depths, _ = model.frozen(x, batch.attention_mask, 0, model.config.num_layers)
        states = torch.stack([F.layer_norm(h, h.shape[-1:]) for h in depths], dim=1)  # (B, depths, L, D)
        for name, chosen in (("mean", batch.attention_mask & ~batch.answer_mask), ("mask", batch.answer_mask)):
            share = chosen / chosen.sum(1, keepdim=True)
            found[name].append(torch.einsum("bklD,bl->bkD", states, share).float().numpy())
    mean, mask = (np.concatenate(found[name]) for name in ("mean", "mask"))
    return {
        "final state, mean": mean[:, -1],
        "all depths, mean and mask": np.concatenate([mean, mask], axis=2).reshape(len(mean), -1),
    }


def setfit(texts: Sequence[str], labels: np.ndarray, asked: Sequence[str], seed: int) -> np.ndarray:
    """Labels of the texts asked, by SetFit's published protocol (arXiv 2209.11055) on the encoder of the default base.

    Of every text 20 pairs with one of its label and 20 with one of another, whose cosine is drawn to 1 or 0 in one
    epoch (batches of 16 pairs, AdamW at 2e-5, a tenth of the steps to warm up; in bf16 where the processor has it); a
    logistic regression on the mean states. Needs the extras `minilm` and `interop`.
    """
    from transformers import AutoModel, AutoTokenizer

    folder, rng = find_encoder("minilm"), np.random.default_rng(seed)
    torch.manual_seed(seed)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)

    def embed(some: Sequence[str]) -> torch.Tensor:
        batch = tokenizer(list(some), padding=True, truncation=True, max_length=256, return_tensors="pt")
        real, device = batch.attention_mask[..., None], torch.device("cpu")
        with autocast(device, fast_dtype(device)):
            states = model(**batch).last_hidden_state.float()
        return F.normalize((states * real).sum(1) / real.sum(1))

    pairs = []
    for i in np.tile(np.arange(len(texts)), 20):
        same = np.flatnonzero((labels == labels[i]) & (np.arange(len(texts)) != i))
        other = np.flatnonzero(labels != labels[i])
        pairs += [(i, rng.choice(same), 1.0), (i, rng.choice(other), 0.0)]
    steps = -(-len(pairs) // 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.01)
    model.train()
    for step, chosen in enumerate(np.array_split(rng.permutation(len(pairs)), steps)):
        rate = min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
        for group in optimizer.param_groups:
            group["lr"] = 2e-5 * rate
        first, second, wanted = zip(*(pairs[i] for i in chosen), strict=True)
        states = embed([texts[i] for i in (*first, *second)])
        cosine = (states[: len(first)] * states[len(first) :]).sum(1)
        F.mse_loss(cosine, torch.tensor(wanted)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        states = [np.concatenate([embed(of[i : i + 64]) for i in range(0, len(of), 64)]) for of in (texts, asked)]
    return LogisticRegression(max_iter=300).fit(states[0], labels).predict(states[1])


def best(
    features: dict[str, Any], labels: dict[str, np.ndarray], scaler: Any, strengths: tuple[float, ...]
) -> tuple[float, np.ndarray]:
    """(accuracy on dev, which rows of "tested" are right) of the strength that is best on dev."""
    chosen = (-1.0, np.zeros(0))
    for strength in strengths:
        model = make_pipeline(scaler(), LogisticRegression(C=strength, max_iter=300))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(features["train"], labels["train"])
        accuracy = float(model.score(features["dev"], labels["dev"]))
        if accuracy > chosen[0]:
            chosen = accuracy, model.predict(features["tested"]) == labels["tested"]
    return chosen


def baselines(task: Task, base: Base, data: Path | None, limit: int | None) -> list[dict[str, Any]]:
    split = "test" if "test" in task.splits else "dev"
    examples = {name: load_split(task, of, data, limit=limit if of == "train" else None)
                for name, of in (("train", "train"), ("dev", "dev"), ("tested", split))}  # fmt: skip
    labels = {name: np.array([e.label for e in of]) for name, of in examples.items()}
    texts = {name: [f"{e.before} {e.after}" for e in of] for name, of in examples.items()}
    words = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\S+", binary=True).fit(texts["train"])
    kinds = [("words and pairs of words", lambda: {name: words.transform(of) for name, of in texts.items()})]
    states: dict[str, dict[str, np.ndarray]] = {}

    def read_states(kind: str) -> dict[str, np.ndarray]:
        for name, of in examples.items() if not states else ():
            states[name] = frozen_states(base, TaskRows(of, task, base.tokenizer, base.model.config.max_length))
        return {name: found[kind] for name, found in states.items()}

    for kind in ("final state, mean", "all depths, mean and mask"):
        kinds.append((kind, lambda kind=kind: read_states(kind)))
    rows = []
    for kind, features in kinds:
        started = time.perf_counter()
        sparse = kind.startswith("words")
        strengths = tuple(100 * s for s in STRENGTHS) if sparse else STRENGTHS
        dev, right = best(features(), labels, MaxAbsScaler if sparse else StandardScaler, strengths)
        low, high = wilson(float(right.sum()), len(right))
        measured = (len(labels["train"]), split, len(right), dev, float(right.mean()), low, high)
        seconds = round(time.perf_counter() - started, 1)
        rows.append(dict(zip(COLUMNS, (task.name, base.path.name, kind, *measured, seconds), strict=True)))
    return rows


def people(task: Task, data: Path | None) -> None:
    examples = load_split(task, "test" if "test" in task.splits else "dev", data)
    several = [(f"{e.before} {e.after}", *e.right) for e in examples if len(e.right) > 1]
    prompts, answers, others = [p for p, *_ in several], [a for _, a, *_ in several], [o for _, _, *o in several]
    scores = text_scores(prompts, answers, others)
    shown = {"BLEU": "bleu", "chrF": "chrf", "ROUGE-L": "rouge_l", "names held": "names_held"}
    cells = [task.name, len(several), *(f"{scores[name]:.3f}" for name in shown.values())]
    print_table("a reference, beside the others of its row", ("task", "rows", *shown), [cells])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", required=True)
    parser.add_argument("--base", type=Path, default=bundled_data_dir() / "base")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    base, rows = load_base(options.base), []
    for task in map(load_task, options.task):
        if task.is_generation:
            people(task, options.data)
        else:
            rows += baselines(task, base, options.data, options.limit)
    if options.csv is not None:
        write(options.csv, rows, COLUMNS)
    if not rows:
        return
    shown = [
        (r["task"], r["features"], r["n"], *(f"{100 * r[c]:.1f}" for c in ("dev_accuracy", "accuracy")),
         f"{100 * r['low']:.1f} to {100 * r['high']:.1f}", r["seconds"])
        for r in rows
    ]  # fmt: skip
    print_table("logistic regression", ("task", "on", "rows", "dev %", "%", "95% interval", "seconds"), shown)


if __name__ == "__main__":
    main()
