"""vmoe-train: J-TLAT and the baselines."""
