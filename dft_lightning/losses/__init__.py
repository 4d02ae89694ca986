"""Token losses: one scalar function of the target's log-probability each. Imports torch alone.

Example:
    >>> import torch
    >>> from dft_lightning.losses import CrossEntropyLoss, DFTLoss, FocalLoss
    >>> logits, targets = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([0, -100])
    >>> for loss in (CrossEntropyLoss(), DFTLoss(), FocalLoss(gamma=1.0)):
    ...     print(f"{type(loss).__name__}: {loss(logits, targets).item():.4f}")
    CrossEntropyLoss: 0.1269
    DFTLoss: 0.1118
    FocalLoss: 0.0151
"""

from dft_lightning.losses.base import IGNORE_INDEX, TokenLoss, token_loss_and_weight
from dft_lightning.losses.combined import FromReference, MixtureLoss, ScheduledLoss, ThresholdLoss
from dft_lightning.losses.cross_entropy import CrossEntropyLoss, DFTLoss, dft_cross_entropy
from dft_lightning.losses.focal import FocalLoss, focal_cross_entropy
from dft_lightning.losses.from_logits import statistics_from_logits
from dft_lightning.losses.power import DEFTLoss, PowerLoss
from dft_lightning.losses.reference import (
    AnchoredLoss,
    ImportanceWeightedLoss,
    PriorWeightedLoss,
    ProximalLoss,
    ReferenceKLLoss,
)
from dft_lightning.losses.statistics import Statistic, TokenStats
from dft_lightning.losses.tempered import GEMLoss, SEDSFTLoss, TargetSFTLoss
from dft_lightning.losses.weighted import (
    ChordPhiLoss,
    EAFTLoss,
    InfoSFTLoss,
    RectifiedLoss,
    SequenceDFTLoss,
    TrustRegionLoss,
)

__all__ = [
    "IGNORE_INDEX",
    "LOSSES",
    "AnchoredLoss",
    "ChordPhiLoss",
    "CrossEntropyLoss",
    "DEFTLoss",
    "DFTLoss",
    "EAFTLoss",
    "FocalLoss",
    "FromReference",
    "GEMLoss",
    "ImportanceWeightedLoss",
    "InfoSFTLoss",
    "MixtureLoss",
    "PowerLoss",
    "PriorWeightedLoss",
    "ProximalLoss",
    "RectifiedLoss",
    "ReferenceKLLoss",
    "SEDSFTLoss",
    "ScheduledLoss",
    "SequenceDFTLoss",
    "Statistic",
    "TargetSFTLoss",
    "ThresholdLoss",
    "TokenLoss",
    "TokenStats",
    "TrustRegionLoss",
    "dft_cross_entropy",
    "focal_cross_entropy",
    "statistics_from_logits",
    "token_loss_and_weight",
]

#: Every loss of the package, by the name that a config gives as ``class_path``.
LOSSES: dict[str, type[TokenLoss]] = {
    name: each
    for name in __all__
    if isinstance(each := globals().get(name), type) and issubclass(each, TokenLoss) and each is not TokenLoss
}
