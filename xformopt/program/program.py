"""The Program: a functional graph of ATen and xf operators, its parameters, inputs, outputs and dimensions."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
from torch import fx
from torch.utils.weak import WeakIdKeyDictionary

from xformopt.errors import DataError, ProgramError
from xformopt.program.dims import Dims, Shape

__all__ = ["Default", "Input", "Level", "Output", "Program", "path_of", "shape_of", "value_of"]

# what an input holds that is left out: nothing but zeros, or 0, 1, 2, ... along its last axis
Default: TypeAlias = Literal["zeros", "ascending"]


class Level(enum.StrEnum):
    """How far a Program has come; each level has a documented set of operators (``xformopt.verify``)."""

    CAPTURED = "captured"
    LIFTED = "lifted"
    TARGET = "target"


@dataclass(frozen=True)
class Input:
    """One input: ``shape`` holds sizes and dimension names; integers lie in ``[0, bound)`` where one is known.

    An input with a ``default`` may be left out; a dimension that only such inputs have is then as large as it may be.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    bound: int | None = None
    default: Default | None = None


@dataclass(frozen=True)
class Output:
    """One output; its positions are valid where the input named ``mask`` (``[B, T]``) is non-zero, or everywhere.

    ``mask_means`` is what a non-zero mask says of a position: ``keep`` or ``padding``.
    """

    name: str
    mask: str | None = None
    mask_means: str = "keep"


