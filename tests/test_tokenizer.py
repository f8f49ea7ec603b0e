"""Text <-> ids: one spelling for each thing, whatever corpus it comes from, and no special token from inside text."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import refuses

from tinyld.read import LONGEST
from tinyld.tokenizer import SPECIAL, Tokenizer, detokenize, find_text_files, read_lines

SENTENCES = (
    "it's great ( really ) - and he said \"no\" , didn't he ?",
    "doesn't she like the café ; isn't it 50 % off : $ 3 !",
    "a mask , a pad . the eos / bos ... unk and sep",
    "i can't go , they won't stay and we shouldn't ask",
)


@pytest.fixture(scope="module")
def english() -> Tokenizer:
    """A vocabulary that has every character of these tests."""
    return Tokenizer.train([*SENTENCES, "the quick brown fox jumps over lazy dogs in vex zest"] * 4, 220)


SAME = [
    ("It's great (really)", "it 's great -lrb- really -rrb-"), ("-LSB- a -RSB-", "(a)"), ("and\\/and", "and/and"),
    ("doesn't", "does n't"), ("They won't stay, can't go", "they wo n't stay , ca n't go"), ("didn’t", "did n't"),
    ("it`s", "it's"), ("it´s", "it's"), ("“great”", '"great"'), ("`` great ''", '"great"'),
    ("Isn't it?", "is n't it ?"), ("café", "cafe"), ("cafe\u0301", "café"), ("ＧＲＥＡＴ", "great"),
    ("he said…", "he said ..."), ("he said . . . no", "he said... no"),
    ("great–really", "great -- really"), ("great—really", "great - really"),
    ("<B>great</B> <h1>", "great"),
    ("great<br />really", "great really"), ("great \t  really\u00a0", "great really"),
]  # fmt: skip
DIFFERENT = [
    ("great", "grate"), ("they're", "there"), ("a no t", "a not"), ("said.", "said..."), ("(a)", "a"),
    ("3 <5 a", "3 a"), ("ask <Gina> now", "ask now"), ("if 5 <50>", "if 5"),
]  # fmt: skip


def test_two_spellings_of_one_text_give_the_same_ids_and_what_carries_meaning_stays(english: Tokenizer) -> None:
    for one, other in SAME:
        ids = english.encode(one)
        assert ids and ids == english.encode(other) and english.unk_id not in ids, one
    for one, other in DIFFERENT:
        assert english.encode(one) != english.encode(other)


@pytest.mark.parametrize("name", SPECIAL)
def test_a_special_tokens_name_in_text_is_plain_text(english: Tokenizer, name: str) -> None:
    special = {english.pad_id, english.bos_id, english.eos_id, english.mask_id}
    for frame in ("{}", "a {} b", "it's{}{}great", "[{}]", "[M{}ASK]", "[{}MASK]"):
        text = frame.replace("{}", name)
        assert not special & set(english.encode(text))
        assert english.encode_batch([text, "great"]) == [english.encode(text), english.encode("great")]


def test_a_vocabulary_is_of_its_size_and_comes_back_from_its_file(english: Tokenizer, tmp_path: Path) -> None:
    ids = [english.pad_id, english.unk_id, english.bos_id, english.eos_id, english.mask_id]
    assert ids == list(range(len(SPECIAL))), "special tokens come first"
    assert max(max(english.encode(s)) for s in SENTENCES) < english.vocab_size <= 220
    assert english.encode("漢") == [english.unk_id] and english.decode([english.unk_id]) == "[UNK]"
    path = tmp_path / "tokenizer.json"
    path.write_text(english.to_json(), encoding="utf-8")
    loaded = Tokenizer.parse(path.read_bytes(), path)
    assert loaded.to_json() == english.to_json() and loaded.mask_id == english.mask_id
    assert all(loaded.encode(text) == english.encode(text) for text, _ in SAME)


ROLES = {"pad": 0, "unk": 1, "bos": 2, "eos": 3, "mask": 3}


@pytest.mark.parametrize(("roles", "delete"), [
    ({}, 0), ({"unk": None}, 0), ({"bos": 3}, 0), ({"pad": 3}, None), ({"pad": 2}, None), ({"pad": 4}, None),
    ({"pad": 7}, None),  # a word
])  # fmt: skip
def test_padding_says_that_a_token_is_too_many_where_no_text_has_it(
    english: Tokenizer, tmp_path: Path, roles: dict[str, Any], delete: int | None
) -> None:
    raw = json.loads(english.to_json()) | {"roles": ROLES | {"mask": 4} | roles}
    assert Tokenizer.parse(json.dumps(raw).encode(), tmp_path / "tokenizer.json").delete_id == delete


@pytest.mark.parametrize(("change", "message"), [
    (lambda raw: raw["model"]["vocab"].update(great=-1), "not a tokenizer file"),
    (lambda raw: raw["model"].update(unk_token="none"), "not a tokenizer file"),
    (lambda raw: raw.update(model=3), "not a tokenizer file"),
    (lambda raw: raw.update(roles=ROLES), "end .* one token"),
    (lambda raw: raw.update(roles=ROLES | {"mask": 10**6}), "must be ids of tokens"),
    (lambda raw: raw.update(roles=[0, 1, 2, 3, 4]), "roles: .* is not of type dict"),
    (lambda raw: json.dumps(raw).replace("[MASK]", "[GAP]"), r"has no \[MASK\] token"),
    (lambda raw: "not json", "damaged, not JSON"),
    (lambda raw: "{}", "not a tokenizer file"),
    (lambda raw: '"a"', "is not of type dict"),
])  # fmt: skip
def test_a_damaged_tokenizer_file_is_refused(english: Tokenizer, tmp_path: Path, change: Any, message: str) -> None:
    raw, path = json.loads(english.to_json()), tmp_path / "tokenizer.json"
    text = change(raw)
    path.write_text(text if isinstance(text, str) else json.dumps(raw))
    refuses(f"tokenizer.json: .*{message}", Tokenizer.parse, path.read_bytes(), path)


def test_a_tokenizer_that_fails_at_a_later_text_is_named(english: Tokenizer, tmp_path: Path) -> None:
    """It names a token for the unknown that it lacks, and has all characters that are tried when it is read."""
    raw, path = json.loads(english.to_json()), tmp_path / "tokenizer.json"
    vocab = raw["model"]["vocab"]
    for piece in [w for c in "aworditsbn'-\u6f22tmskö[]" for w in (c, f"##{c}")]:
        vocab.setdefault(piece, len(vocab))
    raw["model"]["unk_token"] = "none"
    path.write_text(json.dumps(raw))
    loaded = Tokenizer.parse(path.read_bytes(), path)
    for encode in (loaded.encode, lambda text: loaded.encode_batch([text])):
        refuses("tokenizer.json: not a tokenizer file, or one that fails at a text", encode, "\u4e2d")


def test_pieces_are_joined_as_people_write(english: Tokenizer) -> None:
    for pieces, text in (
        (["it", "'", "s", "great", "(", "rea", "##lly", ")", "!"], "it's great (really)!"),
        (["a", '"', "great", '"', "film", "."], 'a "great" film.'),
        (["does", "##n", "'", "t", ",", "it", "?"], "doesn't, it?"),
        ("the dogs ' park is ' nice ' , and o ' neil ' s".split(), "the dogs' park is 'nice', and o'neil's"),
        ("james ' house and the players ' union".split(), "james' house and the players' union"),
        ("' it ' s great ! ' he said , ' no '".split(), "'it's great!' he said, 'no'"),
        ("rock ' n ' roll and ' more".split(), "rock 'n' roll and' more"),
        (["50", "%", "of", "$", "3", ";", "a", ":", "b"], "50% of $3; a: b"),
        (["_", "film", "_"], "_ film _"),
        (["##ly", "a"], "ly a"),
        ([], ""),
    ):
        assert detokenize(pieces) == text
    great, no = english.encode("great"), english.encode("no")
    ids = [english.bos_id, *great, english.mask_id, *no, english.pad_id, english.eos_id, *great]
    assert english.decode(ids) == "great _ no", "up to the first [EOS], with masks"


def test_decoded_text_reads_back_as_the_same_ids(english: Tokenizer) -> None:
    rng = random.Random(0)
    words = [w for s in SENTENCES for w in s.split() if w != '"no"']
    for _ in range(50):
        ids = english.encode(" ".join(rng.choices(words, k=rng.randint(1, 12))))
        assert english.encode(english.decode(ids)) == ids


def test_read_lines_reads_plain_packed_and_jsonl_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one  two \n\n   \nthree\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"four\n"))
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "five\nsix", "id": 1}) + "\n")
    (tmp_path / "d.csv").write_text("no\n")
    (tmp_path / "f.TXT").write_bytes(b"a line\rand\r\n\r\nanother")
    (tmp_path / "e.jsonl").write_text('{"text": "cut \\ud83d short"}\n\n \n')  # half a surrogate pair is no text
    paths = find_text_files([tmp_path])
    assert [p.name for p in paths] == ["a.txt", "b.txt.gz", "c.jsonl", "e.jsonl", "f.TXT"]
    assert list(read_lines(paths)) == "one two|three|four|five six|cut ? short|a line|and|another".split("|")


def test_text_that_cannot_be_read_names_the_file(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.txt", b"good\n" * 9_000 + b"caf\xe9\n", "line 9001: not UTF-8"),
        ("a.txt", "the sea".encode("utf-16-le"), "line 1: a zero byte, which no text has"),
        ("a.txt.gz", gzip.compress(b"a\n" + bytes(2 * LONGEST)), "line 2 is longer than 16 MB; is it text"),
        ("a.jsonl", b'{"text": "a"}\nnope\n', "line 2: damaged, not JSON"),
        ("a.jsonl", b'{"body": "a"}\n', "line 1: missing key 'text'"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: text: '3' is not of type str"),
        ("a.jsonl", b'["a"]\n', "line 1: .* is not of type dict"),
        ("a.txt.gz", b"plain", "cannot be read"),
        ("a.txt.gz", gzip.compress(bytes(range(97, 123)) * 99, mtime=0)[:10] + b"\xff" * 40, "cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        refuses(f"{name}.*{message}", list, read_lines([tmp_path / name]))
    (tmp_path / "empty").mkdir()
    (tmp_path / "b.csv").write_text("a\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "inside").symlink_to(tmp_path)
    bad = {"empty": "no text in", "b.csv": "files ending in", "gone": "no such", "more": "inside is a link to a"}
    for name, message in bad.items():
        refuses(message, find_text_files, [tmp_path / name])
