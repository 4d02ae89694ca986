"""The runs of a comparison, each with a config of its own that a person can run by hand."""

from __future__ import annotations

import copy
import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dft_lightning.compare.files import CHECKPOINT, CONFIG, FIT, PART, TEST, read_json, read_yaml, slug_of
from dft_lightning.compare.recorder import RunIdentity
from dft_lightning.compare.settings import Settings
from dft_lightning.errors import InputError
from dft_lightning.files import refuse_link, write_text

RUNS = "runs"
_PATHS = {"trainer": {"default_root_dir", "logger"}}
_PLACE = {"model": {"loss"}}  # of a run in the grid, with its learning rate and seed
_REPLACED = ("GenerationEvaluation", "ModelCheckpoint", "RunRecorder")


@dataclass(frozen=True)
class Run:
    """One run of the grid.

    Attributes:
        identity: its place in the grid.
        folder: where everything of it is.
        config: of its ``fit`` and ``test``.
        program: what Python is given before the arguments.
    """

    identity: RunIdentity
    folder: Path
    config: dict[str, Any]
    program: tuple[str, ...] = ("-m", "dft_lightning")

    def commands(self) -> dict[str, list[str]]:
        """What is left to do: arguments of its program, by stage."""
        config = str(self.folder / CONFIG)
        fit, test = ["fit", "--config", config], ["test", "--config", config]
        if self.identity.loss is None:
            return {} if self.tested() else {"test": test}
        if (self.folder / PART).is_file():  # of a fit that was interrupted
            fit += ["--ckpt_path", str(self.folder / PART)]
        stages = {} if self.fitted() else {"fit": fit}
        return stages if self.tested() else {**stages, "test": [*test, "--ckpt_path", str(self.folder / CHECKPOINT)]}

    def fitted(self) -> bool:
        """Whether ``fit`` has ended."""
        return bool((read_json(self.folder / FIT) or {}).get("finished"))

    def tested(self) -> bool:
        """Whether the model of the ``fit`` was tested."""
        return is_tested(self.folder)


def is_tested(folder: Path) -> bool:
    """Whether a run is whole: its test is of the weights at the end of its last ``fit`` (the base model has none)."""
    fit, test = read_json(folder / FIT), read_json(folder / TEST)
    if test is None or test["run"]["loss"] is None:
        return test is not None
    return fit is not None and fit["finished"] and test["weights"] == fit["final_weights"]


def base_run(settings: Settings, fit_config: dict[str, Any], output: Path) -> Run:
    """The base model, which is only tested, with the first seed of the sweep."""
    return _run(settings, fit_config, output, RunIdentity("base", seed=settings.seeds[0]))


def sweep_runs(settings: Settings, fit_config: dict[str, Any], output: Path) -> list[Run]:
    """Every loss at every learning rate with every seed of the sweep."""
    places = [
        (loss, rate, seed) for seed in settings.seeds for rate in settings.learning_rates for loss in settings.losses
    ]
    return [_run(settings, fit_config, output, identity(*place)) for place in places]


def runs_at_best(
    settings: Settings, fit_config: dict[str, Any], output: Path, best: dict[str, list[float]]
) -> list[Run]:
    """Every loss at its best learning rates with the further seeds."""
    places = [(loss, rate, seed) for seed in settings.seeds_at_best for loss in best for rate in best[loss]]
    return [_run(settings, fit_config, output, identity(*place)) for place in places]


def started_by(program: tuple[str, ...], runs: Sequence[Run]) -> list[Run]:
    """The runs with what Python is given to start each."""
    return [dataclasses.replace(run, program=program) for run in runs]


def identity(loss: str, learning_rate: float, seed: int) -> RunIdentity:
    """A place of the grid, and the name of its run."""
    name = f"{slug_of(loss)}-lr{learning_rate:g}-seed{seed}"
    return RunIdentity(name, loss, learning_rate, seed)


