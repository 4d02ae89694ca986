"""docs/losses.md: its table against the classes, its configs, its figures against formulas by hand."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import fields

import pytest
import torch
import yaml

from conftest import ROOT
from dft_lightning.component import from_plain
from dft_lightning.losses import (
    LOSSES,
    DEFTLoss,
    DFTLoss,
    EAFTLoss,
    ImportanceWeightedLoss,
    MixtureLoss,
    PriorWeightedLoss,
    ScheduledLoss,
    SequenceDFTLoss,
    TokenLoss,
    TokenStats,
)
from dft_lightning.losses.statistics import normalise_needs, reference_need
from small_runs import run_script

pytest.importorskip("matplotlib", reason="the compare extra is not installed")
sys.path.insert(0, str(ROOT / "docs"))

import plot_losses as docs

PAGE = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
FIELDS = {field.name for field in fields(TokenStats)}


def table():
    """The rows of the table of losses: class name, and its cells by their heads."""
    _, _, rest = PAGE.partition("\n| loss | per token |")
    head, _, *rows = ("| loss | per token |" + rest.partition("\n\n")[0]).splitlines()
    names = [name.strip() for name in head.strip("|").split("|")]
    for row in rows:
        cells = dict(zip(names, [cell.strip() for cell in row.strip("|").split("|")], strict=True))
        yield re.match(r"\[`(\w+)`\]", cells["loss"]).group(1), cells


ROWS = list(table())
MADE_OF_LOSSES = {
    "MixtureLoss": lambda *parts: MixtureLoss(list(parts)),
    "ScheduledLoss": lambda start, end: ScheduledLoss(start, end, end_step=1),
}


OPTIONS = {"FromReference": {"loss": DFTLoss()}, "SEDSFTLoss": {"threshold": 0.9}, "TargetSFTLoss": {"eta": 0.5}}


def needs(loss):
    return {need.name for need in normalise_needs(loss.needs)}


def test_the_table_has_every_loss():
    assert {name for name, _ in ROWS} == LOSSES.keys()
    twice = [name for name in LOSSES if [found for found, _ in ROWS].count(name) == 2]
    assert sorted(twice) == ["ImportanceWeightedLoss", "PriorWeightedLoss"]
    assert len(ROWS) == len(LOSSES) + 2


SINGLE = [row for row in ROWS if row[0] not in MADE_OF_LOSSES]


@pytest.mark.parametrize(("name", "cells"), SINGLE, ids=[name for name, _ in SINGLE])
def test_needs_and_pointwise_are_those_of_the_class(name, cells):
    loss = LOSSES[name](**OPTIONS.get(name, {}))
    if "`level: token`" in cells["loss"]:
        loss = ImportanceWeightedLoss(level="token")
    if "`form: mass`" in cells["loss"]:
        loss = PriorWeightedLoss(form="mass")
    named = set(re.findall(r"`(\w+)`", cells["needs"]))
    assert named <= FIELDS
    assert named == needs(loss)
    assert cells["pointwise"] == {True: "yes", False: "no"}[loss.pointwise]
    assert ("scored data" in cells["needs"]) == ("reference_log_prob" in needs(loss))
    assert ("a reference model" in cells["needs"]) == (reference_need(loss.needs) is not None)


@pytest.mark.parametrize("name", MADE_OF_LOSSES)
def test_losses_made_of_losses_are_as_their_parts(name):
    (cells,) = [cells for found, cells in ROWS if found == name]
    assert cells["needs"] == "what its parts need"
    assert cells["pointwise"] == "if its parts are"
    made = MADE_OF_LOSSES[name]
    assert needs(made(DEFTLoss(), EAFTLoss())) == {"sum_squared_prob", "top_k_entropy"}
    assert made(DEFTLoss(), DFTLoss()).pointwise
    assert not made(SequenceDFTLoss(), DFTLoss()).pointwise


# -- configs -------------------------------------------------------------------------------------------------------


def with_paths(spec):
    """Class names as the command completes them."""
    if isinstance(spec, str) and spec in LOSSES:
        spec = {"class_path": spec}
    if isinstance(spec, list):
        return [with_paths(item) for item in spec]
    if not isinstance(spec, dict) or "class_path" not in spec:
        return spec
    init_args = {name: with_paths(value) for name, value in spec.get("init_args", {}).items()}
    return {"class_path": f"dft_lightning.{spec['class_path']}", "init_args": init_args}


def test_every_loss_has_a_config_that_makes_it():
    codes = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    made = [type(from_plain(with_paths(yaml.safe_load(code)["model"]["loss"]), TokenLoss)) for code in codes]
    assert set(made) == set(LOSSES.values())


# -- figures -------------------------------------------------------------------------------------------------------


def entropy(*probabilities):
    total = sum(probabilities)
    return -sum(p / total * math.log(p / total) for p in probabilities if p)


def focal(gamma):
    return lambda p: (1 - p) ** gamma - gamma * p * (1 - p) ** (gamma - 1) * math.log(p)


def deft(count):
    return lambda p: p ** (p**2 + count * ((1 - p) / count) ** 2)


def eaft(count):
    return lambda p: entropy(p, *[(1 - p) / count] * min(count, 19)) / math.log(20)


def infosft(p):
    return p * max(0, 1 - math.log(p / (1 - p)) / math.log(0.93 / 0.07))


def sed(weight):
    return lambda p: 1 - 2 * weight * (p - 0.5) * p


def proximal(epsilon):
    return lambda r: r if r < 1 + epsilon else 0.0


BY_HAND = {
    "More for what the model finds likely": {
        "DFTLoss, PowerLoss q=1": lambda p: p,
        "PowerLoss q=0.3": lambda p: p**0.3,
        "PowerLoss q=4": lambda p: p**4,
        "ThresholdLoss 0.3": lambda p: float(p >= 0.3),
        "MixtureLoss, half DFT": lambda p: (1 + p) / 2,
    },
    "More for what it finds unlikely, or is undecided about": {
        "ChordPhiLoss": lambda p: p * (1 - p),
        "FocalLoss gamma=1": focal(1),
        "FocalLoss gamma=2": focal(2),
        "ThresholdLoss 0.3, above=False": lambda p: float(p < 0.3),
    },
    "Held back below a probability, or from one on": {
        "DFTLoss": lambda p: p,
        "InfoSFTLoss 0.93": infosft,
        "TrustRegionLoss 0.1": lambda p: min(1, p / 0.1),
        "TrustRegionLoss 0.4": lambda p: min(1, p / 0.4),
        "RectifiedLoss 0.5": lambda p: 1.0 if p > 0.5 else p,
    },
    "SEDSFTLoss, where the likeliest have little": {"weight 0.5": sed(0.5), "weight 1": sed(1.0)},
    "DEFTLoss, by where the rest lies": {
        "DFTLoss": lambda p: p,
        "on 1 other": deft(1),
        "on 19 others": deft(19),
        "on 1000 others": deft(1000),
    },
    "EAFTLoss, by where the rest lies": {
        "DFTLoss": lambda p: p,
        "on 1 other": eaft(1),
        "on 19 others": eaft(19),
        "on 1000 others": eaft(1000),
    },
    'ImportanceWeightedLoss, level="token"': {
        "clip to [0, 16]": lambda r: r,
        "clip to [0.2, 1.8]": lambda r: min(max(r, 0.2), 1.8),
        "temperature 0.5": lambda r: r**0.5,
    },
    "ProximalLoss": {"epsilon 0.28": proximal(0.28), "epsilon 0.1": proximal(0.1)},
}
PANELS = [panel for panels in docs.FIGURES.values() for panel in panels]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_curves_are_the_formulas(panel):
    formulas = {"CrossEntropyLoss": lambda x: 1.0, **BY_HAND[panel.title]}
    assert list(panel.lines) == list(formulas)
    points = [x for x in (0.02, 0.1, 0.25, 0.5, 0.9, 0.99, 1.2, 2.0) if x <= panel.x[-1]]
    places = [int(panel.x.sub(x).abs().argmin()) for x in points]
    torch.testing.assert_close(panel.x[places], torch.tensor(points, dtype=torch.float64))
    drawn = {label: line.weight()[places] for label, line in panel.lines.items()}
    expected = {label: torch.tensor([of(x) for x in points], dtype=torch.float64) for label, of in formulas.items()}
    torch.testing.assert_close(drawn, expected, rtol=1e-9, atol=1e-12)  # names the line


NUMBER = re.compile(r"-?\d+\.\d+")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The figures as the script draws them."""
    folder = tmp_path_factory.mktemp("drawn")
    run_script("docs/plot_losses.py", copied_to=folder)
    return folder / "losses"


@pytest.mark.parametrize("name", docs.FIGURES)
def test_figures_are_what_the_script_draws(name, drawn):
    import matplotlib

    committed = (ROOT / "docs" / "losses" / f"{name}.svg").read_text(encoding="utf-8")
    assert f"](losses/{name}.svg)" in PAGE
    if f"Matplotlib v{matplotlib.__version__}" not in committed:
        pytest.skip("drawn with another release of Matplotlib")
    made = (drawn / f"{name}.svg").read_text(encoding="utf-8")
    # Coordinates are compared as numbers: another machine's rounding must not cost a test.
    assert NUMBER.sub("#", made) == NUMBER.sub("#", committed), "run python docs/plot_losses.py"
    numbers = [torch.tensor([float(n) for n in NUMBER.findall(text)]) for text in (made, committed)]
    torch.testing.assert_close(*numbers, rtol=0, atol=0.01)
