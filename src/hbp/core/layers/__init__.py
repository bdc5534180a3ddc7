"""The layers of the core, by kind: each states its rules beside its equation."""
