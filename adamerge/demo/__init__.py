"""Small pools of real models on real data, trained in place on first use and kept in the cache folder.

This room only builds files; they are read through the same code as anybody's.
"""

from pathlib import Path

from adamerge.types import InputError


def locate_demo(name: str) -> Path:
    """The file or folder behind `demo:POOL/NAME`, built first if need be.

    Raises:
        InputError: No such pool or model.
    """
    from adamerge.demo import digits, texts, zoo

    pools = {"digits": digits.locate, "zoo": zoo.locate, "texts": texts.locate}
    pool, _, model = name.partition("/")
    if pool not in pools:
        raise InputError(f"There is no demo pool '{pool}'; there are {', '.join(pools)}.")
    return pools[pool](model)
