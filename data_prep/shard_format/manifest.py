"""The format of the shards: what data_prep writes and train reads (docs/ARCHITECTURE.md, "Shards").

A shard is a tar file that stock webdataset reads. Each of its members is `<key>.tokens.npy`: a 1-D uint16
array (uint32 where the vocabulary has more than 65,535 entries), a block of whole documents, each followed
by the separator's id; no other special token stands in it but the unknown one. `manifest.json` beside the
shards names them with their digests and counts; `tokenizer/` is the Hugging Face folder they were made with.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar
from urllib.parse import unquote, urlsplit

import numpy as np
from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError

from data_prep.shard_format.checks import (
    Count,
    FileName,
    Sha256,
    first_problem,
    plain_file_name,
    shard_is_consistent,
    tokenizer_is_consistent,
)
from data_prep.shard_format.errors import MissingFile, UserError
from data_prep.shard_format.files import write_text
from data_prep.shard_format.remote import read_bytes
from data_prep.shard_format.tokenizer_info import TokenizerInfo

MANIFEST_VERSION = 1
MANIFEST_NAME = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
SPLITS = ("train", "heldout")
LATER_FIELDS = ("token_histogram_sha256",)
"""Not there in the first manifests, whose digests stay."""
# The canonical text of one shard. There may be many, and json.dumps with an indent takes ten times as long. Their texts
# are plain file names and hex digits, which JSON escapes nothing of.
_SHARD = '   {\n    "bytes": %s,\n    "documents": %s,\n    "name": "%s",\n    "sha256": "%s",\n    "tokens": %s\n   }'


@dataclass(slots=True)  # there may be many; frozen, they take twice as long to make
class ShardInfo:
    """One tar file. `tokens` counts all of its tokens, separators included; `sha256` is over the file."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    name: FileName
    bytes: Count
    sha256: Sha256
    documents: Count
    tokens: Count


def _known_splits(splits: dict[str, Any]) -> dict[str, Any]:
    """The splits of this version; ValueError where one is missing, or a shard is there twice."""
    missing = [split for split in SPLITS if split not in splits]
    if missing:
        raise UserError(f"there is no split {missing[0]!r}")
    names = [shard.name for split in SPLITS for shard in splits[split]]
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UserError(f"the shard {twice} is listed twice")
    return {split: splits[split] for split in SPLITS}


@dataclass(frozen=True)
class Manifest:
    """What lies in a folder of shards, and how it was made."""

    tokenizer: Annotated[TokenizerInfo, AfterValidator(tokenizer_is_consistent)]
    splits: Annotated[
        dict[str, tuple[Annotated[ShardInfo, AfterValidator(shard_is_consistent)], ...]],
        AfterValidator(_known_splits),
    ]
    """"train" and "heldout", each in name order; either may be empty."""
    token_histogram: FileName
    """Name of an .npy file beside the manifest: int64 (vocab_size,), the tokens of the train split."""
    token_histogram_sha256: Sha256 | None = None
    """Of that file, which decides the masks; None in manifests from before November 2026."""
    sources: tuple[dict[str, Any], ...] = ()
    """Per source as named by the user: kind, files, bytes (as stored), documents read."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the bytes of the shards depend on beside the sources."""
    skipped: dict[str, Count] = field(default_factory=dict)
    """Documents that were read but are in no shard, by reason."""
    version: int = MANIFEST_VERSION

    def to_json(self) -> str:
        """The canonical text: sorted keys, ASCII, a newline at the end; equal manifests give equal bytes.

        It is json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) without LATER_FIELDS that are None.
        """
        content = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        for name in LATER_FIELDS:
            if content[name] is None:
                del content[name]
        content |= {"tokenizer": dataclasses.asdict(self.tokenizer), "splits": None}
        text = json.dumps(content, indent=1, sort_keys=True) + "\n"
        lists = ",".join(
            f"\n  {json.dumps(name)}: {_shards(self.splits[name])}" for name in sorted(self.splits)
        )
        # Nested keys stand further to the right, and a line break within a string is escaped.
        return text.replace('\n "splits": null,\n', f'\n "splits": {{{lists}\n }},\n')

    def digest(self) -> str:
        """sha256 of the canonical JSON, 64 hex digits: names the shards' contents, not where they lie."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `folder`/manifest.json in one step: it is there whole or not at all."""
        write_text(Path(folder, MANIFEST_NAME), self.to_json())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Manifest:
        """Read manifest.json from a folder, which may be a URL (shard_format/remote.py).

        Raises:
            MissingFile: there is none.
            UserError: it is not a manifest of this version; the message names the file and the field.
        """
        url = shard_url(folder, MANIFEST_NAME)
        data = _read(url)
        try:
            manifest = cls.from_dict(json.loads(data))
            manifest.digest()  # here, since what is nested too deeply for JSON ends here
            return manifest
        except (ValueError, RecursionError) as error:  # ValueError: also of numbers of thousands of digits
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            raise UserError(
                f"{url} is not a manifest of shards ({reason}); make the shards again with data_prep/write_shards.py"
            ) from None

    @classmethod
    def from_dict(cls, content: Any) -> Manifest:
        """A manifest from what its JSON holds; UserError where a field is not what is documented here."""
        if isinstance(content, dict) and content.get("version") != MANIFEST_VERSION:
            raise UserError(
                f"it has version {content.get('version')}, this code reads version {MANIFEST_VERSION}"
            )
        try:
            return _MANIFEST.validate_python(content)
        except ValidationError as error:
            raise UserError(first_problem(error)) from None


_MANIFEST = TypeAdapter(Manifest)


def _shards(shards: tuple[ShardInfo, ...]) -> str:
    if not shards:
        return "[]"
    objects = ",\n".join(
        [_SHARD % (each.bytes, each.documents, each.name, each.sha256, each.tokens) for each in shards]
    )
    return f"[\n{objects}\n  ]"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where every id fits beside 65,535, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 65_535 else np.uint32)


# ------------------------------------------------------------------------------------------ files and URLs


def without_scheme(location: str | os.PathLike[str]) -> str:
    """A location as everything here takes it: file:/abs, file:///abs and file://localhost/abs as paths."""
    text = str(location)
    if not text.startswith("file:"):
        return text
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise UserError(f"{text} names a file on {parts.netloc!r}: give file:///PATH, or the path alone")
    return unquote(text.removeprefix("file:").removeprefix(f"//{parts.netloc}"))


def shard_url(folder: str | os.PathLike[str], name: str) -> str:
    """Where file `name` of a folder or URL of shards lies.

    Raises:
        UserError: the name, which comes from a manifest, may do harm in a path or a URL.
    """
    plain_file_name(name)
    return f"{without_scheme(folder).rstrip('/')}/{name}"


def _read(url: str) -> bytearray:
    try:
        return read_bytes(url)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFile(
            f"{url} does not exist; make shards with "
            f"`python data_prep/write_shards.py SOURCE... --tokenizer T --out {os.path.dirname(url)}`"
        ) from None
    except OSError as error:
        raise UserError(f"{url} cannot be read: {error}") from None
