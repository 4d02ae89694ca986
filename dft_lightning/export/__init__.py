"""A trained checkpoint as a Hugging Face folder."""
