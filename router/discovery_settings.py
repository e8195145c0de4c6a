"""The settings of where engines come from, and of moving them between the pools."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, FilePath
from pydantic_settings import BaseSettings

Seconds = Annotated[float, Field(gt=0, le=86_400)]


class DiscoverySettings(BaseSettings):
    """Part of `RouterSettings`."""

    discovery: Literal["static", "file", "kubernetes"] = Field(
        default="static", description="Where engines come from: the two lists of URLs, a file, or Kubernetes' pods."
    )
    engines_file: FilePath | None = Field(
        default=None,
        description="File of --discovery file: a line for each engine, as prefill URL or decode URL; read again when "
        "it changes.",
    )
    kubernetes_namespace: str = Field(
        default="", description="Namespace of the engines' pods; the router's own if empty, for its Role is there."
    )
    kubernetes_selector_prefill: str = Field(
        default="", description="Label selector of prefill engines' pods, such as app=tknp,role=prefill; none if empty."
    )
    kubernetes_selector_decode: str = Field(
        default="", description="Label selector of decode engines' pods; --discovery kubernetes needs it."
    )
    kubernetes_port: str = Field(
        default="http", description="Port of the engines: its number, or the name that the pods' containers give it."
    )

    # Engines that change their role
    flip_roles: bool = Field(
        default=False,
        description="Move engines that were started with --kv-both between the pools when their loads drift apart; "
        "for one router alone, because each would decide for itself.",
    )
    flip_prefill_tokens: int = Field(
        default=16_384,
        ge=1,
        description="Prompt tokens outstanding on each prefill engine from which that pool needs another one; about "
        "what an engine computes in the time that a first token may take.",
    )
    flip_decode_kv: float = Field(
        default=0.9,
        gt=0,
        le=2,
        description="Share of the decode engines' KV cache, promised to requests until their end, from which that pool "
        "needs another engine.",
    )
    flip_hold: Seconds = Field(
        default=30.0, description="Seconds that a pool must be in need without a break; a burst is over by then."
    )
    flip_cooldown: Seconds = Field(
        default=120.0, description="Seconds from one flip to the next; its effect must be seen first."
    )
