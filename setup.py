"""Puts convert, configs and eval below olmoe_jax in a wheel: nothing else may claim these names.

Everything else about the package is in pyproject.toml.
"""

from setuptools import find_packages, setup

NEIGHBOURS = ("convert", "configs", "eval")

names = find_packages(include=[f"{name}*" for name in NEIGHBOURS])
setup(
    packages=[
        *find_packages(include=["olmoe_jax*"]),
        *(f"olmoe_jax.bundled.{name}" for name in names),
    ],
    package_dir={f"olmoe_jax.bundled.{name}": name for name in NEIGHBOURS},
)
