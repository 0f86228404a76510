"""Reads the launcher's settings messages and trusts nothing in them.

PostgreSQL has checked types and ranges, but the library and this Python may be of two versions while a package is
upgraded.  Nobody else imports this module, or pydantic: it takes more memory than a supervisor needs for everything
else, so a message is checked in a process of its own (``supervisor.vetting``).
"""

from __future__ import annotations

import os
import re
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass

from config.settings import PREFIX, Config, Server, Settings, gucs, parse_address

# What fits into sockaddr_un.
_SOCKET_PATH_BYTES = 107


@dataclass(frozen=True)
class _Settings(Settings):
    """The settings, from the texts that pg_settings shows."""

    def without_pydantic(self) -> Settings:
        """The same, of the class that everybody else knows."""
        return Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})

    @field_validator("listen_addr", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """PostgreSQL's list text to a tuple."""
        if isinstance(value, str):
            return tuple(item for item in map(str.strip, value.split(",")) if item not in ("", "-"))
        return value

    @field_validator("unix_socket_permissions", mode="before")
    @classmethod
    def _read_octal(cls, value: Any) -> Any:
        if isinstance(value, str):
            if not re.fullmatch(r"[0-7]{1,4}", value, re.ASCII):
                raise ValueError("an octal number is needed")
            return int(value, 8)
        return value

    @field_validator("*")
    @classmethod
    def _check_bounds(cls, value: Any, info: ValidationInfo) -> Any:
        bounds = gucs()[info.field_name or ""].bounds
        if bounds and not bounds[0] <= value <= bounds[1]:
            raise ValueError(f"the range is {bounds[0]} .. {bounds[1]}")
        return value

    @field_validator("listen_addr")
    @classmethod
    def _check_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            parse_address(address)
        return value

    @field_validator("listen_unix", "python", "state_dir")
    @classmethod
    def _check_path(cls, value: str) -> str:
        if value and not value.startswith("/"):
            raise ValueError("an absolute path is needed")
        return value

    @field_validator("listen_unix")
    @classmethod
    def _check_socket_path(cls, value: str) -> str:
        if len(os.fsencode(value)) > _SOCKET_PATH_BYTES:
            raise ValueError(f"the path of a Unix socket has at most {_SOCKET_PATH_BYTES} bytes")
        return value


@dataclass(frozen=True)
class _Message:
    settings: _Settings
    server: Server


_message = TypeAdapter(_Message)


def checked(text: bytes | str) -> Config:
    """Read a settings message, JSON with the rows of pg_settings (by name without prefix) and what a worker must know.

    A missing setting has its default and an unknown one is passed over: the library may be of another version.  Raises
    ValueError, in one line and by the settings' names, without their values.
    """
    try:
        message = _message.validate_json(text)
    except ValidationError as error:
        raise ValueError(_explained(error)) from None
    return Config(message.settings.without_pydantic(), message.server)


def _explained(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        where = [str(part) for part in item["loc"]]
        name = f"{PREFIX}{where[-1]}" if where[:1] == ["settings"] else ".".join(where)
        lines.append(f"{name or 'settings message'}: {item['msg']}")
    return "; ".join(lines)
