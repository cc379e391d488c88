"""The house's imports: one way, no circles, and none inside a function but of what is optional or slow."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.paths import ROOT

PACKAGES = ("data_prep", "train", "launch")
FOUNDATION = (
    "config",
    "config_sections",
    "engine_config",
    "environment_file",
    "errors",
    "run_folder",
    "versions",
)
"""Files at the top of train/ that everything in it shares; build.py and run.py there join everything."""
LAYERS = (
    {*FOUNDATION, "lamb"},
    {"distributed", "models"},
    {"data", "engine_check", "optimizer"},
    {"objective"},
    {"checkpointing", "evaluation", "finetuning"},
    {"export", "loop"},
    {"build"},
    {"run"},
)
"""Of train/: a file imports from its own folder, and from the layers above its own in this list."""
SLOW = {
    "aiohttp": "0.4 s",
    "datasets": "1 s",
    "deepspeed": "6 s",
    "fsspec": "0.2 s, which local shards need not cost",
    "huggingface_hub": "0.3 s with its utils",
    "matplotlib": "1 s",
    "pyarrow": "0.2 s, in every process of data preparation",
    "tensorboard": "0.5 s, through torch.utils.tensorboard",
    "torch": "2 s, which --help and a mistyped flag need not wait for",
    "transformers": "1 s",
    "webdataset": "2 s",
}
OPTIONAL = {
    "mlflow": "requirements-trackers.txt",
    "datasketch": "requirements-sources.txt",
    "mpi4py": "wants an MPI library",
    "onnx": "requirements-onnx.txt",
    "onnxruntime": "requirements-onnx.txt",
    "trackio": "requirements-trackers.txt",
    "trafilatura": "requirements-sources.txt",
    "triton": "comes with CUDA builds of torch",
    "wandb": "requirements-trackers.txt",
}
FREE = {
    "launch/preflight/probe.py": "starts on hosts that lack the packages, and says so",
    "launch/preflight/allreduce.py": "the same",
    "launch/benchmarks/data_runs.py": "what is imported is part of the time that is measured",
}
"""Files that may import anything inside a function."""


class Import(NamedTuple):
    """`import module`, somewhere in a file."""

    file: str
    line: int
    module: str
    in_function: bool
    typing_only: bool


def modules() -> dict[str, Path]:
    """Every module of the project, by its dotted name."""
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path
        for path in files
    }


MODULES = modules()


def imports_of(name: str, path: Path) -> Iterator[Import]:
    """What a module imports, resolved to modules where they are the project's own."""

    def visit(node: ast.AST, in_function: bool, typing_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                for module in targets(child):
                    yield Import(str(path.relative_to(ROOT)), child.lineno, module, in_function, typing_only)
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            yield from visit(child, in_function or function, typing_only or typing)

    def targets(node: ast.Import | ast.ImportFrom) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        base = node.module or ""
        if node.level:
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
        return [f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names]

    yield from visit(ast.parse(path.read_text()), False, False)


IMPORTS = {name: list(imports_of(name, path)) for name, path in MODULES.items()}
OWN = [
    (name, found)
    for name, imports in IMPORTS.items()
    for found in imports
    if found.module.split(".")[0] in PACKAGES
]


def allowed(name: str, module: str) -> bool:
    """May `name` import `module`, both the project's own?"""
    here, there = name.split("."), module.split(".")
    if here[:2] == ["train", "lamb"]:
        return there[:2] == ["train", "lamb"]
    if here[0] == "data_prep":
        lifted = here[1:2] == ["shard_format"]
        return there[:2] == ["data_prep", "shard_format"] if lifted else there[0] == "data_prep"
    if here[0] == "launch":
        return there[:2] != ["train", "lamb"] or len(there) == 2 or here[1] == "benchmarks"
    if there[0] != "train":
        return there[:2] == ["data_prep", "shard_format"]
    if here[1] == there[1] or (here[1] in FOUNDATION and there[1] in FOUNDATION):
        return True
    layer = {folder: number for number, folders in enumerate(LAYERS) for folder in folders}
    return layer[there[1]] < layer[here[1]] and (there[1] != "lamb" or len(there) == 2)


def test_imports_go_one_way() -> None:
    wrong = [
        f"{found.file}:{found.line} imports {found.module}"
        for name, found in OWN
        if not allowed(name, found.module)
    ]
    assert wrong == []


@pytest.mark.parametrize("of", ["files", "folders"])
def test_no_circles(of: str) -> None:
    """Also none that an import inside a function, or for types alone, hides."""

    def node(module: str) -> str:
        folder = ".".join(module.split(".")[:2])
        return folder if of == "folders" and (ROOT / folder.replace(".", "/")).is_dir() else module

    graph: dict[str, set[str]] = {}
    for name, found in OWN:
        if node(name) != node(found.module):
            graph.setdefault(node(name), set()).add(node(found.module))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' <- '.join(error.args[1])}")


def test_imports_inside_functions_are_of_slow_or_optional_packages() -> None:
    """Or of a module of ours that brings a slow one, where the file itself does without it."""
    wrong = []
    for name, imports in IMPORTS.items():
        for found in (found for found in imports if found.in_function and found.file not in FREE):
            package = found.module.replace("torch.utils.tensorboard", "tensorboard").split(".")[0]
            brings = found.module if package in PACKAGES else package
            slow = {brings} & set(SLOW) or {each for each in SLOW if reaches(brings, {each})}
            spared = {each for each in slow if not reaches(name, {each})}
            if package not in OPTIONAL and not spared and not reaches(brings, set(OPTIONAL)):
                wrong.append((found.file, found.line, found.module))
    assert wrong == []


def reaches(name: str, packages: set[str], seen: set[str] | None = None) -> bool:
    """Does importing a module import one of `packages`?"""
    seen = set() if seen is None else seen
    if name in seen or name not in IMPORTS:
        return False
    seen.add(name)
    at_import = [found.module for found in IMPORTS[name] if not found.in_function and not found.typing_only]
    return any(module.split(".")[0] in packages or reaches(module, packages, seen) for module in at_import)


def test_a_test_of_each_folder_stands_in_a_folder_of_that_name() -> None:
    rooms = {path.name for path in (ROOT / "train").iterdir() if path.is_dir() and path.name != "__pycache__"}
    tested = {path.name for path in (ROOT / "tests/unit").iterdir() if path.is_dir()}
    assert rooms - tested == set()
