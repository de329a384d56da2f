"""Small pools of real models on real data, trained in place on first use and kept in the cache folder.

This room only builds files; they are read through the same code as anybody's.
"""

from pathlib import Path

from adamerge.types import InputError


def locate_demo(name: str) -> Path:
    """The file behind `demo:POOL/NAME`, built first if need be.

    Raises:
        InputError: No such pool or model.
    """
    pool, _, model = name.partition("/")
    if pool != "digits":
        raise InputError(f"There is no demo pool '{pool}'; there is digits.")
    from adamerge.demo import digits

    return digits.locate(model)
