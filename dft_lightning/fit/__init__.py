"""``fit``, ``validate``, ``test`` and ``predict`` by LightningCLI, and the config of a fit for the other commands."""
