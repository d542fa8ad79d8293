"""TLS: error messages, whom the client trusts, and the commands of serving/README.md."""

from __future__ import annotations

import os
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from tfclm.client import Client, ServerError
from tfclm.errors import InputError
from tfclm.server.config_files import read_tls

from .doubles import (
    GENERATED,
    grpc_metadata,
    grpc_predictions,
    grpc_server,
    http_reply,
    read_request,
    rest_metadata,
    rest_predictions,
    rest_server,
    tcp_server,
)


@dataclass(frozen=True)
class Authority:
    """A CA in a folder, which signs certificates for servers and clients."""

    folder: Path

    @property
    def ca_file(self) -> str:
        """Its own certificate."""
        return str(self.folder / "ca.crt")

    def sign(self, name: str, *options: str) -> tuple[str, str]:
        """A certificate and its key, with options of `openssl x509`."""
        key, certificate = str(self.folder / f"{name}.key"), str(self.folder / f"{name}.crt")
        request = run("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", key)
        extensions = self.folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={'IP:127.0.0.1' if name != 'elsewhere' else 'DNS:elsewhere.example'}\n")
        signed = ["-CA", self.ca_file, "-CAkey", str(self.folder / "ca.key"), "-CAcreateserial"]
        run("x509", "-req", *signed, "-extfile", str(extensions), "-out", certificate, *options, stdin=request)
        return certificate, key


def run(command: str, *arguments: str, stdin: bytes = b"") -> bytes:
    """Runs openssl."""
    subject = ["-subj", "/CN=test"] if command == "req" else []
    given = ["openssl", command, *arguments, *subject]
    return subprocess.run(given, input=stdin, capture_output=True, check=True, timeout=60).stdout


def make_authority(folder: Path) -> Authority:
    """A CA of its own key."""
    folder.mkdir()
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    run("req", "-x509", *curve, "-keyout", str(folder / "ca.key"), "-out", str(folder / "ca.crt"), "-days", "2")
    return Authority(folder)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA."""
    return make_authority(tmp_path_factory.mktemp("tls") / "ca")


@pytest.fixture(scope="module")
def pair(authority: Authority) -> tuple[str, str]:
    """A certificate for 127.0.0.1, and its key."""
    return authority.sign("server")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA that signs nothing here."""
    return make_authority(tmp_path_factory.mktemp("tls") / "stranger")


def answer(path: str, body: bytes) -> bytes:
    """A server that is well, over REST."""
    return http_reply(rest_metadata() if path.endswith("/metadata") else rest_predictions(GENERATED, 1))


HANDLERS: dict[str, Callable[[bytes, Any], bytes]] = {
    "GetModelMetadata": lambda request, context: grpc_metadata(),
    "Predict": lambda request, context: grpc_predictions(GENERATED, 1),
}


@contextmanager
def secure_server(scheme: str, pair: tuple[str, str], clients: Authority | None = None) -> Iterator[str]:
    """A server with TLS, which requires client certificates of an authority if one is given; gives HOST:PORT."""
    certificate, key = pair
    with ExitStack() as stack:
        if scheme == "https":
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key)
            if clients is not None:
                context.load_verify_locations(clients.ca_file)
                context.verify_mode = ssl.CERT_REQUIRED
            url = stack.enter_context(rest_server(answer, context))
            yield url.removeprefix("https://")
        else:
            credentials = grpc.ssl_server_credentials(
                [(Path(key).read_bytes(), Path(certificate).read_bytes())],
                root_certificates=None if clients is None else Path(clients.ca_file).read_bytes(),
                require_client_auth=clients is not None,
            )
            yield f"127.0.0.1:{stack.enter_context(grpc_server(HANDLERS, credentials))}"


def said(url: str, **arguments: Any) -> str:
    """What the client says of a server that it cannot ask."""
    with Client(url, timeout=20, **arguments) as client, pytest.raises(ServerError) as error:
        client.generate("a")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith((url, f"no server answers at {url}", "the proxy "))
    return str(error.value).replace(url, "URL")


