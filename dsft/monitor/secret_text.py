"""Masks secrets inside a text: shell commands, URLs, headers, JSON, and whatever has the form of a known token."""

import re

from dsft.monitor.secret_names import is_harmless_value, is_secret_name

MASK = "***"

_VALUE = r"""(?:\\"(?:(?!\\").)*(?:\\")?|"(?:[^"\\]|\\.)*"?|'[^']*'?|(?:\\.|[^\s"'&;|<>`\\])+)"""
_NAME = r"[A-Za-z_][\w.-]{0,100}"  # the limit keeps a search in a long text short

_VALUES = re.compile(f"{_VALUE}+", re.DOTALL)
_ASSIGNMENT = re.compile(rf"""(?<!\w)(?P<name>{_NAME})\\?["']?\]?\s{{0,9}}(?:=|(?<![/:]):(?!//|:))\s{{0,9}}""")
_OPTION = re.compile(rf"(?<![\w-])(?P<name>--?{_NAME})\s{{1,9}}(?!--)")
_QUERY = re.compile(r"(?P<start>[?&](?:sig|signature|key|auth|code|x-amz-signature)=)[^\s&#\"']+", re.IGNORECASE)
_HEADER = re.compile(
    r"(?P<start>\b(?:proxy-)?authorization\s*\\?[\"']?\s*[:=]\s*\\?[\"']?|\b(?:set-)?cookie\s*:\s*)(?!\$)[^\"'\n\\]+",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(?P<start>\bbearer\s+)(?!\$)[\w.~+/=-]{8,}", re.IGNORECASE)
_URL_PASSWORD = re.compile(
    r"(?P<start>\b[a-z][a-z0-9+.-]{0,30}://[^\s/:@\"']*:)(?!\d+(?:[/?#]|$))[^\s\"']*@", re.IGNORECASE
)
_URL_TOKEN = re.compile(r"(?P<start>\bhttps?://)[\w.~%-]{16,}@", re.IGNORECASE)
_USER_PASSWORD = re.compile(
    rf"(?P<start>(?<!\S)(?:-u|--user|--proxy-user)(?:\s+|=)[\"']?[^\s:\"']+:)(?!\d+\b){_VALUE}+", re.DOTALL
)
_PROGRAM_PASSWORD = re.compile(
    rf"(?P<start>\bsshpass\s+-p\s*|\bredis-cli\b[^|;\n]*\s-a\s*|\b(?:mysql|mysqldump|mysqladmin|mariadb)\b[^|;\n]*\s-p)"
    rf"(?=\S){_VALUE}+"
)
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*", re.DOTALL)
_KNOWN_TOKEN = re.compile(
    r"""(?<![A-Za-z0-9])(?:
    hf_[A-Za-z0-9]{20,} | api_org_[A-Za-z0-9]{20,}                          # Hugging Face
    | sk-(?=[\w-]*\d)[\w-]{20,} | gsk_[A-Za-z0-9]{20,} | r8_[A-Za-z0-9]{20,} | nvapi-[\w-]{20,}   # model services
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

_AFTER_START = (_HEADER, _BEARER, _QUERY, _USER_PASSWORD, _PROGRAM_PASSWORD)


def mask_text(text: str) -> str:
    """Return a text with its secrets masked.

    Args:
        text: Of any kind; what is no secret stays as it is.
    """
    text = _PRIVATE_KEY.sub(MASK, text)
    for pattern in (_URL_PASSWORD, _URL_TOKEN):
        text = pattern.sub(rf"\g<start>{MASK}@", text)
    for pattern in _AFTER_START:
        text = pattern.sub(rf"\g<start>{MASK}", text)
    for pattern in (_ASSIGNMENT, _OPTION):
        text = _mask_named(pattern, text)
    return mask_known_tokens(text)


def mask_known_tokens(text: str) -> str:
    """Return a text without what has the form of a token that is known."""
    return _KNOWN_TOKEN.sub(MASK, text)


def _mask_named(pattern: re.Pattern[str], text: str) -> str:
    """Mask values behind secret names; the search goes on inside the values of other names."""
    parts, position = [], 0
    for found in pattern.finditer(text):
        if found.start() < position or not is_secret_name(found["name"]):
            continue
        value = _VALUES.match(text, found.end())
        if value is not None and not is_harmless_value(value[0]):
            parts += [text[position : found.end()], MASK]
            position = value.end()
    parts.append(text[position:])
    return "".join(parts)
