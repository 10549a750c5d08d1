# SPDX-License-Identifier: GPL-2.0-or-later
"""Run a small certificate authority for one pair: the only module that imports cryptography.

It writes DIR/ca.crt and DIR/ca.key, then primary.crt, primary.key and secondary.crt, secondary.key,
each with the host's identity as URI (tls.identity). Nothing is overwritten unless requested, and
keys are readable only by their owner from the first byte on. EC P-256, RFC 5280 profiles. `colo-xdp
pki` calls init() and issue(), the doctor look().
"""

from __future__ import annotations

import datetime
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..peer.tls import SCHEME, identity

ROLES = ("primary", "secondary")
_CA_NAME = "colo-xdp pair "
_EARLY = datetime.timedelta(hours=1)  # so that a host whose clock is slightly behind accepts it


class PkiError(RuntimeError):
    """A file exists already, is missing or unreadable; the text names it."""


@dataclass(frozen=True, slots=True)
class CertificateSummary:
    """Names and end of validity (UTC) of a certificate."""

    names: tuple[str, ...]
    ends: datetime.datetime


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _write(path: Path, data: bytes, mode: int, *, renew: bool) -> None:
    """Write the file atomically; replace an existing one only to renew it."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(fd, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        try:
            if renew:
                os.replace(new, path)
            else:
                os.link(new, path)  # fails if the file exists, even if it was created meanwhile
        except FileExistsError as e:
            raise PkiError(f"{path} exists already; it is not overwritten") from e
        finally:
            new.unlink(missing_ok=True)
    except OSError as e:
        raise PkiError(f"{path}: {e.strerror}") from e


def _key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = _now()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLY)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def init(directory: Path, pair: str, days: int = 3650) -> list[Path]:
    """Create the authority of a pair; return the files written.

    Raises PkiError if there is one already, or if the directory cannot be written.
    """
    crt, private = directory / "ca.crt", directory / "ca.key"
    for path in (crt, private):
        if path.exists():
            raise PkiError(f"{path} exists already; it is not overwritten")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise PkiError(f"{directory}: {e.strerror}") from e
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _CA_NAME + pair)])
    cert = (
        _builder(name, name, key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(private, _key_bytes(key), 0o600, renew=False)
    _write(crt, cert.public_bytes(serialization.Encoding.PEM), 0o644, renew=False)
    return [crt, private]


def _authority(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey, str]:
    try:
        cert = x509.load_pem_x509_certificate((directory / "ca.crt").read_bytes())
        key = serialization.load_pem_private_key((directory / "ca.key").read_bytes(), None)
    except OSError as e:
        raise PkiError(f"{e.filename}: {e.strerror}; create it with `colo-xdp pki init`") from e
    except (ValueError, TypeError) as e:
        raise PkiError(f"{directory}/ca.crt, ca.key: {e}") from e
    name = str(cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not name.startswith(_CA_NAME):
        raise PkiError(f"{directory}/ca.crt was not made by `colo-xdp pki init`")
    if key.public_key().public_numbers() != cert.public_key().public_numbers():  # type: ignore[union-attr]
        raise PkiError(f"{directory}/ca.key is not the key of {directory}/ca.crt")
    return cert, key, name.removeprefix(_CA_NAME)


def issue(directory: Path, role: str, days: int = 3650, *, renew: bool = False) -> list[Path]:
    """Create a key and a certificate for one host of the pair; return the files written.

    Raises PkiError if they exist and `renew` is not set, or if there is no authority.
    """
    if role not in ROLES:
        raise PkiError(f"role {role!r}: primary or secondary")
    crt, private = directory / f"{role}.crt", directory / f"{role}.key"
    for path in (crt, private):
        if path.exists() and not renew:
            raise PkiError(f"{path} exists already; it is not overwritten (--renew)")
    authority, signer, pair = _authority(directory)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{pair} {role}")])
    uri = x509.UniformResourceIdentifier(identity(pair, role))
    usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    cert = (
        _builder(name, authority.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
        .add_extension(x509.SubjectAlternativeName([uri]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
            critical=False,
        )
        .sign(signer, hashes.SHA256())
    )
    _write(private, _key_bytes(key), 0o600, renew=renew)
    _write(crt, cert.public_bytes(serialization.Encoding.PEM), 0o644, renew=renew)
    return [crt, private]


def look(path: Path) -> CertificateSummary:
    """Read a certificate's file (for `doctor`).

    Raises PkiError.
    """
    try:
        cert = x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as e:
        raise PkiError(f"{path}: {e.strerror}") from e
    except ValueError as e:
        raise PkiError(f"{path}: {e}") from e
    names: list[str] = []
    try:
        alt = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names += alt.get_values_for_type(x509.UniformResourceIdentifier)
        names += alt.get_values_for_type(x509.DNSName)
    except x509.ExtensionNotFound:
        pass
    names += [str(a.value) for a in cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    return CertificateSummary(tuple(names), _end(cert))


def _end(cert: x509.Certificate) -> datetime.datetime:
    """Return the end of validity (UTC).

    cryptography 42 has an attribute that includes the time zone and warns about the old one; Debian
    12 has version 38, which knows only the old one.
    """
    end: datetime.datetime | None = getattr(cert, "not_valid_after_utc", None)
    return end if end is not None else cert.not_valid_after.replace(tzinfo=datetime.UTC)


def ours(seen: CertificateSummary) -> str:
    """Return the colo-xdp identity of a certificate; "" if it has none."""
    return next((n for n in seen.names if n.startswith(SCHEME)), "")
