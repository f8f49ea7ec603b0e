"""A WordPiece encoder of the BERT family with those pieces alone that a text uses most, as a folder for --init.

    python data/base/trim_vocabulary.py FOLDER TEXT PIECES OUT

Special tokens and single characters stay, so that a dropped piece is spelled by shorter ones; kept pieces keep their
order. Text whose pieces were all kept gets the same ones, but for tinyld's one spelling of quotes, brackets and
`does n't`, which is put before the encoder's own.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tokenizers import Regex, normalizers
from tokenizers import Tokenizer as HFTokenizer

from tinyld import tokenizer as ours
from tinyld.checkpoint import Base, load_exactly
from tinyld.corpus import tokenize
from tinyld.foreign import load_foreign
from tinyld.hf import export_bert, find_encoder
from tinyld.model import Denoiser
from tinyld.tokenizer import Tokenizer, find_text_files, read_lines


def trimmed(encoder: Base, counts: Sequence[int], size: int) -> Base:
    """The encoder with its `size` most used pieces. counts: how often each id is used."""
    tokenizer = encoder.tokenizer
    if not tokenizer.is_wordpiece:
        raise SystemExit("only a WordPiece tokenizer can be trimmed (BERT, DistilBERT, ELECTRA)")
    vocab = tokenizer.inner.get_vocab()
    must = {i for piece, i in vocab.items() if piece in tokenizer.special or len(piece.removeprefix("##")) == 1}
    by_count = sorted((i for i in vocab.values() if i not in must), key=lambda i: (-counts[i], i))
    kept = sorted([*must, *by_count[: max(0, size - len(must))]])
    new_id, names = {old: new for new, old in enumerate(kept)}, {i: piece for piece, i in vocab.items()}
    raw = json.loads(tokenizer.inner.to_str())
    raw["model"]["vocab"] = {names[i]: new for i, new in new_id.items()}
    raw["added_tokens"] = [{**t, "id": new_id[t["id"]]} for t in raw.get("added_tokens", []) if t["id"] in new_id]
    raw["post_processor"] = None  # it names ids of its own; rows are framed by tinyld
    inner = HFTokenizer.from_str(json.dumps(raw))
    steps = [normalizers.Replace(Regex(pattern), text) for pattern, text in ours.REPLACEMENTS]
    inner.normalizer = normalizers.Sequence(steps + ([inner.normalizer] if inner.normalizer else []))
    tensors = dict(encoder.model.named_parameters())
    tensors |= {name: tensors[name][kept] for name in ("embedding.weight", "output_bias")}
    model = Denoiser(replace(encoder.model.config, vocab_size=len(kept))).eval()
    load_exactly(dict(model.named_parameters()), tensors, encoder.path)
    return replace(encoder, model=model, tokenizer=Tokenizer(inner))


if __name__ == "__main__":
    folder, text, pieces, out = sys.argv[1:]
    encoder = load_foreign(find_encoder(folder), headless=True)
    used = tokenize(read_lines(find_text_files([Path(text)])), encoder.tokenizer).counts
    export_bert(trimmed(encoder, used.tolist(), int(pieces)), Path(out))
