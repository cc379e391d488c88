"""From nothing to a distilled student on two CPU cores: corpus, vocabulary, shards, teacher, student, control,
export, report. No download but pip's; about ten minutes.

    make quickstart                         installs what is needed, then runs this
    python launch/quickstart.py             once installed
    python launch/quickstart.py --scale 0.1 a tenth of the training steps: the whole path in two minutes

Everything lands in runs/quickstart/. A second call skips finished stages; an interrupted one goes on where it
stopped.
"""

from __future__ import annotations

import gc
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_prep.shard_format.required_packages import require_packages

require_packages()

from data_prep.processes import ProcessExecutor, ProcessLost
from data_prep.shard_format.files import new_file, write_json
from data_prep.shard_format.manifest import Manifest
from data_prep.shard_format.terminal import progress_bar
from data_prep.sources.installed_docs import installed_doc_files, read_docstrings
from data_prep.sources.records import Reading, ReadOptions, SourceFile
from data_prep.sources.resolve import absolute_source
from launch.common.cli import command_parser, run_main
from launch.common.stages import AGAIN, RANKS, cpu_environment, deepspeed_words, run_stage
from train.errors import BAD_USAGE, RunError, UserError
from train.run_folder import final_model, hold

VOCABULARY = 8000
SEQUENCE_LENGTH = 64
HELDOUT_FRACTION = 0.02
STEPS = {"teacher": 900, "student": 300, "control": 300}
OPTIONS = "options.json"
"""Of the first call, in its folder."""
MASKED_SENTENCE = "Returns a new [MASK] with the same shape as the input."


@dataclass(frozen=True)
class Stage:
    """One line of the quickstart: what it is called, what it does."""

    name: str
    title: str
    work: Callable[[], None]


