"""WebNLG with 4,000 inputs to train on, one text each: what a user's own set is like.

python data/results/webnlg_part.py $TINYLD_DATA/webnlg part
tinyld finetune --task webnlg --data part --epochs 8 --batch-size 32 --method full  # or --set budget=2.8%, or as it is
"""

import json
import random
import shutil
import sys
from pathlib import Path


def main(source: Path, out: Path) -> None:
    (out / "webnlg").mkdir(parents=True)
    rng = random.Random(0)
    rows = rng.sample(list(map(json.loads, (source / "train.jsonl").read_text(encoding="utf-8").splitlines())), 4000)
    lines = [json.dumps(row | {"references": [rng.choice(row["references"])]}, ensure_ascii=False) for row in rows]
    (out / "webnlg" / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.copy(source / "dev.jsonl", out / "webnlg")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
