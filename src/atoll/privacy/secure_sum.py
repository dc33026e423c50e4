"""Secure summation: masks that cancel in a sum, and the shares that mend it when sites drop out.

Bonawitz, Ivanov, Kreuter, Marcedone, McMahan, Patel, Ramage, Segal, Seth, "Practical Secure Aggregation for
Privacy-Preserving Machine Learning", CCS 2017. Site u hides its integers x_u (modulo 2^32 or 2^64) as

    y_u = x_u + PRG(b_u) + sum_{v > u} PRG(s_uv) - sum_{v < u} PRG(s_uv)

The pairwise seeds s_uv come from a key agreement and cancel in the sum over all. When v drops out, t sites reveal
their shares of v's key, and what v would have cancelled is computed. The self mask b_u protects a reply that was
merely late: for a site whose reply counts, t sites reveal shares of b_u, and never any of its key.

Pure functions over bytes and NumPy arrays; what a site may reveal and when is ``atoll.federated.secure.site``.
Keys are X25519 (RFC 7748), derived keys HKDF-SHA256 (RFC 5869), masks the AES-256-CTR keystream, shares Shamir's over
the integers modulo 2^255 - 19, sealed by ChaCha20-Poly1305 (RFC 8439), all from the ``cryptography`` package.
Comparisons of Python integers are not constant-time: a neighbour on the same machine who measures time is not
kept out.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.core.errors import AtollError, BadReply

PRIME = 2**255 - 19
SEED = 31
"""Bytes of a secret that is shared: any of them is below the prime."""
KEY = SHARE = 32
"""Bytes of a key, and of a share."""
TAG = 16
"""Bytes that sealing adds."""

Words = NDArray[Any]
"""Of uint32 or uint64."""
Word = type[np.uint32] | type[np.uint64]


def prf(secret: bytes, *name: str | int | bytes) -> bytes:
    """32 bytes that stand for (secret, name) and look random to whoever lacks the secret."""
    return hmac.digest(secret, repr(name).encode(), "sha256")


def digest(*what: str | int | bytes | Sequence[Any]) -> str:
    """SHA-256 of plain values, as text."""
    return hashlib.sha256(repr(what).encode()).hexdigest()


def commitment(seed: bytes) -> bytes:
    """32 bytes by which a seed of 31 random bytes is known again, and which do not tell it."""
    return hashlib.sha256(b"atoll commitment" + seed).digest()


# ------------------------------------------------------------------------------------------- keys


def private_key(seed: bytes) -> Any:
    """The X25519 private key that ``seed`` stands for."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(prf(seed, "x25519"))


def public_key(private: Any) -> bytes:
    """32 bytes for everybody."""
    return bytes(private.public_key().public_bytes_raw())