@dataclass
class Program:
    """A model as a graph.  Parameters are immutable and shared between copies; the graph is this copy's own.

    Every node of ``graph`` carries ``meta["val"]`` (fake tensor or symbolic size) and ``meta["path"]`` (where in the
    source model it comes from).  Parameters are ``get_attr`` nodes whose target is the key in ``parameters``.
    """

    graph: fx.Graph
    parameters: dict[str, torch.Tensor]
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    dims: Dims
    level: Level = Level.CAPTURED
    name: str = "model"
    example_inputs: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in the order of the model's forward."""
        return tuple(spec.name for spec in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return tuple(spec.name for spec in self.outputs)

    @property
    def output_node(self) -> fx.Node:
        """The graph's output node; its one argument is the tuple of returned values."""
        last: fx.Node = next(iter(reversed(self.graph.nodes)))
        return last

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """The nodes whose values are returned, aligned with ``outputs``."""
        values = self.output_node.args[0]
        assert isinstance(values, tuple)
        return tuple(value for value in values if isinstance(value, fx.Node))

    def __str__(self) -> str:
        from xformopt.program.text import format_program

        return format_program(self)

    @staticmethod
    def parse(text: str, *, parameters: Mapping[str, torch.Tensor] | None = None, seed: int = 0) -> Program:
        """Read a Program from its text; parameters not given are drawn from ``seed`` by name, shape and dtype.

        Raises:
            ProgramError: the text does not parse, or its types are not what its operators compute.

        """
        from xformopt.program.text import parse_program

        return parse_program(text, parameters=parameters, seed=seed)

    def copy(self, **changes: object) -> Program:
        """Return a copy with a graph of its own and the same parameters, dimensions and specs."""
        graph = fx.Graph()
        mapped: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            mapped[node] = graph.node_copy(node, mapped.__getitem__)
            # a copied name must not drift: reports and repair records refer to values by name
            mapped[node].meta = dict(node.meta)
        return replace(self, graph=graph, parameters=dict(self.parameters), **changes)  # type: ignore[arg-type]

    def nodes(self) -> Iterator[fx.Node]:
        """Yield the operator nodes in execution order (no inputs, parameters or output)."""
        return (node for node in self.graph.nodes if node.op == "call_function")

    def drop_unused(self) -> Program:
        """Erase values nothing reads and parameters nothing names; returns self."""
        for node in reversed(self.graph.nodes):
            if node.op in ("call_function", "get_attr") and not node.users:
                self.graph.erase_node(node)
        named = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        self.parameters = {name: value for name, value in self.parameters.items() if name in named}
        return self

    def module(self) -> fx.GraphModule:
        """Return an executable module of a copy of the graph (positional inputs; returns a tuple)."""
        graph, names = self.copy().graph, _attribute_names(self.parameters)
        for node in graph.nodes:
            if node.op == "get_attr":
                node.target = names[node.target]
        return fx.GraphModule({names[name]: value for name, value in self.parameters.items()}, graph)

    def bind(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Check ``inputs`` against the specs and return the size of every dimension they fix.

        Raises:
            DataError: a missing or unknown input, a wrong dtype or rank, or sizes that contradict each other.

        """
        if missing := [spec.name for spec in self.inputs if spec.name not in inputs and spec.default is None]:
            raise DataError(
                f"Input {missing[0]!r} is missing: the program takes {', '.join(self.input_names)}; "
                f"given: {', '.join(inputs) or 'nothing'}."
            )
        if unknown := [name for name in inputs if name not in self.input_names]:
            raise DataError(f"There is no input {unknown[0]!r}: the program takes {', '.join(self.input_names)}.")
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            if spec.name in inputs:
                self._bind_one(spec, inputs[spec.name], sizes)
        for spec in self.inputs:
            for size in spec.shape:
                if isinstance(size, str):
                    sizes.setdefault(size, self._most(size))
        return sizes

    def completed(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Return ``inputs`` with the defaults of those that were left out."""
        left_out = [spec for spec in self.inputs if spec.default is not None and spec.name not in inputs]
        if not left_out:
            return inputs
        sizes = {
            size: have
            for spec in self.inputs
            if spec.name in inputs
            for size, have in zip(spec.shape, inputs[spec.name].shape, strict=True)
            if isinstance(size, str)
        }
        return {**inputs, **{spec.name: self._default(spec, sizes) for spec in left_out}}

    def _default(self, spec: Input, sizes: Mapping[str, int]) -> torch.Tensor:
        shape = [size if isinstance(size, int) else sizes.get(size, self._most(size)) for size in spec.shape]
        if spec.default == "zeros":
            return torch.zeros(shape, dtype=spec.dtype)
        return torch.arange(shape[-1], dtype=spec.dtype).expand(shape).contiguous()

    def _most(self, name: str) -> int:
        dim = self.dims[name]
        return dim.low if dim.high is None else dim.high

    def _bind_one(self, spec: Input, value: torch.Tensor, sizes: dict[str, int]) -> None:
        expected = f"{spec.name} must be {_dtype_name(spec.dtype)}[{', '.join(map(str, spec.shape))}]"
        if value.dtype != spec.dtype or value.dim() != len(spec.shape):
            raise DataError(f"{expected}, but is {_dtype_name(value.dtype)}{list(value.shape)}.")
        for axis, (want, have) in enumerate(zip(spec.shape, value.shape, strict=True)):
            wanted = sizes.setdefault(want, have) if isinstance(want, str) else want
            if wanted != have:
                raise DataError(f"{expected}, but axis {axis} of {list(value.shape)} is {have} instead of {wanted}.")
            if isinstance(want, str) and not self.dims[want].admits(have):
                raise DataError(f"{expected} with {self.dims[want]}, but axis {axis} is {have}.")

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Execute the graph eagerly on named inputs; returns named outputs."""
        from xformopt.program.interpret import interpret

        self.bind(inputs)
        return interpret(self, inputs)

    @property
    def fingerprint(self) -> str:
        """A stable hash of graph, attributes and weights (not of names, paths or examples)."""
        from xformopt.program.text import canonical_text

        text, order = canonical_text(self)
        digest = hashlib.blake2b(text.encode(), digest_size=16)
        for name in order:
            digest.update(_hash_tensor(self.parameters[name]))
        return digest.hexdigest()

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(value.numel() * value.element_size() for value in self.parameters.values())


# parameters are immutable, so each tensor is read once however many Programs share it
_TENSOR_HASHES: MutableMapping[torch.Tensor, bytes] = WeakIdKeyDictionary()


def _hash_tensor(tensor: torch.Tensor) -> bytes:
    if tensor not in _TENSOR_HASHES:
        digest = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data)
        _TENSOR_HASHES[tensor] = digest.digest()
    return _TENSOR_HASHES[tensor]


def _dtype_name(dtype: torch.dtype) -> str:
    from xformopt.program.text import DTYPE_NAMES

    return DTYPE_NAMES[dtype]


def value_of(node: fx.Node) -> torch.Tensor:
    """Return the fake tensor a node computes; ProgramError for a node that computes something else."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise ProgramError(f"%{node.name} is {type(value).__name__}, where a tensor is expected.")
    return value


def shape_of(program: Program, node: fx.Node) -> Shape:
    """Return the shape of a node's value in dimension names."""
    return program.dims.shape(value_of(node))


def path_of(node: fx.Node) -> str:
    """Return where in the source model a node comes from, ``encoder.layer.0.attention``; empty if unknown."""
    return str(node.meta.get("path", ""))


def _attribute_names(parameters: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return names that attributes of modules can have: no tensor lies inside another one.

    A weight that was quantized for some readers and stays for others has its codes beside it, ``w.codes`` and ``w``.
    """
    names: dict[str, str] = {}
    for name in parameters:
        parts = name.split(".")
        own = parts[0]
        for end in range(1, len(parts)):
            inside = ".".join(parts[:end]) in parameters
            own = f"{own}{'_' if inside else '.'}{parts[end]}"
        while own != name and own in parameters:
            own = f"{own}_"
        names[name] = own
    return names
