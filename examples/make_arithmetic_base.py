"""Train the quickstart's base model and write it as a Hugging Face checkpoint folder.

python examples/make_arithmetic_base.py --output FOLDER
"""

import argparse
from pathlib import Path

from dft_lightning.data import arithmetic_tokenizer
from dft_lightning.fit import main

CONFIG = Path(__file__).parents[1] / "configs" / "arithmetic_base.yaml"


def make(output: str, *overrides: str) -> None:
    """Train by the config, with further command-line arguments, and save model and tokenizer."""
    cli = main(["fit", "--config", str(CONFIG), *overrides])
    cli.model.model.save_pretrained(output)
    arithmetic_tokenizer().save_pretrained(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, help="folder to write")
    arguments, rest = parser.parse_known_args()
    make(arguments.output, *rest)
