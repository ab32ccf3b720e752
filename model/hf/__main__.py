"""`python -m model.hf COMMAND`: import a published model as a checkpoint, export a checkpoint as a published model.

An entry point stands above the packages it joins; nothing imports it.
"""

import sys

from train.hf.command import main

if __name__ == "__main__":
    sys.exit(main())
