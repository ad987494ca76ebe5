"""The API key of a server: where it comes from, and how a request presents it."""

from __future__ import annotations

import base64
import binascii
import hmac
import re
import secrets

from agentlightning.errors import InvalidValue

_USABLE = re.compile(r"[\x21-\x7e]{8,512}")


def new_key() -> str:
    """A key that nobody can guess, for a server that was given none."""
    return secrets.token_urlsafe(32)


class ApiKey:
    """One key that permits everything.

    A request presents it as ``Authorization: Bearer KEY``, or as the password of HTTP Basic with any user name, so that
    ``http://agl:KEY@host:4747`` works in a client that knows nothing of keys (those of 0.3). Comparisons take the same
    time wherever a wrong key differs, so that the key cannot be guessed character by character.

    Args:
        key: 8 to 512 visible ASCII characters.

    Raises:
        InvalidValue: the key has another form.
    """

    def __init__(self, key: str) -> None:
        if not _USABLE.fullmatch(key):
            raise InvalidValue(
                "the API key is not usable: give 8 to 512 visible ASCII characters without spaces, for example "
                "what `python -c 'import secrets; print(secrets.token_urlsafe(32))'` prints"
            )
        self._key = key.encode()
        self._bearer = b"Bearer " + self._key

    def __repr__(self) -> str:
        return "ApiKey(…)"

    def opens(self, authorization: bytes | None) -> bool:
        """Whether the value of an ``Authorization`` header presents the key."""
        if authorization is None:
            return False
        if hmac.compare_digest(authorization, self._bearer):
            return True
        scheme, _, credentials = authorization.partition(b" ")
        match scheme.lower():
            case b"bearer":
                return hmac.compare_digest(credentials.strip(), self._key)
            case b"basic":
                try:
                    _, _, password = base64.b64decode(credentials.strip(), validate=True).partition(b":")
                except binascii.Error:
                    return False
                return hmac.compare_digest(password, self._key)
            case _:
                return False
