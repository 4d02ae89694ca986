"""Each figure of the README, and of pages with the same results, is what its results file has; its Python runs.

A passage is written here with its figures made from the files, and has to stand in the page: a figure that changes in
either of them is found. What is left of the README without these passages has no figure but in settings and names.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from statistics import mean, median

import lightning.pytorch as pl
import pytest
import yaml

from conftest import ROOT
from dft_lightning import DFTLoss
from dft_lightning.data import ArithmeticRows
from dft_lightning.data.rows.arithmetic import solve
from dft_lightning.losses import LOSSES
from dft_lightning.ops.chunks import CUDA_CHUNK_ROWS, DEFAULT_CHUNK_BYTES
from test_normalization import TOLERANCE

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
WORDS += ["eleven", "twelve", *(f"{each}teen" for each in ("thir", "four", "fif", "six", "seven", "eigh", "nine"))]


def plain(text: str, code: bool = False) -> str:
    """Without line breaks and the marks of emphasis, and without blocks of code unless ``code``."""
    return " ".join((text if code else BLOCK.sub("", text)).replace("**", "").split())


def results(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def cores(found: dict) -> str:
    threads = re.search(r"(\d+) (?:CPU )?threads", found["device"])[1]
    return f"{WORDS[int(threads)]} CPU cores"


def shipped(name: str) -> dict:
    return yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))


# -- the head ----------------------------------------------------------------------------------------------------------

HEAD = results("linear_head_cpu")
CANDIDATES = ("dft_lightning", "plain", "trl", "torch chunked")


def times(ratio: float) -> str:
    """Three digits below two, else two."""
    return f"{ratio:.2f}x" if ratio < 2 else f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x"


def head_passages() -> Iterator[str]:
    measured = {(row["shape"], row["candidate"]): row for row in HEAD["results"]}
    sizes = {re.match(r"N=(\d+) H=(\d+) V=(\d+) (\w+)", shape).groups(): shape for shape, _ in measured}
    for (_, *sizes_of_row), shape in sizes.items():
        rows = [measured.get((shape, name)) for name in CANDIDATES]
        cells = [
            f"{times(row['ratio_to_bare'])}, {row['extra_memory'] / 2**30:.1f} GiB" if row else "not run"
            for row in rows
        ]
        yield f"| {', '.join(sizes_of_row)} | {' | '.join(cells)} |"
    (tokens,) = {size[0] for size in sizes}
    packages, processor = HEAD["packages"], HEAD["device"].split(",")[0]
    yield f"{tokens} tokens on {cores(HEAD)} (torch {packages['torch'].removesuffix('+cpu')}, {processor})"
    yield f"| full logits | TRL {packages['trl'].removesuffix('.0')} | torch's chunked |"

    def errors(name: str) -> str:
        rows = [row for row in HEAD["results"] if (row["candidate"], row["dtype"]) == (name, "bfloat16")]
        found = [row[f"{which}_gradient_error"] for row in rows for which in ("hidden", "weight")]
        low, high = (f"{value:.1e}".replace("e-0", "e-") for value in (min(found), max(found)))
        return low if low == high else f"{low} to {high}"

    yield f"is {errors('dft_lightning')} in bfloat16 (full logits {errors('plain')}, torch's chunked head"
    yield f"{errors('torch chunked')})"
    yield f"in chunks (up to {DEFAULT_CHUNK_BYTES // 2**20} MiB of logits, on CUDA {CUDA_CHUNK_ROWS} tokens and more"


# -- training steps ----------------------------------------------------------------------------------------------------

STEPS = results("training_step_cpu")
SIDES = ("packed", "dft_lightning", "padded", "trl")


def rate(result: dict, side: str) -> str:
    return f"{median(turn[side]['tokens_per_second'] for turn in result['turns']):.0f}"


def cell(result: dict, side: str) -> str:
    """Tokens a second, and GiB."""
    memory = median(turn[side]["peak_memory"] for turn in result["turns"]) / 2**30
    return f"{rate(result, side)}, {memory:.1f}"


def step_passages() -> Iterator[str]:
    for result, name in zip(STEPS["results"], ("| |", "| gradient checkpointing |"), strict=True):
        assert result["gradient_checkpointing"] == (name != "| |")
        yield f"{name} {' | '.join(cell(result, side) for side in SIDES)} |"
    uncompiled = STEPS["results"][0]
    compiled = [cell(uncompiled, f"{side}_compiled") for side in SIDES if side != "trl"]
    yield f"| compiled | {' | '.join(compiled)} | |"
    yield f"alone, in bfloat16, is {rate(uncompiled, 'products')} tokens/s"
    (turns,) = {len(result["turns"]) for result in STEPS["results"]}
    script = (ROOT / "benchmarks" / "training_step.py").read_text()
    (batch,) = re.findall(r'"--batch_size", type=int, default=(\d+)', script)
    (length,) = re.findall(r'"--data.text.max_length", "(\d+)"', script)
    yield f"(batch {batch}, or packed to {length} tokens, bf16-mixed), medians of {WORDS[turns]} turns"
    release = STEPS["packages"]["trl"].removesuffix(".0")
    yield f'| packed | padding-free | padded | TRL {release}, `loss_type="dft"` |'


# -- the quickstart ----------------------------------------------------------------------------------------------------

QUICKSTART = results("quickstart")


def exact(run: str, when: str) -> str:
    found = QUICKSTART["runs"][run]
    return f"{found[f'greedy {when}']:.3f} / {found[f'sampled {when}']:.3f}"


def wrong_tenths(config: dict) -> int:
    """Of ten demonstrations, how many have a wrong answer."""
    rows = ArithmeticRows(**config["data"]["train"]["init_args"])
    summands = [(*map(int, re.findall(r"\d+", row["prompt"])), row["completion"]) for _, row in rows.rows()]
    return round(10 * mean(answer != solve(a, b) for a, b, answer in summands))


def quickstart_passages() -> Iterator[str]:
    config, runs = shipped("quickstart"), QUICKSTART["runs"]
    rows = config["data"]["train"]["init_args"]["num_rows"]
    yield f"addition with DFT on {rows} demonstrations, {10 * wrong_tenths(config)}% of them wrong"
    assert len({exact(run, "before") for run in runs}) == 1
    assert {found["steps"] for found in runs.values()} == {config["trainer"]["max_steps"]}
    learning_rate = f"{config['model']['optimizer']['lr']:.0e}".replace("e-0", "e-")
    yield (
        f"at its one rate ({learning_rate}, {config['trainer']['max_steps']} steps of {config['data']['batch_size']} "
        f"rows, one seed) goes from {exact('DFT', 'before')} to {exact('DFT', 'after')} with DFT, "
        f"{exact('cross-entropy', 'after')} with `configs/quickstart_ce.yaml` over it and "
        f"{exact('focal', 'after')} with `configs/quickstart_focal.yaml`"
    )
    seconds = [found["seconds"] for found in runs.values()]
    yield f"in {min(seconds):.0f} to {max(seconds):.0f} seconds each on {cores(QUICKSTART)}"


# -- comparisons -------------------------------------------------------------------------------------------------------

BASES = ("half", "competent", "new_skill")
NAMES = {
    "cross-entropy": "CE",
    "DFT": "DFT",
    "focal, gamma 2": "focal",
    "cross-entropy, then DFT": "CE then DFT",
    "half cross-entropy, half DFT": "CE + DFT",
}


def runs_of(comparison: str) -> list[dict[str, str]]:
    with (ROOT / "docs" / "results" / comparison / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def base_of(comparison: str, measure: str) -> str:
    (base,) = [run for run in runs_of(comparison) if run["run"] == "base"]
    return f"{float(base[f'test_{measure}']):.3f}"


def at_best_rate(comparison: str, loss: str, measure: str) -> list[dict[str, str]]:
    """All seeds at the rate that was best for seed 0 on validation rows; of equal ones that with the lower nll."""
    own = [run for run in runs_of(comparison) if run["loss"] == loss]
    swept = [run for run in own if run["seed"] == "0"]
    best = min(swept, key=lambda run: (-float(run[f"end_{measure}"]), float(run["end_nll"])))
    return [run for run in own if run["learning_rate"] == best["learning_rate"]]


def on_test_rows(comparison: str, loss: str, measure: str) -> str:
    return f"{mean(float(run[f'test_{measure}']) for run in at_best_rate(comparison, loss, measure)):.3f}"


def forgotten(comparison: str, *rates: str) -> dict[str, float]:
    """What runs with seed 0 leave of exact match on the second validation set."""
    runs = [run for run in runs_of(comparison) if run["seed"] == "0" and run["learning_rate"] in rates]
    return {run["run"]: float(run["forgetting_greedy"]) for run in runs}


def remembered(comparison: str) -> str:
    """Exact match on the second validation set before training."""
    report = (ROOT / "docs" / "results" / comparison / "report.md").read_text(encoding="utf-8")
    forgetting = report[report.index("### Forgetting") :]
    return re.search(r"^\| before training \| ([\d.]+) \|", forgetting, re.MULTILINE)[1]


def comparison_passages() -> Iterator[str]:
    base = [f"{base_of(name, 'greedy')} / {base_of(name, 'sampled')}" for name in BASES]
    yield f"| none (the base) | {' | '.join(base)} |"
    for name, loss in NAMES.items():
        cells = [f"{on_test_rows(base, loss, 'greedy')} / {on_test_rows(base, loss, 'sampled')}" for base in BASES]
        yield f"| {name} | {' | '.join(cells)} |"
    seeds = {len(at_best_rate(base, loss, how)) for base in BASES for loss in NAMES.values() for how in MEASURES}
    rates = {len({run["learning_rate"] for run in runs_of(base) if run["loss"] == "DFT"}) for base in BASES}
    (seeds,), (rates,) = seeds, rates
    yield (
        f"at its own best of {WORDS[rates]} learning rates, chosen on validation rows separately for the "
        f"{WORDS[len(MEASURES)]} numbers; means of {WORDS[seeds]} seeds"
    )
    steps = [{run["steps"] for run in runs_of(base) if run["steps"]} for base in BASES]
    assert steps[0] == steps[1]
    wrong = {wrong_tenths(with_overrides(base)) for base in BASES}
    (wrong,), problems = wrong, with_overrides("half")["data"]["test"]["init_args"]["num_rows"]
    digits = ArithmeticRows(1)
    yield (
        f"Exact match on {problems} clean test problems of {digits.min_digits} to {digits.max_digits} digits, "
        f"greedy / avg@4 sampled at temperature 1, after {min(steps[0])} steps ({min(steps[2])} for the new skill) on "
        f"demonstrations of which about {WORDS[wrong]} in ten are wrong"
    )
    yield (
        "on the competent base it is the one that loses nothing, where cross-entropy falls from "
        f"{base_of('competent', 'sampled')} to {on_test_rows('competent', 'CE', 'sampled')} sampled"
    )
    new = {loss: on_test_rows("new_skill", loss, "greedy") for loss in ("DFT", "CE", "focal")}
    yield f"{new['DFT']} greedy, where cross-entropy has {new['CE']} and focal loss {new['focal']}"
    yield f"is best sampled there, {on_test_rows('new_skill', 'CE then DFT', 'sampled')}"
    (before,) = {remembered(base) for base in BASES[:2]}
    left = [value for base in BASES[:2] for value in forgotten(base, "0.001").values()]
    yield (
        f"fall from {before} greedy to between {min(left):.2f} and {max(left):.2f} at 1e-3 on the first two bases "
        "(seed 0)"
    )
    competent = forgotten("competent", "0.0001")
    focal = competent.pop("focal-lr0.0001-seed0")
    least = min(*competent.values(), *forgotten("half", "0.0001").values())
    yield f"At 1e-4 they stay at {least:.2f} and above there, but for focal loss on the competent base ({focal:.2f})"
    assert max(forgotten("new_skill", "0.0001", "0.0003", "0.001").values()) < 0.25  # "lost at every rate"


def mean_of(runs: list[dict[str, str]], column: str) -> float:
    return mean(float(run[column]) for run in runs)


def real_passages() -> Iterator[str]:
    """What the comparisons on a real model found, a row a loss: at its best rates, and at the lowest with one seed.

    What is forgotten is of the rate best by avg@4, and of the lowest.
    """
    cells = [f"{' / '.join(base_of(task, measure) for measure in OF_REAL)} | 0.00" for task in REAL_TASKS]
    yield f"| none (the base) | {' | '.join(cells)} |"
    for name, loss in REAL.items():
        best = [" / ".join(on_test_rows(task, loss, measure) for measure in OF_REAL) for task in REAL_TASKS]
        yield f"| {name} | {' | '.join(map(' | '.join, zip(best, divergences(loss), strict=True)))} |"
        lowest = [" / ".join(f"{float(run[f'test_{how}']):.3f}" for how in OF_REAL) for run in at_the_lowest(loss)]
        yield f"| {name}, at 2e-5 | {' | '.join(map(' | '.join, zip(lowest, divergences(loss, True), strict=True)))} |"
    at_best, at_lowest = ([d for loss in REAL.values() for d in divergences(loss, low)] for low in (False, True))
    yield (
        f"At the rates best by avg@4 the divergence from the base is {min(at_best)} to {max(at_best)} nats a token. At "
        f"the lowest, 2e-5, it is {min(at_lowest)} to {max(at_lowest)}"
    )
    dft, ce, focal = (on_test_rows("repeating", loss, "sampled") for loss in ("DFT", "CE", "focal"))
    yield f"sampled, it is right in {dft} of the repetitions, where cross-entropy is in {ce}"
    yield f"and focal loss in {focal}"
    dft, ce, focal = (on_test_rows("word_problems_wrong", loss, "sampled") for loss in ("DFT", "CE", "focal"))
    yield f"in {dft} of the word problems, against {ce} and {focal}"
    by_problem = "sampled", "greedy"
    wrong, repeated = ([over_problems(task, how, "DFT", "CE") for how in by_problem] for task in REAL_TASKS[1:])
    first, _, rest = repeated[0].partition(" (")
    yield f"Over cross-entropy that is {first} more ({rest.rstrip(')')}, 95% over problems) and {wrong[0]}"
    yield f"Greedy, no difference is shown: {repeated[1]} and {wrong[1]}"
    ce, focal = (over_problems("word_problems", "greedy", loss, "DFT") for loss in ("CE", "focal"))
    yield f"better than DFT greedily, by {ce} and {focal}"
    yield f"not shown to differ: {over_problems('word_problems', 'sampled', 'CE', 'DFT')}"
    ce, dft = (over_problems("word_problems", "sampled", loss, "focal") for loss in ("CE", "DFT"))
    yield f"both are better than focal loss, by {ce} and {dft}"
    said = set()
    for task in REAL_TASKS:
        config = shipped(f"compare/{task}")
        for place, rate in enumerate(config["learning_rates"]):
            runs = [run for run in first_seed(task) if run["learning_rate"] == str(rate)]
            assert most(runs, "forgetting_kl") == "DFT"  # "furthest at each rate"
            if task != "repeating":
                assert (most(runs, "forgetting_token_accuracy") == "DFT") == (place < 2)  # "at the two lower ones"
        data, seeds = config["overrides"]["data"], len(config["seeds"]) + len(config["seeds_at_best"])
        rates = WORDS[len(config["learning_rates"])]
        said |= {
            f"after two epochs of {data['train']['init_args']['count']} demonstrations",
            f"on {data['test']['init_args']['count']} test problems",
            f"at its own best of {rates} learning rates for each of these numbers; means of {WORDS[seeds]} seeds",
        }
    yield from sorted(said)
    alone = {(t, loss) for t in REAL_TASKS for loss in REAL.values() if len(at_best_rate(t, loss, OF_REAL[2])) == 1}
    assert alone == {("word_problems", "DFT"), ("repeating", "CE")}  # as is said
    assert (
        most(at_best_rate("word_problems", "DFT", "greedy"), "test_greedy", "seed") == "0"
    )  # "of DFT's three the best"


def most(runs: list[dict[str, str]], column: str, named: str = "loss") -> str:
    return max(runs, key=lambda run: float(run[column]))[named]


PAIRS = {"greedy": "### exact match, greedy: differences", "sampled": "### avg@4 at temperature 1: differences"}


def over_problems(comparison: str, measure: str, first: str, second: str) -> str:
    """How much better one loss is than another, with the interval, as the report's table of pairs has it."""
    report = (ROOT / "docs" / "results" / comparison / "report.md").read_text(encoding="utf-8")
    table = report.partition(PAIRS[measure])[2].partition("\n### ")[0]
    for one, other, sign in ((first, second, 1), (second, first, -1)):
        if row := re.search(rf"^\| {one} \| {other} \| (\S+) \| (\S+) to (\S+) \|", table, re.MULTILINE):
            mean, *ends = (sign * float(value) for value in row.groups())
            return f"{mean:.3f} ({min(ends):.3f} to {max(ends):.3f})"
    raise AssertionError(f"no pair of {first} and {second}")


