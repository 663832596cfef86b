"""Which addresses the director dials for whom.

Attaching infrastructure makes the director talk to addresses that a user names. For who is no admin it dials nothing of
its own machine, of its own link, or of the cloud that it runs in: what answers there trusts the director, not the user.
A name is resolved once for each connection, and exactly an address that was checked is dialled: a name that means
something else a moment later changes nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from fieldlab_common.errors import ConfigurationError, ConnectorError

__all__ = ["AddressPolicy", "networks", "refusal", "resolved"]

MOST = 4  # addresses of one name that are tried
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Where clouds tell their machines' credentials, beside 169.254.169.254, which is link-local.
_METADATA = frozenset(
    map(ipaddress.ip_address, ("fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "168.63.129.16", "192.0.0.192"))
)
_THIS_NETWORK = ipaddress.ip_network("0.0.0.0/8")  # RFC 1122, section 3.2.1.3: a host takes it for itself
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address


@dataclass(frozen=True, kw_only=True)
class AddressPolicy:
    """``guarded``: it is for somebody who is no admin. ``allowed``: networks that an admin allows to everybody."""

    guarded: bool = False
    allowed: tuple[str, ...] = ()


def networks(texts: Sequence[str]) -> tuple[str, ...]:
    """The networks, as they are written.

    Raises:
        ConfigurationError: one is none.
    """
    try:
        return tuple(str(ipaddress.ip_network(text)) for text in texts)
    except ValueError as error:
        raise ConfigurationError(
            f"--allow-address: {error}.", advice="Give an address, or a network like 192.0.2.0/24."
        ) from error


def refusal(address: str, policy: AddressPolicy) -> str:
    """What an address is, if it is not dialled for that reason; empty: it may be dialled."""
    if not policy.guarded:
        return ""
    given = ipaddress.ip_address(address)
    meant = _meant(given)
    allowed = [ipaddress.ip_network(text) for text in policy.allowed]
    if any(one in network for one in (given, meant) for network in allowed if network.version == one.version):
        return ""
    kinds = {
        "a metadata address": meant in _METADATA or str(meant) == "169.254.169.254",
        "a loopback address": meant.is_loopback,
        "an unspecified address": meant.is_unspecified or (meant.version == 4 and meant in _THIS_NETWORK),
        "a link-local address": meant.is_link_local,
        "a multicast address": meant.is_multicast or str(meant) == "255.255.255.255",
    }
    return next((kind for kind, is_it in kinds.items() if is_it), "")


def _meant(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for, if it does; without the name of a link."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    plain = ipaddress.IPv6Address(int(address))
    return plain.ipv4_mapped or plain.sixtofour or plain


async def resolved(host: str, port: int, policy: AddressPolicy) -> tuple[str, ...]:
    """The addresses of a host that may be dialled, in the order in which to try them.

    Raises:
        ConnectorError: it has only others. OSError: it has none.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = dict.fromkeys(str(entry[4][0]) for entry in found)
    why = {address: refusal(address, policy) for address in addresses}
    may = tuple(address for address, reason in why.items() if not reason)
    if not may:
        address, reason = next(iter(why.items()))
        said = f"{host} is {reason}" if address == host else f"{host} is at {address}, {reason}"
        raise ConnectorError(
            f"{said}: the director does not dial that for users.",
            advice="Ask the director's admin to attach it, or to allow it (serve --allow-address).",
            transient=False,
        )
    return may[:MOST]
