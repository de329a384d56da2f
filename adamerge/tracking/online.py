"""Can a W&B run be online? Found out without a prompt and without waiting."""

import os
from collections.abc import Mapping
from contextlib import suppress
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from adamerge.hub import reachable

_ONLINE, _OTHER = ("online", "run", "shared"), ("offline", "dryrun", "disabled")  # as wandb names its modes


def asked_mode(init: Mapping[str, Any]) -> str | None:
    """The mode of W&B that was named somewhere; `init` is what `wandb.init` will be called with."""
    return init.get("mode") or _own(init).get("mode") or os.environ.get("WANDB_MODE")


def check_online(init: Mapping[str, Any]) -> None:
    """See that a run that W&B would start online can be.

    Args:
        init: What `wandb.init` will be called with.

    Raises:
        wandb.Error: There is no such mode, no key, or nothing answers.
    """
    import wandb

    mode, own = asked_mode(init), _own(init)
    if mode not in (None, *_ONLINE, *_OTHER):
        raise wandb.Error(f"its mode is '{mode}', which is none of online, offline and disabled")
    common = wandb.setup().settings
    if (mode or common.mode) not in _ONLINE:
        return
    site = urlsplit(str(own.get("base_url") or common.base_url))
    keys = (own.get("api_key"), common.api_key, os.environ.get("WANDB_IDENTITY_TOKEN_FILE"))
    if not any(keys) and not _in_netrc(site):
        raise wandb.Error("there is no API key (see `wandb login`)")
    if not reachable(site):
        raise wandb.Error(f"{site.hostname} does not answer")


def _own(init: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings that were given to the logger itself."""
    own = init.get("settings") or {}
    return own if isinstance(own, Mapping) else own.model_dump(exclude_unset=True)


def _in_netrc(site: SplitResult) -> bool:
    """Whether the file where `wandb login` keeps keys has one for this site."""
    path = os.environ.get("NETRC")
    for file in [Path(path)] if path else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        with suppress(OSError, NetrcParseError):
            return netrc(file.expanduser()).authenticators(site.netloc) is not None
    return False
