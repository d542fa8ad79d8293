"""TLS: the client's certificates and trusted authorities, and the diagnosis of connections that fail."""

from __future__ import annotations

import os
import socket
import ssl
from dataclasses import dataclass

import requests

from tfclm.client.sockets import connect
from tfclm.client.transport import Call, ServerError, one_line
from tfclm.errors import InputError

# How long to wait for an alert: in TLS 1.3, a server asks for a missing client certificate after the handshake.
ALERT_SECONDS = 1.0
# OpenSSL's codes: the certificate is for another name or address.
_NAME_MISMATCH = (62, 64)
# It is not valid yet, or has expired.
_NOT_VALID_NOW = (9, 10)
# Alerts of servers that got no client certificate, or do not accept it.
_CERTIFICATE_ALERTS = (
    "certificate required",
    "handshake failure",
    "bad certificate",
    "certificate unknown",
    "certificate expired",
    "unsupported certificate",
    "unknown ca",
    "decrypt error",
)
# OpenSSL's names for a reply that is not TLS.
_NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG")


@dataclass(frozen=True)
class Server:
    """The address of a server, as messages show it, and the parts of its URL."""

    address: str
    scheme: str
    host: str
    port: int

    @property
    def secure(self) -> bool:
        """Whether the URL asks for TLS."""
        return self.scheme in ("https", "grpcs")


@dataclass(frozen=True)
class Tls:
    """PEM files: certificates of the authorities to trust, and the client's own certificate and key.

    Raises:
        InputError: a file cannot be read, or has the wrong content.
    """

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    def __post_init__(self) -> None:
        if self.key_file is not None and self.cert_file is None:
            raise InputError("`key_file` goes with `cert_file`: give the client's certificate too")
        if self.cert_file is not None and self.key_file is None:
            raise InputError("`cert_file` goes with `key_file`: give the certificate's key too")
        for field in ("ca_file", "cert_file", "key_file"):
            self.read(field)
        if self:
            self.context()

    def __bool__(self) -> bool:
        return self.ca_file is not None or self.cert_file is not None

    def read(self, field: str) -> bytes | None:
        """The content of a file; None if none is given."""
        path = getattr(self, field)
        if path is None:
            return None
        try:
            with open(path, "rb") as file:
                return file.read()
        except (OSError, ValueError) as error:
            raise InputError(f"`{field}` {path}: {getattr(error, 'strerror', None) or error}") from error

    def context(self) -> ssl.SSLContext:
        """A context with the client's certificate that trusts `ca_file`; without `ca_file`, it trusts nobody yet."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.ca_file is not None:
            try:
                context.load_verify_locations(self.ca_file)
            except (OSError, ValueError) as error:
                raise InputError(f"`ca_file` {self.ca_file}: give PEM with one or more certificates") from error
        if self.cert_file is not None and self.key_file is not None:
            try:
                context.load_cert_chain(self.cert_file, self.key_file, password=self._refuse_password)
            except (OSError, ValueError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(
                    f"`cert_file` {self.cert_file}, `key_file` {self.key_file}: give PEM, a certificate and its own key"
                ) from error
        return context

    def _refuse_password(self) -> str:
        raise InputError(f"`key_file` {self.key_file} is encrypted: give one without a passphrase")


def diagnose(server: Server, tls: Tls, call: Call) -> ServerError | None:
    """Connects again to a server that failed and returns what is wrong; None if the connection itself works."""
    context = tls.context()
    if not server.secure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    elif tls.ca_file is None:
        bundle = os.environ.get("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH") if server.scheme == "grpcs" else None
        context.load_verify_locations(bundle or requests.utils.DEFAULT_CA_BUNDLE_PATH)
    if server.scheme.startswith("grpc"):
        context.set_alpn_protocols(["h2"])
    try:
        plain = connect(server.host, server.port, call)
    except (OSError, UnicodeError) as error:
        return unreachable(server.address, error)
    with plain:
        # The server may wait for more data, with or without TLS: that must not take all of the remaining time.
        plain.settimeout(min(2 * ALERT_SECONDS, call.remaining()))
        try:
            with context.wrap_socket(plain, server_hostname=server.host) as wrapped:
                if not server.secure:
                    return _speaks_tls(server)
                wrapped.settimeout(min(ALERT_SECONDS, call.remaining()))
                # gRPC servers close the connection without an alert.
                return (
                    None
                    if wrapped.recv(1)
                    else ServerError(
                        f"{server.address} {_refused(tls, 'it closes the connection after the handshake')}"
                    )
                )
        except ssl.SSLError as error:
            if server.secure:
                return explain(error, server, tls)
            return _speaks_tls(server) if "ALERT" in (error.reason or "") else None
        except OSError:
            return None


def explain(error: ssl.SSLError, server: Server, tls: Tls) -> ServerError:
    """The error for a TLS failure."""
    code, message = getattr(error, "verify_code", None), error.reason or ""
    alert = message.partition("ALERT_")[2].replace("_", " ").lower()
    if code in _NAME_MISMATCH:
        what = f"has a certificate for another name than {server.host}: give the name in the certificate"
    elif code in _NOT_VALID_NOW:
        what = "has a certificate that is not valid now: it has expired, or a clock is wrong"
    elif code is not None:
        what = f"has a certificate that is not trusted ({getattr(error, 'verify_message', '')}): "
        what += f"{tls.ca_file} did not sign it; " if tls.ca_file else ""
        what += "give the CA that signed it as `ca_file`"
    elif alert in _CERTIFICATE_ALERTS:
        what = _refused(tls, f"TLS alert: {alert}")
    elif alert:
        what = f"refuses the TLS connection (TLS alert: {alert})"
    elif message in _NOT_TLS:
        what = f"does not speak TLS: give {server.scheme[:-1]}://"
    elif isinstance(error, ssl.SSLEOFError):
        what = f"closed the connection while TLS was set up: if it does not speak TLS, give {server.scheme[:-1]}://"
    else:
        what = f"cannot be reached over TLS: {message or error}"
    return ServerError(one_line(f"{server.address} {what}"))


def _refused(tls: Tls, how: str) -> str:
    if tls.cert_file is None:
        return f"requires a client certificate: give `cert_file` and `key_file` ({how})"
    return f"does not accept the certificate in `cert_file` {tls.cert_file} ({how})"


def unreachable(address: str, error: BaseException) -> ServerError:
    """The error for a connection that could not be made."""
    if isinstance(error, socket.gaierror | UnicodeError):
        return ServerError(f"no server answers at {address}: there is no host of this name")
    return ServerError(f"no server answers at {address}: start one (python -m tfclm.serve) or give its URL")


def _speaks_tls(server: Server) -> ServerError:
    return ServerError(
        f"{server.address} speaks TLS: give {server.scheme}s://, and the CA that signed its certificate as `ca_file`"
    )