def main(arguments: Sequence[str]) -> int:
    """Run the stages that are not finished yet."""
    parser = command_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for everything")
    parser.add_argument(
        "--source",
        default="installed-docs",
        help="text to use instead: a file, folder or glob as for data_prep/write_shards.py",
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of the training steps (default 1)")
    format_help = (
        "of the runs' matrix products; auto: bf16 where this processor's are twice as fast (default)"
    )
    parser.add_argument("--format", choices=("auto", "fp32", "bf16"), default="auto", help=format_help)
    options = parser.parse_args(arguments)
    if not 0 < options.scale <= 1:
        raise UserError(f"--scale {options.scale}: give a share above 0, at most 1")
    start = time.monotonic()
    with hold(options.out):
        chosen = {
            "scale": options.scale,
            "source": options.source,
            "format": _settled_format(options.format, options.out),
        }
        _refuse_other_options(options.out, chosen)
        todo = stages(options.out, options.scale, options.source, chosen["format"])
        for number, stage in enumerate(todo, start=1):
            did_work = _run_stage(f"[{number}/{len(todo)}]", stage, options.out / "stages")
            write_json(options.out / OPTIONS, chosen)
    if not did_work:  # else it stands just above
        print((options.out / "report.txt").read_text().rstrip())
    print(f"fill-mask:   {(options.out / 'fill_mask.txt').read_text().rstrip()}")
    print(f"student:     {options.out / 'exported'}/, an ordinary Hugging Face folder")
    print(
        f"This call took {(time.monotonic() - start) / 60:.1f} minutes; a further call skips what is finished."
    )
    return 0


def _settled_format(wanted: str, out: Path) -> str:
    """fp32 or bf16; auto is measured once, since a run goes on in the format that it began in."""
    if wanted != "auto":
        return wanted
    if (path := out / OPTIONS).exists():
        return str(json.loads(path.read_text()).get("format", "fp32"))
    # After the command line: torch takes seconds, which --help shall not.
    from train.models.cpu.precision import WORTH_IT, product_rates

    fp32, bf16 = product_rates()
    return "bf16" if bf16 > WORTH_IT * fp32 else "fp32"


def stages(out: Path, scale: float, source: str, number_format: str) -> list[Stage]:
    """The stages in their order."""
    if Path.cwd() != ROOT:  # stages run from there
        out = out.absolute()
    python, tokenizer, shards = sys.executable, out / "tokenizer", out / "shards"
    first: list[Stage] = []
    corpus: str | Path = absolute_source(source)
    if source == "installed-docs":
        corpus = out / "corpus.jsonl"
        title = "English documentation inside the installed packages"
        first = [Stage("corpus", title, lambda: write_corpus(out / "corpus.jsonl"))]

    def pretrain(name: str) -> Callable[[], None]:
        steps = max(20, round(STEPS[name] * scale))
        words = [f"--run.dir={out / name}", f"--data.shards={shards}", f"--training.max_steps={steps}"]
        recipe = ROOT / "launch" / "recipes" / f"quickstart-{name}.yaml"

        def train() -> None:
            own = [f"--model.teacher={final_model(out / 'teacher')}"] if name != "teacher" else []
            if number_format == "bf16":
                own += ["--deepspeed.config=ds_configs/cpu-bf16.json"]
                own += ["--model.teacher_dtype=bf16"] if name != "teacher" else []
            _deepspeed("launch/pretrain.py", "--config", recipe, *words, *own)

        return train

    def command(*words: object) -> Callable[[], None]:
        return lambda: _run(python, *words)

    runs = [out / "student", out / "control"]
    return [
        *first,
        Stage(
            "tokenizer",
            f"a WordPiece vocabulary of {VOCABULARY:,} entries",
            command(
                "data_prep/train_tokenizer.py",
                corpus,
                "--vocab-size",
                VOCABULARY,
                "--out",
                tokenizer,
                "--overwrite",
            ),
        ),
        Stage("shards", "tokenised WebDataset shards, train and held-out", lambda: make_shards(corpus, out)),
        Stage("teacher", "a 4-layer BERT, masked-language modelling", pretrain("teacher")),
        Stage("student", "half its layers, triple loss, LAMB, ZeRO-2 on two ranks", pretrain("student")),
        Stage("control", "the student's shape from random weights, no teacher", pretrain("control")),
        Stage("export", "a Hugging Face folder, loaded back by transformers", lambda: export(out)),
        Stage(
            "report",
            "the models side by side",
            command("launch/report.py", *runs, "--out", out, "--curves", out / "teacher"),
        ),
    ]


def make_shards(corpus: str | Path, out: Path) -> None:
    """Shards of the corpus, with enough held out to score on; documents are what write_shards.py takes for them."""
    words: list[object] = [corpus, "--tokenizer", out / "tokenizer", "--out", out / "shards"]
    words += ["--shard-tokens", 1_000_000, "--heldout-fraction", HELDOUT_FRACTION]
    print(f"python data_prep/write_shards.py {shlex.join(map(str, words))}", flush=True)
    _run(sys.executable, "data_prep/write_shards.py", *words)
    heldout = sum(shard.tokens for shard in Manifest.load(str(out / "shards")).splits["heldout"])
    if heldout < SEQUENCE_LENGTH:
        shutil.rmtree(out / "shards")
        raise UserError(
            f"the source has too little text: {heldout} tokens were held out, and scoring needs {SEQUENCE_LENGTH}; "
            "give more text"
        )


def write_corpus(path: Path) -> None:
    """The documents of the source `installed-docs` as JSON lines, in a fixed order; appears whole or not."""
    files = installed_doc_files()
    documents = characters = 0
    bar = progress_bar(total=sum(file.bytes for file in files), unit="B", unit_scale=True, desc="reading")
    try:
        with new_file(path) as out, ProcessExecutor(len(os.sched_getaffinity(0)), gc.disable) as pool, bar:
            for file, texts in zip(files, pool.map(_documents_of, files), strict=True):
                for text in texts:
                    out.write(json.dumps({"text": text}) + "\n")
                    documents, characters = documents + 1, characters + len(text)
                bar.update(file.bytes)
    except ProcessLost:
        raise RunError(
            f"a process that read the documentation was killed, perhaps for memory; {AGAIN}"
        ) from None
    print(f"{documents:,} documents, {characters / 1e6:.1f} MB -> {path}")


def _documents_of(file: SourceFile) -> list[str]:
    return [record.payload for record in read_docstrings(file, ReadOptions(), Reading())]


def export(out: Path) -> None:
    """Export the student's newest checkpoint, load it with stock transformers, fill a mask."""
    folder = out / "exported"
    if not folder.exists():
        _run(sys.executable, "launch/export.py", out / "student", folder)
    (out / "fill_mask.txt").write_text(fill_mask(folder, MASKED_SENTENCE) + "\n")
    print((out / "fill_mask.txt").read_text().rstrip())


def fill_mask(folder: Path, sentence: str) -> str:
    """What a masked language model puts in place of [MASK], as one line."""
    from transformers import pipeline

    from train.distributed.world import quiet_libraries

    quiet_libraries()
    guesses = pipeline("fill-mask", model=str(folder), device="cpu")(sentence, top_k=3)
    return f"{sentence}  ->  " + ", ".join(
        f"{guess['token_str']} ({guess['score']:.0%})" for guess in guesses
    )


def _run_stage(number: str, stage: Stage, done: Path) -> bool:
    """Whether there was anything left to do."""
    marker = done / f"{stage.name}.json"
    heading = f"{number} {stage.name}: {stage.title}"
    if marker.exists():
        seconds = json.loads(marker.read_text())["seconds"]
        print(f"{heading} - done before, in {seconds:.0f} s", flush=True)
        return False
    print(heading, flush=True)
    start = time.monotonic()
    stage.work()
    seconds = time.monotonic() - start
    done.mkdir(exist_ok=True)
    write_json(marker, {"seconds": round(seconds, 1)})
    print(f"      {seconds:.0f} s\n", flush=True)
    return True


def _refuse_other_options(out: Path, options: dict[str, object]) -> None:
    """Stages made with other options must not be mixed."""
    path = out / OPTIONS
    # It appears with the end of the first stage.
    foreign = [name for name in sorted(os.listdir(out)) if not name.startswith((".", "corpus", "tokenizer"))]
    if foreign and not path.exists():
        raise UserError(f"{out} holds {foreign[0]}, which is not the quickstart's: give another --out")
    if path.exists() and (before := {"format": "fp32", **json.loads(path.read_text())}) != options:
        raise UserError(
            f"{out} was started with {before}: use that again, remove the folder, or give another --out"
        )


def _deepspeed(*words: object) -> None:
    """The real launcher, two ranks on this machine's CPU."""
    _run(*deepspeed_words(RANKS), *words)


def _run(*words: object) -> None:
    """Run a command from the repository root, its output shown; its end ends this program if it failed."""
    environment = {**cpu_environment(), "HF_HUB_OFFLINE": "1"}
    if any(str(word).startswith("hub:") for word in words):
        del environment["HF_HUB_OFFLINE"]
    command = [str(Path.cwd() / word if isinstance(word, Path) else word) for word in words]
    code = run_stage(command, environment, ROOT)
    if code == BAD_USAGE:
        sys.exit(code)  # the stage has said what is wrong with its input
    if code:
        print(f"\n{AGAIN}", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    run_main(main)
