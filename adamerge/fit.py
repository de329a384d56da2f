"""`python -m adamerge.fit --config configs/digits.yaml`: learn a merge; the same as `adamerge fit`."""

import sys

from adamerge.cli import fit, main

if __name__ == "__main__":
    sys.exit(main(fit))
