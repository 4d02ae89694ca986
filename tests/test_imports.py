"""Importing the package costs torch alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("lightning", "transformers", "torchmetrics", "datasets", "jsonargparse")


@pytest.mark.parametrize("module", ["dft_lightning", "dft_lightning.losses", "dft_lightning.ops"])
def test_import_loads_torch_alone(module):
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "[]"


def test_lazy_names_resolve():
    import dft_lightning

    for name in dft_lightning.__all__:
        assert getattr(dft_lightning, name) is not None
        assert name in dir(dft_lightning)
    with pytest.raises(AttributeError, match="no attribute 'Nope'"):
        _ = dft_lightning.Nope
