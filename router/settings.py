"""The router's settings, from arguments or from the environment (TKNP_ROUTER_PORT, ...)."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from router.types import Endpoint, Role

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Urls = Annotated[tuple[str, ...], NoDecode]


class RouterSettings(BaseSettings):
    """Each field: unit, default and the reason for it. Lists are comma-separated in the environment."""

    model_config = SettingsConfigDict(env_prefix="TKNP_ROUTER_", extra="forbid", frozen=True)

    host: str = Field(default="127.0.0.1", description="Address to listen on; this machine only unless told otherwise.")
    port: int = Field(
        default=8000, ge=0, le=65_535, description="Port to listen on; 8000 as vLLM's. 0 takes a free one."
    )
    prefill_urls: Urls = Field(default=(), description="Prefill engines, such as http://10.0.0.5:8100.")
    decode_urls: Urls = Field(default=(), description="Decode engines, such as http://10.0.0.6:8200.")

    connect_timeout: Seconds = Field(
        default=5.0, description="Seconds to connect to an engine; a busy host still accepts within one or two."
    )
    prefill_timeout: Seconds = Field(
        default=600.0,
        description="Seconds for the prefill leg, its queue included; a long prompt on CPU takes minutes.",
    )
    first_token_timeout: Seconds = Field(
        default=600.0,
        description="Seconds from the decode leg's start to its first token; covers the engine's own queue.",
    )
    between_chunks_timeout: Seconds = Field(
        default=120.0, description="Seconds between two chunks of a stream, whether the engine or the client stalls."
    )
    generation_timeout: Seconds = Field(
        default=3600.0,
        description="Seconds for a whole answer that is not streamed; nothing is seen of it before its end.",
    )
    body_timeout: Seconds = Field(
        default=60.0, description="Seconds for a client to send its body, against slow senders."
    )
    shutdown_timeout: Seconds = Field(default=30.0, description="Seconds that open requests get to end after SIGTERM.")

    max_body_bytes: int = Field(
        default=32 * 2**20, ge=1024, description="Bytes of a request body; a million tokens as text is about 5 MiB."
    )
    max_header_bytes: int = Field(
        default=32 * 2**10, ge=1024, description="Bytes of a request's headers; 4 times what browsers and proxies send."
    )

    health_check_interval: Seconds = Field(
        default=1.0, description="Seconds between two checks of an engine; a dead one costs at most this long."
    )
    health_check_timeout: Seconds = Field(
        default=5.0, description="Seconds for one check; an engine on a loaded CPU answers late, and is not dead."
    )
    health_check_failures: int = Field(
        default=3,
        ge=1,
        description="Checks in a row that time out before an engine is down; a refused connection needs one.",
    )
    generation_check_interval: Seconds = Field(
        default=30.0,
        description="Seconds between two checks that an engine still generates; one token, which costs a step.",
    )
    generation_check_timeout: Seconds = Field(
        default=30.0,
        description="Seconds for that token; a prompt that came before it computes for as long on a CPU.",
    )
    breaker_failures: int = Field(
        default=5,
        ge=1,
        description="Requests in a row that fail on an engine before it gets no more until it has generated again.",
    )
    models_interval: Seconds = Field(
        default=60.0,
        description="Seconds that an engine's list of models is kept; adapters can be loaded while it runs.",
    )
    num_retries: int = Field(
        default=2,
        ge=0,
        le=10,
        description="Further attempts on other engines while the client got nothing; each may cost a prefill.",
    )

    retry_ratio: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Retries, other than after an engine's death, as a share of all requests; no overload multiplies.",
    )
    retry_reserve: int = Field(
        default=20,
        ge=1,
        description="Retries that are there beyond that share, for a router that has seen few requests.",
    )
    continue_streams: bool = Field(
        default=True,
        description="Go on with a stream on another engine when its engine dies; costs about 1 us a chunk.",
    )
    drain_seconds: float = Field(
        default=0.0,
        ge=0,
        le=600,
        description="Seconds that /ready says no before SIGTERM closes the port; set it to what load balancers need.",
    )

    record_transfers: bool = Field(
        default=True,
        description="Ask the decode engine what each hand-off moved; one small request per request, afterwards.",
    )
    num_request_records: int = Field(
        default=1000, ge=1, description="Finished requests kept for GET /requests/{id}; about 2 KiB each."
    )

    @field_validator("prefill_urls", "decode_urls", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("prefill_urls", "decode_urls")
    @classmethod
    def _check(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        cleaned = tuple(url.rstrip("/") for url in urls)
        for url in cleaned:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.path or parts.query or "@" in url:
                raise ValueError(f"an engine is http://host:port without a path, not {url!r}")
        if len(set(cleaned)) != len(cleaned):
            raise ValueError("the same engine is listed twice")
        return cleaned

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Every engine that the settings name, prefill first."""
        prefill = tuple(Endpoint(Role.PREFILL, url) for url in self.prefill_urls)
        return prefill + tuple(Endpoint(Role.DECODE, url) for url in self.decode_urls)
