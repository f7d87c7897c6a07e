"""Graph passes, one file each; their order is one list in export/onnx.py.

A file of this folder holds `apply(graph) -> bool`: it changes the graph in place, and says
whether it changed anything.
"""
