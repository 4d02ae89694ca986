"""The command ``configs``: every config listed and copied, nothing of the user's replaced, all of them in the wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dft_lightning.cli.shipped_configs as shipped_configs
from commands import configs as main
from conftest import ROOT
from dft_lightning.cli.shipped_configs import shipped
from dft_lightning.compare.settings import read_settings
from dft_lightning.fit import main as fit

pytestmark = pytest.mark.timeout(60)

FILES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "configs").rglob("*") if path.is_file()}


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if not p.is_dir()}


ALL = {name.removeprefix("configs/"): path.read_bytes() for name, path in FILES.items()}


def fails(capsys, *args):
    """The one message of a command that must end with 2."""
    status = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").strip()


def test_every_config_is_listed_with_what_it_is_for(capsys):
    assert main([]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert {name for name, _ in lines} == set(FILES)
    assert len(lines) == len(FILES) >= 18
    described = dict(lines)
    assert described["configs/quickstart_ce.yaml"] == "Cross-entropy instead of DFT, over configs/quickstart.yaml."
    # A folder's own files come first.
    assert [name.count("/") for name, _ in lines] == sorted(name.count("/") for name in FILES)


@pytest.mark.parametrize("name", sorted(FILES))
def test_first_line_is_a_description(name):
    """A sentence of one line, not the beginning of a paragraph."""
    first, second = FILES[name].read_text().splitlines()[:2]
    assert first.startswith("# ")
    assert first.endswith(".")
    assert first[2].isupper()
    assert second.startswith("#")


def test_names_choose_and_a_comparison_brings_what_it_is_over(capsys, tmp_path):
    assert main(["trainer/ddp", "./configs/quickstart_ce.yaml"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["configs/quickstart_ce.yaml", "configs/trainer/ddp.yaml"]
    assert main(["compare/half", "--output", str(tmp_path)]) == 0
    assert contents(tmp_path) == {name: ALL[name] for name in ("quickstart.yaml", "compare/half.yaml")}
    read_settings([tmp_path / "compare" / "half.yaml"])


def test_copies_are_equal_and_a_second_call_changes_nothing(capsys, tmp_path):
    folder = tmp_path / "new" / "configs"
    assert main(["--output", str(folder)]) == 0
    assert contents(folder) == ALL
    assert capsys.readouterr().out == f"{folder}: {len(ALL)} copied\n"
    (folder / "compare" / "half.yaml").unlink()
    (folder / "mine.yaml").write_text("mine")
    before = (folder / "quickstart.yaml").stat()
    assert main(["--output", str(folder)]) == 0
    assert contents(folder) == {**ALL, "mine.yaml": b"mine"}
    assert capsys.readouterr().out == f"{folder}: 1 copied, {len(ALL) - 1} were there already\n"
    after = (folder / "quickstart.yaml").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_file_that_differs_is_kept_and_then_nothing_is_written(capsys, tmp_path):
    (tmp_path / "trainer").mkdir()
    changed = tmp_path / "trainer" / "ddp.yaml"
    changed.write_text("mine")
    message = fails(capsys, "--output", tmp_path)
    assert message == f"--output: {changed} is there and differs: give another folder, or --overwrite"
    assert contents(tmp_path) == {"trainer/ddp.yaml": b"mine"}
    (tmp_path / "quickstart.yaml").symlink_to("nowhere")
    message = fails(capsys, "--output", tmp_path)
    assert message.startswith(f"--output: {tmp_path / 'quickstart.yaml'} and 1 more are there and differ: ")
    assert main(["--output", str(tmp_path), "--overwrite"]) == 0
    assert contents(tmp_path) == ALL


def test_a_name_that_is_not_known(capsys, tmp_path):
    assert fails(capsys, "quickstat", "--output", tmp_path / "a") == (
        "no such config: quickstat; did you mean configs/quickstart.yaml?"
    )
    assert fails(capsys, "half") == "no such config: half; did you mean configs/compare/half.yaml?"
    assert fails(capsys, "xyz") == "no such config: xyz; `python -m dft_lightning configs` lists them"
    assert not (tmp_path / "a").exists()


def test_folders_that_cannot_be(capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert fails(capsys, "--output", file) == f"--output: {file} is a file"
    assert fails(capsys, "--output", file / "below" / "that") == f"--output: {file} is a file"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "compare").write_text("")
    assert fails(capsys, "--output", tmp_path / "a") == f"--output: {tmp_path / 'a' / 'compare'} is a file"
    (tmp_path / "b" / "quickstart.yaml").mkdir(parents=True)
    message = fails(capsys, "--output", tmp_path / "b", "--overwrite")
    assert message == f"--output: {tmp_path / 'b' / 'quickstart.yaml'} is a folder"
    assert contents(tmp_path) == {"file": b"", "a/compare": b""}
    assert fails(capsys, "--output", "/proc/configs").startswith("/proc/configs")
    assert fails(capsys, "--overwrite") == "--overwrite: give --output FOLDER, too"


def test_where_configs_are_found(monkeypatch, tmp_path):
    """A wheel's are in the package; a checkout's beside it; a folder beside an installed package is somebody else's."""
    package = tmp_path / "dft_lightning"
    monkeypatch.setattr(shipped_configs, "__file__", str(package / "cli" / "shipped_configs.py"))
    package.mkdir()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "a.yaml").write_text("# Beside.")
    with pytest.raises(FileNotFoundError, match="install dft-lightning again"):
        shipped()
    (tmp_path / "pyproject.toml").write_text("")
    assert shipped() == {"configs/a.yaml": tmp_path / "configs" / "a.yaml"}
    (package / "configs").mkdir()
    (package / "configs" / "b.yaml").write_text("# Within.")
    assert shipped() == {"configs/b.yaml": package / "configs" / "b.yaml"}


def test_a_missing_shipped_config_names_the_command(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    advice = "; it comes with the package: `python -m dft_lightning configs --output configs` copies it\n"
    for name in ("configs/quickstart.yaml", str(tmp_path / "configs" / "quickstart.yaml")):
        with pytest.raises(SystemExit):
            fit(["fit", "--config", name])
        error = capfd.readouterr().err
        assert error.endswith(f"{tmp_path / 'configs' / 'quickstart.yaml'}{advice}")
    with pytest.raises(SystemExit):
        fit(["fit", "--config", "other/quickstart.yaml"])
    assert "comes with" not in capfd.readouterr().err
    with pytest.raises(ValueError, match="no such file: configs/compare/half.yaml; it comes with the package"):
        read_settings([Path("configs/compare/half.yaml")])


def test_the_command_comes_here_without_lightning_and_transformers(tmp_path):
    """Which would take it ten seconds."""
    code = (
        "import sys; sys.argv = ['dft-lightning', 'configs']; from dft_lightning.__main__ import run\n"
        "try: run()\n"
        "except SystemExit as end: print(end.code, [m for m in ('lightning', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert out.startswith("configs/alpaca_qwen3.yaml ")
    assert out.splitlines()[-1] == "0 []"


def test_a_reader_that_leaves_is_no_fault():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        command = [sys.executable, "-m", "dft_lightning", "configs"]
        done = subprocess.run(command, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")


def test_the_wheel_has_every_config_once(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".yaml")]
        assert sorted(names) == sorted(f"dft_lightning/{name}" for name in FILES)
        assert {name: archive.read(f"dft_lightning/{name}") for name in FILES} == {
            name: path.read_bytes() for name, path in FILES.items()
        }
