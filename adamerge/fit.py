"""`python -m adamerge.fit --config configs/digits.yaml`: learn a merge."""

import sys

from adamerge.cli import main

if __name__ == "__main__":
    sys.exit(main())
