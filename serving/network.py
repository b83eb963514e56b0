"""Connections with a deadline; optionally to public addresses only.

`Network` is a network backend of httpcore. It resolves a name, checks its addresses, and connects to a checked address.
So a name that later resolves to another address (DNS rebinding) has no effect. TLS certificates are still checked
against the name.

Every wait is split into slices of `SLICE` seconds, between which `Waiting` can end the download. So limits hold in every
phase (name, connection, TLS, headers, body) and against a server that sends one byte at a time.
"""

import contextlib
import errno
import functools
import ipaddress
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import httpcore

# Seconds between checks for a stop or a deadline.
SLICE = 0.2
# Seconds to wait for one address of a name before the next is tried.
CONNECT = 10.0

# Special addresses that Python 3.11 counts as global: IETF protocol assignments (a cloud's metadata server is among
# them), the 6to4 relay, and the address at which Azure's host answers its virtual machines.
SPECIAL = [ipaddress.IPv4Network(network) for network in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")]
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
TUNNELS = [ipaddress.IPv6Network(network) for network in ("2002::/16", "2001::/32")]  # 6to4, Teredo
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class NotPublicError(Exception):
    """The name has no public address."""


class UnknownNameError(Exception):
    """The name cannot be resolved."""


class UnreachableError(Exception):
    """No address of the name accepts a connection."""


class Waiting(Protocol):
    """Limits a connection's waits."""

    def seconds(self) -> float:
        """The longest time to wait now. Raises an exception if the download was stopped or took too long."""

    def received(self) -> None:
        """Called when data was received."""


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public Internet.

    False for private, loopback, link-local (cloud metadata), carrier-grade NAT (100.64.0.0/10), multicast, unspecified
    and reserved addresses, and for IPv6 addresses that carry such an IPv4 address (mapped, NAT64) or tunnel to any.
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        else:
            return ip in GLOBAL_UNICAST and ip.is_global and not any(ip in network for network in TUNNELS)
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in SPECIAL)


class Network(httpcore.NetworkBackend):
    """Opens connections for one download.

    Args:
        waiting: limits the waits.
        public_only: connect to public addresses only (`is_public`).
    """

    def __init__(self, waiting: Waiting, public_only: bool) -> None:
        self.waiting = waiting
        self.public_only = public_only

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Raises NotPublicError, UnknownNameError or UnreachableError, or what `waiting` raises."""
        found = self.resolve(host, port)
        allowed = [one for one in found if not self.public_only or is_public(one[4][0].partition("%")[0])]
        if not allowed:
            raise NotPublicError
        for family, kind, protocol, _, address in allowed:
            try:
                connection = socket.socket(family, kind, protocol)
            except OSError:  # this machine has no IPv6, say
                continue
            try:
                if self.connect(connection, address):
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    return Stream(connection, self.waiting)
            except BaseException:
                connection.close()
                raise
            connection.close()
        raise UnreachableError

    def resolve(self, host: str, port: int) -> list[tuple[Any, ...]]:
        """The addresses of a name, from the system's resolver. It cannot be stopped, so it runs in its own thread."""
        answer: list[Any] = []
        done = threading.Event()

        def ask() -> None:
            # UnicodeError: a label is empty or too long for DNS. OverflowError: the port is above 65535.
            with contextlib.suppress(OSError, UnicodeError, OverflowError):
                answer.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            done.set()

        threading.Thread(target=ask, daemon=True).start()
        while not done.wait(self.waiting.seconds()):
            pass
        if not answer:
            raise UnknownNameError
        return answer

    def connect(self, connection: socket.socket, address: Any) -> bool:
        """Connect, and return whether a server answered. The socket is non-blocking afterwards."""
        connection.setblocking(False)
        if connection.connect_ex(address) not in (0, errno.EINPROGRESS):
            return False
        poll = select.poll()
        poll.register(connection, select.POLLOUT)
        for _ in range(round(CONNECT / SLICE)):
            if poll.poll(1000 * self.waiting.seconds()):
                return connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        return False


class Stream(httpcore.NetworkStream):
    """A connection. `waiting` sets the limits; httpcore's timeouts are ignored."""

    def __init__(self, connection: socket.socket, waiting: Waiting) -> None:
        self.connection = connection
        self.waiting = waiting

    def repeat(self, action: Callable[[], Any]) -> Any:
        """The result of a socket operation, which is retried after each slice."""
        while True:
            self.connection.settimeout(self.waiting.seconds())
            with contextlib.suppress(TimeoutError):
                return action()

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            data = self.repeat(functools.partial(self.connection.recv, max_bytes))
        except OSError as error:
            raise httpcore.ReadError(str(error)) from error
        self.waiting.received()
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        try:
            while buffer:
                buffer = buffer[self.repeat(functools.partial(self.connection.send, buffer)) :]
        except OSError as error:
            raise httpcore.WriteError(str(error)) from error

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """Raises ssl.SSLError; its subclass ssl.SSLCertVerificationError says what is wrong with the certificate."""
        stream = self
        try:
            stream = Stream(
                ssl_context.wrap_socket(
                    self.connection, server_hostname=server_hostname, do_handshake_on_connect=False
                ),
                self.waiting,
            )
            stream.repeat(stream.connection.do_handshake)
        except BaseException as error:
            stream.close()
            if isinstance(error, OSError) and not isinstance(error, ssl.SSLError):
                raise httpcore.ConnectError(str(error)) from error
            raise
        return stream

    def close(self) -> None:
        self.connection.close()

    def get_extra_info(self, info: str) -> Any:
        return self.connection if info == "ssl_object" and isinstance(self.connection, ssl.SSLSocket) else None
