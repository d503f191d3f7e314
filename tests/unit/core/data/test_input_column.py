from dsft.core.data.examples import Conversation
from dsft.core.data.formats import find_layout
from dsft.core.data.rows import Row


def test_an_input_that_the_first_row_lacks_is_not_lost():
    """In JSON Lines rows may differ in their keys."""
    rows = [{"instruction": "Sort.", "output": "a"}, {"instruction": "Fix it.", "input": "x = 1", "output": "b"}]
    layout = find_layout(Row(0, "f.jsonl:1", rows[0]), "jsonl")
    first, second = (layout.parse(values) for values in rows)
    assert isinstance(first, Conversation) and first.turns[0].text == "Sort."
    assert isinstance(second, Conversation) and second.turns[0].text == "Fix it.\n\nx = 1"
