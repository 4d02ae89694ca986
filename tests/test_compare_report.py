"""What a report says of records: chosen rates, winners, checks, files."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from commands import compare as main
from compare_records import LOSSES, whole_comparison, write_run, write_settings
from dft_lightning.compare.analysis import analyse
from dft_lightning.compare.records import read_records

DRAWN = ("test_the_files", "test_names_are_text")


@pytest.fixture(autouse=True)
def figures(request, monkeypatch):
    """Drawn where a test looks at them: they take most of a report's time."""
    if request.function.__name__ not in DRAWN:
        monkeypatch.setattr("dft_lightning.compare.report.all_plots", lambda findings: [])


def findings_of(output):
    return analyse(yaml.safe_load((output / "compare.yaml").read_text()), read_records(output))


def fails(capsys, *args, lines=1):
    assert main([str(arg) for arg in args]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert len(message.strip().splitlines()) == lines
    return message


def test_each_measure_chooses_its_own_rate_on_validation(tmp_path):
    """Greedy is best at 1e-3 and sampled at 1e-4; what the further seeds got on validation has no say."""
    whole_comparison(tmp_path)
    findings = findings_of(tmp_path)
    for loss in range(2):
        greedy, sampled = (findings.choices[name][loss] for name in ("greedy", "sampled"))
        assert (greedy.learning_rate, greedy.validation, len(greedy.records)) == (1e-3, 0.7, 3)
        assert (sampled.learning_rate, sampled.validation, len(sampled.records)) == (1e-4, 0.2, 1)
        assert greedy.at_edge
        assert greedy.tied == []
    choice = findings.choices["greedy"][0]
    assert choice.of_seeds("test", "greedy") == [20 / 40, 21 / 40, 22 / 40]
    assert choice.over_problems().mean == pytest.approx((20 + 21 + 22) / 120)


def test_of_equal_rates_the_one_with_lower_nll_is_taken_and_the_report_says_so(tmp_path):
    write_settings(tmp_path, learning_rates=[1e-5, 1e-4, 1e-3, 1e-2])
    for rate, greedy, nll in ((1e-2, 0.5, 0.4), (1e-3, 0.5, 0.3), (1e-4, 0.5, 0.3), (1e-5, 0.25, 0.1)):
        write_run(tmp_path, "CE", rate, validation=(greedy, 0.5), nll=nll)
    choice = findings_of(tmp_path).choices["greedy"][0]
    assert (choice.learning_rate, choice.tied, choice.at_edge) == (1e-4, [1e-3, 1e-2], False)
    main(["--report_only", str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert "| CE | 0.0001 = | 0.500 |" in text
    assert "the divergence from the start is CE 0.0001 at 0.0001, in nats" in text
    shutil.rmtree(tmp_path / "runs" / "ce-lr0.01-seed0")
    write_run(tmp_path, "CE", 1e-2, validation=(0.5, 0.5), nll=0.2)  # as good, and further away
    main(["--report_only", str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert "the divergence from the start is CE 0.010 at 0.01 (0.0001 at 0.0001, which was as good), in nats" in text


def test_nll_is_better_when_lower(tmp_path):
    write_settings(tmp_path)
    write_run(tmp_path, "CE", 1e-4, nll=0.5)
    write_run(tmp_path, "CE", 1e-3, nll=0.25)
    assert findings_of(tmp_path).choices["nll"][0].learning_rate == 1e-3


def test_a_rate_that_lost_a_seed_takes_no_part(tmp_path):
    write_settings(tmp_path, seeds=[0, 1], seeds_at_best=[])
    for seed in (0, 1):
        write_run(tmp_path, "CE", 1e-4, seed, validation=(0.5, 0.5))
    write_run(tmp_path, "CE", 1e-3, 0, validation=(0.9, 0.9))
    write_run(tmp_path, "CE", 1e-3, 1, validation=(0.9, 0.9), finished=False, tested=False)
    # And a loss that lost a seed at every rate: it is left out and named, and the report of the rest is written.
    write_run(tmp_path, "DFT", 1e-4, 0)
    write_run(tmp_path, "DFT", 1e-3, 1)
    findings = findings_of(tmp_path)
    assert findings.losses == ["CE"]
    assert findings.choices["greedy"][0].learning_rate == 1e-4
    assert findings.choices["greedy"][0].at_edge  # of the two that were asked for
    assert main(["--report_only", str(tmp_path)]) == 0
    assert "DFT (all of it) | no learning rate has a finished run of each seed" in (tmp_path / "report.md").read_text()


def test_winners(tmp_path):
    """Ten problems of forty more, with every seed: better. Both are better than the base, by problems and seeds."""
    whole_comparison(tmp_path)
    pairs = {(pair.first, pair.second): pair for pair in findings_of(tmp_path).pairs["greedy"]}
    found = pairs["CE", "DFT"]
    assert found.winner == "DFT"
    assert found.over_problems.mean == pytest.approx(-0.25)
    assert found.over_seeds.count == 3
    assert pairs["DFT", "base model"].winner == "DFT"


def test_no_winner_where_seeds_disagree(tmp_path):
    """DFT gains 12, 1 and -1 problems of 40: sure over these problems, not over seeds."""
    write_settings(tmp_path, learning_rates=[1e-3])
    for seed, gain in enumerate((12, 1, -1)):
        write_run(tmp_path, "CE", 1e-3, seed, right=20)
        write_run(tmp_path, "DFT", 1e-3, seed, right=20 + gain)
    (pair,) = findings_of(tmp_path).pairs["greedy"]
    assert pair.over_problems.excludes_zero()
    assert not pair.over_seeds.excludes_zero()
    assert pair.winner is None


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_what_is_said_of_seeds(tmp_path, seeds):
    """Of one and of two: what ran, and that it tells nothing of others. Of three: that they agree."""
    write_settings(tmp_path, learning_rates=[1e-3])
    for loss, right in (("CE", 20), ("DFT", 35)):
        for seed in range(seeds):
            write_run(tmp_path, loss, 1e-3, seed, right=right + seed)
    (pair,) = findings_of(tmp_path).pairs["greedy"]
    assert pair.winner == "DFT"
    assert pair.by_seed == pytest.approx([-15 / 40] * seeds)
    assert pair.over_seeds.low is None
    main(["--report_only", str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert f"All this is of the seeds that ran, {seeds} of each loss, on test problems like these" in text
    assert ("too few seeds to tell what another would give" in text) == (seeds < 3)
    assert ("a loss is called better only where the seeds agree as well" in text) == (seeds == 3)
    values = ", ".join(f"{(20 + seed) / 40:.3f}" for seed in range(seeds))
    spread = "0.025" if seeds == 3 else "too few seeds"
    assert re.search(rf"\| CE \| 0.001 \| .* \| {values} \| {spread} \|", text)
    differences = ", ".join(["-0.375"] * seeds)  # to the last problem: no interval of no width
    assert f"| {differences} | {'seeds alike' if seeds == 3 else 'too few seeds'} |" in text


def test_ranges_stay_where_a_value_can_be(tmp_path):
    """With two seeds Student's interval of a share near 1 goes to 1.4, and a perplexity's below 0."""
    write_settings(tmp_path, learning_rates=[1e-3])
    for seed, (right, perplexity) in enumerate(((40, 2.0), (38, 250.0))):
        write_run(tmp_path, "CE", 1e-3, seed, right=right, perplexity=perplexity)
    main(["--report_only", str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert "22.361 (2.000 to 250.000)" in text  # the mean in logarithms: the root of 500
    assert re.search(r"\| CE \| 0.001 \| 0.500 \| 0.975 \| 0.8\d\d to 0.99\d \| 1.000, 0.950 \|", text)
    assert "-0." not in text.partition("## Pairs")[0]


def test_a_difference_of_shares_is_at_most_one(tmp_path):
    """Of 1, 1 and 0.875 by Student's interval up to 1.137; of the other sign down to as much."""
    write_settings(tmp_path, learning_rates=[1e-3])
    for seed, gain in enumerate((40, 40, 35)):
        write_run(tmp_path, "CE", 1e-3, seed, right=0)
        write_run(tmp_path, "DFT", 1e-3, seed, right=gain)
    (pair,) = findings_of(tmp_path).pairs["greedy"]
    assert (pair.over_seeds.low, pair.over_seeds.high) == (-1.0, pytest.approx(-0.78, abs=0.005))
    assert pair.winner == "DFT"


def test_the_number_of_pairs_is_counted(tmp_path):
    """Seven problems more are a difference between two losses, and none among the 45 pairs of ten."""
    for names in (["a", "b"], [f"loss {i}" for i in range(10)]):
        out = tmp_path / str(len(names))
        write_settings(out, losses=dict.fromkeys(names, LOSSES["CE"]), learning_rates=[1e-3], seeds_at_best=[])
        for place, name in enumerate(names):
            path = write_run(out, name, 1e-3, right=27 if place == 0 else 20)
            config = yaml.safe_load((path / "config.yaml").read_text())
            config["model"]["loss"] = LOSSES["CE"]
            (path / "config.yaml").write_text(yaml.safe_dump(config))
        pair = findings_of(out).pairs["greedy"][0]
        assert pair.p_value == pytest.approx(2 / 2**7, abs=0.004)
        assert pair.adjusted == pytest.approx(min(1.0, pair.p_value * (1 if len(names) == 2 else 45)))
        assert pair.winner == (names[0] if len(names) == 2 else None)
        main(["--report_only", str(out)])
        assert (
            f"in the family of the {1 if len(names) == 2 else 45} pairs of this table"
            in (out / "report.md").read_text()
        )


def test_a_rate_at_the_edge_is_said_at_the_head(tmp_path):
    whole_comparison(tmp_path)
    main(["--report_only", str(tmp_path)])
    head = re.sub(r"\\(.)", r"\1", (tmp_path / "report.md").read_text().partition("## ")[0])
    assert (
        "exact match, greedy: every loss at the highest rate, 0.001; avg@4 at temperature 1: every loss at the lo"
        in head
    )
    assert "goes on with learning_rates: [3e-05, 0.0001, 0.001, 0.003] in its config" in head


def test_no_winner_where_problems_leave_it_open(tmp_path):
    write_settings(tmp_path, seeds_at_best=[])
    write_run(tmp_path, "CE", 1e-3, right=20)
    write_run(tmp_path, "DFT", 1e-3, right=21)
    (pair,) = findings_of(tmp_path).pairs["greedy"]
    assert pair.over_problems.mean == pytest.approx(-1 / 40)
    assert pair.winner is None


def test_the_files(tmp_path):
    whole_comparison(tmp_path)
    assert main(["--report_only", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)  # one file, nothing beside it
    assert "<script" not in page
    assert 'name="viewport"' in page
    assert page.count("data:image/svg+xml;base64,") == len(list((tmp_path / "plots").glob("*.svg"))) >= 15
    assert len(list((tmp_path / "plots").glob("*.png"))) == len(list((tmp_path / "plots").glob("*.svg")))
    text = (tmp_path / "report.md").read_text()
    assert "exact match, greedy: DFT 0.775, better than CE and base model; CE 0.525, better than base model" in text
    assert "| targets per step | seed 0, 4 runs | the same | t |" in text
    for picture in re.findall(r"\]\((plots/[^)]+)\)", text):
        assert (tmp_path / picture).is_file()
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(rows) == 9
    best = next(row for row in rows if row["run"] == "dft-lr0.001-seed2")
    assert (best["loss"], best["seed"], best["finished"], float(best["test_greedy"])) == ("DFT", "2", "True", 32 / 40)
    assert float(best["start_greedy"]) == 0.3


def test_minutes_in_sum_and_by_the_clock(tmp_path):
    """Eight fits of a minute and nine tests of twenty seconds, in two calls of four minutes and one and a half."""
    whole_comparison(tmp_path)
    facts = report_facts(tmp_path)
    assert facts["runs"] == "8 trained, 9 tested"
    assert facts["minutes in sum"] == "8.0, of training and evaluation, without the tests; models load beside it"
    assert facts["minutes by the clock"] == "not known: no call of compare made the runs"
    for path in tmp_path.glob("runs/*/test.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": 20.0}))
    calls = [{"began": 100.0, "ended": 340.0}, {"began": 5000.0, "ended": 5090.0}]
    (tmp_path / "calls.json").write_text(json.dumps(calls))
    facts = report_facts(tmp_path)
    assert facts["minutes in sum"] == "11, of training, evaluation and tests; models load beside it"
    assert facts["minutes by the clock"] == "5.5, in 2 calls together"
    (tmp_path / "calls.json").write_text(json.dumps(calls[:1]))
    assert report_facts(tmp_path)["minutes by the clock"] == "4.0, in one call"


def report_facts(output):
    main(["--report_only", str(output)])
    return dict(re.findall(r"^- \*\*(.*?)\*\*: (.*)$", (output / "report.md").read_text(), re.MULTILINE))


def test_tables_are_no_wider_for_more_losses(tmp_path):
    """A row a loss, never a column: a page of 1300 pixels has them all. Cells may break, and so may names in them."""
    losses = dict.fromkeys([f"loss {number}" for number in range(14)], LOSSES["CE"])
    write_settings(tmp_path, losses=losses, seeds_at_best=[])
    for number, name in enumerate(losses):
        folder = write_run(tmp_path, name, 1e-3, folder=f"run{number}")
        (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"loss": LOSSES["CE"]}}))
    main(["--report_only", str(tmp_path)])
    tables = re.findall(r"^\|.*\n\|[- |]+\|\n", (tmp_path / "report.md").read_text(), re.MULTILINE)
    assert len(tables) > 5
    assert max(table.splitlines()[0].count(" | ") + 1 for table in tables) <= 8
    text = (tmp_path / "report.md").read_text()
    assert "| probability before | 0 to 0.1 | 0.1 to 0.5 | 0.5 to 0.9 | 0.9 to 1 |" in text
    assert "| targets | 1 | 1 | 1 | 2 |" in text
    assert "| before training | 0.050 | 0.300 | 0.700 | 0.970 |" in text
    assert "| loss 13 | 0.224 | 0.548 | 0.837 | 0.985 |" in text  # square roots: log-probs are halved
    assert "nowrap" not in (tmp_path / "report.html").read_text()


def test_a_difference_in_targets_is_no_comparison(tmp_path):
    whole_comparison(tmp_path)
    write_run(tmp_path, "DFT", 1e-4, 1, targets="other")
    findings = findings_of(tmp_path)
    assert [check.what for check in findings.checks if not check.agrees] == ["targets per step"]
    main(["--report_only", str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert "NOT COMPARABLE" in text
    assert "DIFFERENT they part at micro-batch 2" in text
    assert "better than" not in text


def test_a_base_of_other_weights_is_no_comparison(tmp_path):
    whole_comparison(tmp_path)
    path = tmp_path / "runs" / "base" / "test.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "weights": "other"}))
    assert [check.what for check in findings_of(tmp_path).checks if not check.agrees] == ["initial weights"]
    pairs = findings_of(tmp_path).pairs["greedy"]
    assert all("base model" not in (pair.first, pair.second) for pair in pairs)


@pytest.mark.parametrize(
    ("place", "config", "reason"),
    [
        (("other", 1e-3, 0), {}, "'other' is none of the comparison's losses"),
        (("CE", 1e-2, 0), {}, "learning rate 0.01 is none of the comparison's"),
        (("CE", 1e-3, 7), {}, "seed 7 is none of the comparison's"),
        (("CE", 1e-3, 2), {"model": {"loss": {"class_path": "Other"}}}, "its config has another loss by the name 'CE'"),
    ],
)
def test_runs_that_are_no_part_of_the_comparison(tmp_path, place, config, reason):
    """Left of an older config, say: they take no part in choices and winners, and are named."""
    write_settings(tmp_path)
    for loss in ("CE", "DFT"):
        write_run(tmp_path, loss, 1e-3)
    folder = write_run(tmp_path, *place, validation=(0.99, 0.99), right=40)
    if config:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    findings = findings_of(tmp_path)
    assert findings.left_out == {folder.name: reason}
    assert {len(choice.records) for choice in findings.choices["greedy"]} == {1}
    main(["--report_only", str(tmp_path)])
    assert reason in (tmp_path / "report.md").read_text().replace("\\", "")


def test_a_difference_in_config_is_no_comparison(tmp_path):
    whole_comparison(tmp_path)
    path = tmp_path / "runs" / "ce-lr0.001-seed0" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["optimizer"]["init_args"]["weight_decay"] = 0.5
    path.write_text(yaml.safe_dump(config))
    (check,) = [check for check in findings_of(tmp_path).checks if not check.agrees]
    assert check.what == "config but for loss, learning rate and seed"
    assert check.note in (
        "(model.optimizer.init_args.weight_decay: not set, 0.5)",
        "(model.optimizer.init_args.weight_decay: 0.5, not set)",
    )


def test_other_test_problems_are_no_comparison(tmp_path):
    whole_comparison(tmp_path)
    path = tmp_path / "runs" / "dft-lr0.001-seed1" / "test.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "problems": "others"}))
    assert [check.what for check in findings_of(tmp_path).checks if not check.agrees] == ["test problems"]


def test_a_test_of_other_weights_is_no_test(tmp_path):
    whole_comparison(tmp_path)
    path = tmp_path / "runs" / "dft-lr0.001-seed1" / "test.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "weights": "some steps before"}))
    assert [record.name for record in read_records(tmp_path) if not record.whole] == ["dft-lr0.001-seed1"]


def test_names_are_text(tmp_path):
    """In a table, in a page and in a figure: dollar signs are no mathematics, and angle brackets no tags."""
    names = {"CE $\\nope$": "CE", "<b>x|y*z*</b>": "DFT"}
    for name, loss in names.items():
        LOSSES[name] = LOSSES[loss]
    write_settings(tmp_path, losses={name: LOSSES[name] for name in names}, seeds_at_best=[])
    for i, name in enumerate(names):
        folder = write_run(tmp_path, name, 1e-3, folder=f"run{i}")
        assert folder.is_dir()
        del LOSSES[name]
    assert main(["--report_only", str(tmp_path)]) == 0
    assert "<b>x" not in (tmp_path / "report.html").read_text()
    text = (tmp_path / "report.md").read_text().partition("## The comparison's config")[0]
    assert "\\<b\\>x\\|y\\*z\\*\\</b\\>" in text
    assert "<b>" not in text.replace("\\<b\\>", "")


def test_unfinished_runs_are_named_with_their_error(tmp_path):
    whole_comparison(tmp_path)
    folder = write_run(tmp_path, "DFT", 1e-4, 1, finished=False, tested=False)
    (folder / "fit.log").write_text("step 1\nTraceback (most recent call last):\n  x\nRuntimeError: out of memory\n")
    main(["--report_only", str(tmp_path)])
    assert "| dft-lr0.0001-seed1 | fit: RuntimeError: out of memory |" in (tmp_path / "report.md").read_text()


# -- bad input -----------------------------------------------------------------------------------------------------


def test_a_folder_of_unfinished_runs(tmp_path, capsys):
    write_settings(tmp_path)
    write_run(tmp_path, None)
    write_run(tmp_path, "CE", 1e-3, finished=False, tested=False)
    message = fails(capsys, "--report_only", tmp_path)
    assert "1 runs and none of a loss has ended (ce-lr0.001-seed0: begun)" in message
    assert not (tmp_path / "report.md").exists()


def test_a_measure_that_was_never_logged(tmp_path, capsys):
    whole_comparison(tmp_path)
    write_settings(tmp_path, measures=["greedy", "pass_at_2", "token_accuracy"])
    path = tmp_path / "runs" / "ce-lr0.001-seed0" / "fit.json"
    fit = json.loads(path.read_text())
    del fit["history"][-1]["validation"]["token_accuracy"]
    path.write_text(json.dumps(fit))
    message = fails(capsys, "--report_only", tmp_path)
    assert "ce-lr0.001-seed0: 'token_accuracy' was never logged on validation rows; there are greedy," in message


def test_folders_that_are_no_comparison(tmp_path, capsys):
    assert "no compare.yaml here: not the output folder" in fails(capsys, "--report_only", tmp_path)
    write_settings(tmp_path)
    assert "no runs in" in fails(capsys, "--report_only", tmp_path)


def test_a_broken_record(tmp_path, capsys):
    whole_comparison(tmp_path)
    (tmp_path / "runs" / "base" / "test.json").write_text('{"run": ')
    assert "test.json: broken record: " in fails(capsys, "--report_only", tmp_path)
    whole = tmp_path / "whole"
    whole_comparison(whole)
    (whole / "runs" / "ce-lr0.001-seed0" / "probabilities.npz").unlink()
    assert "probabilities.npz: missing: copy it with its run" in fails(capsys, "--report_only", whole)
    (whole / "compare.yaml").write_text("[")
    assert "compare.yaml: cannot be read: " in fails(capsys, "--report_only", whole)


def test_without_the_extra():
    """One message, before the report's modules are imported."""
    script = (
        "import sys; sys.modules['jinja2'] = None; "
        "from dft_lightning.cli.commands import run; sys.exit(run('compare', ['--report_only', 'runs']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "error: the report needs jinja2: pip install 'dft-lightning[compare]'\n"


FORGOTTEN = ("exact match, greedy", "nll (nats per token)", "token accuracy", "KL to the start (nats per token)")


def test_forgetting_by_source_and_divergence(tmp_path):
    whole_comparison(tmp_path)
    main(["--report_only", str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert (
        "- Forgetting, at each loss's best rate (exact match, greedy): the divergence from the start is CE 0.001 at"
        in text
    )
    swept = text[text.index("### Every learning rate\n") :].splitlines()
    titles = [title.strip() for title in swept[2].split("|")]
    assert titles[-5:-1] == [f"forgetting: {name}" for name in FORGOTTEN]
    values = [[cell.strip() for cell in line.split("|")] for line in swept if line.startswith("| CE |")]
    assert [(row[2], row[-2]) for row in values[:2]] == [("0.0001", "0.0001"), ("0.001", "0.001")]
    section = text[text.index("### Forgetting\n") :].splitlines()
    rates = "Learning rates, best on validation rows (exact match, greedy): CE 0.001, DFT 0.001."
    assert sum(rates in line for line in section[:40] if line.startswith("After training")) == 2
    assert next(line for line in section if line.startswith("| before training")).endswith(" | 0.000 |")
    assert next(line for line in section if line.startswith("| CE")).endswith(" | 0.001 (0.001 to 0.001) |")
    of_source = section[section.index("### Forgetting by source") :]
    rows = [line for line in of_source if line.startswith("|")]
    assert rows[0] == "| source |  | nll (nats per token) | token accuracy | KL to the start (nats per token) |"
    assert rows[2:4] == [
        "| prose | before training | 2.000 | 0.500 | 0.000 |",
        "| prose | CE | 3.500 (2.500 to 4.500) | 0.500 (0.500 to 0.500) | 0.001 (0.001 to 0.001) |",
    ]