def divergences(loss: str, lowest: bool = False) -> list[str]:
    """From the base on other text, for each task: at the rate best by avg@4, or at the lowest."""
    if lowest:
        return [f"{float(run['forgetting_kl']):.2f}" for run in at_the_lowest(loss)]
    return [f"{mean_of(at_best_rate(task, loss, 'sampled'), 'forgetting_kl'):.2f}" for task in REAL_TASKS]


def at_the_lowest(loss: str) -> list[dict[str, str]]:
    """A run for each task."""
    return [run for t in REAL_TASKS for run in first_seed(t) if (run["loss"], run["learning_rate"]) == (loss, "2e-05")]


def first_seed(comparison: str) -> list[dict[str, str]]:
    return [run for run in runs_of(comparison) if run["seed"] == "0"]


def left_out_passages() -> Iterator[str]:
    times = results("gradient_threshold_smollm2")["times_the_bare_products"]
    yield (
        "with SmolLM2's head on GSM8K in bfloat16, forward and backward of DFT took "
        f"{times['DFT, 2^-14']:.2f} times the three bare products, where the exact head took {times['DFT, exact']:.2f}"
    )


REAL = {"cross-entropy": "CE", "DFT": "DFT", "focal, gamma 2": "focal"}
REAL_TASKS = ("word_problems", "word_problems_wrong", "repeating")
MEASURES = ("greedy", "sampled")
OF_REAL = (*MEASURES, "pass_at_4")


