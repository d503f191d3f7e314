"""The Modelfile that lets Ollama serve a merged model's GGUF file with the prompt it was trained on.

What Ollama does with it was read in its sources: parser/parser.go (the file), template/template.go (the prompt).
"""

import re
from collections.abc import Sequence

from dsft.core.data.prompts import PromptTemplate
from dsft.core.data.turns import GapPieces, TurnPieces, find_gap_pieces, find_turn_pieces

MOST_CONTEXT_TOKENS = 4096
"""Ollama allocates the whole context when it loads a model, 2 GiB of keys and values for a 6.7B Llama at this length;
who has more memory sets num_ctx higher."""

_UNSAFE = re.compile(r'\{+|"{3,}')
"""Beginning of an action of Go's templates; end of a text in a Modelfile."""


def write_modelfile(
    gguf_name: str, prompt_template: str | None, stop_texts: Sequence[str], num_positions: int | None
) -> str:
    """Return a Modelfile.

    Args:
        gguf_name: File name of the model, which lies in the same folder.
        prompt_template: From `write_prompt_template`; None leaves it to Ollama, which may know the chat template that
            is in the GGUF file.
        stop_texts: Spelling of the tokens that end an answer.
        num_positions: Longest context of the model; None where it has no limit.
    """
    lines = [f"FROM ./{gguf_name}"]
    if prompt_template is not None:
        lines.append(f'TEMPLATE """{prompt_template}"""')
    lines += [f"PARAMETER stop {_quote(text)}" for text in stop_texts]
    # Greedy, as `dsft infer` answers; Ollama's own penalty on repeated tokens would change even that.
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    if num_positions is not None:
        lines.append(f"PARAMETER num_ctx {min(num_positions, MOST_CONTEXT_TOKENS)}")
    return "\n".join(lines) + "\n"


def write_prompt_template(template: PromptTemplate) -> str | None:
    """Return a prompt template in the language of Ollama; None for a chat template that can't be taken apart.

    The beginning-of-text token is left out where the tokenizer puts it, because llama.cpp adds it itself if the GGUF
    file says so. As in every server, control tokens that a user spells become tokens. An empty system text counts as
    none.
    """
    if template.name == "text":
        return "{{ .Prompt }}"
    gap = find_gap_pieces(template)
    if gap is not None:
        return _write_gap(gap)
    turns = find_turn_pieces(template)
    return None if turns is None else _write_turns(turns)


def _write_turns(pieces: TurnPieces) -> str:
    opening = _literal(pieces.opening)
    if pieces.before_system is not None:
        system = _literal(pieces.before_system) + "{{ .System }}" + _literal(pieces.after_system)
        opening = "{{ if .System }}" + system + ("{{ else }}" + opening if opening else "") + "{{ end }}"
    user = _literal(pieces.before_user) + "{{ .Content }}" + _literal(pieces.after_user)
    # An answer that comes last is one to go on with.
    behind = "{{ if gt (len (slice $.Messages $index)) 1 }}" + _literal(pieces.after_answer + pieces.between_turns)
    answer = _literal(pieces.before_answer) + "{{ .Content }}" + behind + "{{ end }}"
    turn = '{{ if eq .Role "user" }}' + user + '{{ else if eq .Role "assistant" }}' + answer + "{{ end }}"
    return opening + "{{ range $index, $turn := .Messages }}" + turn + "{{ end }}"


def _write_gap(pieces: GapPieces) -> str:
    # Without a text behind the gap Ollama has no .Suffix, and Go writes "<no value>" for what is not there.
    suffix = "{{ if .Suffix }}{{ .Suffix }}{{ end }}"
    before_prefix, before_suffix = _literal(pieces.before_prefix), _literal(pieces.before_suffix)
    return before_prefix + "{{ .Prompt }}" + before_suffix + suffix + _literal(pieces.before_middle)


def _literal(text: str) -> str:
    """Return what writes a text in a Go template inside a Modelfile, whose parser drops what it can't print."""
    parts = []
    done = 0
    for start, end in _find_unsafe(text):
        escaped = "".join(f"\\U{ord(character):08x}" for character in text[start:end])
        parts += [text[done:start], '{{ "' + escaped + '" }}']
        done = end
    return "".join(parts) + text[done:]


def _find_unsafe(text: str) -> list[tuple[int, int]]:
    unprintable = ((index, index + 1) for index, character in enumerate(text) if not _is_kept(character))
    return sorted([*(found.span() for found in _UNSAFE.finditer(text)), *unprintable])


def _is_kept(character: str) -> bool:
    return character.isprintable() or character in "\n\t"


def _quote(text: str) -> str:
    marks = '"""' if '"' in text else '"'
    return f"{marks}{text}{marks}"
