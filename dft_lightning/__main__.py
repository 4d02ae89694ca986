"""``python -m dft_lightning fit|validate|test|predict --config ...``"""

from __future__ import annotations

from dft_lightning.cli import main


def run() -> None:
    """The console script: exits with status 0 after a run, with 2 after a mistake."""
    main()


if __name__ == "__main__":
    run()
