"""Turn text into tokenised WebDataset shards, with a manifest beside them.

The bytes of every shard depend on the documents and the options alone: not on the order of the sources, on
the number of processes or MPI ranks, or on interruptions. A run that was stopped or killed is continued by
the same command. Duplicates are dropped; a fixed part of the documents is held out for evaluation.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.shard_format.required_packages import require_packages

require_packages()

from data_prep.error_messages import exit_code, explain, parse_words
from data_prep.passes.job import NEAR_DUPLICATES_NAME, SKIPPED_NAME, Job, JobOptions
from data_prep.passes.mixture import MAX_TOKENS, split_weights
from data_prep.passes.near_duplicates import Signatures, find_near_duplicates
from data_prep.passes.placement import Plan
from data_prep.passes.shard_pass import ShardPass, finish, make_plan
from data_prep.passes.tokenize_pass import TokenizePass, made_buckets
from data_prep.passes.work_folder import locked, prepare_folder
from data_prep.shard_format.errors import UserError
from data_prep.shard_format.hub import require_hub
from data_prep.shard_format.manifest import MANIFEST_NAME, Manifest
from data_prep.shard_format.tokenizer_files import save_tokenizer
from data_prep.shard_format.tokenizer_info import tokenizer_info
from data_prep.sources.records import MAX_DOCUMENT_MB, check_max_document_mb, text_fields
from data_prep.sources.resolve import HELP as SOURCES_HELP
from data_prep.sources.resolve import TXT_DOCUMENTS, resolve_sources
from data_prep.sources.tables import quiet_hub
from data_prep.workers import Team, mpi_size, mpi_team, process_team

SHARE_TOLERANCE = 0.01
"""Between a source's share that was asked for and that of its whole documents, before it is worth a note."""
EXAMPLES = """
examples:
  # documentation that is on this machine anyway, with a vocabulary of its own
  python data_prep/train_tokenizer.py installed-docs --vocab-size 8000 --out runs/tokenizer
  python data_prep/write_shards.py installed-docs --tokenizer runs/tokenizer --out shards

  # Wikipedia and a folder of books, one document per book
  python data_prep/write_shards.py hub:wikimedia/wikipedia:20231101.en books/ \\
      --tokenizer bert-base-uncased --out shards

  # the same on many cores, also of several machines that share a file system
  mpirun -n 64 python data_prep/write_shards.py dump.jsonl.zst books/ --tokenizer T --out shards

  # two thirds of each shard Wikipedia, one third books, which are read again and again until they are as much
  python data_prep/write_shards.py dump.jsonl.zst@2 books/@1 --tokenizer T --out shards

then: python data_prep/verify_shards.py shards

Exit code 0: done. 2: bad usage or input. 1: anything else, as a full disk or a lost process; run it again.
A process takes less than 1.5 GB, with documents of up to 64 MB; more with a higher --max-document-mb. Of `hub:`
sources, `datasets` decides.
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=SOURCES_HELP + "\n" + EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE[@WEIGHT]",
        help="where the text is, see below; with weights, whose ratios count, every training shard holds the sources "
        "in these shares of its tokens",
    )
    parser.add_argument("--tokenizer", required=True, help="a Hugging Face folder, or a name on the hub")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder of shards to make")
    parser.add_argument("--seed", type=int, default=0, help="of the documents' random places (default 0)")
    parser.add_argument(
        "--heldout-fraction",
        type=float,
        default=0.01,
        metavar="F",
        help="of the documents, chosen by their digests: the choice does not move when sources are added; where "
        "this takes none, a few documents, or the ends of some large ones (default 0.01)",
    )
    parser.add_argument(
        "--min-tokens", type=int, default=8, metavar="N", help="drop shorter documents (default 8)"
    )
    parser.add_argument(
        "--drop-near-duplicates",
        action="store_true",
        help="also drop documents of which about 75 %% or more of all runs of five tokens are in another, by MinHash; "
        "the first process holds 60 bytes more for each document, DIR/.work 112 (needs the package datasketch)",
    )
    parser.add_argument(
        "--shard-tokens", type=int, default=4_000_000, metavar="N", help="tokens per shard (default 4000000)"
    )
    parser.add_argument(
        "--mixture-tokens",
        type=int,
        metavar="N",
        help="of all training shards, with weights (default: as many as use every document, so that small sources are "
        "repeated and none is cut)",
    )
    _add_reading_options(parser)
    parser.add_argument(
        "--processes", type=int, metavar="N", help="default: one per core; under mpirun the ranks are it"
    )
    return parse_words(parser, arguments)


def _add_reading_options(parser: argparse.ArgumentParser) -> None:
    """What is a document in the sources' files, and what happens to one that cannot be read."""
    parser.add_argument(
        "--txt-documents",
        choices=TXT_DOCUMENTS,
        default="file",
        help="what one document of a .txt file is: all of it, a line, a block between blank lines",
    )
    parser.add_argument(
        "--text-field",
        default="text",
        metavar="NAMES",
        help="the text's field in JSON lines and tables; of several, a,b,c, the first that is there counts",
    )
    parser.add_argument(
        "--on-bad-record",
        choices=("fail", "skip"),
        default="fail",
        help=f"skip: leave out records that cannot be read, count them and name them in DIR/{SKIPPED_NAME}",
    )
    parser.add_argument(
        "--max-document-mb",
        type=int,
        default=MAX_DOCUMENT_MB,
        metavar="N",
        help="a document of more UTF-8 text is a bad record; memory grows with it, by about fifteen times as much "
        f"(default {MAX_DOCUMENT_MB})",
    )


