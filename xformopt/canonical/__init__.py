"""One spelling for what can be said in many ways; every later rule matches only this one.

    views            aten.reshape; the sizes are numbers, one -1, and sizes of the input itself
    axes             counted from the left
    transposes       aten.permute
    parts            aten.slice.Tensor with static bounds, aten.select.int
    broadcasts       aten.expand, -1 for what stays
    casts            aten._to_copy {dtype=...}
    scalars          aten.add.Tensor(%x, 2): a number where the schema has a tensor
    copies           none: a Program's values have no memory layout

The rules hold at every level.  Lifting applies them first, the pass ``canonicalize`` again.
"""

from __future__ import annotations

from collections.abc import Sequence

from xformopt.canonical.identities import (
    compose_expands,
    compose_permutes,
    compose_reshapes,
    remove_copy,
    remove_identity_arithmetic,
    remove_identity_cast,
    remove_identity_movement,
)
from xformopt.canonical.sizes import localize_expand, localize_reshape, use_static_sizes
from xformopt.canonical.spelling import (
    count_axes_from_left,
    spell_cast,
    spell_part_as_slice,
    spell_scalar_operand,
    spell_slice,
    spell_transpose_as_permute,
)
from xformopt.rewrite import Rule

__all__ = ["CANONICAL_RULES"]

CANONICAL_RULES: Sequence[Rule] = (
    use_static_sizes,
    remove_identity_movement,
    remove_identity_cast,
    remove_identity_arithmetic,
    remove_copy,
    spell_transpose_as_permute,
    spell_part_as_slice,
    spell_slice,
    spell_cast,
    spell_scalar_operand,
    count_axes_from_left,
    compose_permutes,
    compose_reshapes,
    compose_expands,
    localize_reshape,
    localize_expand,
)
