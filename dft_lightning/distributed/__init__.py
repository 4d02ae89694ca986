"""What makes a result independent of how a step was split."""

from dft_lightning.distributed.gather import gather_lists
from dft_lightning.distributed.normalization import TokenNormalizer

__all__ = ["TokenNormalizer", "gather_lists"]
