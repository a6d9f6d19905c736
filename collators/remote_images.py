"""`fetch_image`: the bytes of a picture that a row names by URL, without letting the row reach into private networks.

Rows may come from strangers, and the machine that trains sees more than they do: cloud metadata, dashboards, routers
(server-side request forgery, https://cheatsheetseries.owasp.org/cheatsheets/Server_Side_Request_Forgery_Prevention_Cheat_Sheet.html).
`http.client` is used since it sends a request over a socket that is already connected, so that the address checked is
the address asked; it knows no proxies, no redirects and no content encodings, and it needs nothing installed, where
`huggingface_hub` went from requests to httpx to httpx2.

A file of its own: the collator is handed this function, so that the collator's own file opens no network. It imports
libraries only, so that it can be pasted into a notebook cell whole.
"""

import http.client
import io
import ipaddress
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from urllib.parse import quote, urljoin, urlsplit

MAX_BYTES = 20_000_000
MAX_SECONDS = 20
MAX_REDIRECTS = 3
PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # RFC 4291; mapped, local and multicast addresses are outside
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: how an IPv6-only network writes IPv4 addresses
# `is_global` of Python 3.11.7 says yes inside all of these, later ones inside some (https://github.com/python/cpython/issues/113171).
NOT_PUBLIC = [
    ipaddress.ip_network(network)
    for network in (
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # 6to4 relays
        "2002::/16",  # 6to4, which holds an IPv4 address
        "3fff::/20",  # documentation
        "168.63.129.16/32",  # every Azure machine's own WireServer
    )
]


def fetch_image(url: str) -> bytes:
    """Get a picture over HTTP, from a public address only. Nothing is cached.

    The host is resolved once, all its addresses must be public, and the connection goes to one of them; so it is for
    each redirect. Any port is allowed. Proxies of the environment are not used. An https server must show a
    certificate that the system trusts (`SSL_CERT_FILE` adds one).

    Args:
        url: http or https, without a user name.

    Returns:
        The body, at most `MAX_BYTES`.

    Raises:
        ValueError: The URL is of another form, leads to an address that is not public or through more than
            `MAX_REDIRECTS` redirects, answers with another status than 200, with an encoded, cut or too large body,
            or with none within `MAX_SECONDS` in all. The message names the URL.
    """
    deadline = time.monotonic() + MAX_SECONDS
    place = url
    try:
        for _ in range(1 + MAX_REDIRECTS):
            found = _get(place, deadline)
            if isinstance(found, bytes):
                return found
            place = urljoin(place, found)
        raise ValueError(f"more than {MAX_REDIRECTS} redirects")
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = f"no answer in time; {MAX_SECONDS} s are allowed" if isinstance(error, TimeoutError) else error
        by_way = "" if place == url else f"redirected to {place.partition('?')[0]}: "
        message = f"{url}: the picture cannot be fetched ({by_way}{reason}). Download it and give the local path."
        raise ValueError(message) from error


def _get(url: str, deadline: float) -> bytes | str:
    """The body, or where the server says it is."""
    parts = urlsplit(url)
    if parts.scheme not in PORTS or not parts.hostname or "@" in parts.netloc:
        raise ValueError("expected http:// or https://, a host, and no user name")
    port = PORTS[parts.scheme] if parts.port is None else parts.port
    connection = http.client.HTTPConnection(parts.hostname, port)
    connection.default_port = PORTS[parts.scheme]
    with closing(_connect(_resolve(parts.hostname, port, deadline), port, deadline)) as plain:
        sock = plain
        if parts.scheme == "https":
            plain.settimeout(_left(deadline))
            sock = ssl.create_default_context().wrap_socket(plain, server_hostname=parts.hostname)
        with closing(sock):
            sock.settimeout(_left(deadline))
            connection.sock = sock
            path = quote(f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}", safe="/?%:@!$&'()*+,;=~[]|")
            connection.request("GET", path, headers={"User-Agent": "llava-recipes"})  # some hosts refuse without one
            response = http.client.HTTPResponse(_Reader(sock, deadline), method="GET")
            response.begin()
            return _read(response)


def _read(response: http.client.HTTPResponse) -> bytes | str:
    location = response.getheader("Location")
    if response.status in REDIRECTS and location:
        return location
    if response.status != 200:
        raise ValueError(f"HTTP status {response.status}; expected 200")
    encoding = response.getheader("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise ValueError(f"the body is encoded as {encoding}, which was not asked for")
    if (response.length or 0) > MAX_BYTES or len(body := response.read(MAX_BYTES + 1)) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes")
    if response.length:
        raise ValueError(f"the body ends {response.length} bytes early")
    return body


def _resolve(host: str, port: int, deadline: float) -> list[str]:
    pool = ThreadPoolExecutor(1)  # `getaddrinfo` takes no timeout
    try:
        found = pool.submit(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM).result(_left(deadline))
    finally:
        pool.shutdown(wait=False)
    addresses = list(dict.fromkeys(info[4][0] for info in found))
    for address in addresses:
        if not _is_public(address):
            raise ValueError(f"{host} is at {address}, which is not public")
    return addresses


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    if ip in NAT64:
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if ip.version == 6 and ip not in GLOBAL_UNICAST:
        return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in NOT_PUBLIC)


def _connect(addresses: list[str], port: int, deadline: float) -> socket.socket:
    """Try each address, then the first once more. They are numbers: nothing is resolved again."""
    for address in [*addresses, addresses[0]]:
        try:
            # Half of what is left: an address that does not answer must leave time for the next.
            return socket.create_connection((address, port), _left(deadline) / 2)
        except OSError as error:
            failure = error
    raise failure


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Reader(io.RawIOBase):
    """What a socket sends before the deadline. The socket's own timeout would start again with each byte."""

    def __init__(self, sock: socket.socket, deadline: float):
        self.sock = sock
        self.deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self.sock.settimeout(_left(self.deadline))
        return self.sock.recv_into(buffer)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)
