"""Text in a Markdown code block, whatever the text holds; for the scripts that write down answers of models."""

import re


def fence(text: str) -> str:
    """Return the text in a code block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}\n{text}\n{marks}\n"
