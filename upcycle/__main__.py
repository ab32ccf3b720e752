"""`python -m upcycle COMMAND`: plan, expand offline, ask a live run to expand, tell where experts come from.

An entry point stands above the packages it joins; nothing imports it.
"""

import sys

from train.offline.upcycle_command import main

if __name__ == "__main__":
    sys.exit(main())
