"""Puts the top-level cli.py into the wheel as asapc/cli.py; all else stands in pyproject.toml."""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [*modules, ("asapc", "cli", "cli.py")] if package == "asapc" else modules


setup(cmdclass={"build_py": BuildPy})