def options_of(arguments: argparse.Namespace) -> JobOptions:
    """Raises UserError naming the option, its value and what it may be."""
    for name, lowest in (
        ("min_tokens", 1),
        ("shard_tokens", 1024),
        ("mixture_tokens", 1024),
        ("seed", 0),
        ("processes", 1),
    ):
        value = getattr(arguments, name)
        if value is not None and value < lowest:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {lowest}")
    if arguments.mixture_tokens is not None and arguments.mixture_tokens > MAX_TOKENS:
        raise UserError(f"--mixture-tokens {arguments.mixture_tokens}: must be at most {MAX_TOKENS:,}")
    if arguments.seed >= 1 << 63:
        raise UserError(f"--seed {arguments.seed}: must be below 2**63")
    if not 0 <= arguments.heldout_fraction < 1:
        raise UserError(f"--heldout-fraction {arguments.heldout_fraction}: must be at least 0 and below 1")
    check_max_document_mb(arguments.max_document_mb)
    if arguments.drop_near_duplicates:
        Signatures()  # is the package there?
    sources, weights = split_weights(arguments.sources)
    if arguments.mixture_tokens is not None and not weights:
        raise UserError(
            "--mixture-tokens has no effect without weights; write SOURCE@WEIGHT, or leave it out"
        )
    return JobOptions(
        sources=sources,
        weights=weights,
        mixture_tokens=arguments.mixture_tokens,
        drop_near_duplicates=arguments.drop_near_duplicates,
        tokenizer=arguments.tokenizer,
        out=arguments.out,
        seed=arguments.seed,
        heldout_fraction=arguments.heldout_fraction,
        min_tokens=arguments.min_tokens,
        shard_tokens=arguments.shard_tokens,
        txt_documents=arguments.txt_documents,
        text_fields=text_fields(arguments.text_field),
        skip_bad_records=arguments.on_bad_record == "skip",
        max_document_mb=arguments.max_document_mb,
    )


def load_tokenizer(name: str) -> Any:
    """A Hugging Face tokenizer from a folder or the hub.

    Raises:
        UserError: there is none, in one line where transformers has ten.
    """
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoTokenizer
    from transformers.utils import logging

    quiet_hub()
    logging.set_verbosity_error()  # it warns of texts longer than the model; shards hold whole documents
    if not os.path.isdir(name) and (os.path.exists(name) or name.startswith((".", "/", "~"))):
        raise UserError(f"--tokenizer {name}: not a folder with a Hugging Face tokenizer")
    if not os.path.isdir(name):
        require_hub(
            f"--tokenizer {name}", lambda: isinstance(try_to_load_from_cache(name, "tokenizer.json"), str)
        )
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise whatever a damaged file leads to
        where = "in this folder" if os.path.isdir(name) else "on this machine or the hub"
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--tokenizer {name}: no tokenizer that loads {where} ({reason})") from None


