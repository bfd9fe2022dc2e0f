"""Which addresses may be fetched from: IANA's special-purpose registries, and what the operator opened.

Source: the IPv4 and IPv6 special-purpose address registries; RFC 4291 (IPv4-mapped), 3056 (6to4), 4380
(Teredo), 6052 and 8215 (NAT64), 5214 (ISATAP).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import TypeAlias

from ritocco.errors import RequestError

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


def _networks(*texts: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


# Never opened, not even inside an opened network: what has no business behind a picture's URL.
_NEVER: tuple[Network, ...] = _networks(
    *("0.0.0.0/8", "::/128"),  # "this host", which reaches loopback
    *("224.0.0.0/4", "255.255.255.255/32", "ff00::/8"),  # multicast, broadcast
    *("169.254.0.0/16", "fe80::/10"),  # link-local; the metadata service of most clouds is 169.254.169.254
    *("fd00:ec2::254/128", "fd20:ce::254/128"),  # metadata: Amazon and Google over IPv6
    *("100.100.100.200/32", "192.0.0.192/32"),  # metadata: Alibaba, Oracle
    *("168.63.129.16/32",),  # Azure's wire server: a public address that only its machines reach
)
# Special-purpose blocks that `is_global` of some supported Python version takes for global.
_NOT_GLOBAL: tuple[Network, ...] = _networks(
    *("100.64.0.0/10", "192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15", "240.0.0.0/4"),
    *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
)
_GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_WRAPS_IN_LAST_32_BITS: tuple[Network, ...] = _networks(
    "64:ff9b::/96", "64:ff9b:1::/48", "::/96", "::ffff:0:0:0/96"
)
_ISATAP = re.compile(r":0[02]00:5efe:[0-9a-f]{4}:[0-9a-f]{4}$")


def _inner_addresses(address: ipaddress.IPv6Address) -> tuple[ipaddress.IPv4Address, ...]:
    """The IPv4 addresses that a transition mechanism could deliver this IPv6 address to."""
    found: list[ipaddress.IPv4Address] = []
    if address.sixtofour is not None:
        found.append(address.sixtofour)
    if address.teredo is not None:
        found.extend(address.teredo)
    wraps = any(address in network for network in _WRAPS_IN_LAST_32_BITS) and int(address) > 1
    if wraps or _ISATAP.search(address.exploded):
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return tuple(found)


def refusal(address: Address, opened: Iterable[Network] = ()) -> str:
    """Why this address may not be fetched from; empty where it may.

    opened: what the operator opened; link-local, metadata, multicast and unspecified stay refused.
    """
    opened = tuple(opened)
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return "has a zone id"
        if address.ipv4_mapped is not None:
            return refusal(address.ipv4_mapped, opened)
    inner = _inner_addresses(address) if isinstance(address, ipaddress.IPv6Address) else ()
    if any(one in network for one in (address, *inner) for network in _NEVER):
        return "is link-local, metadata, multicast or unspecified and never allowed"
    if any(address in network for network in opened):
        return ""
    tunnelled = isinstance(address, ipaddress.IPv6Address) and (
        address in _NAT64 or address.sixtofour is not None or address.teredo is not None
    )
    for one in inner:
        if why := refusal(one, opened):
            return f"wraps {one}, which {why}"
    if tunnelled:
        return ""
    routed = isinstance(address, ipaddress.IPv4Address) or address in _GLOBAL_IPV6
    if routed and address.is_global and not any(address in network for network in _NOT_GLOBAL):
        return ""
    return "is not a public address and in no network that the operator opened"


def parse_network(text: str) -> Network:
    """A network in CIDR notation; raises RequestError, field `allow_networks`, for anything else."""
    try:
        network = ipaddress.ip_network(text.strip())
    except ValueError as error:
        raise RequestError(
            f"allow_networks: {text!r} is not a network in CIDR notation such as 10.0.0.0/8 ({error})",
            field="allow_networks",
        ) from error
    if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped is not None:
        raise RequestError(
            f"allow_networks: {text!r} wraps IPv4; write the IPv4 network itself", field="allow_networks"
        )
    return network
