"""Run by test_configs on two processes: the command.

usage: two_command.py ARGUMENT...
"""

from __future__ import annotations

import sys

from dft_lightning.fit import main

if __name__ == "__main__":
    main(sys.argv[1:])
