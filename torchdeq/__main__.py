"""`python -m torchdeq` is the command `torchdeq`."""

import sys

from torchdeq.cli import main

if __name__ == "__main__":
    sys.exit(main())
