"""``python -m dft_lightning compare``: run a grid of losses, learning rates and seeds, and report on it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml

from dft_lightning.cli.commands import Stopped
from dft_lightning.compare.files import SETTINGS
from dft_lightning.errors import InputError
from dft_lightning.files import refuse_link, write_text

if TYPE_CHECKING:
    from dft_lightning.fit.own_classes import Classes


def compare(
    config: list[Path] | None = None,
    output: Path | None = None,
    jobs: int = 1,
    print_commands: bool = False,
    report_only: Path | None = None,
    classes: Any = None,
) -> int:
    """Run a grid of losses, learning rates and seeds, and report on it.

    Args:
        config: the comparison, such as configs/compare/quickstart.yaml; a further one goes over it. In Python a file, a
            dict of its keys, or a list of these
        output: folder of the runs and the report; a second call goes on there
        jobs: runs at once
        print_commands: print what is left to run, a line a run
        report_only: rebuild the report from the runs in this folder
        classes: modules of one's own; ``None`` for the package's

    Returns:
        0 where every run ended well, 1 where one failed; the report says which.

    Raises:
        InputError: anything wrong with the input.
        Stopped: on Ctrl-C; the same call goes on.
    """
    if report_only is not None and (config is not None or output is not None or print_commands):
        raise InputError("--report_only takes the output folder of a comparison and nothing else")
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {jobs}")
    try:
        _require_packages()  # before the modules that import them
        if report_only is not None:
            from dft_lightning.compare.report import write_report

            write_report(Path(report_only))
            return 0
        if config is None or output is None:
            raise InputError("give --config FILE and --output FOLDER, or --report_only FOLDER")
        given = list(config) if isinstance(config, (list, tuple)) else [config]
        return _compare(given, Path(output), jobs, print_commands, classes)
    except KeyboardInterrupt:
        raise Stopped("stopped: the same command goes on with the runs that have not ended") from None


def _require_packages() -> None:
    missing = [name for name in ("matplotlib", "scipy", "jinja2") if find_spec(name) is None]
    if missing:
        raise InputError(f"the report needs {', '.join(missing)}: pip install 'dft-lightning[compare]'")


def _compare(config: list[Any], output: Path, jobs: int, print_commands: bool, classes: Classes | None) -> int:
    from dft_lightning.compare.execute import check_jobs, ending_on_signals, execute
    from dft_lightning.compare.files import Clock
    from dft_lightning.compare.grid import Run, base_run, runs_at_best, started_by, sweep_runs, write_config
    from dft_lightning.compare.inputs import check_inputs
    from dft_lightning.compare.report import write_report
    from dft_lightning.compare.scored import scoring_run, with_scored_rows
    from dft_lightning.compare.settings import read_settings
    from dft_lightning.compare.starts import STARTS
    from dft_lightning.data.requirements import UnscoredRowsError
    from dft_lightning.fit.config import read_fit_config
    from dft_lightning.fit.own_classes import PACKAGE

    classes = classes or PACKAGE
    settings = read_settings(config)
    rate = {"model": {"optimizer": {"lr": settings.learning_rates[0]}}}  # an optimizer needs one; each run sets its own
    fit_config = read_fit_config(settings.base, settings.overrides, rate, classes=classes)
    _check_fit_config(fit_config, settings.path)
    check_jobs(jobs, fit_config["trainer"])
    program = classes.program(fit_config)
    (scoring,) = started_by(program, [scoring_run(fit_config, output)])
    if not scoring.commands():  # an earlier call has scored the rows
        write_config(scoring)
        fit_config = with_scored_rows(fit_config, output)

    def planned() -> list[Run]:
        return started_by(program, [base_run(settings, fit_config, output), *sweep_runs(settings, fit_config, output)])

    sweep, unscored = planned(), False
    swept = not any(run.commands() for run in sweep)
    if not swept:
        try:
            check_inputs(sweep, settings.evaluation, classes)
        except UnscoredRowsError:
            if not isinstance(fit_config["model"]["model"], str):
                raise  # drawn at random, each seed has a start of its own, and none is a reference
            unscored = True
    with _only_one(output) as lock, ending_on_signals(), TemporaryDirectory() as starts:
        clock, variables = Clock(output), {STARTS: starts}
        if unscored:
            write_config(scoring)
            if print_commands:
                return _print_commands([scoring], output)
            for failure in execute([scoring], 1, "reference log-probs", lock, clock, variables):
                raise InputError(f"the rows were not scored: {failure.message}")
            fit_config = with_scored_rows(fit_config, output)
            sweep = planned()
            check_inputs(sweep, settings.evaluation, classes)
        for run in sweep:
            write_config(run)
        _write_settings(settings, config, output)
        failures = [] if print_commands else execute(sweep, jobs, "sweep", lock, clock, variables)
        # Before the sweep of a loss has ended its best rate is not known; when it has, what failed takes no part.
        not_ended = {run.identity.loss for run in sweep if print_commands and run.commands()}
        ended = [loss for loss in settings.losses if loss not in not_ended]
        further = runs_at_best(settings, fit_config, output, _best_rates(settings, output, ended))
        further = started_by(program, further)
        if swept and any(run.commands() for run in further):
            check_inputs(further, settings.evaluation, classes)
        for run in further:
            write_config(run)
        if print_commands:
            return _print_commands([*sweep, *further], output)
        failures += execute(further, jobs, "seeds at the best rates", lock, clock, variables)
        print("building the report", flush=True)
        write_report(output)
    return 1 if failures else 0


def _check_fit_config(fit_config: dict[str, Any], path: Path) -> None:
    """What the runs need and a plain ``fit`` may do without."""
    from dft_lightning.modules.schedules import sets_rates_itself

    data = fit_config["data"]
    if data["train"] is None or data["test"] is None:
        missing = "train" if data["train"] is None else "test"
        raise InputError(f"{path}: the base config has no data.{missing}: set it there or in overrides")
    if data["validation"] is None and not data["validation_fraction"]:
        raise InputError(f"{path}: the base config has no data.validation: learning rates are chosen on those rows")
    if data["streaming"] is not None:
        raise InputError(f"{path}: data.streaming: training rows are measured before and after; read them at once")
    if sets_rates_itself(fit_config["model"]["schedule"]):
        raise InputError(
            f"{path}: model.schedule: {fit_config['model']['schedule']['class_path']} sets the learning rate by its "
            "max_lr, so that learning_rates would change nothing: take another"
        )
    if fit_config["trainer"]["limit_test_batches"] is not None:
        raise InputError(
            f"{path}: trainer.limit_test_batches: every loss is tested on all of data.test; take fewer rows"
        )


def _best_rates(settings: Any, output: Path, losses: list[str]) -> dict[str, list[float]]:
    """The learning rates that further seeds are run at: for each loss the best by each measure of ``best_by``."""
    if not settings.seeds_at_best:
        return {}
    from dft_lightning.compare.analysis import choose, sort_records
    from dft_lightning.compare.records import read_records
    from dft_lightning.evaluation.measures import measures_of

    measures = measures_of(settings.evaluation["num_samples"])
    records, _ = sort_records(vars(settings), read_records(output))
    best: dict[str, list[float]] = {}
    for loss in losses:
        choices = [choose(records, loss, measures[name], vars(settings)) for name in settings.best_by]
        best[loss] = sorted({choice.learning_rate for choice in choices if choice is not None})
    return best


def _print_commands(runs: Sequence[Any], output: Path) -> int:
    from dft_lightning.compare.grid import shell_line

    lines = [line for line in map(shell_line, runs) if line]
    if lines:
        print("\n".join(lines))
    else:
        sys.stderr.write(f"nothing left to run: python -m dft_lightning compare --report_only {output}\n")
    return 0


def _write_settings(settings: Any, given: list[Any], output: Path) -> None:
    """What the report needs to know of the comparison, beside the runs."""
    content = {
        "config": ["a dict" if isinstance(each, Mapping) else str(each) for each in given],
        "base": [str(path) for path in settings.base],
        **{name: getattr(settings, name) for name in ("losses", "learning_rates", "seeds", "seeds_at_best")},
        **{name: getattr(settings, name) for name in ("overrides", "best_by", "measures", "evaluation")},
    }
    write_text(output / SETTINGS, yaml.safe_dump(content, sort_keys=False))


@contextlib.contextmanager
def _only_one(output: Path) -> Iterator[int]:
    """A lock on the folder: two comparisons there would run everything twice. Yields its file descriptor.

    The runs inherit it: should this process be killed, they still hold it until they end.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"--output: {output} is a file")
    output.mkdir(parents=True, exist_ok=True)
    refuse_link(output / ".lock")
    handle = os.open(output / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"--output: another comparison, or a run of one, is at work in {output}") from None
    else:
        yield handle
    finally:
        os.close(handle)
