"""Secrets taken out of what is printed, logged or journalled.

What a stage says may quote a command or an address of the user's, and those may contain a token.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_SECRET_NAME = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY)S?$",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\s\"'`=:;,]+")
_SHORTEST = 8
"""Shorter values are words of everyday text; hiding them would garble messages."""
_WORDS = (
    r"(?:x-(?:amz|goog)-(?:signature|credential|security-token)|[\w-]*token|[\w-]*secret|password|"
    r"passwd|sig|signature|api[-_]?key|access[-_]?key[-_]?(?:id)?)"
)
_HEADER = r"[\w-]*(?:token|secret|[-_]key|apikey|authorization|cookie|password|passwd)"
"""Names of headers with a secret. A bare `key:` is none: messages name keys of configurations."""
_SCHEME = r"(?:(?:bearer|basic|digest|token|negotiate|apikey|aws4-hmac-sha256)\s+)?"
_QUOTE = r"(?P<quote>\\?[\"'])"
_TO_QUOTE = r"(?:(?!(?P=quote)).)+"
_QUOTED = r"\"[^\"]*\"|'[^']*'"
_VALUE = rf"(?:{_QUOTED}|\\?[\"']?(?:=\"[^\"]*\"|[^\s\"'`\\])+)"
_PATTERNS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?<=://)[^/\s]+(?=@)",  # user:password@host
        rf"(?<=[?&])(?P<keep>{_WORDS}=)[^&\s'\"`]+",
        # 'X-Auth-Token: value', up to the quote that closes it: the value may contain spaces.
        rf"(?P<keep>{_QUOTE}(?:--?[\w-]+=)?{_HEADER}\s*:\s*{_SCHEME}){_TO_QUOTE}",
        rf"(?P<keep>{_QUOTE}{_HEADER}(?P=quote)\s*:\s*(?P=quote)){_TO_QUOTE}",  # as JSON
        # Without quotes a value ends at a space, but for the lists of cookies and digests.
        rf"(?P<keep>(?<![\w./-]){_HEADER}\s*:\s*{_SCHEME}){_VALUE}(?:(?<=[;,])\s+{_VALUE})*",
        rf"(?<![^\s\"'`])(?P<keep>--?{_WORDS}(?:[= ]|[\"'],\s*))(?!\*){_VALUE}",
        r"(?<!\S)(?P<keep>(?:-u|--(?:proxy-)?user)[= ]?[\"']?[^\s:]*:(?!//))[^\s\"'`]+",  # curl's
        rf"(?<![\w-])(?P<keep>(?-i:[A-Z0-9_]*(?:TOKEN|SECRET|PASSWORD|PASSWD|_KEY))=){_VALUE}",
        r"(?P<keep>\b(?:bearer|basic) )[\w.~+/=-]{8,}",
        r"\bhf_[A-Za-z0-9]{16,}\b",  # a token of the Hugging Face hub
    )
)


def redact_secrets(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text with secrets replaced by `***`.

    Hidden are values, of at least 8 characters, of variables that are named as secrets (HF_TOKEN,
    AWS_SECRET_ACCESS_KEY), passwords in addresses, tokens and signatures in queries, options and
    headers, with any quotes around them.
    """
    # Values by themselves: a tool may print them without name or header.
    for name, value in environment.items():
        if len(value) >= _SHORTEST and value in text and _SECRET_NAME.search(name):
            text = text.replace(value, HIDDEN)
    for pattern in _PATTERNS:
        text = pattern.sub(lambda match: match.groupdict().get("keep", "") + HIDDEN, text)
    return text


def redact_all(value: Any) -> Any:
    """A value as JSON knows it, its texts without secrets; what JSON does not know is made text.

    To be used before the value is encoded: JSON escapes what a secret may contain.
    """
    if isinstance(value, Mapping):
        return {str(key): redact_all(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_all(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return redact_secrets(str(value))


def secrets_in(command: str) -> list[str]:
    """The words of at least 8 characters that `redact_secrets` hides, longest first.

    What the command prints may repeat them without their names.
    """
    shown = set(_WORD.findall(redact_secrets(command)))
    hidden = {word for word in _WORD.findall(command) if word not in shown}
    return sorted((word for word in hidden if len(word) >= _SHORTEST), key=lambda word: -len(word))
