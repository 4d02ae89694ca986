"""What a reader sees of every figure: the texts as drawn and as saved, the axes and the bands."""

from __future__ import annotations

import io
import json
import re
import sys

import numpy as np
import pytest
import yaml

pytest.importorskip("matplotlib", reason="the compare extra is not installed")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from compare_records import LOSSES, write_run, write_settings
from conftest import ROOT
from dft_lightning.compare.analysis import analyse
from dft_lightning.compare.plots import all_plots
from dft_lightning.compare.plots.style import Styles, add_legend, drawing, new_figure, set_log
from dft_lightning.compare.records import read_records

sys.path.insert(0, str(ROOT / "docs"))

import plot_losses

TEX = re.compile(r"\\|mathdefault|[{}^]|\$")
NAMES = ["CE", "DFT", "CE $\\nope$", "a loss whose name is as long as a sentence, and longer than the figure is wide"]
NAMES += [f"loss {number}" for number in range(5)]


def compared(folder, names, rates, steps, values_at, norms, seeds=(0, 1, 2)):
    """The figures of a comparison whose runs have such values: ``values_at(loss, seed, step)``."""
    losses = dict.fromkeys(names, LOSSES["CE"])
    write_settings(folder, losses=losses, learning_rates=list(rates), seeds=list(seeds), seeds_at_best=[])
    write_run(folder, None)
    for place, name in enumerate(names):
        for rate in rates:
            for seed in seeds:
                path = write_run(folder, name, rate, seed, folder=f"{place}-{rate:g}-{seed}")
                (path / "config.yaml").write_text(yaml.safe_dump({"model": {"loss": LOSSES["CE"]}}))
                fit = json.loads((path / "fit.json").read_text())
                start = fit["history"][0]["validation"]
                at = {step: {**start, **values_at(place, seed, step)} for step in steps}
                fit["history"] = [{"step": s, "validation": v, "forgetting": v} for s, v in at.items()]
                fit["logged"] = [[s, {"train/grad_norm": v}] for s, v in zip(steps, norms(seed), strict=True)]
                (path / "fit.json").write_text(json.dumps(fit))
                generator = np.random.default_rng(seed)
                before = np.log(generator.uniform(0.001, 1, 3000)).astype(np.float32)
                np.savez(path / "probabilities.npz", before=before, after=before / 2)
    settings = yaml.safe_load((folder / "compare.yaml").read_text())
    return all_plots(analyse(settings, read_records(folder)))


def hostile(folder):
    """Many losses, rates side by side, values over ten decades, seeds that disagree, shares at their ends."""

    def values_at(loss, seed, step):
        small = 10.0 ** (-step / 4 - loss / 2)
        return {
            "nll": small * (1, 1, 30)[seed],
            "entropy": 0.001 * (1, 1, 30)[seed],
            "loss": small,
            "token_accuracy": (1.0, 1.0, 0.97)[seed],
            "greedy": (0.0, 0.0, 0.02)[seed],
        }

    return compared(
        folder,
        NAMES,
        (1e-5, 1.1e-5, 2e-5, 3e-5, 1e-4, 3e-4, 1e-3, 1e-1),
        (0, 10, 20),
        values_at,
        lambda seed: [(5.0, 5.0, 5.0)[seed], (1e-4, 1e-4, 2.0)[seed], (1e-4, 1e-4, 1e-3)[seed]],
    )


def narrow(folder):
    """Two losses whose values hardly move, far from 0; one objective is negative."""

    def values_at(loss, seed, step):
        moved = 1 + step * 1e-4 + loss * 1e-4
        return {"nll": 2.31 * moved, "entropy": 1.2 * moved, "loss": loss - 0.5 + step * 1e-6}

    return compared(folder, ["CE", "DFT"], (1e-4,), (0, 10, 20), values_at, lambda seed: [3.1, 3.2, 3.3])


def of_docs(folder):
    with drawing():
        return [plot_losses.draw(name) for name in plot_losses.FIGURES]


@pytest.fixture(scope="module", params=[hostile, narrow, of_docs], ids=lambda made: made.__name__)
def drawn(request, tmp_path_factory):
    """By name, each figure with the SVG that was made of it."""
    made = request.param(tmp_path_factory.mktemp("figures"))
    found = (
        {f.name: f.figure for f in made}
        if not isinstance(made[0], Figure)
        else dict(zip(plot_losses.FIGURES, made, strict=True))
    )
    files = {}
    for name, figure in found.items():
        buffer = io.StringIO()
        with drawing():
            figure.savefig(buffer, format="svg")
        files[name] = figure, buffer.getvalue()
    return files


@pytest.fixture
def figures(drawn):
    return {name: figure for name, (figure, _) in drawn.items()}


