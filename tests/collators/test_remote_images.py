"""`fetch_image` against real servers of this machine, of which one address at most counts as public."""

import gzip
import shutil
import socket
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import collators.remote_images
from collators.remote_images import _is_public, fetch_image

BODY = b"\x89PNG\r\n\x00 any bytes"
BOMB = gzip.compress(bytes(1_000_000))
ANSWERS = {  # what is sent for a path, to the byte; an empty line ends the head
    "/picture.png": b"HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n" + BODY + b"not of the picture",
    "/a%20b%C3%A9?c=%2F&d": b"HTTP/1.0 200 OK\r\n\r\n" + BODY,
    "/until-closed": b"HTTP/1.0 200 OK\r\n\r\n" + BODY,
    "/chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n11\r\n" + BODY + b"\r\n0\r\n\r\n",
    "/moved": b"HTTP/1.1 302 Found\r\nLocation: picture.png\r\n\r\n",
    "/cut": b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n" + BODY,
    "/cut-chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\n" + BODY,
    "/says-large": b"HTTP/1.1 200 OK\r\nContent-Length: 2001\r\n\r\n" + BODY,
    "/large": b"HTTP/1.0 200 OK\r\n\r\n" + bytes(2001),
    "/large-chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"100\r\n%b\r\n" % bytes(256) * 8,
    "/bomb": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB) + BOMB,
    "/missing": b"HTTP/1.1 404 Not Found\r\nContent-Length: 17\r\n\r\n" + BODY,
    "/moved-nowhere": b"HTTP/1.1 302 Found\r\n\r\n",
    "/loop": b"HTTP/1.1 302 Found\r\nLocation: /loop\r\n\r\n",
    "/no-http": b"220 mail.example ESMTP\r\n",
    "/to-ipv4": b"HTTP/1.1 301 Moved\r\nLocation: http://127.0.0.2/secret\r\n\r\n",
    "/to-ipv6": b"HTTP/1.1 307 Moved\r\nLocation: //[::1]/secret\r\n\r\n",
    "/to-file": b"HTTP/1.1 302 Found\r\nLocation: file:///etc/hostname\r\n\r\n",
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.headers["Host"], self.path))
        if not self.path.startswith("/drip"):
            self.wfile.write(ANSWERS[self.path])
            return
        head = b"HTTP/1.1 200 OK\r\nX: "
        if self.path == "/drip-body":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n")
            head = b""
        for byte in head + b"drips for one second":
            try:
                self.wfile.write(bytes([byte]))
            except OSError:
                return
            time.sleep(0.05)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    def verify_request(self, request, address):
        self.connections += 1
        return True


@pytest.fixture
def server():
    with Server(("127.0.0.1", 0), Handler) as server:
        server.asked, server.connections = [], 0
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def public(monkeypatch):
    """127.0.0.1 counts as public, and nothing else."""
    monkeypatch.setattr(collators.remote_images, "_is_public", "127.0.0.1".__eq__)