def run_job(team: Team, options: JobOptions) -> Manifest:
    """Every input is looked at before anything is written; then the two passes."""
    sources = resolve_sources(options.sources, options.txt_documents)
    tokenizer = load_tokenizer(options.tokenizer)
    info = tokenizer_info(tokenizer)
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is not a folder")
    with locked(out):
        run, manifest = prepare_folder(options, sources, info)
        if manifest is not None:
            return manifest
        job = Job(options, tuple(sources), info, tokenizer.backend_tokenizer.to_str(), run)
        team.run(TokenizePass(job))
        job = replace(job, made=made_buckets(job))
        if options.drop_near_duplicates:
            found = find_near_duplicates(job.bucket_paths(), job.work / NEAR_DUPLICATES_NAME)
            job = replace(job, near=found)
        plan = make_plan(job)
        if plan.pieces:
            print(f"{out}: {heldout_note(plan)}", flush=True)
        team.run(ShardPass(job, plan))
        return finish(job, plan, lambda folder: save_tokenizer(tokenizer, folder))


def heldout_note(plan: Plan) -> str:
    """What is held out where chance has held out nothing."""
    whole = sum(cut == 0 for cut in plan.pieces.values())
    what = f"{whole:,} documents are" if whole else f"the ends of {len(plan.pieces):,} documents are"
    return f"by chance no document fell to the held-out split; {what} held out, so that there is something to score on"


def _mixed(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each source of a mixture has given, and whether that is what was asked for."""
    total, lines = sum(source["train_tokens"] for source in sources), []
    for source in sources:
        share = source["train_tokens"] / max(1, total)
        lines.append(
            f"{share:8.1%} {source['train_documents']:>12,} documents {source['train_tokens']:>15,} tokens of train, "
            f"{source['epochs']:.2f} epochs of {source['source']}"
        )
        # No source gives less than it was asked for: what another lacks in share, this one has too much.
        if share - source["weight"] > SHARE_TOLERANCE:
            lines.append(
                f"note: the last has {share:.1%} where {source['weight']:.1%} was asked for: documents are taken "
                "whole, and its are long; give more --mixture-tokens, or shorter documents"
            )
    return lines


def summary(manifest: Manifest, out: str, elapsed_s: float | None) -> str:
    """What a user wants to know at the end."""
    lines = []
    for split, shards in manifest.splits.items():
        documents, tokens = sum(s.documents for s in shards), sum(s.tokens for s in shards)
        size = sum(s.bytes for s in shards)
        lines.append(
            f"{split:8} {documents:>12,} documents {tokens:>15,} tokens {len(shards):>6,} shards "
            f"{size / 1e6:>10,.1f} MB"
        )
    lines += _mixed([source for source in manifest.sources if "epochs" in source])
    skipped = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in manifest.skipped.items())
    lines.append(f"left out {skipped}")
    read = sum(source["bytes"] for source in manifest.sources)
    took = "complete already" if elapsed_s is None else f"{read / 1e6:,.1f} MB of input in {elapsed_s:,.1f} s"
    lines.append(f"{out}: {took}; manifest digest {manifest.digest()}")
    if manifest.skipped["bad_records"]:
        lines.append(f"the bad records are named in {Path(out, SKIPPED_NAME)}")
    if not manifest.splits["heldout"]:
        lines.append("note: nothing is held out, so that no model can be scored; see --heldout-fraction")
    lines.append(f"next: python data_prep/verify_shards.py {out}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes share the cores better than its threads do
    if mpi_size() == 1:
        return run_command(parse_arguments(arguments))
    try:
        with mpi_team() as team:
            return run_command(parse_arguments(arguments), team) if team else 0
    except UserError as error:  # no mpi4py
        print(f"write_shards: {error}", file=sys.stderr, flush=True)
        return 2


def run_command(parsed: argparse.Namespace, ranks: Team | None = None) -> int:
    started = time.monotonic()
    try:
        options = options_of(parsed)
        existed = Path(options.out, MANIFEST_NAME).exists()
        if ranks is not None:
            if parsed.processes is not None:
                raise UserError("--processes has no effect under mpirun: its ranks do the work; leave it out")
            manifest = run_job(ranks, options)
        else:
            with process_team(parsed.processes or len(os.sched_getaffinity(0))) as processes:
                manifest = run_job(processes, options)
    except Exception as error:
        print(f"write_shards: {explain(error)}", file=sys.stderr, flush=True)
        return exit_code(error)
    except KeyboardInterrupt:
        print("\nwrite_shards: stopped; run the same command again to go on", file=sys.stderr)
        return 130
    print(summary(manifest, options.out, None if existed else time.monotonic() - started))
    return 0


if __name__ == "__main__":
    sys.exit(main())
