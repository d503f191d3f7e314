"""Masks secrets in text, by names that speak of them and by the forms that they are known to have.

In a command line `ARGUMENT_END` stands between arguments: a value that is one, or the rest of one, goes as a whole,
whatever stands in it. In any other text a value goes as far as a shell would take it for one word.
"""

import re

from dsft.monitor.secret_names import is_option, is_secret, may_be_secret_name

MASK = "***"
ARGUMENT_END = "\0"

_BLANK = r"[\s\0]"
_NAME = r"[A-Za-z_][\w.-]{0,100}"
_SHELL_WORD = re.compile(
    r"""(?:\\"(?:(?!\\")[^\0])*(?:\\")?|"(?:[^"\\\0]|\\[^\0])*"?|'[^'\0]*'?|(?:\\[^\0]|[^\s\0"'&;|<>`\\])+)+"""
)
_ARGUMENT = re.compile(r"[^\0]*")
_NAMES = re.compile(r"[\w.@+=-]*(?::\s*)?")

_ASSIGNMENT = re.compile(
    rf"""(?<!\w)(?P<name>[-+]{{0,2}}{_NAME})\\?["']?\]?\s{{0,9}}(?:=|(?<![/:]):(?!//|:))\s{{0,9}}"""
)
_OPTION = re.compile(rf"(?<![\w-])(?P<name>--?{_NAME})(?:\0|\s{{1,9}})")
_KEY = re.compile(r"(?<=\0)(?P<name>[A-Za-z][\w-]{0,50}[_.][\w.-]{1,50})\0")
_PROGRAM_OPTION = re.compile(
    r"\b(?:(?:sshpass|login)\b[^|;\n]{0,300}?[\s\0]-p[\s\0]*|redis-cli\b[^|;\n]{0,300}?[\s\0]-a[\s\0]*"
    r"|(?:mysql|mariadb)[^|;\n]{0,300}?[\s\0]-p(?=[^\s\0])|login\b[^|;\n]{0,300}?[\s\0](?=[0-9a-f]{40}\b))"
)
"""Programs that have a short option for a password; the last is the key of `wandb login KEY`."""
_USER = re.compile(
    rf"""(?<![^\s\0])(?:(?:-u|--user|--proxy-user)(?:{_BLANK}{{1,9}}|=)["']?(?!\d+:)[^\s\0:"'/]{{1,100}}:"""
    r"""|-u["']?[\w.@+-]{1,100}:)(?!//)"""
)
_HEADER = re.compile(
    r"(?P<start>\b(?:proxy-)?authorization\s{0,9}\\?[\"']?\s{0,9}[:=]\s{0,9}\\?[\"']?|\b(?:set-)?cookie\s{0,9}:\s{0,9})"
    r"(?!\$)[^\"'\n\\\0]+",
    re.IGNORECASE,
)
_BEARER = re.compile(rf"(?P<start>\bbearer{_BLANK}{{1,9}})(?!\$)[\w.~+/=-]{{8,}}", re.IGNORECASE)
_QUERY = re.compile(r"(?P<start>[?&](?:sig|signature|key|auth|code|x-amz-signature)=)[^\s\0&#\"']+", re.IGNORECASE)
_URL_PASSWORD = re.compile(
    r"(?P<start>\b[a-z][a-z0-9+.-]{0,30}://[^\s\0/:@\"']*:)(?!\d+(?:[/?#\0\s]|$))[^\s\0\"']*(?=@)", re.IGNORECASE
)
_URL_TOKEN = re.compile(r"(?P<start>\bhttps?://)[^\s\0/:@\"']+(?=@)", re.IGNORECASE)
_URL_PATH = re.compile(
    r"(?P<start>\b(?:hooks\.slack\.com/\w{1,20}/|discord(?:app)?\.com/api/webhooks/|api\.telegram\.org/(?:file/)?bot))"
    r"[^\s\0\"']+",
    re.IGNORECASE,
)
_PRIVATE_KEY = re.compile(r"(?P<start>)-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[^\0]*")
_KNOWN_TOKEN = re.compile(
    r"""(?<![A-Za-z0-9])(?:
    hf_[A-Za-z0-9]{20,} | api_org_[A-Za-z0-9]{20,}                          # Hugging Face
    | sk-(?=[a-z-]{0,40}[A-Z\d])[\w-]{20,} | gsk_[A-Za-z0-9]{20,} | r8_[A-Za-z0-9]{20,} | nvapi-[\w-]{20,}   # models
    | (?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{16,} | whsec_[A-Za-z0-9]{16,}  # Stripe
    | gh[opusr]_[A-Za-z0-9]{20,} | github_pat_\w{20,}                       # GitHub
    | gl(?:pat|dt|rt|cbt|ptt|ft|soat|agent|imt|oas|ffct)-[\w.-]{16,}        # GitLab
    | xox[a-z](?:-|\.)[\w.-]{10,} | xapp-[\w-]{10,}                         # Slack
    | (?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9]) | AIza[\w-]{30,} | ya29\.[\w-]{20,}   # AWS, Google
    | eyJ[\w-]{8,}\.[\w-]{4,}(?:\.[\w-]*)?                                  # JSON Web Token
    | npm_[A-Za-z0-9]{30,} | pypi-[\w-]{40,} | dckr_pat_[\w-]{20,} | dop_v1_[0-9a-f]{32,}
    | SG\.[\w-]{16,}\.[\w-]{16,} | wandb_v1_\w{20,}
    )""",
    re.VERBOSE,
)

_FORMS = (_PRIVATE_KEY, _URL_PASSWORD, _URL_TOKEN, _URL_PATH, _HEADER, _BEARER, _QUERY)
_NAMED = (_PROGRAM_OPTION, _USER, _ASSIGNMENT, _OPTION, _KEY)


def mask_text(text: str) -> str:
    """Return a text with its secrets masked.

    Args:
        text: A command line with `ARGUMENT_END` between its arguments, or any other text.
    """
    for form in _FORMS:
        text = form.sub(rf"\g<start>{MASK}", text)
    for pattern in _NAMED:
        text = _mask_values(pattern, text)
    return _KNOWN_TOKEN.sub(MASK, text)


def _mask_values(pattern: re.Pattern[str], text: str) -> str:
    """Mask those values behind what a pattern finds that are secrets; the search goes on inside of the others."""
    parts, position = [], 0
    for found in pattern.finditer(text):
        name = found.groupdict().get("name", "password")
        if found.start() < position or not may_be_secret_name(name):
            continue
        value = (_ARGUMENT if _is_at_start(text, found.end()) else _SHELL_WORD).match(text, found.end())
        if value is None or not is_secret(name, value[0]) or (pattern is _OPTION and is_option(value[0])):
            continue
        parts += [text[position : found.end()], MASK]
        position = value.end()
    parts.append(text[position:])
    return "".join(parts)


def _is_at_start(text: str, position: int) -> bool:
    """Return whether a value is what its argument consists of, but for names before it such as `--env=HF_TOKEN=`."""
    end_before = text.rfind(ARGUMENT_END, 0, position)
    return end_before >= 0 and _NAMES.fullmatch(text, end_before + 1, position) is not None
