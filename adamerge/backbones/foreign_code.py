"""Code that models bring along: libraries run none of it, except one folder's where the user asked for it."""

import functools
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adamerge.checkpoints import locate
from adamerge.hub import hub_id
from adamerge.types import InputError

REMOTE = "trust_remote_code"  # what transformers' complaint of a folder with code of its own contains
_TENSORS_ALONE, _ANYTHING = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # read by torch.load
_FETCHES_CODE = "get_cached_module_file"
_one_at_a_time = threading.RLock()  # a block changes state of the whole process


@dataclass(frozen=True)
class _Allowed:
    """The one folder whose code may run, which can be a copy of a repository; without a folder, no code may run."""

    source: str | None = None
    folder: str | None = None
    repo: str | None = None

    @classmethod
    def of(cls, source: str | None) -> "_Allowed":
        if source is None:
            return cls()
        hub = None if Path(source).expanduser().exists() else hub_id(source)
        return cls(source, str(locate(source, weights=False, code=True)), hub.repo if hub else None)

    def folder_for(self, origin: str, file: str) -> str:
        """Return the folder that a file of code is taken from.

        Raises:
            InputError: Code of that origin may not run.
        """
        if self.folder is not None and origin in (self.folder, self.repo):
            return self.folder
        if self.source is None:
            raise InputError(
                f"'{origin}' has code of its own run ({file}), which is not trusted: no option of yours asks for it. "
                f"Take `{REMOTE}` and `auto_map` out of its configuration, or name a model that its library knows."
            )
        raise InputError(
            f"'{self.source}' takes code from '{origin}' ({file}), in no commit that could be told; only code that "
            f"lies beside the model is run. Put {file} into a folder with the model, and name it in `auto_map` "
            f"without '{origin}--'."
        )


_allowed: ContextVar[_Allowed | None] = ContextVar("allowed", default=None)  # None outside of the blocks: unchecked


@contextmanager
def only_code_of(source: str | None) -> Iterator[None]:
    """Let transformers run the code of one model's folder alone in the block, whatever a configuration switches on.

    Other libraries configure transformers from files of strangers, and transformers configures itself from nested
    files. One function of transformers fetches all such code, and it is guarded here. The user is not asked at the
    terminal, and only tensors are read from pickles.

    Args:
        source: The folder or hub id whose code may run, in the commit that it stands for; None for none.
    """
    from transformers import dynamic_module_utils as library

    with _one_at_a_time:
        _guard()
        before = _allowed.set(_Allowed.of(source))
        seconds, library.TIME_OUT_REMOTE_CODE = library.TIME_OUT_REMOTE_CODE, 0  # for an answer at the terminal
        try:
            with _only_tensors():
                yield
        finally:
            library.TIME_OUT_REMOTE_CODE = seconds
            _allowed.reset(before)


def _guard() -> None:
    """Put a check in front of the function that fetches code for transformers, in each module that has imported it."""
    for name in ("transformers.dynamic_module_utils", "transformers.generation.utils"):
        get = getattr(sys.modules.get(name), _FETCHES_CODE, None)
        if get is not None and not hasattr(get, "is_guarded"):
            setattr(sys.modules[name], _FETCHES_CODE, _guarded(get))


def _guarded(get: Any) -> Any:
    @functools.wraps(get)
    def guarded(origin: Any, *args: Any, **options: Any) -> Any:
        allowed = _allowed.get()
        if allowed is not None:
            file = str(args[0] if args else options.get("module_file"))
            if not _is_missing(origin, file):
                origin = allowed.folder_for(str(origin), file)
        return get(origin, *args, **options)

    guarded.is_guarded = True  # type: ignore[attr-defined]
    return guarded


def _is_missing(origin: Any, file: str) -> bool:
    """Tell whether a folder has no such file: some versions look for code in every folder, and find none."""
    return os.path.isdir(origin) and not os.path.lexists(os.path.join(origin, file))


@contextmanager
def _only_tensors() -> Iterator[None]:
    before = {name: os.environ.pop(name, None) for name in (_TENSORS_ALONE, _ANYTHING)}
    os.environ[_TENSORS_ALONE] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def is_kernel(implementation: Any) -> bool:
    """Tell whether an attention implementation is a kernel of the hub, `org/name`: code that transformers runs."""
    parts = implementation.values() if isinstance(implementation, dict) else [implementation]
    return any(isinstance(part, str) and "/" in part for part in parts)


def refuse_kernels(folder: Path) -> None:
    """Refuse a configuration that has a kernel of the hub run.

    Raises:
        InputError: It names one.
    """
    values: list[Any] = [json.loads((folder / "config.json").read_text(encoding="utf-8"))]
    while values:
        value = values.pop()
        for key, item in value.items() if isinstance(value, dict) else ():
            if "implementation" in key and is_kernel(item):
                raise InputError(
                    f"{folder / 'config.json'} has `{key}` {item}, a kernel of the hub, which is code that is not "
                    "trusted: no option of yours asks for it. Take it out of the file, and choose one yourself in "
                    "`backbone.attention`."
                )
        values += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
