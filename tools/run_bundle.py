"""Run a bundle of three targets in a clean environment, as a user's machine would.

    python tools/run_bundle.py [MODEL]              writes tools/results/bundle.json

The model is lowered for ort-cpu, tvm-cpu and tvm-x86-64-v3, packed, and unpacked into a folder with an environment of
its own, which pip fills with numpy and the runtimes alone.  Its bench JSON becomes the result, with the packages that
were installed; put it beside that of another machine: ``xformopt report tools/results/bundle.json other.json``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

from xformopt.api import export
from xformopt.bundle.pack import write_bundle

RESULT = Path(__file__).parent / "results" / "bundle.json"
TARGETS = ("ort-cpu", "tvm-cpu", "tvm-x86-64-v3")
RUNTIMES = ("numpy", "onnxruntime", "apache-tvm")
# what a bundle must do without
ABSENT = ("torch", "xformopt", "onnx", "pydantic")


def make_environment(folder: Path) -> Path:
    """Make an environment with the runtimes, in the versions of this one, and return its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pinned = [f"{name}=={importlib.metadata.version(name)}" for name in RUNTIMES]
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pinned], check=True)
    return python


def check_clean(python: Path, folder: Path) -> list[str]:
    """Return the packages of an environment, none of which may be of those that bundles do without."""
    command = "import importlib.metadata as m; print(*sorted(d.name for d in m.distributions()))"
    done = subprocess.run([python, "-c", command], cwd=folder, env={}, capture_output=True, text=True, check=True)
    packages = done.stdout.split()
    if found := set(packages) & set(ABSENT):
        raise RuntimeError(f"the environment is not clean: it has {', '.join(sorted(found))}")
    return packages


def main() -> None:
    """Parse the model, pack it and run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="digits-vit")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for target in TARGETS:
            export(options.model, folder / target, target=target, threads=options.threads)
        write_bundle([folder / target for target in TARGETS], folder / "bundle.zip")
        with zipfile.ZipFile(folder / "bundle.zip") as archive:
            archive.extractall(folder / "bundle")
        python = make_environment(folder / "environment")
        packages = check_clean(python, folder)
        result = folder / "bench.json"
        # nothing of this process's settings reaches the runner
        environment = {"PATH": os.environ["PATH"], "HOME": name}
        command = [python, "-m", "runner", "--threads", str(options.threads), "--json", result]
        done = subprocess.run(command, cwd=folder / "bundle", env=environment)
        report = json.loads(result.read_text())
    report["environment"] = packages
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
