"""What turns model outputs into a token loss. Knows torch and the losses alone."""

from dft_lightning.ops.logits_loss import TokenOutput, logits_token_loss

__all__ = ["TokenOutput", "logits_token_loss"]
