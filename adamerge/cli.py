"""How commands meet a terminal: messages, errors as one paragraph, exit status."""

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from adamerge.config import job_from_arguments
from adamerge.training import Run, execute
from adamerge.types import InputError

log = logging.getLogger("adamerge")


def fit() -> Run:
    """The training command."""
    return execute(job_from_arguments())


def main(command: Callable[[], Any] = fit) -> int:
    """Run a command with messages on the terminal and errors as one paragraph; returns the exit status."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    for noisy in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        log.info("%s", command())
    except InputError as error:
        if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":  # every rank fails with it; one says so
            sys.stderr.write(f"adamerge: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("adamerge: stopped by Ctrl-C.\n")
        return 130
    return 0
