"""`python -m adamerge.demo POOL FOLDER`: train a demo pool anew, and write the files that the package ships."""

import argparse
from pathlib import Path

from adamerge.files import atomic_dir


def main() -> None:
    """Train one pool into a new folder."""
    from adamerge.demo import digits_training, texts_training, zoo_training

    pools = {"digits": digits_training.train, "texts": texts_training.train, "zoo": zoo_training.train}
    parser = argparse.ArgumentParser(prog="python -m adamerge.demo", description=__doc__)
    parser.add_argument("pool", choices=pools)
    parser.add_argument("folder", type=Path, help="A new folder; it appears whole or not at all.")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists; name a new folder.")
    with atomic_dir(options.folder) as folder:
        pools[options.pool](folder)


if __name__ == "__main__":
    main()