def with_overrides(comparison: str) -> dict:
    """The quickstart's config with the comparison's own data."""
    config, own = shipped("quickstart"), shipped(f"compare/{comparison}")["overrides"]
    return {**config, "data": {**config["data"], **own["data"]}}


def other_passages() -> Iterator[str]:
    templates = (ROOT / "docs" / "chat_templates.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `", templates, re.MULTILINE)
    yield f"what {len(rows)} chat templates do"
    own = {"CrossEntropyLoss", "DFTLoss", "FocalLoss", "MixtureLoss", "ScheduledLoss"}
    yield f"{WORDS[len(set(LOSSES) - own)].capitalize()} others from papers come with the package"
    estimated = (ROOT / "docs" / "sharding.md").read_text(encoding="utf-8")
    sizes = sorted(re.findall(r"^\| \S+-([\d.]+)B \|", estimated, re.MULTILINE), key=float)
    yield f"the memory that models of {sizes[0]} to {sizes[-1]} billion parameters take"
    tolerance = f"{TOLERANCE['float32']:.0e}".replace("e-0", "e-")
    yield f"gradient is that of one big batch to {tolerance} in float32"


README_PASSAGES = [
    *head_passages(),
    *step_passages(),
    *quickstart_passages(),
    *left_out_passages(),
    *real_passages(),
    *comparison_passages(),
    *other_passages(),
]

