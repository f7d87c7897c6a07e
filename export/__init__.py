"""vmoe-export: from a twin to a bundle that really runs sparse."""
