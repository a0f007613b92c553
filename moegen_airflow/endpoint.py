"""Where the job service is and how to speak to it, as an Airflow connection says."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import httpx

from moegen_airflow.exceptions import MoegenInputError

if TYPE_CHECKING:
    from airflow.sdk import Connection


@dataclass(frozen=True)
class Endpoint:
    """One connection, read and checked."""

    url: str  # without a slash at the end
    token: str | None = field(default=None, repr=False)
    default_model: str | None = None
    verify_ssl: bool = True
    ca_cert: str | None = None  # path of a PEM file
    request_timeout_s: float = 30.0

    @classmethod
    def from_connection(cls, connection: Connection, extra: Mapping[str, Any]) -> Endpoint:
        """Raises `MoegenInputError` naming the connection and the field that cannot be used."""
        return cls(
            url=_url(connection),
            token=connection.password or None,
            default_model=extra.get("default_model") or None,
            verify_ssl=_flag(extra.get("verify_ssl"), connection),
            ca_cert=extra.get("ca_cert") or None,
            request_timeout_s=_seconds(extra.get("request_timeout"), connection),
        )

    @cached_property
    def verify(self) -> ssl.SSLContext | bool:
        # Built once: loading the authorities takes longer than a poll, and the triggerer has one thread for all.
        if not self.verify_ssl or self.url.startswith("http://"):
            return False
        try:
            return ssl.create_default_context(cafile=self.ca_cert)
        except OSError as error:
            raise MoegenInputError(f"ca_cert: {self.ca_cert!r} cannot be loaded ({error}); name a PEM file") from error

    @property
    def client_options(self) -> dict[str, Any]:
        """Keyword arguments of `httpx.Client` and `httpx.AsyncClient`."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return {"base_url": self.url, "headers": headers, "verify": self.verify, "timeout": self.request_timeout_s}


def _url(connection: Connection) -> str:
    where = f"connection {connection.conn_id}: host"
    return service_url(connection.host or "", where, connection.schema or "http", connection.port)


def service_url(host: str, where: str, scheme: str = "http", port: int | None = None) -> str:
    """The service's URL of a host that may be one already. Raises `MoegenInputError`, beginning with `where`."""
    host = host.strip()
    if not host:
        raise MoegenInputError(f"{where} is empty; give the service's URL, as in http://moegen:8080")
    try:
        url = httpx.URL(host if "://" in host else f"{scheme}://{host}")
    except httpx.InvalidURL as error:
        raise MoegenInputError(f"{where}: {host!r} is not a URL ({error}); write http://moegen:8080") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise MoegenInputError(f"{where}: {str(url)!r} cannot be used; give an http:// or https:// URL")
    if url.port is None and port:
        url = url.copy_with(port=port)
    return str(url).rstrip("/")


def _flag(value: object, connection: Connection) -> bool:
    """Connection URIs carry text where the form carries true or false."""
    flags = {"": True, "none": True, "true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if (text := str(value).strip().lower()) not in flags:
        raise MoegenInputError(f"connection {connection.conn_id}: verify_ssl: {value!r} is not true or false")
    return flags[text]


def _seconds(value: object, connection: Connection) -> float:
    try:
        seconds = float(str(value or 30))
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise MoegenInputError(
            f"connection {connection.conn_id}: request_timeout: {value!r} cannot be used; give seconds above 0"
        )
    return seconds
