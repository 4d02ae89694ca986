"""Classes of one's own, as a user's project has them in a module."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import LlamaForCausalLM

from dft_lightning import CausalLMModule, InstructionDataModule
from dft_lightning.data import arithmetic_tokenizer


class OwnLlama(LlamaForCausalLM):
    """A model class that transformers does not know."""


class OwnModule(CausalLMModule):
    """Every weight of the head begins as ``own_start``, every answer is ``2`` and every log-prob is -3."""

    def __init__(self, *args, own_start: float = 0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.own_start = own_start

    def build_model(self):
        model = super().build_model()
        torch.nn.init.constant_(model.lm_head.weight, self.own_start)
        return model

    def generate_tokens(self, input_ids, attention_mask, options):
        said = [self.tokenizer.convert_tokens_to_ids("2"), *self.stop_token_ids[:1]]
        return torch.tensor([said] * len(input_ids))

    def token_output(self, *args, **kwargs):
        output = super().token_output(*args, **kwargs)
        return replace(output, log_prob=torch.full_like(output.log_prob, -3.0))


class OwnTexts(CausalLMModule):
    """Its texts are not what its tokens say."""

    def generate(self, input_ids, attention_mask, options):
        return [text + "!" for text in super().generate(input_ids, attention_mask, options)]


class OwnGreedy(CausalLMModule):
    """Its texts are those of its likeliest tokens, whatever is asked for."""

    def generate(self, input_ids, attention_mask, options):
        return super().generate(input_ids, attention_mask, replace(options, do_sample=False))


class OwnModel(CausalLMModule):
    def build_model(self):
        model = super().build_model()
        model.__class__ = OwnLlama
        return model


class OwnData(InstructionDataModule):
    """Needs no tokenizer."""

    def __init__(self, *args, own_letters: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        if own_letters < 0:
            raise ValueError(f"own_letters must not be negative, got {own_letters}")

    def build_tokenizer(self):
        return arithmetic_tokenizer()
