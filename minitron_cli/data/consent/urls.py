"""URLs of a corpus as (authority, path): the authority is whose robots.txt counts, the path is what it judges.

RFC 9309 gives every scheme, host and port its own robots.txt. `https://Example.COM:443/a#b` and `https://example.com/a`
are one authority, `http://example.com` and `https://example.com:8443` are two others.
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache

_URL = re.compile(r"(?:(https?)://|//)?([^/?#]*)([^#]*)", re.IGNORECASE | re.DOTALL)
_HOST = re.compile(r"[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_LONGEST_HOST = 253


def split_url(url: object) -> tuple[str, str] | None:
    """Authority (`scheme://host[:port]`, normalised) and path with query (as written); None for what is no web URL.

    Without a scheme, as in `example.com/a`, it is https, and the host must have a dot. Fragment and user information
    are dropped. Never raises.
    """
    if not isinstance(url, str):
        return None
    match = _URL.match(url.strip())
    assert match is not None  # every part may be empty
    scheme, netloc, path = match.groups()
    authority = _authority(scheme, netloc)
    if authority is None:
        return None
    return authority, path if path[:1] == "/" else "/" + path


def authority_of(url: object) -> str | None:
    """The authority of a URL or bare domain, or None."""
    parts = split_url(url)
    return None if parts is None else parts[0]


def host_of(authority: str) -> str:
    """The host of a normalised authority, without scheme and port."""
    netloc = authority.partition("://")[2]
    end = netloc.find("]") + 1  # of an IPv6 address, which holds colons itself
    return netloc[:end] if end else netloc.partition(":")[0]


def other_scheme(authority: str) -> str | None:
    """The same host under http for https and the reverse; None where a port is named."""
    scheme, _, netloc = authority.partition("://")
    if host_of(authority) != netloc:
        return None
    return ("http" if scheme == "https" else "https") + "://" + netloc


@lru_cache(maxsize=1 << 16)
def _authority(scheme: str | None, netloc: str) -> str | None:
    """The normalised authority; cached, because hosts repeat."""
    _, user, address = netloc.rpartition("@")
    if user and scheme is None:
        return None  # a mail address
    host, port = _host_and_port(address)
    if host is None or (scheme is None and "." not in host):
        return None
    scheme = (scheme or "https").lower()
    if port and not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
        return None
    if not port or int(port) == _DEFAULT_PORTS[scheme]:
        return f"{scheme}://{host}"
    return f"{scheme}://{host}:{int(port)}"


def _host_and_port(address: str) -> tuple[str | None, str]:
    if address.startswith("["):
        inner, bracket, rest = address[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            return None, ""
        try:
            return f"[{ipaddress.IPv6Address(inner).compressed}]", rest[1:]
        except ValueError:
            return None, ""
    host, _, port = address.partition(":")
    return _host(host), port


def _host(host: str) -> str | None:
    """Lower case, in ASCII (IDNA 2008 with the UTS 46 mapping, as browsers do), without the final dot."""
    if host.isascii():
        host = host.lower()
    else:
        import idna

        try:
            host = idna.encode(host, uts46=True).decode("ascii")
        except (idna.IDNAError, UnicodeError):
            return None
    host = host.removesuffix(".")
    if len(host) > _LONGEST_HOST or not _HOST.fullmatch(host):
        return None
    if host.rpartition(".")[2].isdigit():  # only addresses end in a number
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            return None
    return host
