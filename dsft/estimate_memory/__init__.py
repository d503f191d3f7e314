"""`dsft estimate-memory`: what training, inference and a merge need of memory; arithmetic, no torch."""
