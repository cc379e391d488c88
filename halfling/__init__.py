"""The installed form of the project: train/, launch/, data_prep/ and ds_configs/ lie in this folder (setup.py).

They import each other by those names, which are too common to be installed beside other people's packages; so the
command puts this one folder on the path, as each script does with the repository's. In a checkout it is the folder
above.
"""

from __future__ import annotations

import runpy
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    """The command `halfling`: the same as `python -m launch` in a checkout."""
    home = HERE if (HERE / "launch").is_dir() else HERE.parent
    runpy.run_path(str(home / "launch" / "__main__.py"), run_name="__main__")
