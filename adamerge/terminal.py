"""Where progress is shown."""

from rich.console import Console


def progress_console(*, quiet: bool = False) -> Console:
    """Standard error, plain in notebooks too; nothing is drawn where it is no terminal. Names are shown as they are."""
    return Console(stderr=True, force_jupyter=False, quiet=quiet, markup=False, emoji=False)
