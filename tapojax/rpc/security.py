"""Who may talk to a server: bearer tokens, TLS and mutual TLS. Secrets come from files, never from a command line."""

import hmac
import ipaddress
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import grpc


class Security(NamedTuple):
    """Secrets of one end of the wire, PEM where they are bytes; without any the wire is plain and stays on loopback."""

    token: str | None = None  # what every call must carry
    certificate: bytes | None = None  # this end's own, with its key
    key: bytes | None = None
    authority: bytes | None = None  # signed the other end's certificate; on a server it makes TLS mutual

    def __repr__(self) -> str:
        """Names what is set and shows nothing of it: a value that is printed, logged or raised gives nothing away."""
        return f"Security({', '.join(name for name, value in self._asdict().items() if value)})"


def load_security(
    *, token_file: str = "", certificate_file: str = "", key_file: str = "", authority_file: str = ""
) -> Security:
    """Reads the files that are named.

    Raises:
      ValueError: a file cannot be read, is empty, or is no certificate, or the certificate and the key differ.
    """
    security = Security(
        token=_token(token_file) if token_file else None,
        certificate=_read(certificate_file, "--certificate_file") if certificate_file else None,
        key=_read(key_file, "--key_file") if key_file else None,
        authority=_read(authority_file, "--authority_file") if authority_file else None,
    )
    if bool(certificate_file) != bool(key_file):
        raise ValueError(f"--certificate_file={certificate_file} --key_file={key_file}: give both or neither")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        if certificate_file:
            what = f"{certificate_file} and {key_file} are not a certificate and its unencrypted key in PEM"
            context.load_cert_chain(certificate_file, key_file, password=lambda: "")
        if authority_file:
            what = f"{authority_file} is not a certificate in PEM"
            context.load_verify_locations(authority_file)
    except ssl.SSLError as error:
        raise ValueError(f"{what} ({error}): pass others") from error
    return security


def _read(file: str, option: str) -> bytes:
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"{option}={file} cannot be read: {error.strerror}") from error
    if not content.strip():
        raise ValueError(f"{option}={file} is empty")
    return content


def _token(file: str) -> str:
    token = _read(file, "--token_file").strip()
    if not all(33 <= byte <= 126 for byte in token):
        raise ValueError(f"--token_file={file} must hold one word of printable ASCII, such as `openssl rand -hex 32`")
    return token.decode("ascii")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine for certain: localhost or a loopback address, not a name that resolves to one."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def check_bind(host: str, security: Security) -> None:
    """Lets a server listen beyond loopback only behind TLS and a token.

    Raises:
      ValueError: something is missing; it says what to pass.
    """
    needs = {"--token_file": security.token, "--certificate_file": security.certificate, "--key_file": security.key}
    if not is_loopback(host) and not all(needs.values()):
        missing = " ".join(f"{option}=FILE" for option, value in needs.items() if not value)
        raise ValueError(
            f"--host={host} can be reached from other machines, which takes TLS and a token: pass {missing}, "
            "or --host=127.0.0.1"
        )


def server_credentials(security: Security) -> grpc.ServerCredentials | None:
    """TLS of a server, mutual where there is an authority; None where there is no certificate.

    Raises:
      ValueError: an authority without a certificate.
    """
    if security.certificate is None:
        if security.authority is not None:
            raise ValueError("--authority_file on a server asks for mutual TLS: pass --certificate_file and --key_file")
        return None
    return grpc.ssl_server_credentials(
        [(security.key, security.certificate)],
        root_certificates=security.authority,
        require_client_auth=security.authority is not None,
    )


def channel_credentials(security: Security) -> grpc.ChannelCredentials | None:
    """TLS of a client that knows the servers' authority, mutual where it has a certificate; None without an authority.

    Raises:
      ValueError: a certificate without an authority.
    """
    if security.authority is None:
        if security.certificate is not None:
            raise ValueError("--certificate_file on a client is for mutual TLS: pass --authority_file of the servers")
        return None
    return grpc.ssl_channel_credentials(security.authority, security.key, security.certificate)


def authorization(token: str) -> tuple[str, str]:
    """The metadata by which a call shows its token."""
    return "authorization", f"Bearer {token}"


def authorized(metadata: Iterable[tuple[str, str | bytes]], token: str) -> bool:
    """Whether a call's metadata holds the token, in a time that does not tell how much of it was right."""
    name, expected = authorization(token)
    shown = [value if isinstance(value, bytes) else value.encode() for key, value in metadata if key == name]
    return len(shown) == 1 and hmac.compare_digest(shown[0], expected.encode())
