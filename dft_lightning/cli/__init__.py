"""The commands: those that fit, and the table of those beside them."""

# What each does, for the help. Their options are those of their trainer, module and data module.
FITS = {
    "fit": "Fine-tune a model, with validation on the way.",
    "validate": "Measure a model on the validation rows.",
    "test": "Let a model answer the test rows, and compare the answers.",
    "predict": "Let a model answer rows, and write the answers.",
}

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

# Of those that take ``fit``: as which command they read it, where it is another.
READ_AS = {"score": "predict"}
