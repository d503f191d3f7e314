"""`dsft estimate-memory`: the memory of a run before it is started."""
