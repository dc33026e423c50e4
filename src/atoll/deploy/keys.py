"""Keys and certificates of a federation: one certificate for the server, one key pair for each site.

The server proves who it is by TLS, with a certificate signed by the federation's own authority. A site proves who it
is by signing every request with its private key; the operator of the server holds the public keys. Private keys are
written readable by their owner alone.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atoll.core.errors import RunError

AUTHORITY, CERTIFICATE, SERVER_KEY = "ca.pem", "server.pem", "server.key"
HOST = r"(?=.{1,253}$)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*"
ITSELF = "127.0.0.1"
"""Where the server reaches its own SuperLink, by the same certificate."""


def make_certificates(folder: Path, hosts: Sequence[str], days: int = 365) -> None:
    """Write ``ca.pem`` (give it to the sites), ``server.pem`` and ``server.key`` (they stay at the server).

    The authority's own key is not kept: to renew, make all three again and hand out the new ``ca.pem``.

    Args:
        hosts: names and addresses by which sites reach the server.
        days: how long the certificates are good.

    Raises:
        RunError: the folder already holds some of these files, or what is given is no host.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    if not hosts:
        raise RunError("A certificate names the hosts by which sites reach the server; give at least one.")
    for name in (AUTHORITY, CERTIFICATE, SERVER_KEY):
        if (folder / name).exists():
            raise RunError(f"{folder / name} exists already; sites may rely on it. Give another folder.")

    def named(text: str) -> Any:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def certificate(subject: Any, key: Any, issuer: Any, signer: Any, **extensions: Any) -> Any:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=days))
        )
        for extension, critical in extensions.values():
            builder = builder.add_extension(extension, critical)
        return builder.sign(signer, hashes.SHA256())

    def key_usage(ca: bool) -> Any:
        return x509.KeyUsage(
            digital_signature=not ca, content_commitment=False, key_encipherment=False, data_encipherment=False,
            key_agreement=not ca, key_cert_sign=ca, crl_sign=ca, encipher_only=False, decipher_only=False,
        )  # fmt: skip

    authority, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = certificate(
        named("Atoll federation"), authority, named("Atoll federation"), authority,
        basic=(x509.BasicConstraints(ca=True, path_length=0), True), usage=(key_usage(True), True),
        identity=(x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), False),
    )  # fmt: skip
    leaf = certificate(
        named(hosts[0][:64]), own, root.subject, authority,
        basic=(x509.BasicConstraints(ca=False, path_length=None), True), usage=(key_usage(False), True),
        hosts=(x509.SubjectAlternativeName([_host(h) for h in dict.fromkeys([*hosts, ITSELF])]), False),
        purpose=(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        authority=(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), False),
    )  # fmt: skip
    pem = serialization.Encoding.PEM
    folder.mkdir(parents=True, exist_ok=True)
    (folder / AUTHORITY).write_bytes(root.public_bytes(pem))
    (folder / CERTIFICATE).write_bytes(leaf.public_bytes(pem) + root.public_bytes(pem))
    plain = serialization.NoEncryption()
    write_private(folder / SERVER_KEY, own.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))


def make_site_key(path: Path) -> Path:
    """Write a site's private key to ``path`` and its public key to ``path`` with the suffix ``.pub``.

    Returns:
        the path of the public key, which goes to the operator of the server.

    Raises:
        RunError: there is a key already.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    public = path.with_suffix(".pub")
    for taken in (path, public):
        if taken.exists():
            raise RunError(f"{taken} exists already, and the server may know it; give another name.")
    key = ec.generate_private_key(ec.SECP384R1())
    path.parent.mkdir(parents=True, exist_ok=True)
    openssh, plain = serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    write_private(path, key.private_bytes(serialization.Encoding.PEM, openssh, plain))
    text = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    public.write_bytes(text + b" " + path.stem.encode() + b"\n")
    return public


def read_public_keys(folder: Path) -> dict[str, bytes]:
    """The sites of a federation: every ``<name>.pub`` in the folder, in the order of their names.

    Returns:
        a public key (PEM) by site name; a site's number is its place.

    Raises:
        RunError: no key, one that cannot be read, or one key under two names.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    keys: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.pub")):
        try:
            key = serialization.load_ssh_public_key(path.read_bytes())
        except (ValueError, UnsupportedAlgorithm, OSError) as e:
            raise RunError(f"{path} is not a public key; the site makes one with `atoll certify --site`.") from e
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise RunError(f"{path} is not a key on a NIST curve; the site makes one with `atoll certify --site`.")
        pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        for other, known in keys.items():
            if known == pem:
                raise RunError(f"{path.stem} and {other} have the same public key; each site needs its own.")
        keys[path.stem] = pem
    if not keys:
        raise RunError(f"{folder} holds no public key of a site (a file such as `oslo.pub`).")
    return keys


def check_server_files(folder: Path) -> None:
    """Whether a folder holds what :func:`make_certificates` made.

    Raises:
        RunError: a file is missing, or they do not belong together.
    """
    for name in (AUTHORITY, CERTIFICATE, SERVER_KEY):
        if not (folder / name).is_file():
            raise RunError(f"{folder / name} is not there; `atoll certify --host NAME` makes certificates.")
    try:
        ssl.create_default_context(cafile=folder / AUTHORITY)
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(folder / CERTIFICATE, folder / SERVER_KEY)
    except OSError as e:
        raise RunError(
            f"The files {AUTHORITY}, {CERTIFICATE} and {SERVER_KEY} in {folder} do not belong together, or one is not "
            "what its name says. Put back the ones that `atoll certify --host NAME` made."
        ) from e


def check_site_files(certificate: Path, key: Path) -> None:
    """Whether a site has the server's ``ca.pem`` and a private key of its own.

    Raises:
        RunError: a file is missing, or is something else.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    authority = "the ca.pem that the operator of the server has sent"
    own = "the .key file that `atoll certify --site NAME` has made"
    for option, path, what in (("--certificate", certificate, authority), ("--key", key, own)):
        if not path.is_file():
            raise RunError(f"There is no file {path} ({option}); it should be {what}.")
    try:
        ssl.create_default_context(cafile=certificate)
    except OSError as e:
        raise RunError(f"{certificate} is not a certificate; --certificate should be {authority}.") from e
    try:
        private = serialization.load_ssh_private_key(key.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        raise RunError(f"{key} is not a private key; --key should be {own}.") from e
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise RunError(f"{key} is not a key on a NIST curve; --key should be {own}.")


def write_private(path: Path, content: bytes) -> None:
    """A new file that only its owner may read."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
        f.write(content)


def _host(text: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        if not re.fullmatch(HOST, text):
            raise RunError(
                f"`{text}` is no host; give a name such as server.example.org or an address, without https:// and port."
            ) from None
        return x509.DNSName(text)
