"""Signing: what only the holder of the operator's key may decide, and the signature that proves it (Ed25519, RFC 8032).

The store keeps the public key alone. The private one belongs on the operator's machine, never into an agent's environment:
whoever has it can approve, raise, resume and release.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from bursar.commands import Definition, Definitions
from bursar.errors import InvalidInput, OperatorRequired

PREFIX = "bursar-operator-"


class OperatorKey:
    """A private key. `text` is what to keep secret; `public` is what the store knows. Raises InvalidInput for other text."""

    def __init__(self, text: str) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        try:
            seed = base64.urlsafe_b64decode(text.strip().removeprefix(PREFIX).encode())
            self._key = Ed25519PrivateKey.from_private_bytes(seed)
        except (ValueError, binascii.Error):
            raise InvalidInput(
                f"This is no operator key: it begins with {PREFIX}. Give what `bursar operator init` wrote.",
                argument="key",
            ) from None

    @classmethod
    def generate(cls) -> OperatorKey:
        """A new key."""
        import secrets

        return cls(PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(32)).decode())

    @property
    def text(self) -> str:
        return PREFIX + base64.urlsafe_b64encode(self._key.private_bytes_raw()).decode()

    @property
    def public(self) -> str:
        return base64.urlsafe_b64encode(self._key.public_key().public_bytes_raw()).decode()

    def __repr__(self) -> str:
        return f"OperatorKey(public={self.public!r})"

    def sign(self, kind: str, name: str, definition: Mapping[str, Any]) -> dict[str, Any]:
        """The definition with its signature."""
        signature = self._key.sign(_payload(kind, name, definition))
        return {**definition, "signature": base64.urlsafe_b64encode(signature).decode()}

    def prove(self, id: str) -> str:
        """The proof that the reservation `id` may be released."""
        return str(self.sign("release", id, {})["signature"])


def check_public(text: str) -> str:
    """The public half of a key, as `bursar operator init` prints it. Raises InvalidInput."""
    try:
        if isinstance(text, str) and len(base64.b64decode(text.strip().encode(), b"-_", validate=True)) == 32:
            return text.strip()
    except (ValueError, binascii.Error):
        pass  # the error below says what is due
    raise InvalidInput(
        "This is no operator's public key. Give what `bursar operator init` printed, never the key itself.",
        argument="operator",
    )


def verifies(public: str, kind: str, name: str, definition: Mapping[str, Any]) -> bool:
    """Whether the definition carries a signature by the key whose public half this is."""
    return _signed(public, str(definition.get("signature", "")), _payload(kind, name, definition))


@lru_cache(maxsize=4_096)  # every process looks at every decision anew with every change of the policy, 0.7 ms each
def _signed(public: str, signature: str, payload: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(public))
        key.verify(base64.urlsafe_b64decode(signature), payload)
    except (InvalidSignature, ValueError, binascii.Error):
        return False
    return True


def operator_of(held: Definitions) -> str | None:
    """The public key that the store knows, if any."""
    found = held.get("operator", {}).get("operator")
    return None if found is None else str(found.definition.get("public", ""))


_ABOUT = ("by", "at_us", "of", "signature")  # what a definition says of the decision, rather than what was decided


def content(definition: Mapping[str, Any]) -> dict[str, Any]:
    """What a definition decides, without who decided it and when."""
    return {key: value for key, value in definition.items() if key not in _ABOUT}


def changes(kind: str, definitions: Mapping[str, dict[str, Any]], held: Definitions) -> dict[str, dict[str, Any]]:
    """Those of the definitions that decide anything new. Raises OperatorRequired where one needs a signature that it lacks."""
    public = operator_of(held)
    found = {}
    for name, definition in definitions.items():
        before = held.get(kind, {}).get(name)
        if before is not None and content(before.definition) == content(definition):
            # what a former operator had granted counts no more: another may give the same anew
            given_anew = (
                kind in ("approval", "raise") and public is not None and verifies(public, kind, name, definition)
            )
            if not given_anew or verifies(str(public), kind, name, before.definition):
                continue
        found[name] = definition
        if not _needs(kind, name, definition, before, public):
            continue
        if public is None:
            raise OperatorRequired(
                "This store has no operator yet, so nobody may approve, raise, resume or release. "
                "Run `bursar operator init` first, and keep its key away from the agents.",
                kind=kind,
                name=name,
            )
        answers = definition.get("of")  # the version that the decision is about: an old signature does not serve again
        if answers != (before.version if before is not None else None) or not verifies(public, kind, name, definition):
            remedy = "`bursar policy apply FILE`" if kind == "budget" else "the command again"
            raise OperatorRequired(
                f"The {kind} {name!r} needs the signature of this store's operator, on what stands there now. "
                f"Run {remedy} with the operator's key.",
                kind=kind,
                name=name,
            )
    return found


def short_id(verb: str, *facts: object) -> str:
    """A name that every process gives the same thing, short enough to be typed, such as "ask-3f9a2c1b07"."""
    return f"{verb}-{hashlib.blake2b(repr(facts).encode(), digest_size=5).hexdigest()}"


def switch_name(target: Mapping[str, Any]) -> str:
    """The name of the switch of an account or of tags: each has its own, so none can be turned to something else."""
    if target.get("account") is not None:
        return short_id("kill", {"account": target["account"]})
    pairs = sorted((target.get("tags") or {}).items())
    return " ".join(f"{tag}={worded(value)}" for tag, value in pairs) or "everything"


def prune_name(before_us: int) -> str:
    """The name of the decision to prune what was settled before that time."""
    return f"before {before_us}"


def worded(value: str) -> str:
    """A tag's value, in quotes where the switch of other tags could be meant."""
    return json.dumps(value, ensure_ascii=False) if re.search('[ ="]', value) else value


def _needs(kind: str, name: str, definition: Mapping[str, Any], before: Definition | None, public: str | None) -> bool:
    if kind == "approval":  # nor may a question come to be about another account after somebody has read it
        moved = before is not None and before.definition.get("account") != definition.get("account")
        return moved or definition.get("state") == "approved"
    if kind == "freeze":
        return not definition.get("frozen") or name != switch_name(definition)
    if kind == "budget":  # further budgets only limit more
        return before is not None and public is not None
    if kind in ("operator", "prune", "erase"):
        return public is not None
    return kind == "raise"


def _payload(kind: str, name: str, definition: Mapping[str, Any]) -> bytes:
    plain = {key: value for key, value in definition.items() if key != "signature"}
    return json.dumps([kind, name, plain], sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
