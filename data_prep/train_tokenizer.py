"""Train a WordPiece vocabulary on a corpus of one's own, and save it as a Hugging Face tokenizer folder.

The result is a BERT tokenizer: it loads with AutoTokenizer, puts [CLS] before and [SEP] after a text, and
lower-cases unless --cased.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.shard_format.required_packages import require_packages

require_packages()

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from data_prep.error_messages import exit_code, explain, parse_words
from data_prep.passes.mixture import split_weights
from data_prep.processes import ProcessExecutor
from data_prep.shard_format.errors import UserError
from data_prep.shard_format.files import new_folder
from data_prep.shard_format.terminal import progress_bar
from data_prep.shard_format.tokenizer_files import save_tokenizer
from data_prep.sources.formats import FORMATS, document_of
from data_prep.sources.records import (
    MAX_DOCUMENT_MB,
    Reading,
    ReadOptions,
    check_max_document_mb,
    text_fields,
)
from data_prep.sources.resolve import HELP as SOURCES_HELP
from data_prep.sources.resolve import TXT_DOCUMENTS, Unit, make_units, resolve_sources
from data_prep.sources.texts import PIECE, BadRecord, pieces_of, utf8

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "spm.model"),
)
"""Of any kind of tokenizer: AutoTokenizer would mix what another one has left with ours."""
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
EXAMPLES = """
examples:
  python data_prep/train_tokenizer.py installed-docs --vocab-size 8000 --out runs/tokenizer
  python data_prep/train_tokenizer.py reports.jsonl.gz 'notes/**/*.txt' --vocab-size 30000 --cased --out T

then: python data_prep/write_shards.py SOURCE... --tokenizer runs/tokenizer --out shards

