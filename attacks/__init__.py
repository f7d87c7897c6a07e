"""vmoe-attack: attacks on twins and on what was deployed."""
