"""What the caller of ``bench`` named, sorted: artifacts, ONNX files, targets, and the one original."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from xformopt.benchmark import Candidate
from xformopt.comparison import BASELINES, artifact_candidate, check_target, onnx_candidate, onnx_inputs
from xformopt.errors import UsageError
from xformopt.lowering import load, targets
from xformopt.lowering.artifact import Artifact
from xformopt.original import Model, Original, capture_original, chosen_inputs

if TYPE_CHECKING:
    import torch

__all__ = ["Lineup", "open_artifact", "sort_candidates"]


@dataclass
class Lineup:
    """Who stands in a comparison.

    Attributes:
        candidates: Artifacts and ONNX files, in the order given.
        baselines: Targets that run the original itself.
        lowered: Targets that the original is optimized for first.
        original: What all are held to.
        kept: Artifacts whose private folders must outlive the comparison.

    """

    candidates: list[Candidate] = field(default_factory=list)
    baselines: list[str] = field(default_factory=list)
    lowered: list[str] = field(default_factory=list)
    original: Original | None = None
    kept: list[Artifact] = field(default_factory=list)

    def original_for(self, target: str) -> Original:
        """Return the original, which ``target`` needs.

        Raises:
            UsageError: none was named, and no artifact holds one.

        """
        if self.original is None:
            raise UsageError(
                f'The target "{target}" runs the original model, which none of the candidates holds. '
                f"Name the model too, or an artifact that was written with its Program."
            )
        return self.original

    def inputs(self, batch: int | None, length: int | None, seed: int) -> dict[str, torch.Tensor]:
        """Draw inputs for the original, or else for the first ONNX model."""
        if self.original is not None:
            return chosen_inputs(self.original.program, batch, length, seed=seed)
        if not self.candidates:
            raise UsageError("There is nothing to measure: name a model, an artifact directory or an .onnx file.")
        path = self.kept[0].model_path if self.kept else self.candidates[0].path
        return onnx_inputs(path, batch, length, seed=seed)


def sort_candidates(
    items: Sequence[Artifact | Model],
    further_targets: Iterable[str] | None = (),
    *,
    trust_remote_code: bool = False,
    length: int | None = None,
) -> Lineup:
    """Tell what each item is; see :func:`xformopt.api.bench`.

    Raises:
        UsageError: two models, or a name that nothing bears.
        XformoptError: a model or an artifact cannot be used.

    """
    known = {target.name for target in targets()}
    wanted = [item for item in items if isinstance(item, str) and item in known]
    for target in (*wanted, *(further_targets or ())):
        check_target(target)
    lineup = Lineup()
    for item in items:
        if isinstance(item, str) and item in known:
            continue
        if isinstance(item, str | Path) and Path(item).suffix == ".onnx":
            lineup.candidates.append(onnx_candidate(Path(item).expanduser()))
        elif (artifact := open_artifact(item)) is not None:
            lineup.kept.append(artifact)
            name = artifact.target if isinstance(item, Artifact) else Path(str(item)).resolve().name
            lineup.candidates.append(artifact_candidate(artifact, name))
        elif lineup.original is not None:
            raise UsageError("Two models were named; a comparison has one original. Measure them one after the other.")
        else:
            lineup.original = capture_original(item, trust_remote_code=trust_remote_code, length=length)  # type: ignore[arg-type]
    if lineup.original is None:
        lineup.original = _held_by(lineup.kept)
    if further_targets is None and lineup.original is not None:
        further_targets = ("eager",) if lineup.candidates else ("eager", "ort-cpu")
    for target in dict.fromkeys([*wanted, *(further_targets or ())]):
        (lineup.baselines if target in BASELINES else lineup.lowered).append(target)
    return lineup


def open_artifact(item: Artifact | Model, *, threads: int | None = None) -> Artifact | None:
    """Return the artifact that an item is or whose directory it names; None for anything else.

    Raises:
        ArtifactError: the directory is damaged.

    """
    if isinstance(item, Artifact):
        return item
    if isinstance(item, str | Path) and (Path(item).expanduser() / "artifact.json").is_file():
        return load(item, threads=threads)
    return None


def _held_by(artifacts: Sequence[Artifact]) -> Original | None:
    for artifact in artifacts:
        if artifact.captured is not None or (artifact.folder / "program").is_dir():
            return Original(artifact.original(), artifact.manifest.source or artifact.manifest.name)
    return None
