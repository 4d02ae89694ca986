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
import re
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
    if not options.page:
        try:
            _make(options)
        except ValueError as error:
            parser.error(str(error))
    if options.output == RESULTS:
        PAGE.write_text(page(_read(RESULTS), PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def _make(options: argparse.Namespace) -> None:
    prepare()
    import transformers

    from family_checks import CELLS

    table = _read(options.output)
    if options.fresh or table.get("transformers") != transformers.__version__:
        table = {"transformers": transformers.__version__, "families": {}}
    names, cells = options.only or row_names(), options.cells or list(CELLS)
    for given, known in ((names, row_names()), (cells, list(CELLS))):
        if unknown := set(given) - set(known):
            raise ValueError(f"the table has no {', '.join(sorted(unknown))}: see {PAGE}")
    again = options.only or options.cells
    todo = [name for name in names if again or set(cells) - set(table["families"].get(name, {}))]
    for name, row in run(todo, cells, options.jobs):
        found: dict[str, Found] = table["families"]
        found[name] = {**found.get(name, {}), **row}
        table["families"] = dict(sorted(found.items()))
        print(f"{name:40}", " ".join(f"{cell}: {row[cell]['state']}" for cell in row), flush=True)
        _write(options.output, table)  # so that a run that is stopped goes on


def prepare() -> None:
    """Everything that the processes share; they are forked from this one."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["TOKENIZERS_PARALLELISM"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import peft.tuners.lora  # noqa: F401

    import family_checks  # noqa: F401


def row_names() -> list[str]:
    """All causal types, and those that see the future as they come a second time, as decoders."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from family_configs import SEE_THE_FUTURE, as_decoder

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
        import torch

        torch.set_num_threads(1)  # threads of OpenMP are not forked
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
            row[cell] = _tried(CELLS[cell], family)
            if "why" in row[cell]:
                row[cell]["why"] = row[cell]["why"].replace(str(family.folder.parent), "FOLDER")
            _write(file, row)


def _tried(check: Any, family: Any) -> dict[str, Any]:
    from dft_lightning.errors import InputError
    from family_checks import TOLERANCE, Wrong

    family.note = family.head_note
    try:
        deviation = check(family)
    except InputError as error:
        if family.head_note or "head: full" not in str(error):
            return {"state": "refused", "why": _text(error)}
        family.loading["head"], family.head_note = "full", f"with `head: full`: {_text(error)}"
        return _tried(check, family)
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

    return one_line(error, 600)


# -- results and page --------------------------------------------------------------------------------------------------


def _read(file: Path) -> Any:
    with contextlib.suppress(FileNotFoundError):
        return json.loads(file.read_text(encoding="utf-8"))
    return {}


def _write(file: Path, found: dict[str, Any]) -> None:
    """Whole or not at all, a line for each family."""
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in found.get("families", found).items())
    text = (
        f"{{{rows}}}"
        if "families" not in found
        else (f'{{"transformers": {json.dumps(found["transformers"])}, "families": {{\n{rows}\n}}}}')
    )
    beside = file.with_suffix(".part")
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(file)


_MARK = "<!-- What follows is written by tests/families.py. -->\n"
_STATES = ("right", "refused", "wrong", "failed", "not made")


def page(table: dict[str, Any], text: str) -> str:
    """The page's own text with the table of results after it."""
    found: dict[str, Found] = table["families"]
    cells = list(dict.fromkeys(cell for row in found.values() for cell in row))
    reasons: dict[str, int] = {}
    rows = []
    for name, row in found.items():
        numbers = {cell: reasons.setdefault(_kind(row[cell]), len(reasons) + 1) for cell in cells if "why" in row[cell]}
        shown = [f"{row[cell]['state']} {numbers.get(cell, '')}".strip() for cell in cells]
        rows.append([f"`{name}`", *shown])
    counts = [
        [state, *(str(sum(row[cell]["state"] == state for row in found.values())) for cell in cells)]
        for state in _STATES
    ]
    parts = [
        f"## In numbers\n\ntransformers {table['transformers']}, {len(found)} rows.",
        _markdown(["", *cells], counts),
        "## Type by type",
        _markdown(["type", *cells], rows),
        "## Why\n\nThe numbers in the table. Names and figures of one model are left out (`...`).",
        "\n".join(f"{number}. {reason}" for reason, number in reasons.items()),
    ]
    return text.partition(_MARK)[0] + _MARK + "\n" + "\n\n".join(parts) + "\n"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _kind(cell: dict[str, Any]) -> str:
    """A reason without what is of one model alone."""
    why = re.sub(r"\b\w+(ForCausalLM|ForConditionalGeneration|LMHeadModel|Decoder|LMHead|Config)\b", "...", cell["why"])
    why = re.sub(r"model_type='\w+'|\w+(?='s own log-prob)", "...", why)
    why = re.sub(
        r"\{.*?\}", lambda found: "{" + ", ".join(sorted(found[0][1:-1].split(", "))) + "}", why
    )  # a set's order
    why = re.sub(r" \([\w/.-]+\.py:\d+\)$", "", why)
    why = re.sub(r"\b\d+(\.\d+)?(e-\d+)?\b", "...", why)
    return re.sub(r"([*_<>|\[\]])", r"\\\1", why)


if __name__ == "__main__":
    main()
