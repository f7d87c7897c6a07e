"""The routed kernels of the lowering `plugin`: their source, what they compute, their compiler."""
