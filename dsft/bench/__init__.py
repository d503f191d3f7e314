"""`dsft bench`: the speed and memory of configurations, measured."""
