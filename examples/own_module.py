"""A module of one's own: change one thing, keep the rest, command included.

python examples/own_module.py fit --config configs/quickstart.yaml

and inspect, compare, score, sample and export likewise.
"""

from typing import Any

from dft_lightning import CausalLMModule
from dft_lightning.fit import main


class FrozenEmbeddings(CausalLMModule):
    """Trains everything but the embedding."""

    def build_parameter_groups(self) -> list[dict[str, Any]]:
        self.model.get_input_embeddings().requires_grad_(False)
        return super().build_parameter_groups()


if __name__ == "__main__":
    main(module_class=FrozenEmbeddings)
