"""Files that try to have code run, for tests that it is not."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dft_lightning import CausalLMModule, DFTLoss
from dft_lightning.assets import resolve
from small_runs import arithmetic_data, trainer

MODULE = "strangers_code"
CODE = """open({marker!r}, "w").write("ran")

from transformers import LlamaConfig, LlamaForCausalLM

from dft_lightning import DFTLoss


class Loss(DFTLoss):
    pass


class StrangeConfig(LlamaConfig):
    model_type = "strange"


class StrangeModel(LlamaForCausalLM):
    config_class = StrangeConfig
"""


class Stranger:
    """Code within reach of an import, and whether it ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.marker = folder / "ran"
        self.code = CODE.format(marker=str(self.marker))
        (folder / f"{MODULE}.py").write_text(self.code)

    @property
    def loss(self) -> dict[str, Any]:
        return {"class_path": f"{MODULE}.Loss", "init_args": {}}

    @property
    def process(self) -> dict[str, Any]:
        """A class that does something when it is made: it opens a file to write."""
        return {"class_path": "logging.FileHandler", "init_args": {"filename": str(self.marker)}}

    def ran(self) -> bool:
        return self.marker.exists()

    def pickle(self) -> Any:
        return _MakesFolder(str(self.marker))


class _MakesFolder:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    folder = tmp_path / "strangers"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    made = Stranger(folder)
    # Where transformers would fetch and import a kernel of the hub, had the machine the package for it.
    asks = "transformers.modeling_utils.lazy_import_flash_attention"
    monkeypatch.setattr(asks, lambda *_, **__: made.marker.touch(), raising=False)
    yield made
    sys.modules.pop(MODULE, None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint of one step, whose base is a folder beside it."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(resolve("asset://arithmetic-base"), folder / "base")
    return saved(CausalLMModule(str(folder / "base"), loss=DFTLoss()), folder / "whole.ckpt")


def saved(module: CausalLMModule, path: Path) -> Path:
    run = trainer(max_steps=1, default_root_dir=path.parent)
    run.fit(module, datamodule=arithmetic_data(8, batch_size=4))
    run.save_checkpoint(path)
    return path


def changed(path: Path, target: Path, key: str = "hyper_parameters", **values: Any) -> Path:
    """A checkpoint with other values below a key of it; of a group of options with these of its fields."""
    content = torch.load(path, weights_only=True)
    old = content.get(key) or content.get("hyper_parameters", {})
    groups = {name for name in ("loading", "evaluation", "step") if isinstance(values.get(name), dict)}
    values |= {name: {**old.get(name, {}), **values[name]} for name in groups}
    content[key] = {**content.get(key, {}), **values}
    torch.save(content, target)
    return target
