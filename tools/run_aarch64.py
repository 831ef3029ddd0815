"""Run artifacts for tvm-aarch64 under user-mode emulation, and compare them with what the original computes.

    python tools/run_aarch64.py [--check] [MODEL ...]         writes tools/results/aarch64.json; --check nothing

Needs Debian's packages qemu-user-static and gcc-aarch64-linux-gnu, and its package index.  An arm64 root is made once
in the user's cache folder, of Debian's python3.11 and libc and of the aarch64 wheels of apache-tvm, apache-tvm-ffi and
numpy; the artifact goes there as a bundle, and the emulator runs it.  Correctness alone is told: an emulator's times
mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import platformdirs

import xformopt as xo
from xformopt.api import optimize
from xformopt.bundle.pack import write_bundle

RESULT = Path(__file__).parent / "results" / "aarch64.json"
EMULATOR = "qemu-aarch64-static"
# models by name, and the recipe of an entry that has one
MODELS = {"minilm": None, "digits-vit": None, "digits-vit int8": "int8"}
TOLERANCE = 1e-4
# what lies between two codes of 8 bits may be rounded to either, and every layer after it magnifies that
INTEGER_TOLERANCE = 1e-2
# what python3.11, numpy and TVM load
DEBIAN = (
    *("libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libexpat1", "libffi8", "libssl3", "libbz2-1.0", "liblzma5"),
    *("libuuid1", "libzstd1", "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib"),
)
WHEELS = ("apache-tvm", "apache-tvm-ffi", "numpy", "ml_dtypes", "typing_extensions")
# run by the emulated interpreter in the folder of the bundle; prints the distance of every output
RUN = """
import json, sys
from pathlib import Path
import numpy as np
from runner.contents import read_contents
from runner.lowering.tvm_session import TvmSession

contents = read_contents(Path.cwd())
(candidate,) = contents.candidates
found = TvmSession(candidate.path / "model.so", threads=1).run(contents.inputs)
gaps = {}
for name, expected in contents.expected.items():
    valid = contents.valid.get(name)
    a, b = (found[name], expected) if valid is None else (found[name][valid], expected[valid])
    gaps[name] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
import platform
print(json.dumps({"relative_l2": gaps, "architecture": platform.machine()}))
"""


def make_root() -> Path:
    """Return the arm64 root, made where it is missing."""
    version = importlib.metadata.version("apache-tvm")
    root = platformdirs.user_cache_path("xformopt") / f"aarch64-tvm-{version}"
    if (root / "ready").exists():
        return root
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        download_debian(Path(folder))
        for package in sorted(Path(folder).glob("*.deb")):
            run(["dpkg-deb", "-x", package, root])
    with tempfile.TemporaryDirectory() as folder:
        pinned = [f"{name}=={importlib.metadata.version(name)}" for name in WHEELS]
        platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (17, 26, 27, 28, 34)]
        only = ["--only-binary=:all:", "--no-deps", "--python-version=3.11", "--implementation=cp"]
        run([sys.executable, "-m", "pip", "download", "--quiet", "-d", folder, *only, *platforms, *pinned])
        for wheel in Path(folder).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(root / "wheels")
    (root / "ready").touch()
    return root


def download_debian(folder: Path) -> None:
    """Download the arm64 packages with lists of their own: the system's apt is left as it is."""
    for name in ("lists/partial", "archives/partial"):
        (folder / "apt" / name).mkdir(parents=True)
    (folder / "apt" / "status").touch()
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "Dir::State": folder / "apt",
        "Dir::State::status": folder / "apt" / "status",
        "Dir::Cache": folder / "apt",
        "APT::Sandbox::User": "root",
    }
    given = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    run(["apt-get", *given, "update", "-qq"])
    run(["apt-get", *given, "download", "-qq", *DEBIAN], cwd=folder)


def run(command: list[str | Path], cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
    """Run a command and return what it prints; its last words become the error's."""
    done = subprocess.run(
        [os.fspath(part) for part in command], capture_output=True, text=True, cwd=cwd, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} ended with {done.returncode}: {done.stderr.strip()[-600:]}")
    return done.stdout


def emulate(root: Path, bundle: Path) -> dict[str, Any]:
    """Unpack a bundle of one artifact and run it on the emulated processor."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(bundle) as archive:
            archive.extractall(folder)
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONHOME": f"{root}/usr",
            "PYTHONPATH": f"{root}/wheels:{folder}",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [EMULATOR, "-L", root, root / "usr/bin/python3.11", "-c", RUN]
        answer: dict[str, Any] = json.loads(run(command, Path(folder), environment).splitlines()[-1])
    return answer


def main() -> None:
    """Parse the models to run, lower each for arm64 and emulate it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=[], metavar="MODEL", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--check", action="store_true", help="write nothing; without the packages, do nothing")
    options = parser.parse_args()
    if unknown := sorted(set(options.models) - set(MODELS)):
        parser.error(f"there is no {unknown[0]!r}; there are {', '.join(MODELS)}")
    if shutil.which(EMULATOR) is None:
        sys.exit(f"{EMULATOR} was not found: install it (the package qemu-user-static on Debian)")
    try:
        root = make_root()
    except RuntimeError as error:
        if not options.check:
            raise
        print(f"arm64 artifacts were not run: their root cannot be made here ({error})")
        return
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in options.models or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            artifact = Path(folder) / "tvm-aarch64"
            # without its original, the artifact is held to the program it was lowered from: what int8 loses is not
            # the target's
            recipe = MODELS[name]
            optimize(
                name.split()[0], artifact, target="tvm-aarch64", recipe=recipe, bench=False, keep_program=recipe is None
            )
            write_bundle([artifact], Path(folder) / "bundle.zip")
            found = emulate(root, Path(folder) / "bundle.zip")
        found["within"] = within = TOLERANCE if recipe is None else INTEGER_TOLERANCE
        found["passed"] = all(gap <= within for gap in found["relative_l2"].values())
        versions = {package: importlib.metadata.version(package) for package in WHEELS}
        emulator = run([EMULATOR, "--version"]).splitlines()[0]
        results[name] = {**found, "packages": versions, "emulator": emulator, "xformopt": xo.__version__}
        if not options.check:
            RESULT.write_text(json.dumps(results, indent=1) + "\n")
        print(name, found, flush=True)
    sys.exit(0 if all(results[name]["passed"] for name in options.models or MODELS) else 1)


if __name__ == "__main__":
    main()
