"""The routed kernels where they run: how they are launched, and TensorRT's plugins around them.

No torch and no Triton: the kernels come as PTX, which lies in `ptx/`.
"""
