"""A token loss of one's own, by class path from the command.

    python -m dft_lightning fit --config configs/quickstart.yaml --model.loss examples.own_loss.ClippedDFT \
        --model.loss.floor 0.2

The module, the head, the normalisation and the telemetry are the same for every loss.
"""

from torch import Tensor

from dft_lightning import TokenLoss, TokenStats


class ClippedDFT(TokenLoss):
    """DFT whose weight never falls below ``floor``, so that unlikely tokens are learnt a little."""

    def __init__(self, floor: float = 0.1, **kwargs) -> None:
        super().__init__(**kwargs)
        self.floor = floor

    def token_loss(self, stats: TokenStats) -> Tensor:
        return -stats.log_prob.exp().detach().clamp(min=self.floor) * stats.log_prob
