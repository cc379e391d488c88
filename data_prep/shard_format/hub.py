"""Is the Hugging Face hub there? Its client tries every file again and again before it gives up: 49 s for a model."""

from __future__ import annotations

import functools
import os
import socket
import urllib.request
from collections.abc import Callable
from urllib.parse import urlsplit

from data_prep.shard_format.errors import UserError

TIMEOUT_S = 3.0


def require_hub(name: str, is_cached: Callable[[], bool] = lambda: False) -> None:
    """Refuse a name on the hub at once where the hub cannot be reached, and its cache does not hold it.

    Nothing is tried with HF_HUB_OFFLINE, when the client asks its cache alone, nor behind a proxy.

    Raises:
        UserError: with both remedies.
    """
    if (
        os.environ.get("HF_HUB_OFFLINE")
        or os.environ.get("TRANSFORMERS_OFFLINE")
        or urllib.request.getproxies()
    ):
        return
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if (fault := _fault(endpoint)) is None:
        return
    if is_cached():
        print(
            f"{endpoint} cannot be reached ({fault}): {name} from the cache; HF_HUB_OFFLINE=1 saves the waiting"
        )
        return
    raise UserError(
        f"{name} is not here, and {endpoint} cannot be reached ({fault}): give a local folder, or go online once to "
        "fill the cache"
    )


@functools.cache
def _fault(endpoint: str) -> str | None:
    """Why no connection can be made; None where one can."""
    try:
        address = urlsplit(endpoint)
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), TIMEOUT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:  # HF_ENDPOINT is no URL
        return str(error)
    return None
