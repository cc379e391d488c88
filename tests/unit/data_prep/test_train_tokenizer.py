"""A vocabulary of one's own: the same on every run, and a tokenizer that stock transformers loads."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from data_prep.shard_format.tokenizer_info import tokenizer_fingerprint, tokenizer_info
from data_prep.train_tokenizer import main, train_wordpiece


def corpus() -> list[str]:
    rng = random.Random(1)
    syllables = ["ka", "lo", "mi", "nu", "té", "pra", "xi", "zu", "漢", "字", "qu.", "er", "ing", "-tion"]
    return [" ".join("".join(rng.choices(syllables, k=3)) for _ in range(30)) for _ in range(50)]


def test_same_texts_give_the_same_vocabulary_in_any_order() -> None:
    texts = corpus()
    first = train_wordpiece(texts, 200)
    second = train_wordpiece(reversed(texts), 200)
    assert first.get_vocab() == second.get_vocab()
    assert 100 < len(first) <= 200
    assert first.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert "##漢" not in first.get_vocab(), "a Chinese character is never inside a word"
    assert "##." not in first.get_vocab(), "nor is punctuation"


def test_folder_is_a_bert_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(corpus()))
    assert (
        main(
            [str(tmp_path / "a.txt"), "--vocab-size", "200", "--out", str(tmp_path / "t"), "--processes", "1"]
        )
        == 0
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t")
    ids = tokenizer("KALO té")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "kalo te"
    assert tokenizer_info(tokenizer).vocab_size == len(tokenizer)
    tokenizer.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)


def test_a_tokenizer_is_replaced_only_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("the model reads and the student writes\n" * 50)
    out = tmp_path / "tokenizer"
    words = [str(tmp_path / "a.txt"), "--vocab-size", "64", "--processes", "1", "--out", str(out)]
    assert main(words) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "mine").touch()
    (tmp_path / "a.txt").write_text("another text of other words\n" * 50)
    assert main(words) == 2
    message = "tokenizer: holds a tokenizer already (tokenizer.json); give another folder, or --overwrite to replace it"
    assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != "mine"} == before
    assert main([*words, "--overwrite"]) == 0
    after = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "mine"}
    assert after.keys() == before.keys()
    assert after["tokenizer.json"] != before["tokenizer.json"]
    assert (out / "mine").exists()
    assert main([*words[:-1], str(tmp_path / "a.txt")]) == 2
    assert "a.txt: is not a folder" in capsys.readouterr().err


def test_cased_keeps_capitals_and_accents() -> None:
    tokenizer = train_wordpiece(["Émile Zola"] * 5, 64, lowercase=False)
    assert tokenizer.decode(tokenizer("Émile")["input_ids"], skip_special_tokens=True) == "Émile"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab-size", "3"], "--vocab-size 3: must be between 64 and"),
        (["--vocab-size", "100"], "the sources hold no text to train a vocabulary on"),
        (["--vocab-size", "100", "--processes", "0"], "--processes 0: must be at least 1"),
        (["--vocab-size", "100", "--text-field", ","], "--text-field ',': names no field"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("\n")
    assert main([str(tmp_path / "a.txt"), "--out", str(tmp_path / "t"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_of_a_replaced_tokenizer_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """AutoTokenizer reads also what transformers 5 no longer writes."""
    (tmp_path / "a.txt").write_text("the model reads and the student writes\n" * 50)
    out = tmp_path / "tokenizer"
    out.mkdir()
    (out / "added_tokens.json").write_text('{"<more>": 64}')
    words = [str(tmp_path / "a.txt"), "--vocab-size", "64", "--processes", "1", "--out", str(out)]
    assert main(words) == 2
    assert "holds a tokenizer already (added_tokens.json)" in capsys.readouterr().err
    (out / "special_tokens_map.json").write_text('{"mask_token": "<mask>", "pad_token": "<pad>"}')
    assert main([*words, "--overwrite"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.mask_token, tokenizer.mask_token_id, tokenizer.pad_token_id) == ("[MASK]", 4, 0)
    assert f"{len(tokenizer)} entries" in capsys.readouterr().out
