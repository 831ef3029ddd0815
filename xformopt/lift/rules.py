"""All lifting rules, in the order in which one prepares the ground for the next."""

from __future__ import annotations

from xformopt.canonical import CANONICAL_RULES
from xformopt.lift import norms, pointwise, pooling, rotary, rows
from xformopt.lift.attention import LiftAttention, move_gate
from xformopt.program import Program
from xformopt.rewrite import Rule

__all__ = ["lifting_rules"]


def lifting_rules(program: Program) -> tuple[Rule, ...]:
    """Return the rules that bring a captured ``program`` to the lifted level."""
    return (
        *CANONICAL_RULES,
        rows.drop_empty_parts,
        rows.lift_einsum,
        rows.lift_linear,
        rows.add_bias,
        rows.restore_rows,
        rows.split_linear,
        norms.lift_norm,
        norms.lift_written_norm,
        norms.absorb_affine,
        norms.merge_norm_heads,
        pointwise.lift_activation,
        pointwise.lift_glu,
        rotary.lift_rope,
        pooling.lift_patch_embedding,
        pooling.lift_mean_pool,
        move_gate,
        LiftAttention(program),
        rows.undo_movement,
    )
