"""What a mask means: decided by evaluating the mask's own subgraph on probe inputs, at sizes beyond its constants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from xformopt.lift.probe import Probe, operator_name
from xformopt.program import Program, value_of

__all__ = ["MaskClass", "classify_mask"]

_BATCH = 2
_MAX_ELEMENTS = 48_000_000
# additive masks use any large negative number for "never"; biases that a model learns stay far below
_NEVER = -1e4
_TRIALS = 3


@dataclass(frozen=True)
class MaskClass:
    """Which keys a query sees: positions by band, keys by a ``[B, S]`` input.

    ``left`` and ``right`` bound ``j - i`` by ``-left`` and ``right``; -1 means no bound.  ``keys`` is the input whose
    elements tell of every key whether it is kept (``nonzero_keeps``) or padding.
    """

    left: int = -1
    right: int = -1
    keys: fx.Node | None = None
    nonzero_keeps: bool = True


def classify_mask(
    program: Program,
    mask: fx.Node,
    shape: tuple[torch.SymInt | int, ...],
    batch: torch.SymInt | int,
    *,
    hides: bool = False,
) -> MaskClass | str:
    """Return the class of ``mask``, or the reason why it has none.

    Args:
        program: Where ``mask`` lives.
        mask: Boolean (True: attend) or additive, broadcastable to ``shape``.
        shape: Shape of the logits it applies to, ``[..., T, S]``.
        batch: Size of the batch of attention; the leading axes of ``shape`` are batch and heads flattened.
        hides: A boolean mask says which keys *not* to attend.
    """
    leaves = list(_leaves(mask))
    keys = [leaf for leaf in leaves if leaf.op == "placeholder"]
    if len(keys) > 1:
        return f"the mask depends on {len(keys)} inputs ({', '.join(str(k.target) for k in keys)})"
    if keys and value_of(keys[0]).dim() != 2:
        return f"the mask depends on {keys[0].target}, which is not a [B, S] key mask"
    sizes = _probe_sizes(program, mask)
    if sizes is None:
        return "the mask has constants so large that it cannot be evaluated beyond them"
    probe = Probe(program, sizes)
    full, (count,) = probe.concrete(shape), probe.concrete([batch])
    return _Trial(probe, mask, keys[0] if keys else None, full, count, hides).classify()


@dataclass(frozen=True)
class _Trial:
    """One mask at one choice of sizes."""

    probe: Probe
    mask: fx.Node
    keys: fx.Node | None
    shape: tuple[int, ...]
    batch: int
    hides: bool

    def classify(self) -> MaskClass | str:
        """Find the band with every key present, then what the key input does to it."""
        plain = self._visible(1)
        if plain is None:
            return "the mask is computed from more than sizes, positions and a key mask"
        if isinstance(plain, str):
            return plain
        keeps = True
        if self.keys is not None:
            inverted = self._visible(0)
            if not isinstance(inverted, torch.Tensor):
                return inverted or "the mask cannot be computed where no key exists"
            if int(inverted.sum()) > int(plain.sum()):
                plain, keeps = inverted, False
        if not torch.equal(plain, plain[:1, :1].expand_as(plain)):
            return "the mask differs between heads or batch entries"
        band = _band(plain[0, 0])
        if isinstance(band, str) or self.keys is None:
            return band if isinstance(band, str) else MaskClass(*band)
        return self._check_keys(plain, band, keeps)

    def _check_keys(self, plain: torch.Tensor, band: tuple[int, int], keeps: bool) -> MaskClass | str:
        assert self.keys is not None
        generator = torch.Generator().manual_seed(0)
        ignored = True
        for trial in range(_TRIALS):
            chosen = torch.rand(self.probe.shape(self.keys), generator=generator) < 0.6
            if trial == 0:
                # left padding, where rows of a causal mask lose every key
                chosen = torch.arange(chosen.shape[1]).expand_as(chosen) >= chosen.shape[1] // 3
            visible = self._visible(chosen if keeps else ~chosen)
            if not isinstance(visible, torch.Tensor) or chosen.shape[1] != plain.shape[3]:
                return "the mask has values that are neither attend nor never"
            expected = plain & chosen[:, None, None, :]
            # what a query without any key sees is no one's intent
            asked = expected.any(-1, keepdim=True)
            ignored &= torch.equal(visible, plain)
            if not torch.equal(visible & asked, expected) and not ignored:
                return "the mask is not a band of positions and a key mask"
        return MaskClass(*band) if ignored else MaskClass(*band, self.keys, keeps)

    def _visible(self, keys: torch.Tensor | int) -> torch.Tensor | str | None:
        """Return which keys each query sees, ``[B, H, T, S]`` bool; a reason if the mask holds other values."""
        known = {}
        if self.keys is not None:
            full = torch.full(self.probe.shape(self.keys), keys) if isinstance(keys, int) else keys
            known[self.keys] = full.to(value_of(self.keys).dtype)
        found = self.probe.run(self.mask, known)
        if not isinstance(found, torch.Tensor):
            return None
        visible = _as_visible(found)
        if isinstance(visible, str):
            return visible
        visible = ~visible if self.hides else visible
        while visible.dim() < len(self.shape):
            visible = visible.unsqueeze(0)
        if len(self.shape) != 4 or self.shape[0] != self.batch:
            visible = visible.expand(self.shape).reshape(self.batch, -1, *self.shape[-2:])
        return visible.expand(self.batch, -1, *self.shape[-2:])


def _as_visible(found: torch.Tensor) -> torch.Tensor | str:
    if found.dtype == torch.bool:
        return found
    if not found.is_floating_point():
        return "the mask is neither boolean nor additive"
    never = found <= _NEVER
    if not bool((never | (found == 0)).all()):
        return "it is a bias with finite values, not a mask"
    return ~never


def _band(visible: torch.Tensor) -> tuple[int, int] | str:
    """Return the (left, right) bounds of a band of ``[T, S]``, -1 where unbounded."""
    if bool(visible.all()):
        return -1, -1
    T, S = visible.shape
    if T != S:
        return "a mask between different sequences is not all ones"
    distance = torch.arange(S) - torch.arange(T).unsqueeze(1)  # j - i
    seen = distance[visible]
    if not seen.numel():
        return "the mask hides everything"
    low, high = int(seen.min()), int(seen.max())
    if not torch.equal(visible, (distance >= low) & (distance <= high)) or low > 0 or high < 0:
        return "the mask is not a band around the diagonal"
    return (-low if -low < T - 1 else -1), (high if high < T - 1 else -1)


def _leaves(mask: fx.Node) -> Iterator[fx.Node]:
    """Yield what the mask is computed from: inputs and parameters (sizes are not followed to their tensors)."""
    seen: set[fx.Node] = set()
    pending = [mask]
    while pending:
        node = pending.pop()
        if node in seen or isinstance(node.meta.get("val"), torch.SymInt):
            continue
        seen.add(node)
        if node.op != "call_function":
            yield node
        pending.extend(node.all_input_nodes)


def _probe_sizes(program: Program, mask: fx.Node) -> dict[str, int] | None:
    """Choose sizes beyond every integer constant of the mask's subgraph, within what the dimensions admit."""
    constants, parameters = _constants(program, mask)
    # a stored mask is as large as positions can get
    beyond = min(max(constants, default=0) + 5 + len(program.dims), *parameters, 2**40)
    sizes: dict[str, int] = {}
    for index, name in enumerate(program.dims.names):
        wanted = _BATCH if index == 0 and name == "batch" else max(beyond, 9)
        dim = program.dims[name]
        size = max(dim.low, program.dims.largest(name, wanted))
        # sequences of different length must not look alike
        while size in sizes.values() and size > dim.low:
            size -= 1
        sizes[name] = size
    probe = Probe(program, sizes)
    elements = torch.Size(probe.shape(mask)).numel()
    return sizes if elements <= _MAX_ELEMENTS else None


def _constants(program: Program, mask: fx.Node) -> tuple[list[int], list[int]]:
    """Return the integers in the mask's subgraph, and the lengths of the tensors stored in it."""
    constants: list[int] = []
    lengths: list[int] = []
    seen: set[fx.Node] = set()
    pending = [mask]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if operator_name(node) != "sym_size":
            pending.extend(node.all_input_nodes)
        flat = [*node.args, *node.kwargs.values()]
        flat += [part for value in flat if isinstance(value, list | tuple) for part in value]
        # the largest integers say "to the end"
        constants += [abs(v) for v in flat if isinstance(v, int) and not isinstance(v, bool) and abs(v) < 2**40]
        if node.op == "get_attr" and value_of(node).numel() > 1:
            lengths.append(max(program.parameters[str(node.target)].shape))
    return constants, lengths
