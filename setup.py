"""Refuses to build a wheel. Everything else about the package is in pyproject.toml.

A wheel would put top-level packages named `cluster`, `jobs` and `pcm` into an environment. PyPI has projects of such
names, and each would overwrite the other's files. The checkout (an editable install) and the cluster image are the ways
to use this project.
"""

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class RefusedWheel(bdist_wheel):
    def run(self) -> None:
        raise SystemExit(
            "pcmnet-ray is not built as a wheel: its packages cluster, jobs and pcm would overwrite others of these "
            "names; use the checkout: `make install`, or `pip install -c constraints.txt -e .`"
        )


setup(cmdclass={"bdist_wheel": RefusedWheel})
