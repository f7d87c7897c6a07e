"""Expert families, one file each: `build(width, classes) -> nn.Module`, clip -> logits."""