# -- other pages with figures of the same files ------------------------------------------------------------------------


def first_run_passages() -> Iterator[str]:
    for when, step in (("before", 0), ("after", QUICKSTART["runs"]["DFT"]["steps"])):
        greedy, sampled = exact("DFT", when).split(" / ")
        yield f"step {step}: exact match greedy {greedy}, sampled {sampled}"


def data_passages() -> Iterator[str]:
    off = STEPS["results"][0]
    packed, padding_free, padded = (rate(off, side) for side in SIDES[:3])
    yield f"at {packed} tokens/s packed, {padding_free} padding-free and {padded} padded"
    prepared = results("data")["processes"]
    for number, found in prepared.items():
        own, trl = (found[side]["rows_per_second"] for side in ("dft_lightning", "trl"))
        processes = {"1": "one process", "2": "two processes"}[number]
        yield f"| rows a second, {processes} | {own:.0f} | {trl:.0f} | {found['ratio']:.1f} |"
    own, trl = (prepared["1"][side]["efficiency"] for side in ("dft_lightning", "trl"))
    yield f"| full | {own:.1%} | {trl:.1%} | |"


OWN_STATISTIC = "a statistic of one's own"


def own_loss_passages() -> Iterator[str]:
    in_float32, in_bfloat16 = (results(f"head_losses_cpu_{dtype}") for dtype in ("float32", "bfloat16"))
    (own, dft), (own_half, dft_half) = (
        [found["times_the_bare_products"][name] for name in (OWN_STATISTIC, "DFTLoss")]
        for found in (in_float32, in_bfloat16)
    )
    yield (
        f"With this loss, {in_float32['tokens']} tokens and a vocabulary of {in_float32['vocabulary']}, "
        f"{cores(in_float32)} took {own:.2f} times the three bare products in float32, where DFT takes {dft:.2f}, and "
        f"{own_half:.2f} times in bfloat16, where DFT takes {dft_half:.2f} (`benchmarks/head_losses.py`)"
    )