SECURE = pytest.mark.parametrize("scheme", ["https", "grpcs"])


@SECURE
def test_a_trusted_server(scheme: str, authority: Authority, pair: tuple[str, str]):
    """There is no way to name a CA, so that a server of one's own cannot be asked over TLS."""
    with (
        secure_server(scheme, pair) as address,
        Client(f"{scheme}://{address}", ca_file=authority.ca_file) as client,
    ):
        assert client.generate("a").completion == " é"


@SECURE
def test_ca_file_counts_whatever_the_environment_says(
    scheme: str, authority: Authority, pair: tuple[str, str], stranger: Authority, monkeypatch: pytest.MonkeyPatch
):
    """A bundle that the environment names is taken instead of the file that was given."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.setenv(name, stranger.ca_file)
    with (
        secure_server(scheme, pair) as address,
        Client(f"{scheme}://{address}", ca_file=authority.ca_file) as client,
    ):
        assert client.generate("a").completion == " é"


@SECURE
def test_a_certificate_that_is_not_trusted(scheme: str, pair: tuple[str, str], stranger: Authority):
    """Such a server is taken for none: 'no server answers: start one'."""
    with secure_server(scheme, pair) as address:
        assert said(f"{scheme}://{address}").startswith("URL has a certificate that is not trusted (")
        assert said(f"{scheme}://{address}").endswith("give the CA that signed it as `ca_file`")
        told = said(f"{scheme}://{address}", ca_file=stranger.ca_file)
        assert f"{stranger.ca_file} did not sign it" in told


@SECURE
def test_a_certificate_for_another_name(scheme: str, authority: Authority):
    """A wrong name is called a missing server, or a missing CA."""
    with secure_server(scheme, authority.sign("elsewhere")) as address:
        told = said(f"{scheme}://{address}", ca_file=authority.ca_file)
    assert told == "URL has a certificate for another name than 127.0.0.1: give the name in the certificate"


@SECURE
def test_a_certificate_that_has_expired(scheme: str, authority: Authority):
    """As one that is not trusted, for which another CA would be looked for."""
    with secure_server(scheme, authority.sign("expired", "-days", "-1")) as address:
        told = said(f"{scheme}://{address}", ca_file=authority.ca_file)
    assert told == "URL has a certificate that is not valid now: it has expired, or a clock is wrong"


@SECURE
def test_client_certificates(scheme: str, authority: Authority, pair: tuple[str, str], stranger: Authority):
    """A server with client_verify could not be asked, nor did any message say that it wants a certificate."""
    with secure_server(scheme, pair, authority) as address:
        url = f"{scheme}://{address}"
        told = said(url, ca_file=authority.ca_file)
        assert told.startswith("URL requires a client certificate: give `cert_file` and `key_file` (")
        certificate, key = stranger.sign("client")
        told = said(url, ca_file=authority.ca_file, cert_file=certificate, key_file=key)
        assert told.startswith(f"URL does not accept the certificate in `cert_file` {certificate} (")
        certificate, key = authority.sign("client")
        with Client(url, ca_file=authority.ca_file, cert_file=certificate, key_file=key) as client:
            assert client.generate("a").completion == " é"


@SECURE
def test_a_plain_client_of_a_tls_port(scheme: str, pair: tuple[str, str]):
    """'no server answers: start one', where one answers that speaks TLS."""
    with secure_server(scheme, pair) as address:
        plain = scheme[:-1]
        told = said(f"{plain}://{address}")
    assert told == f"URL speaks TLS: give {scheme}://, and the CA that signed its certificate as `ca_file`"


def test_a_plain_client_of_a_proxy_that_explains_itself(pair: tuple[str, str]):
    """nginx answers a request without TLS with HTTP 400, so that the server looks like another program."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)

    def serve(connection: socket.socket) -> None:
        if connection.recv(1, socket.MSG_PEEK) == b"G":
            connection.recv(2**16)
            connection.sendall(http_reply(b"<html>", "400 The plain HTTP request was sent to HTTPS port"))
        else:
            context.wrap_socket(connection, server_side=True).close()

    with tcp_server(serve) as port:
        assert said(f"http://127.0.0.1:{port}").startswith("URL speaks TLS: give https://")


