"""The address of the teacher service, checked, and its socket."""

from __future__ import annotations

import ipaddress
import socket

from tropd.pipeline.config.sections.model_settings import TeacherConfig
from tropd.storage.errors import ConfigError


def check_address(
    host: str, token: str | None, token_env: str = TeacherConfig.model_fields["token_env"].default
) -> None:
    """Refuse to listen beyond this machine without a token.

    Raises:
        ConfigError: with the fix.
    """
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and token is None:
        raise ConfigError(
            f"service.host = {host!r} is not loopback, and no bearer token is set",
            hint=f'set {token_env} in the environment of service and trainer, or service.host = "127.0.0.1"',
        )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        ConfigError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}",
            hint="set service.port to another port, or to 0 for a free one",
        ) from error
    # Connections inherit this. asyncio does not set it on them, since the socket does not name its protocol, and
    # every answer would wait some 40 ms for the client's delayed acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
