"""`python -m dsft`: the same as the `dsft` script."""

import sys

from dsft.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
