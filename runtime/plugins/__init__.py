"""The routed kernels where they run: how they are launched, and TensorRT's plugins around them.

    import tensorrt as trt
    from vmoe.runtime.plugins import nodes

    nodes.register(trt)    # then TensorRT parses moe-tensorrt.onnx, and loads plans of it

No torch and no Triton: the kernels come as PTX, in `kernels.zip`. `vmoe.export.plugins` has their
source, and says how they are compiled.
"""
