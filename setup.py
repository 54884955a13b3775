"""The packages of the wheel: `cmjax/`, and `models/` as `cmjax.models`."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["cmjax*"])
    + [f"cmjax.{name}" for name in find_packages(include=["models*"])]
)
