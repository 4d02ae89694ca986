"""What makes a result independent of how a step was split."""

from dft_lightning.distributed.ranks import TokenNormalizer, gather_lists
from dft_lightning.distributed.shard_loading import parameters_on_meta
from dft_lightning.distributed.sharding import ShardingOptions

__all__ = [
    "ShardingOptions",
    "TokenNormalizer",
    "gather_lists",
    "parameters_on_meta",
]
