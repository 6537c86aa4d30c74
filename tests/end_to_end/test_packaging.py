"""The project installs as a checkout, never as a wheel, whose top-level packages would overwrite those of others."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pcm
from tests.helpers.paths import ROOT


def build(hook: str, out: Path) -> subprocess.CompletedProcess:
    """What pip asks of the build backend."""
    code = f"from setuptools import build_meta; build_meta.{hook}({str(out)!r})"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_wheel_is_refused_in_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    done = build("build_wheel", tmp_path)
    assert done.returncode == 1 and not list(tmp_path.glob("*.whl"))
    (line,) = done.stderr.splitlines()
    assert "cluster, jobs and pcm would overwrite" in line and "make install" in line


def test_an_editable_install_copies_no_package_and_has_the_command_and_the_version(tmp_path: Path) -> None:
    done = build("build_editable", tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    assert not [name for name in files if name.split("/")[0] in ("cluster", "jobs", "pcm", "tests", "benchmarks")]
    (entry_points,) = (text for name, text in files.items() if name.endswith("/entry_points.txt"))
    assert "pcmnet = jobs.__main__:main" in entry_points
    (metadata,) = (text for name, text in files.items() if name.endswith("/METADATA"))
    assert f"\nVersion: {pcm.__version__}\n" in metadata


def test_the_citation_and_the_changelog_name_the_version() -> None:
    assert f"\nversion: {pcm.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{pcm.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
