"""Write a checkpoint's student as an ordinary Hugging Face folder, and any encoder as ONNX. Needs no GPU, no teacher
and no shards.

    python launch/export.py RUN OUT                       the newest complete checkpoint of a run
    python launch/export.py RUN/checkpoints/step-00000500 OUT
    python launch/export.py RUN OUT --onnx --int8         the same, with model.onnx and model_int8.onnx in it
    python launch/export.py FOLDER OUT --onnx --int8      of a Hugging Face folder: a classifier, say
    python launch/export.py RUN OUT --push OWNER/NAME --private --license apache-2.0 --language en --scores SCORES

The folder holds safetensors weights (the optimizer's fp32 copy), the tokenizer and a model card; it is loaded
back with stock transformers and must give the same outputs before it appears under its name. model.onnx has dynamic
batch and sequence axes and optimum's names; ONNX Runtime must give torch's outputs on several shapes, with padding,
before the folder appears. --int8 quantises weights and activations (dynamic) and says what that changed.

--push uploads OUT to the Hugging Face hub (or HF_ENDPOINT) with your token (`hf auth login`, HF_TOKEN). The model card
names the teacher, the recipe, the data with their sizes, and what you state: licences, language, scores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.shard_format.required_packages import require_packages

require_packages()

from data_prep.shard_format.files import new_folder
from launch.common.cli import command_parser, run_main
from train.errors import UserError
from train.run_folder import read_summary

if TYPE_CHECKING:
    from train.export.onnx_export import OnnxFile


def main(arguments: Sequence[str]) -> int:
    """Parse, export, say what was done."""
    parser = command_parser(__doc__)
    parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT_OR_FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx too")
    parser.add_argument("--int8", action="store_true", help="with --onnx: write model_int8.onnx too")
    parser.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help="with --int8: a sentence per line, to measure int8 on (else random tokens)",
    )
    add_card(parser)
    options = parser.parse_args(arguments)
    refuse_idle_options(options)
    if options.out.exists():
        raise UserError(f"{options.out} exists; give another folder or remove it first")
    if options.onnx:
        from train.export.onnx_check import require_onnx

        require_onnx()
    if options.push:
        from train.export.hub_push import require_push

        require_push(options.push)
    texts = read_texts(options.texts) if options.texts else None
    from train.distributed.world import quiet_libraries

    quiet_libraries()
    is_model = (options.source / "config.json").exists()
    said = [f"{options.source} -> {options.out}"]
    files: list[OnnxFile] = []
    with new_folder(options.out) as folder:
        if not is_model:
            said = [write_folder(options, folder)]
        if options.onnx:
            from train.export.onnx_export import export_onnx  # its packages are optional

            files = export_onnx(options.source if is_model else folder, folder, options.int8, texts)
    print("\n".join([*said, *(line for file in files for line in described(file))]))
    if options.push:
        from train.export.hub_push import push_folder

        print(f"pushed: {push_folder(options.out, options.push, options.private)}")
    return 0


def add_card(parser: argparse.ArgumentParser) -> None:
    """The options of the hub and of the model card."""
    add = parser.add_argument_group("the hub and the model card").add_argument
    add("--push", metavar="NAME", help="upload OUT to the hub: OWNER/NAME")
    add("--private", action="store_true", help="a new repository is private; refused where it is public")
    add("--license", metavar="ID", help="of the weights, as the hub names it: apache-2.0")
    add("--language", nargs="+", default=[], metavar="CODE", help="en, de, ...")
    add("--data-license", metavar="TEXT", help="of the text that the model was trained on")
    add("--scores", type=Path, metavar="DIR", help="what launch/finetune.py left of this model")


def refuse_idle_options(options: argparse.Namespace) -> None:
    """UserError where an option would change nothing."""
    if options.int8 and not options.onnx:
        raise UserError("--int8 quantises the ONNX file: give --onnx too")
    if options.texts and not options.int8:
        raise UserError("--texts is what int8 is measured on: give --onnx --int8 too")
    if (options.source / "config.json").exists() and not options.onnx:
        raise UserError(f"{options.source} is a Hugging Face folder already; --onnx writes it as ONNX")
    if options.private and not options.push:
        raise UserError("--private is of the repository on the hub: give --push NAME too")
    for name in ("license", "language", "data_license", "scores"):
        if getattr(options, name) and (options.source / "config.json").exists():
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} goes into the card of a run's model; {options.source} has a card of its own"
            )


def read_texts(path: Path) -> list[str]:
    """The lines of a file that hold anything; UserError where none does, or it is no text."""
    try:
        texts = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: give a text file with one sentence per line") from None
    if not texts:
        raise UserError(f"{path} holds no sentences: give a file with one per line")
    return texts


def write_folder(options: argparse.Namespace, folder: Path) -> str:
    """Write a run's or a checkpoint's student to `folder`; what was done, OUT being the name it will have."""
    from train.export.hugging_face import export_checkpoint, find_checkpoint
    from train.export.model_card import Stated

    stated = Stated(
        name=options.push or Stated.name,
        license=options.license,
        languages=tuple(options.language),
        data_license=options.data_license,
        scores=options.scores,
    )
    checkpoint = find_checkpoint(options.source, print)
    difference = export_checkpoint(checkpoint, folder, read_summary(checkpoint.parent.parent), stated)
    return f"{checkpoint} -> {options.out} (outputs of both differ by {difference:g})"


def described(file: OnnxFile) -> list[str]:
    """What was written and how far it is from torch, as lines for the user."""
    check = file.check
    reads, gives = ", ".join(file.inputs), ", ".join(file.outputs)
    top1 = "" if check.top1 is None else f", the first choice is the same in {check.top1:.1%}"
    return [
        f"{file.path.name}: {file.size / 1e6:.1f} MB, {file.task}: {reads} -> {gives}",
        f"  beside torch on {check.inputs}: outputs differ by {check.mean:.2g} on average, "
        f"at most {check.largest:.2g} (their standard deviation is {check.spread:.2g}){top1}",
    ]


if __name__ == "__main__":
    run_main(main)
