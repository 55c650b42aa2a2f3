"""What an endpoint judge is told: whether its settings can be meant, and the key from its environment variable."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
from urllib.parse import urlsplit

from m3po_jax.config import EndpointConfig
from m3po_jax.errors import UserError
from m3po_jax.reading import check_values

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check_endpoint(config: EndpointConfig) -> None:
    """UserError where the settings cannot be meant; no error shows what may be a secret."""
    where = "score.endpoint"
    if config.api_key_env and not _VARIABLE.fullmatch(config.api_key_env):
        raise UserError(
            "not the name of an environment variable",
            where=f"{where}.api_key_env",
            remedy="name the variable; the key itself must not stand in a recipe",
        )
    url, place = urlsplit(config.base_url), f"{where}.base_url"
    if url.username is not None or url.password is not None or url.query or url.fragment:
        raise UserError(
            "has credentials, a query or a fragment", where=place, remedy="the key comes from api_key_env alone"
        )
    try:
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable:
        raise UserError(
            f"not the address of a server: {config.base_url!r}", where=place, remedy="such as https://host/v1"
        )
    if (
        url.scheme == "http"
        and config.api_key_env
        and not config.allow_insecure
        and not _is_local(url.hostname or "")
    ):
        raise UserError(
            "would send the key unencrypted to another machine",
            where=place,
            remedy="use https, or set score.endpoint.allow_insecure=true in a network of your own",
        )
    if not config.model:
        raise UserError("no model", where=f"{where}.model", remedy="the server's name for the judge")
    check_values(config, where)
    for name, value, what in (("stream", True, "answers in pieces"), ("n", None, "several answers")):
        if name in config.extra_body and config.extra_body[name] not in ((False, None) if value else (1, None)):
            raise UserError(
                f"asks for {what}; one whole answer is read",
                where=f"{where}.extra_body.{name}",
                remedy="leave it out",
            )
    if config.max_cost is not None and not config.prompt_price + config.completion_price > 0:
        raise UserError(
            "a limit without prices", where=f"{where}.max_cost", remedy="set prompt_price and completion_price"
        )


def _is_local(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_client() -> None:
    """UserError where the client is not installed that requests are sent with."""
    if importlib.util.find_spec("openai") is None:
        raise UserError(
            "the endpoint backend needs OpenAI's client",
            where="score.backend",
            remedy="pip install 'm3po-jax[judge]'",
        )


def read_key(config: EndpointConfig) -> str:
    """The key from its environment variable; empty where none is named.

    Raises:
        UserError: the variable is absent, or holds what no header can carry.
    """
    if not config.api_key_env:
        return ""
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise UserError(
            f"the environment variable {config.api_key_env} is not set",
            where="score.endpoint.api_key_env",
            remedy="export it in the shell that starts the run",
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(
            f"the environment variable {config.api_key_env} does not hold a key", where="score.endpoint.api_key_env"
        )
    return key
