"""Cases on fake GPUs, in a process of their own: `python -m tests.fake_cuda LIBRARY CASES RESULTS`.

CASES: a JSON file, {"first_steps" or "passes": {name: case}}. RESULTS: the JSON file to write, with what each case
gave, or {"error": traceback}, in its place.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

library, cases, results = sys.argv[1:]
# Before torch is imported: the kinds of devices enter themselves in its registries.
ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)

from tests.fake_cuda import gpu  # noqa: E402

os.environ.update(gpu.ENVIRONMENT)
waits = gpu.install()
found: dict[str, dict[str, object]] = {}
for part, own in json.loads(Path(cases).read_text()).items():
    run, found[part] = importlib.import_module(f"tests.fake_cuda.{part}").run, {}
    for name, case in own.items():
        try:
            found[part][name] = run(case, waits)
        except Exception:
            found[part][name] = {"error": traceback.format_exc()}
Path(results).write_text(json.dumps(found))