def losses_passages() -> Iterator[str]:
    found = results("head_losses_cpu_float32")
    passes, eaft, whole, gem, other_form, sed, by_sequence, compared = ratios_of(found)
    yield (
        f"on {cores(found)} ({found['tokens']} tokens, a vocabulary of {found['vocabulary']}, {found['dtype']}, "
        f"`python benchmarks/head_losses.py`): {passes} for the losses of one pass, but for `EAFTLoss`, {eaft} and "
        f"with the whole entropy {whole}; {gem} for `GEMLoss`, {other_form} with its other form and {sed} for "
        "`SEDSFTLoss`; "
        f"{by_sequence} for those by sequence; and {compared} for those that read a reference's distribution, with its "
        "product"
    )
    half = results("head_losses_cpu_bfloat16")
    passes, eaft, whole, gem, other_form, sed, by_sequence, compared = ratios_of(half)
    yield (
        f"In bfloat16 the products take {half['bare_seconds'] / found['bare_seconds']:.2f} of the time, and what else "
        f"is done to a chunk weighs more: {passes}, {eaft} and {whole}; {gem}, {other_form} and {sed}; {by_sequence}; "
        f"and {compared}"
    )


BY_NAME = ("EAFTLoss", "EAFTLoss, whole entropy", "GEMLoss", "GEMLoss, logsigmoid", "SEDSFTLoss")
COMPARED = ("AnchoredLoss", "ReferenceKLLoss", "ReferenceKLLoss, reverse", "TargetSFTLoss", "PriorWeightedLoss, mass")


