"""What turns hidden states or logits into a token loss. Knows torch and the losses alone."""

from dft_lightning.ops.call import ReferenceHead, TokenOutput
from dft_lightning.ops.linear_head import check_threshold, linear_token_loss, linear_token_statistics
from dft_lightning.ops.logits_loss import logits_token_loss
from dft_lightning.ops.pieces import release_scratch

__all__ = [
    "ReferenceHead",
    "TokenOutput",
    "check_threshold",
    "linear_token_loss",
    "linear_token_statistics",
    "logits_token_loss",
    "release_scratch",
]
