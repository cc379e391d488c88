"""What sentence-transformers reads beside a model: carried over from a teacher's folder to its student's, so that
`SentenceTransformer(FOLDER)` loads the student with the teacher's pooling.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from data_prep.shard_format.files import write_json
from train.errors import UserError
from train.models.encoder_config import COPY_AGAIN, read_json_beside
from train.models.families import max_positions
from train.models.pooling import MODULES, sentence_modules

TRANSFORMER_FILES = tuple(
    f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert", "xlm-roberta")
)
"""Whatever its architecture is, the first one that is there counts."""
WIDTHS = ("word_embedding_dimension", "embedding_dimension")
"""Of the hidden states that are pooled: the key's old name and its new one."""

logger = logging.getLogger(__name__)


def carry_sentence_files(origin: str, folder: Path, config: Any) -> None:
    """Copy the files from a model's folder (or hub name) to another's, fitted to that one's width and positions.

    Nothing is copied where the model has none, or modules of them with weights or code of their own, which is said.

    Args:
        config: the Hugging Face config of the model in `folder`.
    Raises:
        UserError: a file that cannot be read.
    """
    known = sentence_modules(origin)
    if not known:
        return
    if others := [module.type for module in known if not module.is_plain]:
        logger.warning(
            "%s: sentence-transformers' %s has weights or code of its own, so that the student's folder gets none of "
            "sentence-transformers' files",
            origin,
            others[0],
        )
        return
    found: dict[str, Any] = {}
    for module in known:
        name = f"{module.path}/config.json"
        found[name] = read_json_beside(origin, name) if module.path else None
        if module.type.endswith(".Pooling") and found[name] is None:
            raise UserError(f"{origin} has no {name}, which its {MODULES} names; {COPY_AGAIN}")
    found |= {
        name: read_json_beside(origin, name)
        for name in ("config_sentence_transformers.json", *TRANSFORMER_FILES)
    }
    write_json(folder / MODULES, read_json_beside(origin, MODULES))
    for name, settings in found.items():
        if settings is None:
            continue
        if not isinstance(settings, dict):
            raise UserError(f"{origin}/{name} is damaged (no JSON object); {COPY_AGAIN}")
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, _fitted(settings, config))


def _fitted(settings: dict[str, Any], config: Any) -> dict[str, Any]:
    positions, longest = max_positions(config), settings.get("max_seq_length")
    fitted = {key: int(config.hidden_size) for key in WIDTHS if key in settings}
    if positions is not None and isinstance(longest, int):
        fitted["max_seq_length"] = min(longest, positions)
    return {**settings, **fitted}
