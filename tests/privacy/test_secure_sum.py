"""The mathematics of secure sums: exact for any dropouts, uniform to who looks, and shares that say nothing early."""

from __future__ import annotations

import contextlib
import hashlib
import hmac

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.core.errors import AtollError, BadReply
from atoll.privacy.secure_sum import (
    PRIME,
    SEED,
    add_masks_,
    agree,
    at_zero,
    commitment,
    least,
    mask,
    private_key,
    public_key,
    recover,
    remove_masks_,
    seal,
    share,
    signed,
    unseal,
    word,
)  # fmt: skip

quick = settings(max_examples=25, deadline=None, derandomize=True)


def seed_of(*name: object, size: int = 32) -> bytes:
    return hashlib.sha256(repr(name).encode()).digest()[:size]


def pairs_of(site: int, sites: list[int]) -> dict[int, bytes]:
    """Seeds that two sites have in common; here without keys."""
    return {other: seed_of("pair", *sorted((site, other))) for other in sites if other != site}


def masked(values, sites, dtype):
    out = {}
    for site, row in zip(sites, values, strict=True):
        out[site] = row.astype(dtype)
        add_masks_(out[site], site, seed_of("self", site), pairs_of(site, sites))
    return out


@quick
@given(st.data())
@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_the_sum_is_exact_whoever_drops_out(dtype, data):
    n = data.draw(st.integers(2, 9))
    sites = sorted(data.draw(st.sets(st.integers(0, 40), min_size=n, max_size=n)))
    gone = data.draw(st.sets(st.sampled_from(sites), max_size=n - 1))
    top = 2**31 // n - 1 if dtype == np.uint32 else 2**63 // n - 1
    values = np.random.default_rng(n).integers(-top, top, (n, 7))
    sent = masked(values, sites, dtype)
    stay = [s for s in sites if s not in gone]
    total = np.zeros(7, dtype)
    for site in stay:
        total += sent[site]
    dropped = {site: {s: pairs_of(site, sites)[s] for s in stay} for site in gone}
    remove_masks_(total, [seed_of("self", s) for s in stay], dropped)
    exact = [sum(int(row[j]) for s, row in zip(sites, values, strict=True) if s in stay) for j in range(7)]
    assert signed(total).tolist() == exact


def chi_square(words: np.ndarray) -> float:
    """Of the bytes against the uniform law; 255 degrees of freedom, so mean 255 and standard deviation 22.6."""
    counts = np.bincount(words.view(np.uint8), minlength=256)
    expected = words.nbytes / 256
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_a_masked_vector_looks_like_chance(dtype):
    sites, count = [0, 1, 2], 20_000
    values = np.stack([np.full(count, 5), np.zeros(count), np.arange(count) % 7]).astype(np.int64)
    for site, words in masked(values, sites, dtype).items():
        assert chi_square(words) < 255 + 5 * 22.6, site


def test_the_self_mask_hides_a_reply_whose_key_was_revealed():
    """The server thought that site 1 was gone, had its key reconstructed, and then its reply came."""
    sites, count = [0, 1, 2], 20_000
    values = np.full((3, count), 3)
    words = masked(values, sites, np.uint32)[1]
    for other, seed in pairs_of(1, sites).items():
        both = mask(seed, count, np.uint32)
        words = words - both if other > 1 else words + both
    assert chi_square(words) < 255 + 5 * 22.6
    words -= mask(seed_of("self", 1), count, np.uint32)
    assert signed(words).tolist() == [3] * count, "without the self mask this is what the server would have had"


def test_masks_are_the_counter_mode_of_aes():
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES256
    from cryptography.hazmat.primitives.ciphers.modes import ECB

    seed = seed_of("ctr")
    block = Cipher(AES256(seed), ECB()).encryptor()
    blocks = block.update(b"".join(i.to_bytes(16, "big") for i in range(5)))
    assert mask(seed, 20, np.uint32).astype("<u4").tobytes() == blocks
    assert mask(seed, 9, np.uint64).astype("<u8").tobytes() == blocks[:72]


# ------------------------------------------------------------------------------------------- shares


