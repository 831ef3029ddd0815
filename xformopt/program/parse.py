"""Read the text form of a Program back (the grammar is in ``xformopt.program.text``)."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from xformopt.errors import ProgramError
from xformopt.program.dims import Dim, Dims
from xformopt.program.interpret import infer_value
from xformopt.program.program import Default, Input, Level, Output, Program
from xformopt.program.text import BUILTINS, DTYPE_NAMES, format_type

__all__ = ["Parser"]

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_LAYOUTS = {"torch.strided": torch.strided}
_FORMATS = {str(f): f for f in (torch.contiguous_format, torch.preserve_format, torch.channels_last)}
_HEADER = re.compile(r'program "(?P<name>[^"]*)" (?P<level>\w+)')
_DIM = re.compile(r"dim (?P<name>\w+) in \[(?P<low>\d+), (?P<high>\d+|inf)\]")
_INPUT = re.compile(
    r"input %(?P<name>[\w.]+): (?P<type>\S+)(?: below (?P<bound>\d+))?(?: default (?P<default>zeros|ascending))?"
)
_DEFAULTS: dict[str, Default] = {"zeros": "zeros", "ascending": "ascending"}
_PARAM = re.compile(r"param %(?P<name>[\w.]+): (?P<type>\S+)")
_TYPE = re.compile(r"(?P<dtype>\w+)\[(?P<shape>[^\]]*)\]")
_NODE = re.compile(r"%(?P<name>[\w.]+): (?P<type>.+?) = (?P<target>[\w.]+)\((?P<rest>.*)")
_RETURN = re.compile(r"(?P<name>[\w.]+)=%(?P<value>[\w.]+)(?: valid (?P<means>keep|padding) %(?P<mask>[\w.]+))?")
_TOKEN = re.compile(
    r"""\s*(?:(?P<ref>%[\w.]+)|(?P<number>-?(?:\d+\.\d*(?:e[+-]?\d+)?|\d+e[+-]?\d+|\d+|inf|nan)(?![\w]))"""
    r"""|(?P<string>"(?:[^"\\]|\\.)*")|(?P<word>[A-Za-z_][\w]*)|(?P<mark>[\[\](){},=]))"""
)


