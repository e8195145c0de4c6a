"""The router's settings, from arguments or from the environment (TKNP_ROUTER_PORT, ...)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, FilePath, SecretStr, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from router.discovery import check_discovery
from router.discovery_settings import DiscoverySettings, Seconds
from router.engine_file import check_engine_url
from router.hosts import split_patterns
from router.keys import read_keys
from router.policies import load_policies
from router.tls import make_context
from router.types import Endpoint, Role

Urls = Annotated[tuple[str, ...], NoDecode]


class RouterSettings(DiscoverySettings):
    """Each field: unit, default and the reason for it. Lists are comma-separated in the environment."""

    model_config = SettingsConfigDict(env_prefix="TKNP_ROUTER_", extra="forbid", frozen=True, hide_input_in_errors=True)

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
    stream_kv: bool = Field(
        default=False,
        description="Send the decode leg beside the prefill leg, so that KV cache is pulled while it is computed.",
    )
    stream_kv_spare: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="Share of a rank's KV cache that a prompt, and all that are computed meanwhile, must leave to "
        "spare to be streamed (--stream-kv): its blocks are taken early, and others may need them sooner.",
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

    # Choosing engines: router/policies/ has one file for each policy
    prefill_policy: str = Field(
        default="least_loaded",
        description="How a prefill engine is chosen: least_loaded (by tokens outstanding), round_robin, power_of_two, "
        "prefix_aware or session_affinity.",
    )
    decode_policy: str = Field(
        default="least_loaded", description="How a decode engine is chosen among those with room; the same names."
    )
    session_header: str = Field(
        default="x-session-id",
        description="Header whose value names a request's session, for session_affinity; without it, the field user.",
    )
    default_output_tokens: int = Field(
        default=512,
        ge=1,
        description="Tokens expected of an answer without max_tokens, which may be as long as the context; few are.",
    )
    kv_poll_interval: Seconds = Field(
        default=1.0,
        description="Seconds between two questions to a decode engine for its free KV; one short call to its ranks.",
    )
    local_prefill_tokens: int = Field(
        default=0,
        ge=0,
        description="Prompt tokens, not counting those that a decode engine has cached, up to which it prefills by "
        "itself; 0 for never: where a hand-off costs more than a prefill depends on model and network.",
    )
    pull_back_tokens: int = Field(
        default=0,
        ge=0,
        description="Tokens of a prompt's beginning that a decode engine has cached and the prefill engine has not, "
        "from which the prefill engine pulls them instead of computing them; 0 for never. Engines need --kv-both and "
        "--kv-events-config.",
    )
    decode_only: bool = Field(
        default=True,
        description="Serve from decode engines alone while no prefill engine is up; slower is better than not at all.",
    )

    # Admission
    max_requests_in_flight: int = Field(
        default=4096,
        ge=1,
        description="Requests that engines have at once from this router. Engines queue for themselves, so it is above "
        "what they run at once; it bounds what the router holds, two descriptors and some 50 KiB each.",
    )
    max_queue_length: int = Field(
        default=1024, ge=0, description="Requests that wait when that many are in flight; more would hardly be in time."
    )
    wait_for_room: bool = Field(
        default=False,
        description="Let a request wait in the router's queue until a decode engine's rank can hold it to its end. Off "
        "by default: engines queue for themselves, without a limit on time, and preempt where KV runs out.",
    )
    queue_timeout: Seconds = Field(
        default=60.0, description="Seconds that a request waits in the queue; a client's patience is rarely longer."
    )
    max_requests_per_key: int | None = Field(
        default=None,
        ge=1,
        description="Requests of one API key in the router at once; none by default, and the key file can set another.",
    )

    # Access
    api_keys_file: FilePath | None = Field(
        default=None,
        description="File with the API keys of clients, one a line, or TOML; it is read again when it changes. "
        "None by default: everybody may ask.",
    )
    open_metrics: bool = Field(
        default=False,
        description="Whether /metrics needs no API key; by default it does, for it names engines and keys.",
    )

    max_connections: int = Field(
        default=10_000,
        ge=1,
        description="Connections at once; twice what may run and wait, for clients keep idle ones. Probes are answered "
        "on a few more.",
    )
    header_timeout: Seconds = Field(
        default=75.0,
        description="Seconds for a request's headers, and until a new connection sends anything; longer than load "
        "balancers keep an idle one.",
    )
    cors_allowed_origins: Urls = Field(
        default=(),
        description="Origins whose pages may ask from a browser, such as https://chat.example.org, or * for all; none "
        "by default.",
    )
    ssl_certfile: FilePath | None = Field(
        default=None,
        description="Certificate chain (PEM) to serve HTTPS with; read again when it changes. HTTP if None.",
    )
    ssl_keyfile: FilePath | None = Field(
        default=None, description="Private key (PEM) of the certificate; None if it stands in the same file."
    )
    ssl_ca_certs: FilePath | None = Field(
        default=None, description="CA certificates (PEM); only clients with a certificate of one of them are let in."
    )

    # Trust between the router and its engines
    allowed_engine_hosts: Urls = Field(
        default=(),
        description="Hosts that a prefill engine may name as the place of its KV cache, beside those of the engines' "
        "URLs: names with * for any part, addresses, networks such as 10.0.0.0/8.",
    )
    engine_api_key: SecretStr | None = Field(
        default=None,
        description="The key that engines were started with (vLLM's --api-key). Options can be seen by others: set "
        "it in the environment, or use the file.",
    )
    engine_api_key_file: FilePath | None = Field(
        default=None, description="File that holds that key and nothing else; as Kubernetes mounts a secret."
    )

    # Names of models
    model_aliases: Annotated[dict[str, str], NoDecode] = Field(
        default={},
        description="Other names of models, as alias=model,...; the answers name the model. None: clients name models.",
    )

    # Observability
    otlp_traces_endpoint: str = Field(
        default="",
        description="OTLP collector of traces, such as http://10.0.0.7:4317; without one nothing is traced.",
    )
    otlp_traces_protocol: Literal["grpc", "http/protobuf"] = Field(
        default="grpc", description="grpc as vLLM's default; http/protobuf needs the path in the endpoint (/v1/traces)."
    )
    trace_sample_ratio: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Share of requests traced where the client did not decide; one costs the router 0.2 ms of CPU.",
    )

    guard_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of greedy requests that one engine alone answers again, to compare; each costs a request.",
    )
    guard_concurrency: int = Field(
        default=1, ge=1, le=64, description="Requests that are repeated at once; one, so that nobody notices."
    )
    guard_tie_tolerance: float = Field(
        default=0.125,
        ge=0,
        description="Nats between the two likeliest tokens that count as a tie; two bfloat16 logits near 20 differ so.",
    )

    @field_validator("prefill_urls", "decode_urls", "cors_allowed_origins", "allowed_engine_hosts", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("prefill_urls", "decode_urls")
    @classmethod
    def _check(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        cleaned = tuple(map(check_engine_url, urls))
        if len(set(cleaned)) != len(cleaned):
            raise ValueError("the same engine is listed twice")
        return cleaned

    @field_validator("model_aliases", mode="before")
    @classmethod
    def _split_aliases(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        if not all(alias.strip() and model.strip() for alias, _, model in pairs):
            raise ValueError(f"an alias is name=model, several are separated by commas, not {value!r}")
        return {alias.strip(): model.strip() for alias, _, model in pairs}

    @field_validator("otlp_traces_endpoint")
    @classmethod
    def _check_collector(cls, url: str) -> str:
        if url and (urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname):
            raise ValueError(f"a collector is http://host:port, not {url!r}")
        return url

    @field_validator("prefill_policy", "decode_policy")
    @classmethod
    def _check_policy(cls, name: str) -> str:
        names = load_policies()
        if name not in names:
            raise ValueError(f"a policy is one of {', '.join(names)}, not {name!r}")
        return name

    @field_validator("allowed_engine_hosts")
    @classmethod
    def _check_hosts(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        split_patterns(patterns)
        return patterns

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        if self.ssl_certfile is not None:
            make_context(self.ssl_certfile, self.ssl_keyfile, self.ssl_ca_certs)
        elif self.ssl_keyfile is not None or self.ssl_ca_certs is not None:
            raise ValueError("--ssl-keyfile and --ssl-ca-certs need --ssl-certfile")
        if self.engine_api_key is not None and self.engine_api_key_file is not None:
            raise ValueError("give either --engine-api-key or --engine-api-key-file")
        key = self.engine_key
        if key is not None and (not key or not all("!" <= char <= "~" for char in key)):
            raise ValueError("the engines' API key must be printable ASCII without spaces, and not empty")
        return self

    @model_validator(mode="after")
    def _check_discovery(self) -> Self:
        check_discovery(self)
        return self

    @field_validator("api_keys_file")
    @classmethod
    def _check_keys(cls, path: Path | None) -> Path | None:
        if path is not None:
            read_keys(path)
        return path

    @property
    def engine_key(self) -> str | None:
        """The key that the router shows to engines."""
        if self.engine_api_key_file is not None:
            return self.engine_api_key_file.read_text(encoding="latin-1").strip()
        return None if self.engine_api_key is None else self.engine_api_key.get_secret_value()

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Every engine that the settings name, prefill first."""
        prefill = tuple(Endpoint(Role.PREFILL, url) for url in self.prefill_urls)
        return prefill + tuple(Endpoint(Role.DECODE, url) for url in self.decode_urls)
