"""vmoe-run and vmoe-bench: serving; never torch, never onnx."""
