"""Turn text into tokenised WebDataset shards, with a manifest beside them.

The bytes of every shard depend on the documents and the options alone: not on the order of the sources, on
the number of processes or MPI ranks, or on interruptions. A run that was stopped or killed is continued by
the same command. Duplicates are dropped; a fixed part of the documents is held out for evaluation.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.job import WORK_FOLDER, FolderLock, Job, JobOptions, Team, exit_code, explain, prepare_folder
from data_prep.shard_format.errors import UserError
from data_prep.shard_format.manifest import MANIFEST_NAME, Manifest, TokenizerInfo, tokenizer_info
from data_prep.shard_pass import SKIPPED_NAME, Builder, finish, make_plan
from data_prep.sources.records import text_fields
from data_prep.sources.resolve import HELP as SOURCES_HELP
from data_prep.sources.resolve import TXT_DOCUMENTS, resolve_sources
from data_prep.sources.tables import quiet_hub
from data_prep.tokenize_pass import Spiller
from data_prep.workers import JobFailed, MpiWorld, ProcessLost, World, mpi_size, run_processes

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

then: python data_prep/verify_shards.py shards

Exit code 0: done. 2: bad usage or input. 1: anything else, as a full disk or a lost process; run it again.
A process takes less than 1.5 GB, one document of 300 MB included; of `hub:` sources, `datasets` decides.
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=SOURCES_HELP + "\n" + EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="where the text is, see below")
    parser.add_argument("--tokenizer", required=True, help="a Hugging Face folder, or a name on the hub")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder of shards to make")
    parser.add_argument("--seed", type=int, default=0, help="of the documents' random places (default 0)")
    parser.add_argument(
        "--heldout-fraction",
        type=float,
        default=0.01,
        metavar="F",
        help="of the documents, chosen by their digests: the choice does not move when sources are added "
        "(default 0.01)",
    )
    parser.add_argument(
        "--min-tokens", type=int, default=8, metavar="N", help="drop shorter documents (default 8)"
    )
    parser.add_argument(
        "--shard-tokens", type=int, default=4_000_000, metavar="N", help="tokens per shard (default 4000000)"
    )
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
        "--processes", type=int, metavar="N", help="default: one per core; under mpirun the ranks are it"
    )
    return parser.parse_args(arguments)


def options_of(arguments: argparse.Namespace) -> JobOptions:
    """Raises ValueError naming the option, its value and what it may be."""
    for name, lowest in (("min_tokens", 1), ("shard_tokens", 1024), ("seed", 0), ("processes", 1)):
        value = getattr(arguments, name)
        if value is not None and value < lowest:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {lowest}")
    if arguments.seed >= 1 << 63:
        raise UserError(f"--seed {arguments.seed}: must be below 2**63")
    if not 0 <= arguments.heldout_fraction < 1:
        raise UserError(f"--heldout-fraction {arguments.heldout_fraction}: must be at least 0 and below 1")
    return JobOptions(
        sources=tuple(arguments.sources),
        tokenizer=arguments.tokenizer,
        out=arguments.out,
        seed=arguments.seed,
        heldout_fraction=arguments.heldout_fraction,
        min_tokens=arguments.min_tokens,
        shard_tokens=arguments.shard_tokens,
        txt_documents=arguments.txt_documents,
        text_fields=text_fields(arguments.text_field),
        skip_bad_records=arguments.on_bad_record == "skip",
    )


def load_tokenizer(name: str) -> Any:
    """A Hugging Face tokenizer from a folder or the hub.

    Raises:
        UserError: there is none, in one line where transformers has ten.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    quiet_hub()
    logging.set_verbosity_error()  # it warns of texts longer than the model; shards hold whole documents
    if not os.path.isdir(name) and (os.path.exists(name) or name.startswith((".", "/", "~"))):
        raise UserError(f"--tokenizer {name}: not a folder with a Hugging Face tokenizer")
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers and tokenizers raise whatever a damaged file leads to
        where = "in this folder" if os.path.isdir(name) else "on this machine or the hub"
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--tokenizer {name}: no tokenizer that loads {where} ({reason})") from None