def test_a_tls_client_of_a_plain_port():
    """As if the certificate were wrong, or no server there."""
    with rest_server(answer) as url:
        told = said(url.replace("http", "https"))
        assert told.startswith(("URL does not speak TLS: give http://", "URL closed the connection while TLS"))
        assert "give http://" in told
    with grpc_server(HANDLERS) as port:
        assert said(f"grpcs://127.0.0.1:{port}") == "URL does not speak TLS: give grpc://"


def test_the_other_protocols_port():
    """The ports of REST and gRPC are next to each other: the one for the other was called no server."""
    with rest_server(answer) as url:
        told = said(url.replace("http", "grpc"))
        assert told == "URL does not speak gRPC: for its REST port, give http://"
    with grpc_server(HANDLERS) as port:
        assert said(f"http://127.0.0.1:{port}") == "URL does not speak HTTP: for its gRPC port, give grpc://"


@pytest.mark.parametrize("scheme", ["http", "https", "grpc", "grpcs"])
def test_nothing_listens(scheme: str):
    """Told from TLS's failures, and at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.monotonic()
    told = said(f"{scheme}://127.0.0.1:{port}")
    assert told == "no server answers at URL: start one (python -m tfclm.serve) or give its URL"
    assert time.monotonic() - began < 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ca_file": "/no/such.pem"}, "`ca_file` /no/such.pem: No such file or directory"),
        ({"ca_file": __file__}, "`ca_file` .*: give PEM with one or more certificates"),
        ({"cert_file": "a.pem"}, "`cert_file` goes with `key_file`"),
        ({"key_file": "a.pem"}, "`key_file` goes with `cert_file`"),
        ({"cert_file": __file__, "key_file": __file__}, "give PEM, a certificate and its own key"),
    ],
)
@SECURE
def test_files_that_are_none(scheme: str, arguments: dict[str, Any], message: str):
    """A file that is only found wrong when the server is asked, as one that does not answer."""
    with pytest.raises(InputError, match=message) as error:
        Client(f"{scheme}://127.0.0.1:1", **arguments)
    assert "\n" not in str(error.value)


def test_a_key_with_a_passphrase(authority: Authority, pair: tuple[str, str]):
    """OpenSSL asks for it at the terminal, so that a program hangs."""
    locked = str(authority.folder / "locked.key")
    run("pkey", "-in", pair[1], "-aes256", "-passout", "pass:secret", "-out", locked)
    with pytest.raises(InputError, match=r"`key_file` .*locked\.key is encrypted: give one without a passphrase"):
        Client("grpcs://127.0.0.1:1", cert_file=pair[0], key_file=locked)


def test_tls_files_for_a_plain_url(authority: Authority):
    """A client that was given a CA, and asks without TLS all the same."""
    with pytest.raises(
        InputError, match=r"`url` http://127\.0\.0\.1:1: `ca_file`, `cert_file` and `key_file` go with https://"
    ):
        Client("http://127.0.0.1:1", ca_file=authority.ca_file)


# Proxies, which the environment names


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that names none."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


def test_a_proxy(no_proxy: pytest.MonkeyPatch):
    """Connections of our own that ask the server directly, which the proxy alone can reach."""
    with rest_server(answer) as proxy, Client("http://models.invalid:8501", timeout=20) as client:
        no_proxy.setenv("http_proxy", proxy)
        assert client.generate("a").completion == " é"


def test_a_tunnel_through_a_proxy(no_proxy: pytest.MonkeyPatch, authority: Authority, pair: tuple[str, str]):
    """As above, with TLS to the server within; what the proxy sends has no longer than the call either."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)

    def tunnel(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with context.wrap_socket(connection, server_side=True) as inner:
            while path := read_request(inner)[0]:
                inner.sendall(answer(path, b""))

    def stall(connection: socket.socket) -> None:
        read_request(connection)
        for _ in range(100):
            time.sleep(0.1)
            connection.sendall(b"H")

    for serve, timeout in ((tunnel, 20.0), (stall, 1.0)):
        with (
            tcp_server(serve) as port,
            Client("https://127.0.0.1:1", timeout=timeout, ca_file=authority.ca_file) as client,
        ):
            no_proxy.setenv("https_proxy", f"http://127.0.0.1:{port}")
            if serve is tunnel:
                assert client.generate("a").completion == " é"
            else:
                with pytest.raises(ServerError, match="did not answer within 1 s"):
                    client.generate("a")


def test_a_proxy_that_is_not_there(no_proxy: pytest.MonkeyPatch):
    """A message that blames the server, or that holds the proxy's password."""
    no_proxy.setenv("http_proxy", "http://me:secret@127.0.0.1:9")
    told = said("http://models.invalid:8501")
    assert "the proxy 127.0.0.1:9 does not answer" in told
    assert "secret" not in told


def test_a_password_in_the_url(no_proxy: pytest.MonkeyPatch):
    """Messages end up in logs, with the password of the URL."""
    with Client("http://me:secret@127.0.0.1:9") as client, pytest.raises(ServerError) as error:
        client.generate("a")
    assert str(error.value).startswith("no server answers at http://127.0.0.1:9: ")


# serving/README.md


SERVING_README = Path(__file__).parent.parent.parent / "serving" / "README.md"


def commands() -> list[str]:
    """The shell blocks of the README's section on TLS: make, serve and ask; make for clients, ask; ask over REST."""
    section = SERVING_README.read_text(encoding="utf-8").partition("\n## TLS\n")[2].partition("\n## ")[0]
    return re.findall(r"```sh\n(.*?)```", section, re.DOTALL)


@pytest.mark.slow
def test_the_commands_of_the_readme(tmp_path: Path):
    """Commands that make files which the server or the client cannot read, or flags that are none."""
    import tensorflow as tf
    from server.processes import launcher
    from server.serving_models import Text

    make, start, make_client, ask_as_client, ask_over_rest = commands()
    serve, ask = start.splitlines()
    here = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])}

    def shell(script: str, port: int = 0) -> subprocess.CompletedProcess[str]:
        for written, ours in (("python -m", f"{sys.executable} -m"), (":8500", f":{port}"), (":8443", f":{port}")):
            script = script.replace(written, ours)
        given = ["bash", "-euc", script]
        return subprocess.run(given, cwd=tmp_path, env=here, capture_output=True, text=True, timeout=120)

    module = Text()
    signatures = {"serving_default": module.complete}
    tf.saved_model.save(module, str(tmp_path / "serving_models" / "quickstart" / "1"), signatures=signatures)
    done = shell(make)
    assert done.returncode == 0, done.stderr
    # The server's own reading of the file; a second server would take its time.
    tls = read_tls(str(tmp_path / "ssl.config"))
    assert tls is not None
    with grpc_server(HANDLERS, grpc.ssl_server_credentials([(tls.key, tls.certificate)])) as port:
        assert shell(ask, port).stdout == "The é\n"
    done = shell(make.partition("\n\n")[2] + make_client)
    assert done.returncode == 0, done.stderr
    python, flag, verb, *flags = serve.split()
    assert (python, flag, verb) == ("python", "-m", "tfclm.serve")
    with launcher() as launch:
        port = launch(*flags, first=partial(os.chdir, tmp_path)).listens().grpc_port
        # The model has one signature.
        done = shell(ask_as_client.rstrip() + " --signature serving_default", port)
        assert (done.stdout, done.stderr) == ("The import world\n", "")
        assert "requires a client certificate: give --cert-file and --key-file" in shell(ask, port).stderr
    pair = (str(tmp_path / "server.crt"), str(tmp_path / "server.key"))
    with secure_server("https", pair) as address:
        done = shell(ask_over_rest, int(address.rpartition(":")[2]))
        assert (done.returncode, done.stdout) == (0, "The é\n"), done.stderr
