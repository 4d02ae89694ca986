"""LoRA: the options of an adapter, the adapter in the model, and what is saved of it."""
