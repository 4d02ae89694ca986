"""The commands beside ``fit``, ``validate``, ``test`` and ``predict``."""

# The function of each, by its path. Its arguments are the command's options, its docstring is their help. One that
# takes ``fit`` reads the config of a fit: every option that is not its own goes there.
COMMANDS = {
    "compare": "dft_lightning.compare.command.compare",
    "init": "dft_lightning.inspection.init.init",
    "inspect": "dft_lightning.inspection.command.inspect",
    "score": "dft_lightning.scoring.command.score",
    "sample": "dft_lightning.sampling.command.sample",
    "export": "dft_lightning.export.command.export",
    "cache": "dft_lightning.inspection.cache.cache",
    "configs": "dft_lightning.cli.shipped_configs.configs",
}
