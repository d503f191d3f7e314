"""Which names of options, variables and keys speak of a secret, and which values can't be one."""

import re

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

_SECRET = frozenset(
    {
        "apikey", "apitoken", "auth", "authorization", "authtoken", "bearer", "cookie", "cred", "credential",
        "credentials", "creds", "jwt", "mypwd", "pass", "passcode", "passphrase", "passwd", "password", "passwords",
        "pat", "psk", "secret", "secrets", "token", "userpwd",
    }
)  # fmt: skip
_KEY_OWNERS = frozenset(
    {
        "access", "account", "admin", "anthropic", "api", "auth", "aws", "azure", "client", "comet", "decryption",
        "encryption", "gcp", "gemini", "google", "groq", "hf", "huggingface", "master", "mistral", "neptune", "nvidia",
        "openai", "private", "sas", "secret", "service", "signing", "storage", "subscription", "wandb",
    }
)  # fmt: skip
_VOCABULARY = frozenset(
    {
        "additional", "answer", "audio", "begin", "boi", "bos", "chat", "class", "cls", "control", "decoder", "draft",
        "each", "end", "eoi", "eos", "eot", "fim", "first", "forced", "image", "instruction", "last", "mask", "max",
        "middle", "min", "new", "next", "num", "pad", "padding", "per", "placeholder", "prefix", "response", "sep",
        "separator", "single", "special", "start", "stop", "suffix", "think", "thinking", "tool", "trigger", "unk",
        "unknown", "video", "vision",
    }
)  # fmt: skip
"""Words before "token" that make it a token of text."""
_DENIALS = frozenset({"disable", "disallow", "no", "skip", "without"})
_TAILS = frozenset({"arg", "string", "text", "value"})
_HARMLESS = re.compile(
    r"|\d|true|false|none|null|yes|no|on|off|auto|\*+|\$\w+|\$\{\w+\}|<[^<>]*>|\[[A-Z_]+\]", re.IGNORECASE
)


def is_secret_name(name: str) -> bool:
    """Return whether what stands behind a name is to be masked.

    Args:
        name: Of an option, a variable, a header or a key, e.g. `--hf-token`, `OPENAI_API_KEY`, `hub.apiKey`.
    """
    words = [word.lower() for word in _WORDS.findall(name) if not word.isdigit()]
    while len(words) > 1 and words[-1] in _TAILS:
        words.pop()
    if not words or words[0] in _DENIALS:
        return False
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if last == "key":
        return before in _KEY_OWNERS
    if last == "keys":
        return before == "api"
    if last == "pwd":
        return len(words) > 1  # PWD alone is the shell's working folder
    if last == "tokens":
        return before in {"access", "api", "auth"}
    if last == "token":
        return before not in _VOCABULARY
    return last in _SECRET


def is_harmless_value(value: str) -> bool:
    """Return whether a value can stay: a switch, a variable that stands for it, or a token of text like `<pad>`."""
    return _HARMLESS.fullmatch(value.strip("\"'\\")) is not None