def labels_of(axis):
    """The tick labels of an axis that are in the picture."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    margin = 1e-9 * (high - low)
    major = len(axis.get_major_ticks())
    found = [tick.label1 for tick in ticks[:major] if low - margin <= tick.get_loc() <= high + margin]
    return found + [tick.label1 for tick in ticks[major:] if tick.label1.get_text()]


def axes_of(figures):
    for name, figure in figures.items():
        for axes in figure.axes:
            yield name, figure, axes


def test_every_axis_has_numbers_that_can_be_read(figures):
    """Plain text, at least two, none on another or out of the picture, each with a value of its own."""
    for name, figure, axes in axes_of(figures):
        for axis in (axes.xaxis, axes.yaxis):
            labels = labels_of(axis)
            texts = [label.get_text() for label in labels]
            assert len(set(texts)) == len(texts) >= 2, (name, texts)
            for text in texts:
                assert re.fullmatch(r"[\u2212-]?\d+(\.\d+)?(e-?\d+)?|[\d.]+ to [\d.]+\n\(\d+\)", text), (name, text)
            boxes = [label.get_window_extent() for label in labels]
            for i, box in enumerate(boxes):
                assert not any(box.overlaps(other) for other in boxes[:i]), (name, texts)
                assert figure.bbox.padded(1).contains(box.x0, box.y0), (name, texts)
                assert figure.bbox.padded(1).contains(box.x1, box.y1), (name, texts)


def test_legends_are_in_the_picture_and_names_as_given(figures):
    known = {re.sub(r"\s", "", name) for name in NAMES}
    for name, figure, axes in axes_of(figures):
        for legend in [*figure.legends, *(legend for part in figure.subfigs for legend in part.legends)]:
            box = legend.get_window_extent()
            assert figure.bbox.padded(1).contains(box.x0, box.y0), name
            assert figure.bbox.padded(1).contains(box.x1, box.y1), name
            assert not box.overlaps(axes.get_window_extent()), name
            texts = {re.sub(r"\s", "", text.get_text()) for text in legend.get_texts()}
            if len(texts) >= len(NAMES):
                assert known <= texts
        assert axes.get_window_extent().height > 100, name  # what is left of the panel beside its words
        assert axes.get_xlabel(), name
        assert axes.get_ylabel(), name


def test_files_have_the_texts_that_were_drawn(drawn):
    """As a browser shows them: letters are shapes, and each text is a comment before its own."""
    for name, (figure, svg) in drawn.items():
        saved = saved_texts(svg)
        shown = {text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()}
        assert set(saved) <= {part for text in shown for part in (text, *text.splitlines())}, name
        assert not [text for text in saved if TEX.search(text) and text.removeprefix("after ") != NAMES[2]], name
        assert (NAMES[2] in shown) == (NAMES[2] in saved), name


def saved_texts(svg):
    return re.findall(r"<!-- (.*?) -->", svg, re.DOTALL)


PUBLISHED = sorted((ROOT / "docs").rglob("*.svg"))


def test_no_published_figure_has_tex():
    assert len(PUBLISHED) > 100
    for path in PUBLISHED:
        texts = saved_texts(path.read_text(encoding="utf-8"))
        assert len(texts) > 4, path
        assert not [text for text in texts if TEX.search(text)], path


# -- axes and bands ------------------------------------------------------------------------------------------------


def test_axes_show_what_a_value_can_be(figures):
    """No entropy below 0, no share beyond 0 and 1, whatever a band over seeds does; every line is in its panel."""
    for name, _, axes in axes_of(figures):
        if not axes.get_lines():
            continue
        bottom, top = axes.get_ylim()
        values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()])
        if values.min() >= 0:
            assert bottom >= 0, name
        assert bottom <= values.min() <= values.max() <= top, name
        if re.search(r"greedy|sampled|pass_at|accuracy|temperature", name):
            assert top <= 1, name


def test_bands_have_no_slab(figures):
    """On a logarithmic axis: every corner of a band is above 0, and none is above what the runs have."""
    for name, _, axes in axes_of(figures):
        if axes.get_yscale() != "log":
            continue
        for band, line in zip(axes.collections, axes.get_lines(), strict=bool(axes.collections)):
            (path,) = band.get_paths()
            assert path.vertices[:, 1].min() > 0, name
            means = dict(zip(*line.get_data(), strict=True))
            assert all(y <= 3 * means[x] * (1 + 1e-9) for x, y in path.vertices), name  # of three runs


def test_the_caption_says_where_half_a_band_is_missing(tmp_path):
    plots = {plot.name: plot.caption for plot in compared(
        tmp_path, ["CE"], (1e-4,), (0, 10), lambda *_: {}, lambda seed: [(1.0, 1.1, 1.2)[seed], (0.0, 0.1, 9.0)[seed]]
    )}  # fmt: skip
    half = "its upper half alone is drawn"
    assert half in plots["train_grad_norm"]
    assert half not in plots["validation_nll"]


@pytest.mark.parametrize("times", [1.001, 1.3, 4.0, 50.0, 1e4, 3e6, 1e14])
def test_any_logarithmic_axis_has_a_few_numbers(times):
    _, axes = new_figure("x", "y")
    set_log(axes, "y")
    for low in (1e-9, 3e-4, 0.7, 1.0, 97.0, 5e6):
        places = axes.yaxis.get_major_locator().tick_values(low, low * times)
        labels = [axes.yaxis.get_major_formatter()(place) for place in places]
        assert 2 <= len(labels) <= 6
        assert len(set(labels)) == len(labels)
        assert [float(label) for label in labels] == pytest.approx(sorted(places), rel=1e-4)
        assert low * (1 - 1e-9) <= min(places) < max(places) <= low * times * (1 + 1e-9)


def test_losses_of_one_colour_differ_in_every_figure():
    styles = Styles([str(i) for i in range(21)])
    for drawn in (styles.bar, styles.line):
        assert len({json.dumps(drawn(str(i)), sort_keys=True) for i in range(21)}) == 21


def test_a_legend_of_many_names_leaves_the_panel_its_height():
    with drawing():
        figure, axes = new_figure("x", "y")
        for i in range(30):
            axes.plot([0, 1], [0, i], label=f"a loss with a name {i}")
        add_legend(axes)
        FigureCanvasAgg(figure).draw()
    assert axes.get_window_extent().height > 100