def agree(private: Any, other: bytes, purpose: bytes) -> bytes:
    """The 32-byte key that two owners of private keys, and nobody else, can compute.

    Args:
        private: the own :func:`private_key`.
        other: the other's public key.

    Raises:
        BadReply: ``other`` is no public key.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    try:
        secret = private.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError as e:  # a point of small order would give a key that everybody knows
        raise BadReply("what was sent as a public key is none") from e
    return bytes(HKDF(SHA256(), KEY, salt=None, info=b"atoll secure sum " + purpose).derive(secret))


# ------------------------------------------------------------------------------------------- shares


def share(secret: bytes, threshold: int, holders: Iterable[int], random: bytes) -> dict[int, bytes]:
    """Shamir's shares of 31 secret bytes: any ``threshold`` of them tell it, fewer say nothing.

    Args:
        holders: numbers from 0, one a share.
        random: a secret key that the polynomial is drawn from, used for this secret alone.
    """
    if len(secret) != SEED:
        raise AtollError(f"A secret to share has {SEED} bytes; got {len(secret)}.")
    rest = (int.from_bytes(prf(random, "coefficient", j), "big") % PRIME for j in range(1, threshold))
    falling = [int.from_bytes(secret, "big"), *rest][::-1]
    out = {}
    for holder in holders:
        value = 0
        for coefficient in falling:
            value = (value * (holder + 1) + coefficient) % PRIME
        out[holder] = value.to_bytes(SHARE, "big")
    return out


def at_zero(holders: Sequence[int]) -> dict[int, int]:
    """Lagrange's weights: the secret is the weighted sum of the holders' shares modulo the prime."""
    out = {}
    for i in holders:
        above = below = 1
        for j in holders:
            if j != i:
                above = above * (j + 1) % PRIME
                below = below * (j - i) % PRIME
        out[i] = above * pow(below, -1, PRIME) % PRIME
    return out


def recover(shares: Mapping[int, bytes], weights: Mapping[int, int]) -> bytes:
    """The secret, from as many shares as its threshold.

    Args:
        weights: :func:`at_zero` of the holders to use.

    Raises:
        BadReply: the shares are not of one secret.
    """
    value = sum(int.from_bytes(shares[i], "big") * w for i, w in weights.items()) % PRIME
    if value >> (8 * SEED):
        raise BadReply("shares of a secret do not fit each other")
    return value.to_bytes(SEED, "big")


def seal(key: bytes, text: bytes, about: bytes) -> bytes:
    """``text`` for the other owner of ``key``, 16 bytes longer. A key seals one text only; ``about`` is vouched for."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    return bytes(ChaCha20Poly1305(key).encrypt(bytes(12), text, about))


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """What was sealed; raises :class:`BadReply` when it, or ``about``, is not what the sender wrote."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        return bytes(ChaCha20Poly1305(key).decrypt(bytes(12), sealed, about))
    except InvalidTag as e:
        raise BadReply("sealed shares, or the keys that came with them, were changed on their way") from e


# ------------------------------------------------------------------------------------------- masks


def word(bound: int) -> Word:
    """The narrowest modulus in which a sum of at most ``bound`` in absolute value cannot wrap.

    Raises:
        AtollError: there is none.
    """
    if bound < 1 << 31:
        return np.uint32
    if bound < 1 << 63:
        return np.uint64
    raise AtollError(
        f"A secure sum of up to {bound:.1e} does not fit 64 bits; use fewer `bits`, a smaller `most_samples`, or "
        "fewer sites a round."
    )


def mask(seed: bytes, count: int, dtype: Word) -> Words:
    """``count`` words that look uniform to whoever lacks the 32-byte seed."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES256
    from cryptography.hazmat.primitives.ciphers.modes import CTR

    stream = Cipher(AES256(seed), CTR(bytes(16))).encryptor().update(bytes(count * np.dtype(dtype).itemsize))
    little: Words = np.frombuffer(stream, np.dtype(dtype).newbyteorder("<")).astype(dtype, copy=False)
    return little


def add_masks_(words: Words, site: int, own: bytes, pairs: Mapping[int, bytes]) -> None:
    """Turn x_u into y_u, in place.

    Args:
        own: 32-byte seed of the self mask.
        pairs: by other site, the 32-byte seed that both have.
    """
    dtype = words.dtype.type
    words += mask(own, len(words), dtype)
    for other, seed in pairs.items():
        _signed_add_(words, mask(seed, len(words), dtype), other > site)


def remove_masks_(words: Words, own: Iterable[bytes], dropped: Mapping[int, Mapping[int, bytes]]) -> None:
    """Turn the sum of the y_u that arrived into the sum of their x_u, in place.

    Args:
        own: seeds of the self masks of the sites that are in the sum.
        dropped: by site that is not, the seeds that it has with those that are.
    """
    dtype = words.dtype.type
    for seed in own:
        words -= mask(seed, len(words), dtype)
    for gone, pairs in dropped.items():
        for other, seed in pairs.items():
            _signed_add_(words, mask(seed, len(words), dtype), other > gone)  # what `gone` would have added


def _signed_add_(words: Words, by: Words, plus: bool) -> None:
    (np.add if plus else np.subtract)(words, by, out=words)


def signed(words: Words) -> NDArray[np.int64]:
    """Numbers modulo 2^32 or 2^64 as the signed integers that they stand for."""
    return words.view(np.int32 if words.dtype == np.uint32 else np.int64).astype(np.int64)


def least(threshold: float, cohort: int) -> int:
    """How many of a cohort must stay: the fraction, more than half, and two (a sum of one is no secret)."""
    return max(2, cohort // 2 + 1, math.ceil(threshold * cohort - 1e-9))
