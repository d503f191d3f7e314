"""Which names of options, variables and keys speak of a secret, and which values can't be one."""

import re

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_COMPOUND = re.compile(r"(\w{2,}?)(tokens?|passwords?|passwd|passphrase|pass|pwd|secrets?|keys?)")

_SECRET = frozenset(
    {
        "auth", "authorization", "bearer", "cookie", "cred", "credential", "credentials", "creds", "jwt", "otp", "pass",
        "passcode", "passphrase", "passwd", "password", "passwords", "pat", "pin", "psk", "secret", "secrets", "totp",
    }
)  # fmt: skip
_KEY_OWNERS = frozenset(
    {
        "access", "account", "activation", "admin", "anthropic", "api", "auth", "aws", "azure", "client", "clearml",
        "cohere", "comet", "decryption", "deepseek", "encryption", "fireworks", "gcp", "gemini", "github", "google",
        "groq", "hf", "huggingface", "kaggle", "langfuse", "langsmith", "license", "master", "mistral", "neptune",
        "nvidia", "openai", "openrouter", "pass", "pinecone", "private", "product", "replicate", "sas", "secret",
        "service", "session", "signing", "storage", "stripe", "subscription", "together", "wandb", "xai",
    }
)  # fmt: skip
_VOCABULARY = frozenset(
    {
        "additional", "answer", "audio", "begin", "boi", "bos", "chat", "class", "cls", "control", "de", "decoder",
        "draft", "each", "end", "eoi", "eos", "eot", "fim", "first", "forced", "image", "instruction", "last", "mask",
        "max", "middle", "min", "multi", "new", "next", "num", "pad", "padding", "per", "placeholder", "prefix", "re",
        "response", "sep", "separator", "single", "special", "start", "stop", "sub", "suffix", "think", "thinking",
        "tool", "trigger", "unk", "unknown", "video", "vision",
    }
)  # fmt: skip
"""Words before "token" that make it a token of text."""
_NO_PASSWORDS = frozenset({"by", "com", "encom", "multi", "one", "over", "single", "sur", "tres", "two", "under"})
"""What makes another word of "pass" when it is joined to it."""
_DENIALS = frozenset({"disable", "disallow", "no", "skip", "without"})
_TAILS = frozenset({"arg", "read", "string", "text", "value", "write"})

_HARMLESS = re.compile(
    r"|\d{1,3}|true|false|none|null|yes|no|on|off|auto|\*+|-{1,2}[a-z]?|\$\w+|\$\{\w+\}|<[^<>]*>|\[[A-Z_]+\]",
    re.IGNORECASE,
)
_OPTION_WORD = r"(?:[a-z]+|[a-z]{1,5}\d{1,3}|\d{1,4}[a-z]{0,3})"
_OPTION = re.compile(rf"--{_OPTION_WORD}(?:[-_.]{_OPTION_WORD})*")
_OF_RANDOM_CHARS = re.compile(r"(?![./~])[\w.~+/=-]{16,}")
_LONG_RUN = re.compile(r"[A-Za-z0-9]{20}")
_SEPARATORS = re.compile(r"[\W_]+")
_CHANGE = re.compile(r"[A-Za-z](?=\d)|\d(?=[A-Za-z])")
_MIN_CHANGES = 3


def is_secret(name: str, value: str) -> bool:
    """Return whether a value is to be masked.

    Args:
        name: Of the option, variable, header or key that it belongs to, e.g. `--hf-token`, `OPENAI_API_KEY`.
        value: What stands behind it.
    """
    bare = value.strip("\"'\\")
    if _HARMLESS.fullmatch(bare):
        return False
    return is_secret_name(name) or (may_be_secret_name(name) and _is_random(bare))


def is_secret_name(name: str) -> bool:
    """Return whether what stands behind a name is a secret, whatever it looks like."""
    *front, last = _split(name)
    before = front[-1] if front else ""
    if front and front[0] in _DENIALS:
        return False
    if last == "key":
        return before in _KEY_OWNERS
    if last == "keys":
        return before == "api"
    if last == "tokens":
        return before in {"access", "api", "auth"}
    if last == "token":
        return before not in _VOCABULARY
    if last == "pwd":
        return name not in {"PWD", "OLDPWD"}  # the shell's working folders
    return last in _SECRET or before + last in _SECRET


def is_option(argument: str) -> bool:
    """Return whether what stands behind an option is the next one: it has the form of words, not of a secret."""
    option = argument.partition("=")[0]
    return _OPTION.fullmatch(option) is not None and not _is_random(option)


def may_be_secret_name(name: str) -> bool:
    """Return whether what stands behind a name can be a secret; that of some names is one only if it looks random."""
    return _split(name)[-1] in {"key", "token"} or is_secret_name(name)


def _split(name: str) -> list[str]:
    """Return the words of a name in lower case, at least one; what says only how a secret is given is left out."""
    words = [word.lower() for word in _WORDS.findall(name.removeprefix("-D")) if not word.isdigit()]
    while len(words) > 1 and words[-1] in _TAILS:
        words.pop()
    compound = _COMPOUND.fullmatch(words[-1]) if words else None
    if compound is not None and not (compound[2] == "pass" and compound[1] in _NO_PASSWORDS):
        words[-1:] = compound.groups()
    return words or [""]


def _is_random(value: str) -> bool:
    """Return whether a value looks as if it was drawn by chance: long, of letters and digits that take turns."""
    if not _OF_RANDOM_CHARS.fullmatch(value):
        return False
    changes = _CHANGE.findall(_SEPARATORS.sub("", value))
    return _LONG_RUN.search(value) is not None or len(changes) >= _MIN_CHANGES
