"""``python -m dft_lightning inspect``: rows as the model will see them, before a run."""
