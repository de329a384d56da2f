"""Seeds derived from names, so that what is drawn depends on nothing else."""

import hashlib


def seed_of(*parts: object) -> int:
    """A seed in [0, 2^63) of its own for every combination of parts: a run's seed, a task, a step."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
