"""How routing is expressed in what is deployed, one file each.

A file of this folder holds `lower(router, experts) -> dict[str, onnx.ModelProto]`: the graphs of
a bundle by the name of their part, from the router (None of a model with one expert) and the
experts, each a graph from `clip` to `scores` or `logits`. It may hold `others`, which takes the
same and gives the model as only one engine reads it, by that engine's name.
"""
