"""State-space layers as they stand in a graph: what feeds the scan, and what reads it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from xformopt.match import arguments, is_call, is_returned, operand, readers, xf
from xformopt.program import Program, value_of
from xformopt.program.text import target_name
from xformopt.rewrite import Reject

__all__ = ["SCANS", "StateSpaceLayer", "is_rotation", "match_layer", "projections", "scans"]

aten = torch.ops.aten
SCANS = (xf.ssd, xf.selective_scan)
_LINEAR = (xf.linear, xf.linear_activation)
_PATH = (
    xf.activation,
    xf.glu,
    xf.rms_norm,
    aten.slice.Tensor,
    aten.permute.default,
    aten.constant_pad_nd.default,
    aten.conv1d.default,
    aten.softplus.default,
    aten.mul.Tensor,
)


def scans(program: Program) -> list[fx.Node]:
    """Return the scans of state-space layers, in execution order."""
    return [node for node in program.nodes() if is_call(node, *SCANS)]


def projections(program: Program) -> list[fx.Node]:
    """Return the linear layers that feed scans, gate their results or read them, in execution order."""
    found: set[fx.Node] = set()
    for scan in scans(program):
        behind = _behind(scan)
        found |= behind | _before(scan)
        for node in behind:
            found |= _before(operand(node))
    return sorted(found)


def is_rotation(node: fx.Node) -> bool:
    """Whether a linear layer only turns what the next one reads, by a Hadamard matrix."""
    return is_call(node, xf.linear) and str(operand(node, 1).target).startswith("hadamard.")


def _before(node: fx.Node) -> set[fx.Node]:
    """Return the linear layers that ``node`` is made of; those that make the inputs of others (step sizes) as well."""
    found: set[fx.Node] = set()
    for source in node.all_input_nodes:
        if is_call(source, *_LINEAR):
            found |= {source} | (_before(source) if operand(source).target is not xf.rms_norm else set())
        elif is_call(source, *_PATH):
            found |= _before(source)
    return found


def _behind(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for reader in readers(node):
        if is_call(reader, *_LINEAR):
            found |= {reader} | (_behind(reader) if is_rotation(reader) else set())
        elif is_call(reader, *_PATH):
            found |= _behind(reader)
    return found


@dataclass(frozen=True)
class StateSpaceLayer:
    """A layer of Mamba-2 whose inner channels can be put in another order.

    Attributes:
        scan: The ``xf.ssd``.
        output: The linear layer that reads the result.
        nodes: All operators between the inputs of the projections and ``output``, in execution order.
        channels: Parameters and the axis along which they hold inner channels, which come first there.
        heads: The same of heads.

    """

    scan: fx.Node
    output: fx.Node
    nodes: tuple[fx.Node, ...]
    channels: dict[fx.Node, int]
    heads: dict[fx.Node, int]


class _MismatchError(Exception):
    """A part of the layer is not what it must be; the reason is the message."""


def match_layer(scan: fx.Node) -> StateSpaceLayer | Reject:
    """Find the layer around an ``xf.ssd``; a reason where something in it is not as Mamba-2 has it."""
    try:
        return _Matcher(scan).layer()
    except _MismatchError as mismatch:
        return Reject(str(mismatch))


class _Matcher:
    """Walks a layer from its scan in both directions and notes what holds channels and heads."""

    def __init__(self, scan: fx.Node) -> None:
        self.scan, self.given = scan, arguments(scan)
        self.inner = int(value_of(self.given["x"]).shape[-1])
        self.nodes: set[fx.Node] = {scan}
        self.channels: dict[fx.Node, int] = {}
        self.heads: dict[fx.Node, int] = {}

    def layer(self) -> StateSpaceLayer:
        self._input()
        self._projection(self._through(self.given["dt"]), self.heads, "the step sizes")
        for name in ("a", "d"):
            if self.given[name] is not None:
                self.heads[self._parameter(self._through(self.given[name]), f"the scan's {name}")] = 0
        output = self._output()
        order = sorted(self.nodes)
        inside = {*order, output}
        for node in order:
            if is_returned(node) or any(user not in inside for user in node.users):
                raise _MismatchError(f"%{node.name} is read outside of the layer")
        for parameter in (*self.channels, *self.heads):
            if any(user not in inside for user in parameter.users):
                raise _MismatchError(f"the parameter {parameter.target} is read outside of the layer")
        return StateSpaceLayer(self.scan, output, (*order, output), self.channels, self.heads)

    def _input(self) -> None:
        """From the scan's x back to the projection: slice, activation, convolution of each channel by itself."""
        cut = self._take(self.given["x"], aten.slice.Tensor)
        given = arguments(cut)
        mixed = operand(cut)
        if given["dim"] not in (2, -1) or (given["start"] or 0) != 0 or given["end"] != self.inner:
            raise _MismatchError("the scan's x is not the first part of what the convolution makes")
        for name in ("b", "c"):
            part = self._take(self.given[name], aten.slice.Tensor)
            if operand(part) is not mixed or (arguments(part)["start"] or 0) < self.inner:
                raise _MismatchError(f"the scan's {name} is no later part of what the convolution makes")
        node = mixed
        if is_call(node, xf.activation):
            node = operand(self._take(node, xf.activation))
        convolution = operand(self._permute(node))
        self._take(convolution, aten.conv1d.default)
        given = arguments(convolution)
        if given["groups"] != value_of(convolution).shape[1]:
            raise _MismatchError("the convolution mixes channels")
        self.channels[self._parameter(given["weight"], "the convolution's weight")] = 0
        if given["bias"] is not None:
            self.channels[self._parameter(given["bias"], "the convolution's bias")] = 0
        padded = given["input"]
        if is_call(padded, aten.constant_pad_nd.default):
            padded = operand(self._take(padded, aten.constant_pad_nd.default))
        self._projection(operand(self._permute(padded)), self.channels, "the scan's input")

    def _output(self) -> fx.Node:
        """From the scan to the linear layer that reads it: gate, and a norm over all channels."""
        node = self._only_reader(self.scan)
        self._take(node, xf.glu, aten.mul.Tensor)
        gate = next(value for value in node.all_input_nodes if value is not self.scan)
        self._projection(self._through(gate), self.channels, "the gate")
        node = self._only_reader(node)
        if is_call(node, xf.rms_norm):
            self._take(node, xf.rms_norm)
            given = arguments(node)
            if given["groups"] != 1:
                raise _MismatchError("the norm behind the scan is over groups of channels")
            if given["weight"] is not None:
                self.channels[self._parameter(given["weight"], "the norm's weight")] = 0
            node = self._only_reader(node)
        if not is_call(node, *_LINEAR):
            raise _MismatchError(f"{target_name(node.target)} reads the layer's result, not a linear layer")
        self.channels[self._parameter(operand(node, 1), "the weight of the output")] = 1
        return node

    def _projection(self, node: fx.Node, axes: dict[fx.Node, int], what: str) -> None:
        if not is_call(node, xf.linear):
            raise _MismatchError(f"{what} come from {target_name(node.target)}, not from a linear layer of their own")
        self.nodes.add(node)
        given = arguments(node)
        axes[self._parameter(given["weight"], f"the weight of {what}")] = 0
        if given["bias"] is not None:
            axes[self._parameter(given["bias"], f"the bias of {what}")] = 0

    def _permute(self, node: fx.Node) -> fx.Node:
        self._take(node, aten.permute.default)
        if list(arguments(node)["dims"]) != [0, 2, 1]:
            raise _MismatchError(f"%{node.name} orders axes in an unknown way")
        return node

    def _through(self, node: fx.Node) -> fx.Node:
        """Follow operators on single elements with one operand."""
        while is_call(node, xf.activation) or self._is_unary(node):
            self.nodes.add(node)
            node = operand(node)
        return node

    @staticmethod
    def _is_unary(node: fx.Node) -> bool:
        target = node.target
        pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
        return pointwise and len(node.all_input_nodes) == 1

    def _take(self, node: fx.Node, *targets: object) -> fx.Node:
        if not is_call(node, *targets):
            expected = target_name(targets[0])
            raise _MismatchError(f"%{node.name} is {target_name(node.target)}, where {expected} is expected")
        self.nodes.add(node)
        return node

    @staticmethod
    def _parameter(node: fx.Node, what: str) -> fx.Node:
        if node.op != "get_attr":
            raise _MismatchError(f"{what} is computed, not a parameter")
        return node

    @staticmethod
    def _only_reader(node: fx.Node) -> fx.Node:
        if len(node.users) != 1 or is_returned(node):
            raise _MismatchError(f"%{node.name} has several readers")
        return readers(node)[0]
