"""What goes into the wheel; everything else about the package stands in pyproject.toml.

The folders keep their places in the repository and are installed inside one package, `halfling`: setuptools cannot be
told so in pyproject.toml without naming every folder.
"""

from setuptools import find_packages, setup

INNER = ("data_prep", "launch", "train")
setup(
    packages=[
        "halfling",
        "halfling.ds_configs",
        *(f"halfling.{name}" for name in find_packages(include=[*INNER, *(f"{name}.*" for name in INNER)])),
    ],
    package_dir={f"halfling.{name}": name for name in (*INNER, "ds_configs")},
    package_data={
        "halfling.ds_configs": ["*.json"],
        "halfling.launch": ["recipes/*.yaml", "slurm/*", "pbs/*", "kubernetes/*", "hosts.example"],
        "halfling.launch.reporting": ["*.html"],
        "halfling.train.lamb": ["*.c", "*.md"],
        "halfling.train.models.cpu": ["*.c"],
        "halfling.train.objective": ["*.c", "*.h"],
    },
)
