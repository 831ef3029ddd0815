"""Nest the sibling source folders inside the `xformopt` package; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

ROOTS = {"xformopt": "xformopt"} | {f"xformopt.{room}": room for room in ("passes", "kernels", "models")}

setup(
    package_dir=ROOTS,
    packages=[
        name
        for package, folder in ROOTS.items()
        for name in [package, *(f"{package}.{sub}" for sub in find_packages(folder))]
    ],
)
