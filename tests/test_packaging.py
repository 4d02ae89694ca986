"""What pyproject.toml says of dependencies holds in the files beside it."""

from __future__ import annotations

import sys

import yaml
from packaging.requirements import Requirement

from conftest import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it along there

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def lower_bound(requirement):
    (bound,) = [part.version for part in requirement.specifier if part.operator == ">="]
    return bound


UNUSED = ("bench", "docs")  # by .ci/run with the oldest dependencies


def test_oldest_dependencies_are_the_lower_bounds():
    extras = PROJECT["optional-dependencies"]
    texts = [*PROJECT["dependencies"], *(text for name in extras if name not in UNUSED for text in extras[name])]
    required = [Requirement(text) for text in [*texts, *PYPROJECT["build-system"]["requires"]]]
    bounds = {(r.name, lower_bound(r)) for r in required if r.name != PROJECT["name"]}
    lines = (ROOT / ".ci" / "oldest.txt").read_text().splitlines()
    stated = [tuple(line.split("==")) for line in lines if not line.startswith("#")]
    assert sorted(stated) == sorted(bounds)


def test_the_workflow_runs_every_supported_python():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["run"]
    prefix = "Programming Language :: Python :: "
    supported = [text.removeprefix(prefix) for text in PROJECT["classifiers"] if text.startswith(f"{prefix}3.")]
    assert job["strategy"]["matrix"]["python"] == supported
    assert PROJECT["requires-python"] == f">={supported[0]}"
    assert job["strategy"]["matrix"]["include"] == [{"python": supported[0], "dependencies": "oldest"}]
    assert job["steps"][-1] == {"run": ".ci/run"}
