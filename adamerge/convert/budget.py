"""A limit on what reading one checkpoint may cost, whatever its pickles say."""

from dataclasses import dataclass

from adamerge.types import InputError

_STEPS = 4_000_000  # a tensor takes about 35: 110,000 tensors
_BYTES_OF_A_STEP = 8  # large files also hold lists of losses or indices, of millions of numbers
_SPARE = 2**24  # bytes


@dataclass
class Budget:
    """Counts what a checkpoint costs to read, and refuses it once that is more than any checkpoint needs.

    A pickle of a few kilobytes can ask for any number of steps and bytes: it may name one part many times over.

    Args:
        source: What messages call the checkpoint.
        size: The bytes of its file; twice as many may be copied.
    """

    source: str
    size: int = 0

    def __post_init__(self) -> None:
        self._most = self._steps = _STEPS + self.size // _BYTES_OF_A_STEP
        self._limit = self._bytes = 2 * self.size + _SPARE

    def step(self, number: int = 1) -> None:
        """Pay for operations of a pickle, entries that are copied, or parts that are visited.

        Raises:
            InputError: The checkpoint needs more than the limit.
        """
        self._steps -= number
        if self._steps < 0:
            self._refuse(f"more than {self._most:,} steps to read")

    def copy(self, number: int) -> None:
        """Pay for bytes or letters that are copies of others in the file.

        Raises:
            InputError: The checkpoint needs more than the limit.
        """
        self._bytes -= number
        if self._bytes < 0:
            self._refuse(f"more than {self._limit / 1e6:,.0f} MB of names and copies")

    def _refuse(self, what: str) -> None:
        raise InputError(
            f"{self.source} asks for {what}, as no checkpoint of a model does: it is not converted. Save the model's "
            "plain `state_dict()` again, without what stands beside it, or get the checkpoint from somewhere else."
        )
