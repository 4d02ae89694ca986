"""Conversations to tokens: the tokenizer, its chat template, what is learnt, and the cache."""
