"""A folder like ``../shared`` made in code: small tokenizers and a model of the kinds of the real ones, for tests that
need a kind and find no real one. Their vocabularies and templates are our own, their ways those of the families."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from conftest import TINY_LLAMA

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = CHATML.replace(
    "{{ m.content }}<|im_end|>",
    (
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '' }}"  # a line break after a block would go
    ),
)
# A system message where there is none.
SMOLLM = {"role": "system", "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}
SMOLLM_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\n" + SMOLLM["content"] + "<|im_end|>\n{% endif %}" + CHATML
)
# Empty thoughts before the last answer alone.
QWEN_TEMPLATE = CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
)
# A line break and the spaces behind it become one token, as in large vocabularies.
TEXT = [
    "assistant\n   \n\n  x",
    "user\nOnce upon a time there was a little girl named Lily.",
    "the cat sat on the mat. ",
] * 9


@functools.cache
def _made() -> tempfile.TemporaryDirectory[str]:
    made = tempfile.TemporaryDirectory(prefix="stand-ins-")  # removed when Python ends
    for path, make in MAKERS.items():
        folder = Path(made.name, path)
        folder.mkdir(parents=True)
        make(folder)
    return made


def stand_ins() -> Path:
    """The folder, which has what ``MAKERS`` names."""
    return Path(_made().name)


def byte_level(special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")) -> Tokenizer:
    """Byte-level BPE of a few merges."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    return made


def _smollm2(folder: Path) -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=byte_level(),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=SMOLLM_TEMPLATE,
    ).save_pretrained(folder)


def _qwen3(folder: Path) -> None:
    """What it is given is composed first, and its thoughts' marks are tokens, but not special ones."""
    made = byte_level()
    made.normalizer = normalizers.NFC()
    made.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=QWEN_TEMPLATE,
    ).save_pretrained(folder)


def _gpt2(folder: Path) -> None:
    """The bare vocabulary files."""
    byte_level(special=("<|endoftext|>",)).model.save(str(folder))


def _stories(folder: Path) -> None:
    """SentencePiece's ways: a space before a text, bytes for what is not known, no template; and a Llama."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=250, show_progress=False))
    learnt = json.loads(words.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    names += [chr(0x4E00 + i) for i in range(512 - len(names))]
    vocabulary, merges = {name: i for i, name in enumerate(names)}, [tuple(merge) for merge in learnt["merges"]]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<unk>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = {**TINY_LLAMA, "vocab_size": 512, "max_position_embeddings": 512, "initializer_range": 0.3}
    LlamaForCausalLM(LlamaConfig(**config, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)


MAKERS = {
    "tokenizers/smollm2": _smollm2,
    "tokenizers/qwen3": _qwen3,
    "tokenizers/gpt2": _gpt2,
    "models/stories260K": _stories,
}
