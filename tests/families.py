"""What this package does with every causal model type of the installed transformers: the table of docs/families.md.

    python tests/families.py [--only TYPE ...] [--cells CELL ...] [--jobs 2] [--fresh]

Each type is made tiny with large random weights and tried in a process of its own. What is found goes to
benchmarks/results/families.json, where a run that was stopped goes on, and from there into the page.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "families.json"
PAGE = ROOT / "docs" / "families.md"
TIMEOUT = 150.0

Found = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these rows of the table alone, whether there or not")
    parser.add_argument("--cells", nargs="+", metavar="CELL", help="these columns alone")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--fresh", action="store_true", help="begin anew rather than go on")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="write the page from the results, and nothing else")
    options = parser.parse_args()
    found = _read(options.output)
    if not options.page:
        prepare()
        from family_checks import CELLS

        names = options.only or row_names()
        cells = options.cells or list(CELLS)
        if options.fresh:
            found = {}
        again = options.only or options.cells
        todo = [name for name in names if again or set(cells) - set(found.get(name, {}))]
        for name, row in run(todo, cells, options.jobs):
            found[name] = {**found.get(name, {}), **row}
            print(f"{name:40}", " ".join(f"{cell}: {row[cell]['state']}" for cell in row), flush=True)
            _write(options.output, found)
    if options.output == RESULTS:
        PAGE.write_text(page(_read(RESULTS), PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def prepare() -> None:
    """Everything that the processes share; they are forked from this one."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["TOKENIZERS_PARALLELISM"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch

    torch.set_num_threads(1)  # threads of OpenMP are not forked
    import family_checks  # noqa: F401
    import peft.tuners.lora  # noqa: F401


def row_names() -> list[str]:
    """All causal types, and those that see the future as they come a second time, as decoders."""
    from family_configs import SEE_THE_FUTURE, as_decoder
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return sorted([*names, *(as_decoder(name) for name in names if name in SEE_THE_FUTURE)])


# -- a process for each ------------------------------------------------------------------------------------------------


def run(names: list[str], cells: list[str], jobs: int = 1) -> Iterator[tuple[str, Found]]:
    """The cells of each row of the table, as they come."""
    waiting, running = list(names), dict[int, tuple[str, Path, float]]()
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                file = Path(folder, f"{len(waiting)}.json")
                running[_forked(name, cells, file)] = (name, file, time.monotonic())
            for number, (name, file, began) in list(running.items()):
                ended = os.waitpid(number, os.WNOHANG)[0]
                late = time.monotonic() - began > TIMEOUT
                if late and not ended:
                    os.kill(number, signal.SIGKILL)
                    os.waitpid(number, 0)
                if ended or late:
                    del running[number]
                    yield name, _completed(_read(file), cells, "timeout" if late else "the process died")
            time.sleep(0.02)


def _completed(row: Found, cells: list[str], why: str) -> Found:
    lacking = [cell for cell in cells if cell not in row]
    return {**row, **{cell: {"state": "failed", "why": why} for cell in lacking}}


def _forked(name: str, cells: list[str], file: Path) -> int:
    sys.stdout.flush()
    number = os.fork()
    if number:
        return number
    try:
        _quiet()
        _try_all(name, cells, file)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _quiet() -> None:
    import logging

    from transformers import logging as transformers_logging

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    if not os.environ.get("FAMILIES_VERBOSE"):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)


def _try_all(name: str, cells: list[str], file: Path) -> None:
    from family_checks import CELLS, Family

    row: Found = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            family = Family(name, Path(folder, "model"))
        except Exception as error:
            row = {cell: {"state": "not made", "why": _why(error)} for cell in cells}
            _write(file, row)
            return
        for cell in cells:
            began = time.perf_counter()
            row[cell] = _tried(CELLS[cell], family)
            row[cell]["seconds"] = round(time.perf_counter() - began, 2)
            _write(file, row)


def _tried(check: Any, family: Any) -> dict[str, Any]:
    from family_checks import TOLERANCE, Wrong

    from dft_lightning.errors import InputError

    try:
        family.note = family.head_note
        deviation = check(family)
    except InputError as error:
        return {"state": "refused", "why": _text(error)}
    except Wrong as error:
        return {"state": "wrong", "why": _text(error)}
    except Exception as error:
        if os.environ.get("FAMILIES_VERBOSE"):
            traceback.print_exc()
        return {"state": "failed", "why": _why(error)}
    found = {"deviation": float(f"{deviation:.2g}")}
    if not deviation <= TOLERANCE:
        return {"state": "wrong", "why": f"differs by {deviation:.2g}", **found}
    return {"state": "right", **found, **({"why": family.note} if family.note else {})}


def _why(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {_text(error)} ({'/'.join(Path(place.filename).parts[-2:])}:{place.lineno})"


def _text(error: Exception) -> str:
    from dft_lightning.errors import one_line

    return one_line(error, 240)


# -- results and page --------------------------------------------------------------------------------------------------


def _read(file: Path) -> Any:
    with contextlib.suppress(FileNotFoundError):
        return json.loads(file.read_text(encoding="utf-8"))
    return {}


def _write(file: Path, found: Any) -> None:
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    beside.replace(file)


def page(found: dict[str, Found], text: str) -> str:
    return text


if __name__ == "__main__":
    main()