def ratios_of(found: dict) -> list[str]:
    """Of the losses of one pass; EAFT's two forms, GEM's and SED's; those by sequence, and by a distribution."""
    ratios = dict(found["times_the_bare_products"])
    ratios.pop(OWN_STATISTIC)
    beside = sorted(ratios.pop(name) for name in COMPARED)
    by_class = [f"{ratios.pop(name):.2f}" for name in BY_NAME]
    by_sequence = sorted(ratios.pop(name) for name in ("SequenceDFTLoss", "ImportanceWeightedLoss, sequence"))
    said = " and ".join(dict.fromkeys(f"{ratio:.1f}" for ratio in by_sequence))
    passes = f"{min(ratios.values()):.2f} to {max(ratios.values()):.2f}"
    return [passes, *by_class, said, f"{beside[0]:.1f} to {beside[-1]:.1f}"]


KEPT = {
    "none": "none",
    "every_2": "`every_2`",
    "selective": "`selective`",
    "full": "`full`",
    "offload": "`offload`",
    "compiled": "none, compiled",
    "compiled, selective": "`selective`, compiled",
    "compiled, full": "`full`, compiled",
}


def sharding_passages() -> Iterator[str]:
    found = results("activations_cpu")
    assert set(KEPT) == set(found["sides"])
    assert found["device"].endswith(", 1 threads")
    turns = f"{WORDS[len(found['turns'])]} turn{'s' * (len(found['turns']) > 1)}"
    yield f"SmolLM2-135M on {found['batch_size']} padded rows of GSM8K, bfloat16 by autocast, one thread, {turns}"
    for side, name in KEPT.items():
        each = found["sides"][side]
        yield (
            f"| {name} | {each['peak_memory'] / 2**30:.2f} | {each['times_the_speed']:.2f} | {each['first_step']:.0f} |"
        )
    yield f"`offload` would move {found['sides']['offload']['to_host'] / 2**30:.2f} GiB to the host"


def trainer_passages() -> Iterator[str]:
    found = results("trl_trainer_cpu")
    rows = WORDS[found["batch_size"]]
    yield f"SmolLM2-135M on GSM8K, {rows} rows a batch, {cores(found)}, TRL {found['packages']['trl']}"
    for precision, name in (("32-true", "float32"), ("bf16-mixed", "bf16-mixed")):
        each = found[precision]
        (trl, own), (theirs, ours) = (
            [each[what][side] for side in ("trl", "dft_lightning")] for what in ("tokens_per_second", "peak_memory_mib")
        )
        yield f"| {name}, tokens a second | {trl:.0f} | {own:.0f} | {each['speed_over_trl']:.2f} |"
        yield f"| {name}, peak memory of the process, MiB | {theirs:.0f} | {ours:.0f} | {ours / theirs:.2f} |"
    assert found["32-true"]["largest_difference_of_losses"] < 1e-5
    yield "In float32 the losses of the steps are the same to a part in a million"


def resuming_passages() -> Iterator[str]:
    found = results("kill")
    count, within = len(found["runs"]), found["killed within a write"]
    yield f"Of {count} small runs that were killed or stopped at random moments, {within} of them within the writing"
    yield f"all {found['same']} went on to the same weights"


OBJECTIVES = {
    "DFT": "DFT",
    "`DEFTLoss`": "DEFT",
    "`PowerLoss(0.5)`": "power 0.5",
    "`SequenceDFTLoss`, product": "sequence DFT",
    "`ThresholdLoss(0.1)`": "p above 0.1",
    "ASFT, `AnchoredLoss(0.1)`": "ASFT",
    "`ChordPhiLoss`": "CHORD phi",
    "PSFT, `ProximalLoss(0.28)`": "PSFT",
    "EAFT, 20 likeliest": "EAFT",
    "`SequenceDFTLoss`, geometric": "geometric DFT",
    "CE": "CE",
    "iw-SFT, by sequence": "iw sequence",
    "iw-SFT, by token": "iw token",
    "focal": "focal",
}