def _run(settings: Settings, fit_config: dict[str, Any], output: Path, run: RunIdentity) -> Run:
    folder = output / RUNS / run.name
    config = copy.deepcopy(fit_config)
    if run.loss is not None:
        config["model"]["loss"] = settings.losses[run.loss]
        config["model"]["optimizer"]["init_args"]["lr"] = run.learning_rate
    batches = config["data"]["batches"]
    if batches["split_seed"] is None:  # a seed is another order of rows and not another split
        batches["split_seed"] = batches["seed"]
    config["seed_everything"] = batches["seed"] = run.seed
    recorder = {
        "class_path": "dft_lightning.compare.RunRecorder",
        "init_args": {"folder": str(folder), "run": dataclasses.asdict(run), "evaluation": settings.evaluation},
    }
    config["trainer"] |= {
        "default_root_dir": str(folder),
        "enable_progress_bar": False,  # what it writes is a log file
        "enable_checkpointing": False,  # the recorder saves the last weights, and those are tested
    }
    config["trainer"]["logger"] = _loggers(config["trainer"]["logger"], folder)
    config["trainer"]["callbacks"] = [*_other_callbacks(config["trainer"]["callbacks"], folder), recorder]
    return Run(run, folder, config)


def _loggers(given: Any, folder: Path) -> Any:
    """The command's own loggers, or a CSV logger before the base's: ``fit`` and ``test`` each save their config into
    the first one's folder, which has to be a new one."""
    if not isinstance(given, (dict, list)):
        return None
    own = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "lightning_logs"}}
    return [own, *(given if isinstance(given, list) else [given])]


def _other_callbacks(callbacks: Any, folder: Path) -> list[Any]:
    """The base's own, without what the recorder does: generation along ``fit`` and checkpoints. Exported models go into
    the run's folder: one of the base's choice would be of whichever run came last."""
    listed = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    kept = []
    for callback in listed:
        name, options = str(callback["class_path"]).rpartition(".")[2], callback.get("init_args") or {}
        if name == "HuggingFaceExport" and options.get("output"):
            callback = {**callback, "init_args": {**options, "output": str(folder / Path(options["output"]).name)}}
        if name not in _REPLACED:
            kept.append(callback)
    return kept


def write_config(run: Run) -> None:
    """Write a run's config, unless it is there.

    Raises:
        InputError: there is another config, and something was run by it.
    """
    path = run.folder / CONFIG
    begun = any((run.folder / name).exists() for name in (FIT, TEST, "fit.log", "test.log", "score.log"))
    if path.is_file() and begun:
        old, new = without_paths(read_yaml(path)), without_paths(run.config)
        if old != new:
            raise InputError(
                f"{run.folder} was run with another config ({first_difference(old, new)}): "
                "choose another --output, or move that folder away"
            )
        return
    refuse_link(run.folder)
    text = f"# python {shlex.join(run.program)} fit --config {path}\n" + yaml.safe_dump(run.config, sort_keys=False)
    write_text(path, text)


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config without where it writes: it may lie elsewhere, or be called by another path."""
    return _without(config, _PATHS, {"folder"})


def common_part(config: dict[str, Any]) -> dict[str, Any]:
    """What the configs of all runs of a comparison share: all but loss, learning rate, seed and paths."""
    plain = _without(config, {**_PATHS, **_PLACE}, {"folder", "run"})
    plain.pop("seed_everything", None)
    plain.get("data", {}).get("batches", {}).pop("seed", None)
    plain.get("model", {}).get("optimizer", {}).get("init_args", {}).pop("lr", None)
    return plain


def _without(config: dict[str, Any], keys: dict[str, set[str]], of_recorder: set[str]) -> dict[str, Any]:
    """A copy without some keys of each section and some options of the recorder."""
    plain = copy.deepcopy(config)
    callbacks = plain.get("trainer", {}).get("callbacks") or []
    recorders = [c["init_args"] for c in callbacks if str(c["class_path"]).endswith(".RunRecorder")]
    places = [(plain.get(section, {}), names) for section, names in keys.items()]
    for place, names in [*places, *((recorder, of_recorder) for recorder in recorders)]:
        for name in names:
            place.pop(name, None)
    return plain


def first_difference(old: Any, new: Any, key: str = "") -> str:
    """The first dotted key by which two configs differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(n for n in new if n not in old)]:
            if name not in old or name not in new or old[name] != new[name]:
                below = f"{key}.{name}" if key else str(name)
                return first_difference(old.get(name, "not set"), new.get(name, "not set"), below)
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            if a != b:
                return first_difference(a, b, f"{key}.{i}")
    return f"{key}: {old} there, {new} now"


def shell_line(run: Run) -> str:
    """What is left of a run as one line for a shell or a scheduler."""
    return " && ".join(f"python {shlex.join([*run.program, *args])}" for args in run.commands().values())
