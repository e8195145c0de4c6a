"""Real handshakes with certificates that are made here."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from openai import DefaultHttpxClient, OpenAI

from router.settings import RouterSettings
from tests.router.conftest import Stack, StartStack
from tests.router.running import wait_for
from tests.router.scripted_engine import MODEL


@dataclass
class Authority:
    """A CA in a folder; `ca` is the file with its certificate."""

    folder: Path

    def __post_init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
        self.ca = self.folder / "ca.pem"
        certificate = self._sign(self._key, self._name, is_ca=True)
        self.ca.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, password: bytes | None = None) -> tuple[Path, Path]:
        """The files of a certificate for 127.0.0.1 and of its key; files of that name are replaced."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(key, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), is_ca=False)
        certfile, keyfile = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certfile.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        keyfile.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
        )
        return certfile, keyfile

    def client(self, own: tuple[Path, Path] | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.ca)
        if own is not None:
            context.load_cert_chain(*own)
        return context

    def _sign(self, key: ec.EllipticCurvePrivateKey, subject: x509.Name, *, is_ca: bool) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        public = key.public_key()
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(issuer, critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
            .add_extension(_usage(is_ca=is_ca), critical=True)
            .sign(self._key, hashes.SHA256())
        )


def _usage(*, is_ca: bool) -> x509.KeyUsage:
    no = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    return x509.KeyUsage(digital_signature=True, key_cert_sign=is_ca, crl_sign=is_ca, **no)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def get(stack: Stack, context: ssl.SSLContext) -> httpx.Response:
    with httpx.Client(verify=context, trust_env=False) as client:
        return client.get(f"https://127.0.0.1:{stack.router.port}/v1/models")


def serial(stack: Stack, context: ssl.SSLContext) -> str:
    with (
        socket.create_connection(("127.0.0.1", stack.router.port)) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as secured,
    ):
        assert secured.version() in ("TLSv1.2", "TLSv1.3")
        return str((secured.getpeercert() or {})["serialNumber"])


def test_the_official_client_over_https(start_stack: StartStack, authority: Authority) -> None:
    certfile, keyfile = authority.issue("router")
    stack = start_stack(ssl_certfile=certfile, ssl_keyfile=keyfile)
    http = DefaultHttpxClient(verify=authority.client(), trust_env=False)
    url = f"https://127.0.0.1:{stack.router.port}/v1"
    with http, OpenAI(base_url=url, api_key="none", max_retries=0, http_client=http) as client:
        stream = client.completions.create(model=MODEL, prompt="hi", stream=True)
        assert "".join(event.choices[0].text for event in stream) == "0 1 2 3 4 "
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        get(stack, ssl.create_default_context())
    with pytest.raises(OSError):  # not HTTP: the connection ends in one way or another
        stack.router.call("GET", "/health")


def test_certificate_and_key_in_one_file(start_stack: StartStack, authority: Authority) -> None:
    certfile, keyfile = authority.issue("router")
    certfile.write_bytes(certfile.read_bytes() + keyfile.read_bytes())
    assert get(start_stack(ssl_certfile=certfile), authority.client()).status_code == 200


def test_clients_without_a_certificate_stay_outside(
    start_stack: StartStack, authority: Authority, tmp_path: Path
) -> None:
    certfile, keyfile = authority.issue("router")
    stack = start_stack(ssl_certfile=certfile, ssl_keyfile=keyfile, ssl_ca_certs=authority.ca)
    assert get(stack, authority.client(authority.issue("client"))).status_code == 200
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other").issue("client")
    for context in (authority.client(), authority.client(stranger)):
        with pytest.raises(httpx.TransportError):
            get(stack, context)


def test_old_tls_is_refused(start_stack: StartStack, authority: Authority) -> None:
    certfile, keyfile = authority.issue("router")
    stack = start_stack(ssl_certfile=certfile, ssl_keyfile=keyfile)
    context = authority.client()
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with pytest.raises(httpx.ConnectError):
        get(stack, context)


def test_a_renewed_certificate_is_used_without_a_restart(
    start_stack: StartStack, authority: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("router.tls.Certificate.kept_fresh.__wrapped__.__defaults__", (0.05,))
    certfile, keyfile = authority.issue("router")
    stack = start_stack(ssl_certfile=certfile, ssl_keyfile=keyfile)
    before = serial(stack, authority.client())
    old_key = keyfile.read_bytes()
    keyfile.write_bytes(authority.issue("other")[1].read_bytes())
    wait_for(lambda: "the certificate from before stays in use" in caplog.text)
    assert serial(stack, authority.client()) == before
    keyfile.write_bytes(old_key)
    authority.issue("router")
    wait_for(lambda: serial(stack, authority.client()) != before)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda a, c, k: c.write_text("nonsense"), "no start line|not in PEM"),
        (lambda a, c, k: k.write_bytes(a.issue("other")[1].read_bytes()), "mismatch"),
        (lambda a, c, k: a.issue("router", b"secret"), "encrypted"),
    ],
)
def test_bad_files_are_one_sentence(
    authority: Authority, spoil: Callable[[Authority, Path, Path], object], reason: str
) -> None:
    certfile, keyfile = authority.issue("router")
    spoil(authority, certfile, keyfile)
    with pytest.raises(ValueError, match=reason):
        RouterSettings(ssl_certfile=certfile, ssl_keyfile=keyfile)