def run_job(world: World, options: JobOptions | None) -> Manifest | None:
    """What every process runs; rank 0 has the options. Returns the manifest on rank 0."""
    team = Team(world)
    root = _Root(options) if world.rank == 0 and options is not None else None
    try:
        job, done = team.together(lambda: root.begin() if root else (None, None))[0]
        if job is None:
            return done
        team.claims = job.claims
        team.together(lambda: Spiller(job, team).run())
        plan = team.together(lambda: make_plan(job) if root else None)[0]
        assert plan is not None
        team.together(lambda: Builder(job, team, plan).run())
        return team.together(lambda: root.finish(job, plan) if root else None)[0]
    finally:
        if root:
            root.end()


class _Root:
    """What rank 0 alone does."""

    def __init__(self, options: JobOptions) -> None:
        self._options = options
        self._lock: FolderLock | None = None
        self._tokenizer: Any = None

    def begin(self) -> tuple[Job | None, Manifest | None]:
        """Look at every input before anything is written."""
        options = self._options
        sources = resolve_sources(options.sources, options.txt_documents)
        self._tokenizer = load_tokenizer(options.tokenizer)
        info: TokenizerInfo = tokenizer_info(self._tokenizer)
        if Path(options.out).exists() and not Path(options.out).is_dir():
            raise UserError(f"--out {options.out}: is not a folder")
        self._lock = FolderLock(Path(options.out, WORK_FOLDER))
        run, manifest = prepare_folder(options, sources, info)
        if manifest is not None:
            return None, manifest
        backend = self._tokenizer.backend_tokenizer.to_str()
        return Job(options, tuple(sources), info, backend, run), None

    def finish(self, job: Job, plan: Any) -> Manifest:
        return finish(job, plan, self._tokenizer.save_pretrained)

    def end(self) -> None:
        if self._lock is not None:
            self._lock.release()


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
    skipped = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in manifest.skipped.items())
    lines.append(f"left out {skipped}")
    read = sum(source["bytes"] for source in manifest.sources)
    took = "complete already" if elapsed_s is None else f"{read / 1e6:,.1f} MB of input in {elapsed_s:,.1f} s"
    lines.append(f"{out}: {took}; manifest digest {manifest.digest()}")
    if manifest.skipped["bad_records"]:
        lines.append(f"the bad records are named in {Path(out, SKIPPED_NAME)}")
    if not manifest.splits["heldout"]:
        lines.append("note: no document fell to the held-out split; raise --heldout-fraction to evaluate")
    lines.append(f"next: python data_prep/verify_shards.py {out}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    started = time.monotonic()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes share the cores better than its threads do
    world = MpiWorld() if mpi_size() > 1 else World()
    silent = io.StringIO()
    out, errors = (sys.stdout, sys.stderr) if world.rank == 0 else (silent, silent)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        parsed = parse_arguments(arguments)
    try:
        options = options_of(parsed)
        existed = Path(options.out, MANIFEST_NAME).exists()
        if world.size > 1:
            if parsed.processes is not None:
                raise UserError("--processes has no effect under mpirun: its ranks do the work; leave it out")
            manifest = run_job(world, options)
        else:
            num_processes = parsed.processes or len(os.sched_getaffinity(0))
            manifest = run_processes(num_processes, run_job, options)
    except (JobFailed, ProcessLost, ValueError, OSError) as error:
        if world.rank == 0:
            message = str(error) if isinstance(error, (JobFailed, ProcessLost)) else explain(error)
            print(f"write_shards: {message}", file=sys.stderr, flush=True)
        world.gather(None)  # mpirun stops all ranks when one fails: not before the message is out
        return exit_code(error)
    except KeyboardInterrupt:
        print("\nwrite_shards: stopped; run the same command again to go on", file=sys.stderr)
        return 130
    if world.rank == 0 and manifest is not None:
        print(summary(manifest, options.out, None if existed else time.monotonic() - started))
    return 0


if __name__ == "__main__":
    sys.exit(main())
