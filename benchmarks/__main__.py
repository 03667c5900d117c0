"""`python -m benchmarks SUITE ...`: the suites; see docs/benchmarks.md."""

import sys

from .suites.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
