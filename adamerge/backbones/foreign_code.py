"""Code that a model brings along: model libraries run none of it, but that of one folder where it was asked for."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adamerge.checkpoints import locate
from adamerge.hub import hub_id
from adamerge.types import InputError

REMOTE = "trust_remote_code"  # what transformers' complaint of a folder with code of its own contains
_TENSORS_ALONE, _ANYTHING = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # read by torch.load
_guard = threading.RLock()


@contextmanager
def only_code_of(source: str | None) -> Iterator[None]:
    """Let transformers run the code of one model's folder alone in the block, whatever a configuration switches on.

    Other libraries configure transformers from files of strangers, and transformers configures itself from nested
    files. All of their code passes one function of transformers, which is guarded here. Nobody is asked at the
    terminal, and pickles are read for their tensors alone.

    Args:
        source: The folder or hub id whose code may run, in the commit that it stands for; None for none.
    """
    from transformers import dynamic_module_utils as library

    home = None if source is None else locate(source, weights=False, code=True)
    own = None if source is None or Path(source).expanduser().exists() else hub_id(source)

    with _guard:
        get, seconds = library.get_cached_module_file, library.TIME_OUT_REMOTE_CODE
        original = getattr(get, "guarded", get)

        def checked(origin: Any, file: str, *args: Any, **options: Any) -> Any:
            if home is None or str(origin) not in (str(home), own.repo if own else str(home)):
                raise InputError(_refusal(str(origin), file, source))
            return original(str(home), file, *args, **options)

        checked.guarded = original  # type: ignore[attr-defined]
        library.get_cached_module_file = checked  # type: ignore[assignment]
        library.TIME_OUT_REMOTE_CODE = 0  # seconds for an answer; none is waited for
        try:
            with _only_tensors():
                yield
        finally:
            library.get_cached_module_file, library.TIME_OUT_REMOTE_CODE = get, seconds


def _refusal(origin: str, file: str, source: str | None) -> str:
    if source is None:
        return (
            f"'{origin}' has code of its own run ({file}), which is not trusted: no option of yours asks for it. Take "
            f"`{REMOTE}` and `auto_map` out of its configuration, or name a model that its library knows by itself."
        )
    return (
        f"'{source}' takes code from '{origin}' ({file}), in no commit that could be told; only code that lies beside "
        f"the model is run. Put {file} into a folder with the model, and name it in `auto_map` without '{origin}--'."
    )


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
    """Whether an attention implementation is a kernel of the hub, `org/name`, which is code that transformers runs."""
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
