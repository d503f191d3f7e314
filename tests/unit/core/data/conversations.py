"""Conversations written short."""

from dsft.core.data.examples import Conversation, Turn


def converse(*texts: str, system: str | None = None) -> Conversation:
    """Return texts as user and assistant in turn; the assistant's are to be learned."""
    turns = [
        Turn("assistant", text, is_target=True) if index % 2 else Turn("user", text) for index, text in enumerate(texts)
    ]
    return Conversation((*([] if system is None else [Turn("system", system)]), *turns))
