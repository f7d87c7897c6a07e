"""Graph passes, one file each; their order is one list in export/onnx.py."""
