"""What other libraries raise, as one sentence; what they say on the way, unsaid."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from adamerge.backbones.foreign_code import only_code_of
from adamerge.hub import hub_or_cache
from adamerge.types import InputError


@contextmanager
def explained(what: str, code_of: str | None = None) -> Iterator[None]:
    """Turn all that model libraries and the hub raise into one sentence, and let them run no foreign code.

    Args:
        what: What cannot be done, as the sentence begins.
        code_of: The source whose code they may run all the same, where the user asked for that.
    """
    try:
        with hub_or_cache(), only_code_of(code_of), quiet():
            yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{what}: {reason}. Check the name, the network and the file.") from error


@contextmanager
def quiet() -> Iterator[None]:
    """transformers, where it is in use, reports errors alone for the length of the block."""
    if "transformers" not in sys.modules:
        yield
        return
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
