"""Importing the package costs nothing, its losses torch alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "lightning", "transformers", "torchmetrics", "datasets", "jsonargparse")


def imported_by(code):
    """Which of the heavy ones a program imports."""
    code = f"import sys\n{code}\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return result.stdout.strip()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import dft_lightning", "[]"),
        ("import dft_lightning; dft_lightning.DFTLoss, dft_lightning.losses.FocalLoss", "['torch']"),
        ("import dft_lightning.losses", "['torch']"),
        ("import dft_lightning.ops", "['torch']"),
    ],
)
def test_import_loads_torch_at_most(code, expected):
    assert imported_by(code) == expected


def test_lazy_names_resolve():
    import dft_lightning

    for name in dft_lightning.__all__:
        assert getattr(dft_lightning, name) is not None
        assert name in dir(dft_lightning)
    with pytest.raises(AttributeError, match="no attribute 'Nope'"):
        _ = dft_lightning.Nope


def test_every_loss_is_a_name_of_the_package():
    import dft_lightning
    from dft_lightning import losses

    assert set(losses.__all__) == {name for name, room in dft_lightning._LAZY.items() if room == losses.__name__}
    assert all(getattr(dft_lightning, name) is getattr(losses, name) for name in losses.__all__)
    namespace = {}
    exec("from dft_lightning import *", namespace)
    assert namespace["DFTLoss"] is losses.DFTLoss