FURTHER = {
    "DFT": "DFT",
    "GFT, `RectifiedLoss(0.5)`": "GFT rectified",
    "TrSFT, `TrustRegionLoss(0.1)`": "TrSFT",
    "`FromReference(PowerLoss(0.5))`": "power 0.5 of the base",
    "PriFT by mass": "PriFT mass",
    "PriFT by probability": "PriFT prob",
    "Target-SFT, `eta` 0.5": "Target-SFT",
    "InfoSFT": "InfoSFT",
    "PSFT, a reference every 8 steps": "PSFT, every 8",
    "CE and 0.1 `ReferenceKLLoss`": "SFT and KL",
    "CE": "CE",
    "SED-SFT": "SED-SFT",
    "GEM": "GEM",
}


def results_passages() -> Iterator[str]:
    measures = (*MEASURES, "pass_at_4")
    for comparison, names in (("objectives", OBJECTIVES), ("objectives_more", FURTHER)):
        yield f"| base | {' | '.join(base_of(comparison, measure) for measure in measures)} |"
        for name, loss in names.items():
            yield f"| {name} | {' | '.join(on_test_rows(comparison, loss, measure) for measure in measures)} |"
    cells = ("CE", "cross-entropy"), ("DFT", "DFT")
    base = ", ".join(base_of("offline_rl", measure) for measure in MEASURES)
    found = [(name, ", ".join(on_test_rows("offline_rl", loss, how) for how in MEASURES)) for loss, name in cells]
    yield f"base {base}; {'; '.join(f'{name} {values}' for name, values in found)}."


THRESHOLDS = ("exact", "2^-12", "2^-14", "2^-16")


def threshold_passages() -> Iterator[str]:
    """What a gradient threshold does, a row each of a model, a loss and a threshold; and other heads' times."""
    for model, name in (("smollm2", "SmolLM2"), ("gemma3", "Gemma 3 270M")):
        found = results(f"gradient_threshold_{model}")
        times = found["times_the_bare_products"]
        for loss, errors in found["errors"].items():
            for threshold in THRESHOLDS:
                own = errors[threshold]
                lost = [f"{own['kept']:.0%}", f"{own['dropped']:.1e}"] if threshold != "exact" else ["100%", "0"]
                cells = [f"{times[f'{loss}, {threshold}']:.2f}", *lost, f"{own['dh']:.1e}", f"{own['dW']:.1e}"]
                yield f"| {name}, {loss}, {threshold} | {' | '.join(cells)} |"
        others = ", ".join(f"{other} {times[key]:.1f}" for key, other in OTHER_HEADS.items() if key in times)
        yield f"{name}, {found['tokens']} tokens: {others}"


def beside_passages() -> Iterator[str]:
    """The head's times beside busy processes, a row each of a head and a dtype; and the quickstart's."""
    found = [results(f"linear_head_cpu_beside_{number}")["results"] for number in range(3)]
    for dtype in ("float32", "bfloat16"):
        for candidate, name in (("dft_lightning", "this head"), ("plain", "full logits")):
            ratios = [
                run["ratio_to_bare"]
                for runs in found
                for run in runs
                if (run["dtype"], run["candidate"]) == (dtype, candidate)
            ]
            yield f"| {name}, {dtype} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |"
    alone, beside, spinning = (
        [run["seconds"] for run in results(f"quickstart_beside_{name}")["runs"].values()]
        for name in ("0", "2", "2_spinning")
    )
    yield (
        f"30 steps of the quickstart took {min(alone):.0f} to {max(alone):.0f} seconds alone, {min(beside):.0f} to "
        f"{max(beside):.0f} beside two busy processes of two threads, and {min(spinning):.0f} to {max(spinning):.0f} "
        "beside them with OpenMP's default"
    )


def curve_passages() -> Iterator[str]:
    runs = results("threshold_curve")["steps, objective, nll"]
    exact = [objective for _, objective, _ in runs["exact"]]
    for name in ("threshold", "another order"):
        apart = [abs(a - b) for a, (_, b, _) in zip(exact, runs[name], strict=True)]
        yield f"by {mean(apart):.4f} on average and {max(apart):.4f} at most"
    yield f"Over {runs['exact'][-1][0]} steps of SmolLM2 on SVAMP's word problems"


