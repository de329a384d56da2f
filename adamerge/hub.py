"""The model hub where it can be reached, what is cached of it where not."""

import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass


def reachable(site: SplitResult, seconds: float = 3) -> bool:
    """Whether a connection can be made, to the site or to the proxy on the way there; known after `seconds`."""
    host = site.hostname or ""
    proxy = None if proxy_bypass(host) else getproxies().get(site.scheme)
    target = site if proxy is None else urlsplit(proxy if "//" in proxy else f"//{proxy}")
    address = (target.hostname or host, target.port or (443 if target.scheme == "https" else 80))
    answered = threading.Event()

    def ask() -> None:
        with suppress(OSError), socket.create_connection(address, timeout=seconds):
            answered.set()

    asking = threading.Thread(target=ask, daemon=True)  # looking up a name has no time limit of its own
    asking.start()
    asking.join(seconds)
    return answered.is_set()


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """In the block, the hub's libraries do not wait and retry for a hub that does not answer: they take what is cached.

    Whether it answers is asked once per process.
    """
    from huggingface_hub import constants

    known = [constants]
    if "datasets" in sys.modules:
        from datasets import config

        known.append(config)
    before = [module.HF_HUB_OFFLINE for module in known]
    if any(before) or not _answers(constants.ENDPOINT):
        for module in known:
            module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, value in zip(known, before, strict=True):
            module.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]


@cache
def _answers(endpoint: str) -> bool:
    return reachable(urlsplit(endpoint))
