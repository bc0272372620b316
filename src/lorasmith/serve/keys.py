"""Who may ask. Keys are compared in constant time, kept as hashes, and never written anywhere."""

import hashlib
import hmac
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from lorasmith.errors import SettingsError

KEYS_VARIABLE = "LORASMITH_API_KEYS"
MIN_KEY_LENGTH = 16


class Keys:
    """The keys of a server; without any, everybody who reaches it may ask."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        """Keep the keys' hashes.

        Raises:
            SettingsError: a key is short enough to be guessed.
        """
        keys = list(keys)
        if any(len(key) < MIN_KEY_LENGTH for key in keys):
            raise SettingsError(
                f"An API key is shorter than {MIN_KEY_LENGTH} characters. A good one comes from: "
                "python -c 'import secrets; print(secrets.token_urlsafe())'"
            )
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __repr__(self) -> str:
        return f"Keys({len(self._digests)} of them)"

    def admit(self, authorization: str | None) -> bool:
        """Say whether the value of an Authorization header opens the door."""
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip() if scheme.lower() == "bearer" else "")
        # All of them, so that the time tells nothing about which one was near.
        return sum([hmac.compare_digest(given, digest) for digest in self._digests]) > 0 or not self._digests


def read_keys(file: Path | None, environ: Mapping[str, str] | None = None) -> Keys:
    """Return the keys in ``file``, one a line, # begins a comment, and in LORASMITH_API_KEYS, by comma.

    Raises:
        SettingsError: the file cannot be read or holds none, or a key is too short.
    """
    listed = (os.environ if environ is None else environ).get(KEYS_VARIABLE, "")
    keys = [key.strip() for key in listed.split(",") if key.strip()]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as fault:
            reason = fault.strerror if isinstance(fault, OSError) else "it is no text"
            raise SettingsError(f"The file of API keys {file} cannot be read: {reason}.") from None
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise SettingsError(f"The file of API keys {file} holds none. Write one a line.")
        keys += found
    return Keys(keys)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
