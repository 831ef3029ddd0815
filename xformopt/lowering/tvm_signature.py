"""What a compiled library takes and returns: a function for each size it was compiled for, what is padded or cut up.

Needs numpy alone: a bundle carries this file to machines that have no xformopt.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xformopt.errors import DataError

__all__ = ["Batching", "Call", "Function", "Padding", "Signature", "read_signature", "write_signature"]

# beside the library
_SUFFIX = ".json"


@dataclass(frozen=True)
class Function:
    """One size: its name in the library, the shapes it takes, and which of the parameters, in order."""

    name: str
    inputs: dict[str, list[int]]
    parameters: list[int]


@dataclass(frozen=True)
class Padding:
    """How inputs of a length in between are made as long as the next: values by input, and what is cut off again.

    Attributes:
        inputs: By name, the axis that is padded, and with what.
        outputs: By name, the axis that is cut.

    """

    inputs: dict[str, tuple[int, int]]
    outputs: dict[str, int]


@dataclass(frozen=True)
class Batching:
    """How a batch of no compiled size is run in parts that have one.

    Attributes:
        inputs: Those that have an item for each place of their first axis; the others are the same for all.
        sizes: The compiled ones, rising.

    """

    inputs: tuple[str, ...]
    sizes: tuple[int, ...]

    def parts(self, count: int) -> list[tuple[int, int, int]]:
        """Return start, items and compiled size of each part: as large as fits, the last filled up."""
        found, start = [], 0
        while start < count:
            left = count - start
            size = max((size for size in self.sizes if size <= left), default=self.sizes[0])
            found.append((start, min(size, left), size))
            start += size
        return found


@dataclass(frozen=True)
class Call:
    """What to call: the function, its inputs in order, and the length that outputs are cut to, None: they are whole."""

    function: Function
    inputs: list[np.ndarray]
    length: int | None


@dataclass(frozen=True)
class Signature:
    """All functions of a library, by rising size.

    ``why_unpadded`` says why ``padding`` is None, where there is more than one length; ``why_whole`` says the same of
    ``batching``, where there is more than one batch.
    """

    functions: tuple[Function, ...]
    outputs: tuple[str, ...]
    padding: Padding | None = None
    why_unpadded: str = ""
    batching: Batching | None = None
    why_whole: str = ""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs, in order."""
        return tuple(self.functions[0].inputs)

    def run(
        self, arrays: Mapping[str, np.ndarray], once: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Return what ``once`` makes of ``arrays``, or of the parts of a batch that has no function, put together."""
        if self.batching is None:
            return once(arrays)
        count = len(arrays[self.batching.inputs[0]])
        if count in self.batching.sizes or not count:
            return once(arrays)
        found = []
        for start, items, size in self.batching.parts(count):
            # what fills up a part is its last item once more
            places = np.minimum(np.arange(start, start + size), count - 1)
            part = {name: array[places] if name in self.batching.inputs else array for name, array in arrays.items()}
            found.append({name: output[:items] for name, output in once(part).items()})
        return {name: np.concatenate([part[name] for part in found]) for name in self.outputs}

    def choose(self, arrays: Mapping[str, np.ndarray]) -> Call:
        """Return the smallest function that takes ``arrays``, padded where that is allowed.

        Raises:
            DataError: none does.

        """
        for function in self.functions:
            if all(list(arrays[name].shape) == shape for name, shape in function.inputs.items()):
                return Call(function, [arrays[name] for name in function.inputs], None)
        for function in self.functions if self.padding is not None else ():
            assert self.padding is not None
            padded = [_padded(arrays[name], shape, self.padding.inputs.get(name)) for name, shape in _items(function)]
            whole = [array for array in padded if array is not None]
            if len(whole) == len(padded):
                name, (axis, _) = next(iter(self.padding.inputs.items()))
                return Call(function, whole, arrays[name].shape[axis])
        raise DataError(self._refusal(arrays))

    def cut(self, call: Call, outputs: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Return outputs by name, as long as the inputs were."""
        found = dict(zip(self.outputs, outputs, strict=True))
        if call.length is None or self.padding is None:
            return found
        for name, axis in self.padding.outputs.items():
            found[name] = found[name][(slice(None),) * axis + (slice(call.length),)]
        return found

    def _refusal(self, arrays: Mapping[str, np.ndarray]) -> str:
        last = self.functions[-1]
        taken = {name: [function.inputs[name] for function in self.functions] for name in last.inputs}
        name = next((name for name, shapes in taken.items() if list(arrays[name].shape) not in shapes), self.inputs[0])
        shapes = list(dict.fromkeys(map(str, taken[name])))
        why = f" Sizes in between are not padded: {self.why_unpadded}." if self.why_unpadded else ""
        why += f" A batch is not run in parts: {self.why_whole}." if self.why_whole else ""
        return (
            f"{name} has the shape {list(arrays[name].shape)}, and the library was compiled for "
            f"{' and '.join(shapes)}.{why} Lower the model for these sizes."
        )


def _items(function: Function) -> list[tuple[str, list[int]]]:
    return list(function.inputs.items())


def _padded(array: np.ndarray, shape: list[int], how: tuple[int, int] | None) -> np.ndarray | None:
    """Return ``array`` in ``shape``; None where it does not fit."""
    if list(array.shape) == shape:
        return array
    if how is None or array.ndim != len(shape):
        return None
    axis, value = how
    missing = shape[axis] - array.shape[axis]
    if missing < 0 or [*array.shape[:axis], shape[axis], *array.shape[axis + 1 :]] != shape:
        return None
    return np.pad(array, [(0, missing if each == axis else 0) for each in range(array.ndim)], constant_values=value)


def read_signature(model: Path) -> Signature:
    """Return the signature of the library ``model``."""
    stored: dict[str, Any] = json.loads(model.with_name(model.name + _SUFFIX).read_text(encoding="utf-8"))
    padding, batching = stored["padding"], stored.get("batching")
    return Signature(
        functions=tuple(Function(**each) for each in stored["functions"]),
        outputs=tuple(stored["outputs"]),
        padding=None
        if padding is None
        else Padding({name: (how[0], how[1]) for name, how in padding["inputs"].items()}, padding["outputs"]),
        why_unpadded=stored["why_unpadded"],
        batching=None if batching is None else Batching(tuple(batching["inputs"]), tuple(batching["sizes"])),
        why_whole=stored.get("why_whole", ""),
    )


def write_signature(model: Path, signature: Signature) -> None:
    """Write it beside the library."""
    text = json.dumps(dataclasses.asdict(signature), indent=1)
    model.with_name(model.name + _SUFFIX).write_text(text, encoding="utf-8")
