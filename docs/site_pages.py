"""mkdocs' hook: pages of the site that lie outside of docs/, and links between them as they are on the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "LICENSE": "LICENSE.txt",
    "train/lamb/README.md": "lamb.md",
}
"""In the repository -> on the site."""


def on_config(config: Any) -> Any:
    """Pages of docs/ that mkdocs.yml does not place come after those that it does."""
    placed = str(config.nav)
    config.nav += [path.name for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in placed]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=_as_on_site((ROOT / source).read_text())))
    return files


def _as_on_site(text: str) -> str:
    """Links to pages of docs/ and to the pages above."""
    text = re.sub(r"\]\((?:\.\./)*docs/", "](", text)
    for source, name in PAGES.items():
        text = text.replace(f"]({source})", f"]({name})")
    return text
