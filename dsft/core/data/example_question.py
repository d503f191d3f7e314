"""What examples ask a model, by the prompt template it was trained with."""

_QUESTIONS = {"text": "def binary_search(items, target):", "fim": "def area(radius):"}
_INSTRUCTION = "Write a Python function times_four(n) that returns n times 4."


def example_question(template_name: str | None) -> str:
    """Return what the examples ask a model that was trained with a template; None where it is not known."""
    return _INSTRUCTION if template_name is None else _QUESTIONS.get(template_name, _INSTRUCTION)
