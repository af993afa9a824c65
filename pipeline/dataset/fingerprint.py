"""Fingerprints: what a result was made from, in 32 hex digits."""

import hashlib
import json
from typing import Any


def fingerprint_of(**parts: Any) -> str:
    """Hash of the named parts (JSON values); equal parts give equal fingerprints.

    A stage's fingerprint has in it the slide's bytes, the stage's parameters and version and the
    parent's fingerprint, so that a change anywhere upstream makes the result stale.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
