"""``python -m dft_lightning fit|validate|test|predict --config ...`` and ``compare``, ``inspect``, ``export``"""

from __future__ import annotations

import os
import sys

# Large tensors on huge pages, where Linux gives them and the user has not decided: a training step on the CPU is some
# percent faster. torch reads this at its first large tensor, which importing Lightning may make.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from dft_lightning.cli import main


def run() -> None:
    """The console script: exits with status 0 after a run, with 2 after a mistake."""
    if sys.argv[1:2] == ["compare"]:
        from dft_lightning.compare.command import main as compare

        raise SystemExit(compare(sys.argv[2:]))
    if sys.argv[1:2] == ["inspect"]:
        from dft_lightning.inspection.command import main as inspect

        raise SystemExit(inspect(sys.argv[2:]))
    if sys.argv[1:2] == ["export"]:
        from dft_lightning.export.command import main as export

        raise SystemExit(export(sys.argv[2:]))
    main()


if __name__ == "__main__":
    run()
