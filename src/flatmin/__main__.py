"""`python -m flatmin` is the `flatmin` command."""

import sys

from flatmin.lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
