"""Further layers, on the contract of the core."""
