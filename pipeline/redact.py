"""Secrets taken out of what is printed, logged or journalled.

What a stage says may quote a command or an address of the user's, and those may hold a token.
"""

import os
import re
from collections.abc import Mapping

HIDDEN = "***"
_SECRET_NAME = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY)S?$",
    re.IGNORECASE,
)
_SHORTEST = 8
"""Shorter values are words of everyday text; hiding them would garble messages."""
_WORDS = (
    r"(?:x-(?:amz|goog)-(?:signature|credential|security-token)|[\w-]*token|[\w-]*secret|password|"
    r"passwd|sig|signature|api[-_]?key|access[-_]?key[-_]?(?:id)?)"
)
_PATTERNS = (
    re.compile(r"(?<=://)[^/\s@]+(?=@)"),  # user:password@host
    re.compile(rf"(?<=[?&])(?P<keep>{_WORDS}=)[^&\s'\"]+", re.IGNORECASE),
    re.compile(rf"(?<!\S)(?P<keep>--?{_WORDS}[= ])\S+", re.IGNORECASE),
    re.compile(r"(?P<keep>\b(?:bearer|basic) )[\w.~+/=-]{8,}", re.IGNORECASE),
    re.compile(r"\bhf_[A-Za-z0-9]{16,}\b"),  # a token of the Hugging Face hub
)


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text with secrets replaced by `***`.

    Hidden are values of variables that are named as secrets (HF_TOKEN, AWS_SECRET_ACCESS_KEY),
    passwords in addresses, tokens and signatures in queries, options and headers.
    """
    for name, value in environment.items():
        if len(value) >= _SHORTEST and value in text and _SECRET_NAME.search(name):
            text = text.replace(value, HIDDEN)
    for pattern in _PATTERNS:
        text = pattern.sub(_hide, text)
    return text


def _hide(found: re.Match[str]) -> str:
    return found.groupdict().get("keep", "") + HIDDEN