@pytest.fixture
def names(monkeypatch):
    """What names resolve to: for each, the addresses of the first answer, of the second, …"""
    names, look_up = {}, socket.getaddrinfo

    def answer(host, *args, **kwargs):
        addresses = names[host].pop(0) if host in names else [host]
        return [info for address in addresses for info in look_up(address, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return names


@pytest.mark.parametrize("path", ["/picture.png", "/until-closed", "/chunked", "/moved"])
def test_a_picture_arrives_byte_for_byte(server, public, monkeypatch, path):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert fetch_image(server.url + path) == BODY


def test_a_name_is_asked_once_and_goes_into_the_request(server, public, names):
    """A second answer, of another address, is DNS rebinding."""
    names["pictures.example"] = [["127.0.0.1"], ["127.0.0.2"]]
    place = f"pictures.example:{server.server_port}"
    assert fetch_image(f"http://{place}/a bé?c=%2F&d#e") == BODY
    assert names["pictures.example"] == [["127.0.0.2"]]
    assert server.asked == [(place, "/a%20b%C3%A9?c=%2F&d")]


def test_the_next_address_is_tried_where_one_does_not_answer(server, monkeypatch, names):
    monkeypatch.setattr(collators.remote_images, "_is_public", {"127.0.0.1", "127.0.0.3"}.__contains__)
    names["pictures.example"] = [["127.0.0.3", "127.0.0.1"]]
    assert fetch_image(f"http://pictures.example:{server.server_port}/picture.png") == BODY


def test_nothing_connects_to_a_private_address(server, names):
    names["both.example"] = [["93.184.215.14", "127.0.0.1"]]
    for host in ("127.0.0.1", "localhost", "2130706433", "both.example"):
        with pytest.raises(ValueError, match=rf"^http://{host}:.* is at (127\.0\.0\.1|::1), which is not public"):
            fetch_image(f"http://{host}:{server.server_port}/picture.png")
    assert server.connections == 0


@pytest.mark.parametrize(
    "address, expected",
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("64:ff9b::5db8:d70e", True),  # NAT64 of the first
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("168.63.129.16", False),
        ("169.254.169.254", False),
        ("172.16.0.1", False),
        ("192.0.0.192", False),
        ("192.168.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::127.0.0.1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::a9fe:a9fe", False),  # NAT64 of 169.254.169.254
        ("64:ff9b:1::a9fe:a9fe", False),
        ("2001:0:5db8:d70e::1", False),
        ("2002:7f00:1::", False),
        ("fd00:ec2::254", False),
        ("fe80::1%eth0", False),
        ("fec0::1", False),
        ("ff0e::1", False),
    ],
)
def test_public_addresses(address, expected):
    assert _is_public(address) is expected


@pytest.mark.parametrize(
    "path, reason",
    [
        ("/says-large", "more than 2000 bytes"),
        ("/large", "more than 2000 bytes"),
        ("/large-chunks", "more than 2000 bytes"),
        ("/bomb", "encoded as gzip"),
        ("/cut", "ends 23 bytes early|IncompleteRead"),
        ("/cut-chunk", "IncompleteRead"),
        ("/missing", "HTTP status 404; expected 200"),
        ("/moved-nowhere", "HTTP status 302; expected 200"),
        ("/loop", "more than 3 redirects"),
        ("/no-http", "220 mail.example ESMTP"),
        ("/to-ipv4", "redirected to http://127.0.0.2/secret: 127.0.0.2 is at 127.0.0.2, which is not public"),
        ("/to-ipv6", "::1 is at ::1, which is not public"),
        ("/to-file", "redirected to file:///etc/hostname: expected http://"),
    ],
)
def test_a_bad_answer_is_refused(server, public, monkeypatch, path, reason):
    monkeypatch.setattr(collators.remote_images, "MAX_BYTES", 2000)
    with pytest.raises(ValueError, match=reason) as error:
        fetch_image(server.url + path)
    assert str(error.value).startswith(f"{server.url}{path}: the picture cannot be fetched (")
    assert str(error.value).endswith("Download it and give the local path.")
    assert server.connections == (4 if path == "/loop" else 1)


@pytest.mark.parametrize(
    "url, reason",
    [
        ("file:///etc/hostname", "expected http:// or https://"),
        ("ftp://127.0.0.1/a.png", "expected http:// or https://"),
        ("http:///a.png", "expected http:// or https://, a host"),
        ("http://me:secret@127.0.0.1/a.png", "no user name"),
        ("http://127.0.0.1:99999/a.png", "Port out of range"),
        ("http://[::1/a.png", "Invalid IPv6 URL"),
        ("http://a..b/a.png", "label"),
        ("http://127.0.0.1\x00.example/a.png", "control characters"),
    ],
)
def test_a_url_of_another_form_is_refused(public, url, reason):
    with pytest.raises(ValueError, match=rf"\(.*{reason}.*\)\. Download it and give the local path\.$"):
        fetch_image(url)


@pytest.mark.parametrize("path", ["/drip-body", "/drip-head"])
def test_a_server_that_drips_is_cut(server, public, monkeypatch, path):
    monkeypatch.setattr(collators.remote_images, "MAX_SECONDS", 0.3)
    with pytest.raises(ValueError, match="no answer in time; 0.3 s are allowed"):
        fetch_image(server.url + path)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_silent_server_is_cut(public, monkeypatch, scheme):
    monkeypatch.setattr(collators.remote_images, "MAX_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ValueError, match="no answer in time"):
        fetch_image(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}/picture.png")


def test_a_silent_name_server_is_cut(monkeypatch):
    monkeypatch.setattr(collators.remote_images, "MAX_SECONDS", 0.3)
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: [] if over.wait(10) else [])
    with pytest.raises(ValueError, match="no answer in time"):
        fetch_image("http://pictures.example/picture.png")
    over.set()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with the openssl command")
def test_a_certificate_must_be_trusted_and_of_the_host(server, public, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout key -out cert"
    subject = ["-subj", "/CN=pictures", "-addext", "subjectAltName=DNS:pictures.example"]
    subprocess.run([*command.split(), *subject], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("cert", "key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    names |= {"pictures.example": [["127.0.0.1"]] * 2, "other.example": [["127.0.0.1"]]}
    monkeypatch.setitem(collators.remote_images.PORTS, "https", server.server_port)
    url = "https://pictures.example/picture.png"
    with pytest.raises(ValueError, match="self.signed certificate"):
        fetch_image(url)
    monkeypatch.setenv("SSL_CERT_FILE", "cert")
    assert fetch_image(url) == BODY
    with pytest.raises(ValueError, match="certificate is not valid for 'other.example'"):
        fetch_image(url.replace("pictures", "other"))
    assert server.asked == [("pictures.example", "/picture.png")]
