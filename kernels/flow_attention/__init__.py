"""Flow attention: linear attention in which tokens compete for a flow that is conserved."""

from xformopt.kernels.flow_attention.reference import (
    FlowState,
    flow_attention,
    flow_attention_start,
    flow_attention_step,
)

__all__ = ["FlowState", "flow_attention", "flow_attention_start", "flow_attention_step"]
