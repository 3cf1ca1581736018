"""The wheel works outside the checkout: everything it needs is inside."""

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=ROOT)
    (found,) = out.glob("distill-*-py3-none-any.whl")
    return found


class Installed:
    """An unpacked wheel, used from a folder that knows nothing of the checkout."""

    def __init__(self, site: Path, elsewhere: Path) -> None:
        self.site, self.elsewhere = site, elsewhere

    def python(self, *words: object) -> str:
        return run(sys.executable, *words, cwd=self.elsewhere, PYTHONPATH=str(self.site))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    site, elsewhere = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    with zipfile.ZipFile(wheel) as archive:  # a pure wheel is installed by unpacking it
        archive.extractall(site)
    return Installed(site, elsewhere)


def test_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "distill").rglob("*.py")}
    templates = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "distill").rglob("*.html")}
    options = {f"distill/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert options
    assert templates
    assert names == sources | templates | options | {"distill/conf/costs.csv", "distill/py.typed"}


def test_declares_its_command_and_licence(installed: Installed) -> None:
    (info,) = installed.site.glob("distill-*.dist-info")
    scripts = configparser.ConfigParser()
    scripts.read(info / "entry_points.txt")
    assert scripts["console_scripts"]["distill"] == "distill.__main__:main"
    assert (info / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_finds_its_own_configuration(installed: Installed) -> None:
    script = (
        "import distill; from distill.cli.config.compose import config_folder; "
        "print(distill.__file__); print(config_folder())"
    )
    package, conf = installed.python("-c", script).split()
    assert Path(package) == installed.site / "distill" / "__init__.py"
    assert Path(conf) == installed.site / "distill" / "conf"


def test_help(installed: Installed) -> None:
    assert "usage: distill <command>" in installed.python("-m", "distill", "--help")
    options = installed.python("-m", "distill", "train", "--help").partition("\ndistill: ")[2]
    assert "defeat" in options


def test_prints_its_configuration(installed: Installed) -> None:
    text = installed.python("-m", "distill", "train", "--cfg", "job", "model=frcnn_r50")
    assert "_target_: distill.FasterRCNN" in text
    assert "_target_: distill.DSIG" in text
    assert not any(installed.elsewhere.iterdir()), "printing leaves no run folder behind"


@pytest.mark.exhaustive
def test_trains(installed: Installed) -> None:
    data = ["data.source.train=4", "data.source.val=2", "data.source.test=0"]
    installed.python("-m", "distill", "train", "distill=none", "trainer=cpu", "schedule.epochs=1", "pictures=0", *data)
    assert list(installed.elsewhere.glob("outputs/**/student.pt"))
