"""What a user should read while something else goes on, from where it is found to where it is shown."""

from collections.abc import Callable

Notify = Callable[[str], None]
"""Receives a sentence: what was chosen, limited or left out by itself."""
