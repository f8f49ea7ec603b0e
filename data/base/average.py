"""The mean of two bases of one shape, weight by weight: of what was trained and what it began from.

python data/base/average.py TRAINED START 0.3 OUT       # 0.7 of TRAINED, 0.3 of START, stored in int8

START may be the folder of an encoder, as trim_vocabulary.py writes one; its head, which is none, is then left out.
"""

import argparse
import json
from pathlib import Path

import torch

from tinyld.checkpoint import load_base, save_base
from tinyld.foreign import load_foreign
from tinyld.runs import CONFIG, RunFolder, is_foreign


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path)
    parser.add_argument("start", type=Path)
    parser.add_argument("share", type=float, help="of START")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    base, headless = load_base(options.trained), is_foreign(options.start)
    start = load_foreign(options.start, headless=True) if headless else load_base(options.start)
    parameters, initial = dict(base.model.named_parameters()), dict(start.model.named_parameters())
    for name, parameter in parameters.items():
        if not (headless and name.startswith(("head_transform", "output_bias"))):
            parameter.lerp_(initial[name][: len(parameter)], options.share)  # an encoder may have more positions
    folder = RunFolder.create(options.out, force=True)
    config = json.loads((options.trained / CONFIG).read_text(encoding="utf-8"))
    folder.write_json(CONFIG, config | {"save_dtype": "int8"})
    save_base(folder, parameters, base.tokenizer, torch.int8)


if __name__ == "__main__":
    main()
