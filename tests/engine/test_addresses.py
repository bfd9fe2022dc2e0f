"""Which addresses are public, which an operator may open, and which stay shut."""

from __future__ import annotations

import ipaddress

import pytest

from ritocco.addresses import parse_network, refusal
from ritocco.errors import RequestError

IPV4_REFUSED = (
    "127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254",
    "169.254.0.1", "100.64.0.1", "100.100.100.200", "0.1.2.3", "192.0.0.8", "192.0.0.192", "192.0.2.1",
    "0.0.0.0",  # noqa: S104
    "192.88.99.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1",
    "255.255.255.255", "168.63.129.16",
)  # fmt: skip
IPV6_REFUSED = (
    "::", "::1", "fe80::1", "fec0::1", "fc00::1", "fd00:ec2::254", "fd12::1", "ff02::1", "ff0e::1",
    "2001:db8::1", "100::1", "3fff::1", "5f00::1", "4000::1", "2001:20::1", "2001:2::1",
    "fe80::1%1", "2600::1%1",
)  # fmt: skip
WRAPPED_REFUSED = (
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::ffff:0:127.0.0.1", "::127.0.0.1",
    "::8.8.8.8", "2002:7f00:1::", "2002:a00:1::1", "2002:a9fe:a9fe::", "2001:0:808:808:0:0:80ff:fffe",
    "2001:0:7f00:1:0:0:f7f7:f7f7", "64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::7f00:1", "64:ff9b:1::808:808", "2600::5efe:10.0.0.1", "2600::200:5efe:127.0.0.1",
)  # fmt: skip
PUBLIC = (
    "8.8.8.8", "1.1.1.1", "100.63.255.255", "100.128.0.1", "172.32.0.1", "172.15.255.255", "192.0.1.1",
    "198.20.0.1", "223.255.255.255", "2606:4700::1111", "2001:4860:4860::8888", "::ffff:8.8.8.8",
    "64:ff9b::808:808", "2002:808:808::1", "2600::5efe:8.8.8.8", "2001:0:808:808:0:0:f7f7:f7f7",
)  # fmt: skip


@pytest.mark.parametrize("address", [*IPV4_REFUSED, *IPV6_REFUSED, *WRAPPED_REFUSED])
def test_addresses_that_are_refused(address: str) -> None:
    assert refusal(ipaddress.ip_address(address)) != ""


@pytest.mark.parametrize("address", PUBLIC)
def test_addresses_that_are_allowed(address: str) -> None:
    assert refusal(ipaddress.ip_address(address)) == ""


@pytest.mark.parametrize(
    ("address", "opened", "allowed"),
    [
        ("10.1.2.3", "10.0.0.0/8", True),
        ("11.1.2.3", "10.0.0.0/8", True),  # public anyway
        ("192.168.0.1", "10.0.0.0/8", False),
        ("::ffff:10.1.2.3", "10.0.0.0/8", True),
        ("64:ff9b::a01:203", "10.0.0.0/8", True),
        ("127.0.0.1", "127.0.0.0/8", True),
        ("::1", "::1/128", True),
        ("fd12::1", "fd00::/8", True),
        ("fd00:ec2::254", "fd00::/8", False),
        ("fd20:ce::254", "fd00::/8", False),
        ("169.254.169.254", "0.0.0.0/0", False),
        ("169.254.169.254", "169.254.0.0/16", False),
        ("100.100.100.200", "100.64.0.0/10", False),
        ("100.64.0.9", "100.64.0.0/10", True),
        ("168.63.129.16", "0.0.0.0/0", False),
        ("0.0.0.0", "0.0.0.0/0", False),  # noqa: S104
        ("224.0.0.1", "0.0.0.0/0", False),
        ("fe80::1", "::/0", False),
        ("::", "::/0", False),
        ("::ffff:169.254.169.254", "::/0", False),
        ("64:ff9b::a9fe:a9fe", "::/0", False),
        ("64:ff9b:1::a9fe:a9fe", "64:ff9b:1::/48", False),
        ("2002:a9fe:a9fe::1", "2002::/16", False),
        ("::169.254.169.254", "::/0", False),
        ("fd12::5efe:169.254.169.254", "fd00::/8", False),
    ],
)
def test_opened_networks(address: str, opened: str, allowed: bool) -> None:
    assert (refusal(ipaddress.ip_address(address), [ipaddress.ip_network(opened)]) == "") is allowed


@pytest.mark.parametrize("network", ["10.0.0.1/8", "10.0.0.0/33", "example.org", "", "::ffff:10.0.0.0/104"])
def test_networks_must_be_cidr(network: str) -> None:
    with pytest.raises(RequestError, match="allow_networks") as caught:
        parse_network(network)
    assert caught.value.field == "allow_networks"
