"""What is installed: every folder of the project as a package of `lorafleet`, and the files that
its code reads.
"""

from __future__ import annotations

import tomllib

from tests.conftest import ROOT

FOLDERS = "cluster commands deployment evaluation jobs k8s slurm training tuning webapp".split()


def test_every_folder_is_a_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        path.parent.relative_to(ROOT) for name in FOLDERS for path in (ROOT / name).rglob("*.py")
    }
    expected = {"lorafleet", *("lorafleet." + ".".join(folder.parts) for folder in folders)}
    assert set(settings["packages"]) == expected
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)


def test_every_other_file_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    installed = {
        path
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")[1:]).glob(pattern)
    }
    others = {
        path
        for name in FOLDERS
        for path in (ROOT / name).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert others - installed == {
        ROOT / "k8s" / "kind-smoke.sh",
        ROOT / "k8s" / "role.yaml",
    }  # for people
