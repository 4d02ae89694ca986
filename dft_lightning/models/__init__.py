"""What is done to a transformers model: loading and checking it, its head, packed rows, adapters, generation."""
