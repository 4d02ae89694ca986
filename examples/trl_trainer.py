"""Any token loss in ``trl.SFTTrainer``, without logits; needs ``trl``. ``python examples/trl_trainer.py``"""

from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import dft_lightning
from dft_lightning import DFTLoss
from dft_lightning.data import ArithmeticRows
from dft_lightning.integrations import FusedLossMixin

BASE = Path(dft_lightning.__file__).parent / "assets" / "arithmetic-base"


class SFT(FusedLossMixin, SFTTrainer):
    """TRL's trainer with ``token_loss`` in the place of its own losses."""


def additions(number: int, part: str) -> Dataset:
    """Rows of a prompt and a completion as turns of a conversation; TRL trains on the completion."""
    rows = [row for _, row in ArithmeticRows(number, min_digits=2, max_digits=3, part=part).rows()]
    turns = {"prompt": "user", "completion": "assistant"}
    return Dataset.from_list(
        [{name: [{"role": role, "content": row[name]}] for name, role in turns.items()} for row in rows]
    )


def train(output_dir: str, max_steps: int = 4, **options: object) -> SFT:
    """Train on additions; returns the trainer."""
    trainer = SFT(
        model=AutoModelForCausalLM.from_pretrained(BASE),
        args=SFTConfig(
            output_dir=output_dir,
            max_steps=max_steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            **options,
        ),
        train_dataset=additions(256, "train"),
        eval_dataset=additions(64, "held_out"),
        processing_class=AutoTokenizer.from_pretrained(BASE),
        token_loss=DFTLoss(),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    measured = train("runs/trl_trainer").evaluate()
    print(f"nll {measured['eval_nll']:.4f}, DFT loss {measured['eval_loss']:.4f}")
