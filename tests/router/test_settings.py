from __future__ import annotations

import pytest
from pydantic import ValidationError

from router.settings import RouterSettings
from router.types import Role


def test_the_environment_sets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TKNP_ROUTER_PORT", "9000")
    monkeypatch.setenv("TKNP_ROUTER_PREFILL_URLS", "http://a:1/, http://b:2")
    settings = RouterSettings(decode_urls=("https://c:3",))
    assert settings.port == 9000
    assert [(e.role, e.url, e.name) for e in settings.endpoints] == [
        (Role.PREFILL, "http://a:1", "a:1"),
        (Role.PREFILL, "http://b:2", "b:2"),
        (Role.DECODE, "https://c:3", "c:3"),
    ]


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a:1", "http://", "http://a:1/v1", "http://u:p@a:1"])
def test_bad_urls_are_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="http://host:port"):
        RouterSettings(prefill_urls=(url,))


def test_an_engine_listed_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match="twice"):
        RouterSettings(decode_urls=("http://a:1", "http://a:1/"))


def test_aliases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TKNP_ROUTER_MODEL_ALIASES", "gpt-4o=org/small, gpt-4 = org/small,")
    assert RouterSettings().model_aliases == {"gpt-4o": "org/small", "gpt-4": "org/small"}
    assert RouterSettings(model_aliases={"a": "b"}).model_aliases == {"a": "b"}
    for bad in ("gpt-4o", "=small", "gpt-4o="):
        with pytest.raises(ValidationError, match="name=model"):
            RouterSettings(model_aliases=bad)  # type: ignore[arg-type]


def test_every_field_says_what_it_is_for() -> None:
    for name, field in RouterSettings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


@pytest.mark.parametrize("fields", [{"connect_timeout": 0}, {"num_retries": -1}, {"port": 70_000}, {"unknown": 1}])
def test_values_out_of_range_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        RouterSettings(**fields)  # type: ignore[arg-type]
