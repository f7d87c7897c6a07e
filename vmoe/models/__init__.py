"""The twin: a sparse video Mixture-of-Experts in PyTorch."""

from vmoe.models.moe import (
    ROUTE_GRADS,
    ModelSettings,
    MoEOutput,
    VideoMoE,
    build,
    dense_counterpart,
)

__all__ = ["ROUTE_GRADS", "MoEOutput", "ModelSettings", "VideoMoE", "build", "dense_counterpart"]
