"""Collects the released bases' pretraining text from a folder of task data, without any dev or test sentence.

    python data/base/prepare_text.py $TINYLD_DATA /tmp/text     # writes one file per source, prints what was dropped

`pretrain-more/` was cleaned by the rule below when it was made, and is copied; what is read more than once (TIMES),
to learn copying and stories from, is copied that often. Of the reviews there, three of five files are taken.

Reads `pretrain/*.txt` and the texts (never the labels) of every task's `train.tsv`. A line is dropped when, by its
letters and digits alone, it equals a sentence of a dev, test or pretrain-valid file, or when it holds at least half
of the 6-word shingles of one (sentences of 8 words and more).
"""

import re
import shutil
import sys
from collections import Counter, defaultdict
from pathlib import Path

SHINGLE = 6
TIMES = {"dialogues": 2, "tinystories": 3}  # copies of a file of pretrain-more; the others have one
LEFT_OUT = ("imdb-03", "imdb-04")


def words_of(text: str) -> list[str]:
    text = text.lower().replace("-lrb-", " ").replace("-rrb-", " ").replace(" n't", "n't").replace("'", "")
    return re.findall(r"[a-z0-9]+", text)


def column(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")[1:]
    return [line.rsplit("\t", 1)[0].replace(" ||| ", " ") for line in lines]


def shingles(words: list[str]) -> set[int]:
    return {hash(tuple(words[i : i + SHINGLE])) for i in range(len(words) - SHINGLE + 1)}


class HeldOut:
    """Every sentence that must not be trained on."""

    def __init__(self, sentences: list[str]):
        self.exact: set[str] = set()
        self.owners: dict[int, list[int]] = defaultdict(list)
        self.sizes: list[int] = []
        for sentence in sentences:
            words = words_of(sentence)
            self.exact.add("".join(words))
            found = shingles(words) if len(words) >= 8 else set()
            for shingle in found:
                self.owners[shingle].append(len(self.sizes))
            self.sizes.append(len(found))

    def matches(self, line: str) -> bool:
        words = words_of(line)
        if "".join(words) in self.exact:
            return True
        hits = Counter(owner for s in shingles(words) for owner in self.owners.get(s, ()))
        return any(count >= max(1, self.sizes[owner] / 2) for owner, count in hits.items())


def longest_phrases(phrases: list[str]) -> list[str]:
    """Phrases that are not a part of a longer one (SST-2's train rows are all phrases of its sentences)."""
    kept: list[str] = []
    seen: set[tuple[str, ...]] = set()
    for phrase in sorted(set(phrases), key=lambda p: -len(p.split())):
        words = tuple(phrase.split())
        if len(words) < 4 or words in seen:
            continue
        kept.append(phrase)
        for size in range(4, len(words)):
            seen.update(words[i : i + size] for i in range(len(words) - size + 1))
    return kept


def main(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    held_out_files = [p for s in ("dev", "test") for p in sorted(source.glob(f"*/{s}.tsv"))]
    sentences = [s for p in held_out_files for s in column(p)]
    sentences += [s for p in sorted(source.glob("pretrain-valid/*.txt")) for s in p.read_text("utf-8").splitlines()]
    held_out = HeldOut(sentences)
    print(f"{len(sentences):,} held-out sentences from {len(held_out_files)} files and pretrain-valid")
    sources = {p.stem: p.read_text(encoding="utf-8").splitlines() for p in sorted(source.glob("pretrain/*.txt"))}
    for path in sorted(source.glob("*/train.tsv")):
        name = path.parent.name
        if name == "sst2-sentences":  # the same sentences as sst2
            continue
        sources[f"train-{name}"] = longest_phrases(column(path)) if name == "sst2" else column(path)
    for name, lines in sources.items():
        kept = [line for line in lines if line.strip() and not held_out.matches(line)]
        (target / f"{name}.txt").write_text("\n".join(kept) + "\n", encoding="utf-8")
        print(f"{name}: {len(kept):,} lines kept, {len(lines) - len(kept):,} dropped")
    for path in sorted(source.glob("pretrain-more/*.txt.gz")):
        name = path.name.removesuffix(".txt.gz")
        for copy in range(0 if name in LEFT_OUT else TIMES.get(name, 1)):
            shutil.copy(path, target / f"{name}{f'-{copy + 1}' if copy else ''}.txt.gz")
            print(f"{name}: copied")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
