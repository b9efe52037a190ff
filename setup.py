"""What pyproject.toml cannot say: folders beside the package that are installed inside it."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["minillm*"]), "minillm.recipes", "minillm.eval"],
    package_dir={"minillm.recipes": "recipes", "minillm.eval": "eval"},
)
