"""How many bytes a run needs, and how it is run so that it fits: arithmetic without torch."""
