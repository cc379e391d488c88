"""Cases on fake GPUs, in a process of their own: `python -m tests.fake_cuda LIBRARY first_steps|passes CASES RESULTS`.

CASES: a JSON file, {name: case}. RESULTS: the JSON file to write, {name: what the case gave, or {"error": traceback}}.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

library, part, cases, results = sys.argv[1:]
# Before torch is imported: the kinds of devices enter themselves in its registries.
ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)

from tests.fake_cuda import gpu  # noqa: E402

os.environ.update(gpu.ENVIRONMENT)
waits = gpu.install()
run = importlib.import_module(f"tests.fake_cuda.{part}").run
found = {}
for name, case in json.loads(Path(cases).read_text()).items():
    try:
        found[name] = run(case, waits)
    except Exception:
        found[name] = {"error": traceback.format_exc()}
Path(results).write_text(json.dumps(found))
