"""TensorRT plans of a bundle's ONNX parts, built on the machine that will run them.

    settings.py   what a build can be told
    builder.py    one graph -> one plan, its layers, its timing cache
    proof.py      what a plan's layers compute in, against what was asked
    plans.py      an ONNX bundle -> a bundle of plans: needs onnx and tensorrt, and no torch
    pipeline.py   a twin -> a bundle of plans that passed its gates

The network is always strongly typed: what a layer computes in is what the ONNX says, in every
version from 10.3 to 11.
"""
