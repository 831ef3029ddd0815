"""Imports run one way: which room may import which is the architecture."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ANYTHING = {"*"}
_CORE = {"errors", "files", "kernels", "program"}
_MIDDLE = {*_CORE, "rewrite", "match", "analysis", "verify", "canonical", "lift", "calibration", "observers"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "kernels": {"errors", "files"},
    "program": {"errors", "files", "kernels"},
    "rewrite": _CORE,
    "match": {*_CORE, "rewrite"},
    "analysis": {*_CORE, "rewrite", "match"},
    "verify": {*_CORE, "rewrite", "match", "analysis"},
    "canonical": {*_CORE, "rewrite", "match", "analysis"},
    "capture": {*_CORE, "rewrite", "match", "analysis", "verify", "canonical", "models"},
    "lift": {*_CORE, "rewrite", "match", "analysis", "verify", "canonical"},
    "calibration": {*_CORE, "rewrite", "match", "analysis", "verify", "canonical"},
    "observers": {"errors", "program"},
    "reconstruction": {*_CORE, "rewrite", "match"},
    "pipeline": _MIDDLE,
    "passes": {*_MIDDLE, "pipeline", "reconstruction"},
    "models": {"errors", "files", "kernels"},
    # tasks and what is trained on them stand above capture, which finds trained models by way of the zoo's index
    "models.tasks": {*_CORE, "models", "capture"},
    "measure": {"errors", "files"},
    "lowering": {"errors", "files", "kernels", "program", "measure"},
    "benchmark": {"errors", "files", "measure", "report.schema"},
    "benchmark_worker": {"errors", "files", "measure", "lowering", "program"},
    "report": ANYTHING,
    "bundle": ANYTHING,
    # the jobs as functions, and the parts they are made of
    **dict.fromkeys(
        ("api", "comparison", "doctor", "evaluation", "inspection", "lineup", "model_listing", "original", "tasks"),
        ANYTHING,
    ),
    "cli": ANYTHING,
    # the package itself: what `import xformopt as xo` offers, imported when it is asked for
    "": ANYTHING,
}
# beside the operator's definition, a kernel folder holds one file per toolchain
TOOLCHAINS = {"onnx.py": {"onnx", "onnxruntime", "onnxscript"}, "triton.py": {"triton"}, "tvm.py": {"tvm"}}
SOURCES = sorted(path for room in ("xformopt", "kernels", "passes", "models") for path in (ROOT / room).rglob("*.py"))


def room_of(path: Path) -> str:
    """Return the room a file belongs to: its module name below ``xformopt``, first part."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    inside = parts if parts[0] != "xformopt" else parts[1:]
    if inside[:2] == ("models", "tasks"):
        return "models.tasks"
    return "" if inside[0].startswith("__") else inside[0]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of everything a file imports, wherever it does so."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def imported_at_start(tree: ast.Module) -> Iterator[str]:
    """Yield the names of top-level packages a file imports when it is itself imported."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).split(".")[0]
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending.extend(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))


def violations(room: str, names: Iterator[tuple[int, str]]) -> list[str]:
    """Return what ``room`` imports and may not."""
    allowed = MAY_IMPORT[room]
    if allowed is ANYTHING:
        return []
    found = []
    for line, name in names:
        if name == "xformopt" or not name.startswith("xformopt."):
            continue
        wanted = name.removeprefix("xformopt.")
        # the tasks live inside another room, which does not open them to whoever may enter that
        reached = {room, *allowed} - ({"models"} if wanted.startswith("models.tasks") else set())
        if not any(wanted == a or wanted.startswith(f"{a}.") for a in reached):
            found.append(f"line {line} imports {name}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    room = room_of(path)
    assert room in MAY_IMPORT, f"{room} is a new room: say in MAY_IMPORT what it may import"
    assert violations(room, imported(path)) == []


def test_a_wrong_import_is_noticed() -> None:
    assert violations("kernels", iter([(3, "xformopt.program.Program")]))
    assert violations("benchmark", iter([(1, "xformopt.report.html.render")]))
    assert not violations("benchmark", iter([(1, "xformopt.report.schema.Bench")]))
    assert violations("passes", iter([(1, "xformopt.lowering.lower")]))
    assert violations("models", iter([(1, "xformopt.capture.capture")]))
    assert violations("capture", iter([(1, "xformopt.models.tasks.task.Task")]))
    assert not violations("models.tasks", iter([(1, "xformopt.capture.capture")]))
    assert not violations("passes", iter([(1, "torch.nn.Module"), (2, "xformopt.rewrite.Reject")]))


def test_rooms_form_an_order() -> None:
    rooms = {room: {a.split(".")[0] for a in allowed} for room, allowed in MAY_IMPORT.items() if "*" not in allowed}
    placed: set[str] = {"report"}
    while ready := {room for room, needs in rooms.items() if room not in placed and needs <= placed}:
        placed |= ready
    assert placed >= set(rooms), f"these import each other: {set(rooms) - placed}"


@pytest.mark.parametrize("toolchain", TOOLCHAINS)
def test_kernels_import_their_toolchain_when_used(toolchain: str) -> None:
    for path in (ROOT / "kernels").rglob(toolchain):
        early = TOOLCHAINS[toolchain] & set(imported_at_start(ast.parse(path.read_text())))
        assert not early, f"{path} imports {early} at its top: import it inside the functions that use it"


def test_an_early_import_is_noticed() -> None:
    tree = ast.parse("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import onnx\ndef f():\n    import tvm\n")
    assert set(imported_at_start(tree)) == {"typing"}
    assert "triton" in set(imported_at_start(ast.parse("try:\n    import triton\nexcept ImportError:\n    pass\n")))