class Parser:
    """One reading of one text."""

    def __init__(self, text: str, parameters: Mapping[str, torch.Tensor] | None, seed: int) -> None:
        self.lines = text.splitlines()
        self.given = parameters
        self.seed = seed
        self.values: dict[str, fx.Node] = {}
        self.number = 0

    def program(self) -> Program:
        """Return the Program, with its shapes inferred afresh and compared with the printed ones."""
        lines = [(i, line.strip()) for i, line in enumerate(self.lines, 1) if line.strip()]
        if not lines or not (header := _HEADER.fullmatch(lines[0][1])):
            raise ProgramError('A program\'s text must begin with: program "name" level.')
        if header["level"] not in set(Level):
            raise ProgramError(f"Level {header['level']!r} is not one of {', '.join(Level)}.")
        self.built = Program(
            graph=fx.Graph(),
            parameters={},
            inputs=(),
            outputs=(),
            dims=Dims(self._dim(line) for _, line in lines if line.startswith("dim ")),
            level=Level(header["level"]),
            name=header["name"],
        )
        for self.number, line in lines[1:]:
            self._line(line)
        if not self.built.outputs:
            raise ProgramError("The program's text has no return line.")
        return self.built

    def _fail(self, reason: str) -> ProgramError:
        return ProgramError(
            f"Line {self.number} of the program's text: {reason}: {self.lines[self.number - 1].strip()}"
        )

    def _dim(self, line: str) -> Dim:
        if not (found := _DIM.fullmatch(line)):
            raise ProgramError(f"A dimension must read 'dim NAME in [LOW, HIGH]', not {line!r}.")
        return Dim(found["name"], int(found["low"]), Dims.parse_high(found["high"]))

    def _line(self, line: str) -> None:
        word = line.split(" ", 1)[0]
        if word == "dim":
            return
        if word == "input":
            self._input(line)
        elif word == "param":
            self._parameter(line)
        elif word == "return":
            self._return(line)
        elif line.startswith("%"):
            self._node(line)
        else:
            raise self._fail("expected input, param, return or %value")

    def _type(self, text: str) -> tuple[torch.dtype, tuple[int | str, ...]]:
        found = _TYPE.fullmatch(text)
        if not found or found["dtype"] not in _DTYPES:
            raise self._fail(f"{text!r} is not a type such as f32[batch,384]")
        sizes = [size.strip() for size in found["shape"].split(",") if size.strip()]
        shape = tuple(int(size) if size.isdigit() else size for size in sizes)
        if unknown := [s for s in shape if isinstance(s, str) and s not in self.built.dims]:
            raise self._fail(f"dimension {unknown[0]!r} is not declared")
        return _DTYPES[found["dtype"]], shape

    def _define(self, name: str, node: fx.Node) -> None:
        if name in self.values:
            raise self._fail(f"%{name} is defined twice")
        self.values[name] = node

    def _input(self, line: str) -> None:
        if not (found := _INPUT.fullmatch(line)):
            raise self._fail("an input must read 'input %NAME: TYPE'")
        dtype, shape = self._type(found["type"])
        bound = int(found["bound"]) if found["bound"] else None
        spec = Input(found["name"], dtype, shape, bound, _DEFAULTS.get(found["default"]))
        node = self.built.graph.placeholder(spec.name)
        node.meta["val"] = self.built.dims.fake(shape, dtype)
        self.built.inputs += (spec,)
        self._define(spec.name, node)

    def _parameter(self, line: str) -> None:
        if not (found := _PARAM.fullmatch(line)):
            raise self._fail("a parameter must read 'param %NAME: TYPE'")
        name = found["name"]
        dtype, shape = self._type(found["type"])
        value = self._draw(name, dtype, shape) if self.given is None else self.given.get(name)
        if value is None or value.dtype != dtype or tuple(value.shape) != shape:
            have = "missing" if value is None else f"{value.dtype} {tuple(value.shape)}"
            raise self._fail(f"the weights do not hold this parameter (it is {have})")
        self.built.parameters[name] = value
        node = self.built.graph.get_attr(name)
        node.meta["val"] = self.built.dims.fake(shape, dtype)
        self._define(name, node)

    def _draw(self, name: str, dtype: torch.dtype, shape: tuple[int | str, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed ^ zlib.crc32(name.encode()))
        sizes = [int(size) for size in shape]
        if dtype.is_floating_point:
            return torch.randn(sizes, generator=generator).mul_(0.25).to(dtype)
        return torch.randint(0, 2, sizes, generator=generator).to(dtype)

    def _node(self, line: str) -> None:
        body, _, comment = line.partition("  # ")
        found = _NODE.fullmatch(body.rstrip())
        if not found:
            raise self._fail("a value must read '%NAME: TYPE = OPERATOR(OPERANDS) {ATTRIBUTES}'")
        tokens = _Tokens(found["rest"], self)
        operands = tokens.sequence(")")
        attributes = tokens.attributes()
        target = self._target(found["target"])
        args, kwargs = self._arguments(target, operands, attributes)
        node = self.built.graph.call_function(target, args, kwargs)
        node.name = found["name"]
        try:
            node.meta["val"] = infer_value(self.built, node)
        except Exception as error:
            said = " ".join(str(error).split())
            raise self._fail(f"the operator refuses its arguments ({said})") from error
        node.meta["path"] = comment.strip()
        if (computed := format_type(self.built, node.meta["val"])) != found["type"]:
            raise self._fail(f"the operator returns {computed}")
        self._define(found["name"], node)

    def _target(self, name: str) -> Any:
        namespace, _, rest = name.partition(".")
        if namespace == "size" and rest in BUILTINS:
            return BUILTINS[rest]
        if namespace == "xf":
            from xformopt.kernels.definition import load_operators

            load_operators()
        packet, _, overload = rest.partition(".")
        library = getattr(torch.ops, namespace) if namespace in ("aten", "xf", "prims") else None
        if library is None or not hasattr(library, packet):
            raise self._fail(f"there is no operator {name}")
        try:
            return getattr(getattr(library, packet), overload or "default")
        except AttributeError:
            raise self._fail(f"there is no operator {name}") from None

    def _arguments(
        self, target: Any, operands: list[Any], attributes: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not isinstance(target, torch._ops.OpOverload):
            return tuple(operands), attributes
        waiting = iter(operands)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for argument in target._schema.arguments:
            if "Tensor" in str(argument.type):
                value = next(waiting, None)
            else:
                value = attributes.pop(argument.name, argument.default_value)
            if argument.kwarg_only:
                kwargs[argument.name] = value
            else:
                args.append(value)
        if attributes:
            raise self._fail(f"the operator has no attribute {next(iter(attributes))!r}")
        # torch.export leaves trailing defaults out, and so does what rewrites look for
        optional = [a for a in target._schema.arguments if not a.kwarg_only][: len(args)]
        while args and optional[-1].has_default_value() and args[-1] == optional[-1].default_value:
            args.pop()
            optional.pop()
        return tuple(args), {k: v for k, v in kwargs.items() if v is not None}

    def _return(self, line: str) -> None:
        results = []
        for part in line.removeprefix("return ").split(", "):
            found = _RETURN.fullmatch(part)
            if not found or found["value"] not in self.values:
                raise self._fail(f"{part!r} does not return a value")
            self.built.outputs += (Output(found["name"], found["mask"], found["means"] or "keep"),)
            results.append(self.values[found["value"]])
        self.built.graph.output(tuple(results))


class _Tokens:
    """The operands and attributes of one line."""

    def __init__(self, text: str, parser: Parser) -> None:
        self.text = text
        self.parser = parser
        self.tokens = self._split()
        self.current = next(self.tokens)

    def _split(self) -> Iterator[tuple[str, str]]:
        position = 0
        while position < len(self.text.rstrip()):
            if not (found := _TOKEN.match(self.text, position)):
                raise self.parser._fail(f"cannot read {self.text[position:]!r}")
            position = found.end()
            assert found.lastgroup is not None
            yield found.lastgroup, found[found.lastgroup]
        while True:
            yield "end", ""

    def _take(self) -> tuple[str, str]:
        taken, self.current = self.current, next(self.tokens)
        return taken

    def _expect(self, mark: str) -> None:
        if (taken := self._take())[1] != mark:
            raise self.parser._fail(f"expected {mark!r} instead of {taken[1] or 'the end of the line'!r}")

    def sequence(self, close: str) -> list[Any]:
        """Read comma-separated values up to ``close``."""
        values: list[Any] = []
        while self.current[1] != close:
            values.append(self.value())
            if self.current[1] != close:
                self._expect(",")
        self._take()
        return values

    def attributes(self) -> dict[str, Any]:
        """Read ``{name=value, ...}`` or nothing, then the end of the line."""
        found: dict[str, Any] = {}
        if self.current[1] == "{":
            self._take()
            while self.current[1] != "}":
                name = self._take()[1]
                self._expect("=")
                found[name] = self.value()
                if self.current[1] != "}":
                    self._expect(",")
            self._take()
        if self.current[0] != "end":
            raise self.parser._fail(f"unexpected {self.current[1]!r}")
        return found

    def value(self) -> Any:
        """Read one value."""
        kind, text = self._take()
        if kind == "ref":
            if text[1:] not in self.parser.values:
                raise self.parser._fail(f"{text} is not defined above")
            return self.parser.values[text[1:]]
        if text == "[":
            return self.sequence("]")
        if kind == "number":
            return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
        if kind == "string":
            return _special(re.sub(r"\\(.)", r"\1", text[1:-1]))
        if kind == "word":
            return {"true": True, "false": False, "none": None, **_DTYPES}.get(text, text)
        raise self.parser._fail(f"expected a value instead of {text!r}")


def _special(text: str) -> Any:
    if text in _FORMATS:
        return _FORMATS[text]
    if text in _LAYOUTS:
        return _LAYOUTS[text]
    return torch.device(text) if text in ("cpu", "cuda", "meta", "cuda:0") else text
