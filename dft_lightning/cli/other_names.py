"""What other trainers, and people, call the keys and the losses of this one."""

from __future__ import annotations

import re
from collections.abc import Collection

from dft_lightning.errors import nearest

KEYS = {
    "model.model": "base_model model_name model_name_or_path pretrained_model_name_or_path",
    "model.loss": "criterion loss_fn loss_function loss_type",
    "model.optimizer": "optim",
    "model.optimizer.lr": "learning_rate lr",
    "model.optimizer.betas": "adam_beta1 adam_beta2",
    "model.optimizer.eps": "adam_epsilon",
    "model.optimizer.weight_decay": "weight_decay",
    "model.schedule": "lr_scheduler scheduler",
    "model.schedule.decay": "lr_scheduler_type",
    "model.schedule.warmup": "warmup warmup_ratio warmup_steps",
    "model.peft": "adapter lora peft_config use_lora use_peft",
    "model.peft.r": "lora_r lora_rank",
    "model.peft.lora_alpha": "lora_alpha",
    "model.peft.lora_dropout": "lora_dropout",
    "model.loading.dtype": "torch_dtype",
    "model.loading.quantization_config": "load_in_4bit load_in_8bit",
    "model.loading.gradient_checkpointing": "activation_checkpointing activation_offloading",
    "model.loading.compile": "torch_compile",
    "data.train": "dataset dataset_name dataset_path train_dataset train_file",
    "data.validation": "eval_dataset eval_file validation_file",
    "data.validation_fraction": "test_size val_size validation_split",
    "data.batch_size": "micro_batch_size per_device_train_batch_size train_batch_size",
    "data.eval_batch_size": "per_device_eval_batch_size",
    "data.global_batch_size or trainer.accumulate_grad_batches": "gradient_accumulation gradient_accumulation_steps",
    "data.text.max_length": "cutoff_len max_len max_seq_len max_seq_length model_max_length seq_len sequence_len",
    "data.text.prompt_weight": "assistant_only_loss completion_only_loss train_on_inputs train_on_prompt",
    "data.batches.packing": "sample_packing",
    "data.num_workers": "dataloader_num_workers",
    "data.num_proc": "dataset_num_proc preprocessing_num_workers",
    "trainer.max_epochs": "epochs num_epochs num_train_epochs",
    "trainer.default_root_dir": "output output_dir",
    "trainer.precision": "bf16 fp16 mixed_precision",
    "trainer.strategy": "deepspeed fsdp",
    "trainer.gradient_clip_val": "max_grad_norm",
    "trainer.log_every_n_steps": "logging_steps",
    "trainer.val_check_interval": "eval_steps",
    "trainer.logger": "report_to",
    "ckpt_path": "resume_from_checkpoint",
    "seed_everything": "seed",
}
COMMANDS_OF_OTHERS = {
    "train": "fit",
    "finetune": "fit",
    "sft": "fit",
    "eval": "test",
    "evaluate": "test",
    "generate": "predict",
    "infer": "predict",
    "inference": "predict",
}
_OF_KEYS = {name: key for key, names in KEYS.items() for name in names.split()}
_OF_CLASSES = {"ce": "CrossEntropyLoss", "nll": "CrossEntropyLoss", "sft": "CrossEntropyLoss"}


def meant_key(key: str, known: Collection[str]) -> str | None:
    """The known key that somebody who wrote another meant; ``None`` where none is like it.

    What is called so in the same group comes first, then what is called so elsewhere, then what is spelt like it.
    """
    group, last = key.partition(".")[0], _last(key).replace("-", "_")
    same = [name for name in known if _last(name) == last]
    if inside := [name for name in same if name.partition(".")[0] == group]:
        return inside[0]
    if last in _OF_KEYS and all(_is_known(each, known) for each in _OF_KEYS[last].split(" or ")):
        return _OF_KEYS[last]
    if len(same) == 1:
        return same[0]
    lasts = {_last(name): name for name in known}
    return nearest(key, known) or lasts.get(str(nearest(last, lasts, cutoff=0.75)))


def meant_option(name: str, options: Collection[str]) -> str | None:
    """The same for an option of a class that is named."""
    other = _last(_OF_KEYS.get(name, ""))
    return other if other in options else nearest(name, options)


def meant_class(name: str, known: Collection[str]) -> str | None:
    """The same for the name of a class, however it is written: ``dft``, ``cross_entropy``, ``ADAMW``."""
    letters = _letters(name)
    alike = [each for each in known if letters in (_letters(each), _letters(each.removesuffix("Loss")))]
    return (
        next(iter(alike), None)
        or next((each for each in known if each == _OF_CLASSES.get(letters)), None)
        or (nearest(name, known))
    )


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _letters(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _is_known(key: str, known: Collection[str]) -> bool:
    """Itself, or what it is an option of."""
    return key in known or key.rpartition(".")[0] in known