Memory grows with the number of different words, not with the text: about 0.2 GB for 33 MB of Simple English
Wikipedia, 0.3 GB for 100 MB. It has no bound: of a corpus of many gigabytes name some of the files, since a
vocabulary gains little from the rest. The text waits once more, unpacked, in the temporary folder (TMPDIR).
"""


def train_wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool = True) -> Any:
    """A transformers BertTokenizer with at most `vocab_size` entries, the special tokens first.

    The same texts give the same vocabulary, in any order. `texts` is gone through once; a copy waits in a
    temporary file for the trainer, which must know the letters before it begins.

    Raises:
        UserError: the texts are too few for any vocabulary, or `vocab_size` too small for their letters.
    """
    from transformers import BertTokenizer

    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    with tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n") as copy:
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text)
            copy.write(text + "\n")
        letters = _letters(counts, backend.normalizer, limit=min(1000, vocab_size // 4))
        if not letters:
            raise UserError("the sources hold no text to train a vocabulary on")
        # The trainer numbers the "##" letters in the order of a hash table that differs from run to run, and
        # breaks ties between merges by these numbers. As "special" tokens they get theirs beforehand.
        inner = [letter for letter in letters if _goes_on(letter, backend)]
        fixed = [*SPECIAL_TOKENS, *(f"##{letter}" for letter in inner)]
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=fixed,
            initial_alphabet=letters,
            limit_alphabet=len(letters),
            continuing_subword_prefix="##",
            show_progress=False,
        )
        copy.seek(0)
        backend.train_from_iterator(copy, trainer)
    vocabulary = backend.get_vocab()
    ordered = sorted(vocabulary, key=lambda entry: vocabulary[entry])
    return BertTokenizer(
        vocab={entry: index for index, entry in enumerate(ordered)},
        do_lower_case=lowercase,
        model_max_length=512,
    )


def _letters(counts: Counter[str], normalizer: Any, limit: int) -> list[str]:
    """The most frequent characters after normalisation, at most `limit`."""
    normal: Counter[str] = Counter()
    for character, count in counts.items():
        for letter in normalizer.normalize_str(character):
            if not letter.isspace():
                normal[letter] += count
    return sorted(sorted(normal, key=lambda letter: (-normal[letter], letter))[:limit])


def _goes_on(letter: str, backend: Any) -> bool:
    """Whether a word may go on with this character; punctuation and Chinese characters stand alone."""
    return len(backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(f"a{letter}"))) == 1


def corpus(units: list[Unit], options: ReadOptions, num_processes: int) -> Iterator[str]:
    """Every document's pieces, in the order of the sources, with a bar; bad records are left out.

    Documentation is parsed on `num_processes` processes; other formats read faster than the trainer counts.
    """
    total = sum(unit.bytes for unit in units)
    started = time.monotonic()
    bar = progress_bar(total=total or None, desc="reading", unit="B", unit_scale=True)
    documents = 0
    parsed = [(unit, options) for unit in units if _is_parsed(unit)]
    # Syntax trees are many objects and no cycles: collecting garbage would double the time.
    with ProcessExecutor(num_processes, gc.disable) as pool, bar:
        docs = pool.map(_parsed_unit, parsed)
        for unit in units:
            for text in next(docs) if _is_parsed(unit) else _texts(unit, options):
                documents += 1
                yield text
            rate = documents / max(time.monotonic() - started, 1e-9)
            bar.set_postfix_str(f"{rate:,.0f} documents/s", refresh=False)
            bar.update(unit.bytes)


def _is_parsed(unit: Unit) -> bool:
    return unit.files[0].format == "installed-docs"


def _parsed_unit(work: tuple[Unit, ReadOptions]) -> list[str]:
    return list(_texts(*work))


def _texts(unit: Unit, options: ReadOptions) -> Iterator[str]:
    for file in unit.files:
        for record in FORMATS[file.format].read(file, options, Reading()):
            try:
                text = document_of(record, file.format, options)
            except BadRecord as error:
                where = f"{file.path}, {record.place}" if record.place else file.path
                print(f"train_tokenizer: left out {where}: {error}", file=sys.stderr)
                continue
            yield from pieces_of(utf8(text)) if len(text) > PIECE else [text]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=SOURCES_HELP + "\n" + EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="where the text is, see below")
    parser.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="entries, e.g. 8000 or 30000"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer that is in DIR")
    parser.add_argument("--cased", action="store_true", help="keep capital letters and accents")
    parser.add_argument(
        "--txt-documents", choices=TXT_DOCUMENTS, default="line", help="how .txt files are read"
    )
    parser.add_argument("--text-field", default="text", metavar="NAMES", help="as for write_shards.py")
    parser.add_argument(
        "--max-document-mb",
        type=int,
        default=MAX_DOCUMENT_MB,
        metavar="N",
        help=f"a document of more UTF-8 text is left out (default {MAX_DOCUMENT_MB})",
    )
    parser.add_argument("--processes", type=int, metavar="N", help="default: one per core")
    return parse_words(parser, arguments)


def run(parsed: argparse.Namespace) -> str:
    """Train and save; returns what to print."""
    if not 64 <= parsed.vocab_size <= 1 << 20:
        raise UserError(f"--vocab-size {parsed.vocab_size}: must be between 64 and {1 << 20}")
    if parsed.processes is not None and parsed.processes < 1:
        raise UserError(f"--processes {parsed.processes}: must be at least 1")
    check_max_document_mb(parsed.max_document_mb)
    out = Path(parsed.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is not a folder")
    there = [name for name in TOKENIZER_FILES if (out / name).exists()]
    if there and not parsed.overwrite:
        raise UserError(
            f"--out {out}: holds a tokenizer already ({there[0]}); give another folder, or --overwrite to replace it"
        )
    if split_weights(parsed.sources)[1]:
        raise UserError(
            f"{parsed.sources[0]}: weights have no effect on a vocabulary; name the sources without @WEIGHT"
        )
    options = ReadOptions(text_fields(parsed.text_field), parsed.max_document_mb)
    units = make_units(resolve_sources(parsed.sources, parsed.txt_documents))
    num_processes = parsed.processes or len(os.sched_getaffinity(0))
    texts = corpus(units, options, num_processes)
    tokenizer = train_wordpiece(texts, parsed.vocab_size, lowercase=not parsed.cased)
    put_tokenizer(out, tokenizer)
    example = " ".join(tokenizer.tokenize("The tokenizer reads an unhappily long word."))
    return f"{parsed.out}: {len(tokenizer):,} entries; e.g. {example}"


def put_tokenizer(out: Path, tokenizer: Any) -> None:
    """Write the tokenizer's files, each in one step; those of another one are removed, other files stay."""
    out.mkdir(parents=True, exist_ok=True)
    with new_folder(out / ".tokenizer") as folder:
        save_tokenizer(tokenizer, folder)
    for name in TOKENIZER_FILES:
        (out / name).unlink(missing_ok=True)
    for path in (out / ".tokenizer").iterdir():
        path.replace(out / path.name)
    (out / ".tokenizer").rmdir()


def main(arguments: list[str] | None = None) -> int:
    try:
        print(run(parse_arguments(arguments)))
    except Exception as error:
        print(f"train_tokenizer: {explain(error)}", file=sys.stderr)
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