@quick
@given(st.data())
def test_any_threshold_of_shares_tells_and_one_less_does_not(data):
    holders = sorted(data.draw(st.sets(st.integers(0, 10_000), min_size=2, max_size=12)))
    threshold = data.draw(st.integers(2, len(holders)))
    secret = data.draw(st.binary(min_size=SEED, max_size=SEED))
    shares = share(secret, threshold, holders, seed_of(secret))
    some = data.draw(st.permutations(holders))[:threshold]
    assert recover(shares, at_zero(some)) == secret
    few = some[:-1]
    with contextlib.suppress(BadReply):
        assert recover(shares, at_zero(few)) != secret


def test_fewer_shares_fit_every_secret():
    """Perfect secrecy: a polynomial of the right degree goes through t - 1 shares and any secret."""
    shares = share(bytes(SEED), 3, range(5), seed_of("poly"))
    points = {2: int.from_bytes(shares[1], "big"), 5: int.from_bytes(shares[4], "big")}
    for secret in (0, 1, 1 << 200):
        through = {0: secret, **points}

        def at(x, through=through):
            total = 0
            for i, y in through.items():
                above = below = 1
                for j in through:
                    if j != i:
                        above, below = above * (x - j) % PRIME, below * (i - j) % PRIME
                total += y * above * pow(below, -1, PRIME)
            return total % PRIME

        third = at(3).to_bytes(32, "big")
        assert recover({1: shares[1], 4: shares[4], 2: third}, at_zero([1, 2, 4])) == secret.to_bytes(SEED, "big")


def test_wrong_shares_are_noticed_or_give_something_else():
    shares = share(b"s" * SEED, 2, range(3), seed_of("x"))
    with contextlib.suppress(BadReply):
        assert recover({**shares, 1: bytes(32)}, at_zero([0, 1])) != b"s" * SEED
    with pytest.raises(AtollError, match="A secret to share has 31 bytes; got 3"):
        share(b"abc", 2, range(3), b"")


# ------------------------------------------------------------------------------------------- keys


def test_two_sites_agree_on_a_key_that_depends_on_the_purpose():
    a, b = private_key(b"a"), private_key(b"b")
    assert agree(a, public_key(b), b"x") == agree(b, public_key(a), b"x") != agree(a, public_key(b), b"y")
    assert public_key(a) == public_key(private_key(b"a")) != public_key(b)


def test_derived_keys_are_hkdf():
    """RFC 5869 by hand, on the raw agreement."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

    a, b = private_key(b"a"), public_key(private_key(b"b"))
    raw = a.exchange(X25519PublicKey.from_public_bytes(b))
    extracted = hmac.digest(bytes(32), raw, "sha256")
    assert agree(a, b, b"x") == hmac.digest(extracted, b"atoll secure sum x\x01", "sha256")


@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31)])
def test_a_key_that_everybody_would_know_is_refused(point):
    with pytest.raises(BadReply, match="public key is none"):
        agree(private_key(b"a"), point, b"x")


def test_what_is_sealed_is_read_by_its_key_alone_and_unchanged():
    key, sealed = seed_of("k"), seal(seed_of("k"), b"text", b"about")
    assert unseal(key, sealed, b"about") == b"text"
    for k, s, about in (
        (seed_of("l"), sealed, b"about"), (key, sealed[:-1] + b"\0", b"about"), (key, sealed, b"other"), (key, b"", b""),
    ):  # fmt: skip
        with pytest.raises(BadReply, match="changed on their way"):
            unseal(k, s, about)


def test_a_commitment_depends_on_every_byte():
    assert len({commitment(bytes([i]) + bytes(30)) for i in range(50)}) == 50


# ------------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize(
    ("bound", "dtype"), [(0, np.uint32), (2**31 - 1, np.uint32), (2**31, np.uint64), (2**63 - 1, np.uint64)]
)
def test_the_modulus_is_the_narrowest_that_cannot_wrap(bound, dtype):
    assert word(bound) is dtype
    for extreme in (bound, -bound):
        assert signed(np.array([extreme]).astype(np.int64).astype(dtype)).tolist() == [extreme]


def test_a_sum_that_fits_nowhere_is_refused():
    with pytest.raises(AtollError, match="does not fit 64 bits; use fewer `bits`"):
        word(2**63)


@given(st.floats(0.5, 1, exclude_min=True), st.integers(1, 3000))
def test_more_than_half_and_two_must_stay(threshold, cohort):
    n = least(threshold, cohort)
    assert n >= 2
    assert 2 * n > cohort, "no two groups of them are disjoint"
    assert n >= threshold * cohort - 1e-6
    assert n <= max(2, cohort)