ERRORS_OF = {
    "dft_lightning": "this head",
    "float32 logits": "float32 logits",
    "bfloat16 logits": "bfloat16 logits",
    "trl": "TRL 1.16",
    "torch chunked": "torch's chunked",
    "liger's formulas": "Liger's formulas",
}


def error_passages() -> Iterator[str]:
    """Both tables, a row each."""
    for model, title in (("smollm2", "SmolLM2-135M"), ("gemma3", "Gemma 3 270M")):
        found = results(f"head_error_{model}")
        yield f"| {title}, {found['tokens']} tokens | {' | '.join(ERRORS_OF.values())} |"
        by_loss = found["results"]
        for statistic in ("log_prob", "entropy", "top_k_entropy", "mean_log_prob", "sum_squared_prob", "reference_kl"):
            name = "log-prob" if statistic == "log_prob" else f"`{statistic}`"
            yield plain(f"| {name} | {thousandths(by_loss['CrossEntropyLoss'], statistic)} |")
        for loss, of_heads in by_loss.items():
            name, _, form = loss.partition(", ")
            name = loss if loss == OWN_STATISTIC else f"`{name}`" + (f", {form}" if form else "")
            if of_heads["dft_lightning"]["dW"] < 1:  # or there is no gradient in float32
                yield plain(f"| dW, {name} | {thousandths(of_heads, 'dW')} |")


def thousandths(of_heads: dict, error: str) -> str:
    """An error of each head, to two digits and more; nothing where a head has none."""
    values = [1000 * of_heads.get(head, {}).get(error, math.nan) for head in ERRORS_OF]
    return " | ".join("" if math.isnan(value) else f"{value:.{0 if value >= 9.95 else 1}f}" for value in values)


OTHER_HEADS = {"plain": "full logits", "trl": "TRL 1.16", "torch chunked": "torch's chunked"}

PAGES = {
    "README.md": README_PASSAGES,
    "docs/first_run.md": [*first_run_passages()],
    "docs/data.md": [*data_passages()],
    "docs/head.md": [*error_passages(), *threshold_passages(), *curve_passages(), *beside_passages()],
    "docs/losses.md": [*losses_passages()],
    "docs/own_loss.md": [*own_loss_passages()],
    "docs/other_trainers.md": [*trainer_passages()],
    "docs/resuming.md": [*resuming_passages()],
    "docs/sharding.md": [*sharding_passages()],
    "docs/results/README.md": [*results_passages()],
}


@pytest.mark.parametrize(("page", "passage"), [(page, passage) for page in PAGES for passage in PAGES[page]])
def test_figures_are_those_of_the_results(page, passage):
    assert passage in plain((ROOT / page).read_text(encoding="utf-8"), code=page != "README.md")


SETTINGS = (
    "a Llama of 0.33M parameters",
    "greedy / avg@4 sampled at temperature 1 / pass@4",
    "but for pass@4 of DFT in the first column",
    "at the rate best by avg@4",
    "at the lowest rate, 2e-5",
    "gradient_threshold 6e-5",
    "one on a base in 4 bits",
    "packs the training rows into rows of 1024 tokens",
    "`l = log p`: 1 for cross-entropy",
    "For a vocabulary of 150,000 the logits",
)
NAME = re.compile(r"`[^`]*`|\]\([^)]*\)|\b[A-Za-z]+\d*-\d[\d.]*\w*|\b[A-Za-z]+\d+")  # code; links; GPT-2; float32


def test_no_figure_of_the_readme_is_without_its_results():
    rest = plain(README)
    for passage in (*README_PASSAGES, *SETTINGS):
        assert passage in rest
        rest = rest.replace(passage, "")
    assert re.findall(r"\S* \S*\d\S* \S*", NAME.sub("", rest)) == []


# -- Python ------------------------------------------------------------------------------------------------------------


def test_python_runs(monkeypatch):
    """Its blocks, but for the runs: the module is made of a small model, and the trainer is given what it would fit."""
    started, fitted = [], []
    monkeypatch.setattr("dft_lightning.fit.main", lambda module_class: started.append(module_class))
    monkeypatch.setattr(pl.Trainer, "fit", lambda self, *args, **options: fitted.append((args, options)))
    for language, code in BLOCK.findall(README):
        if language == "python":
            exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    (own,) = started
    module = own("asset://arithmetic-base")
    module.configure_model()
    module.build_parameter_groups()
    assert not module.model.get_input_embeddings().weight.requires_grad
    (((module,), options),) = fitted
    assert isinstance(module.loss, DFTLoss)
    assert options["datamodule"].batch_size == 16
