"""The images' recipes: what they copy is enough to install from, and what they say agrees with the chart."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.chart import CHART, find, objects_of, pod_spec
from tknp.common.versions import VLLM_VERSION

ROOT = CHART.parents[2]
RECIPES = sorted((ROOT / "deploy" / "docker").glob("Dockerfile.*[!e]"))
IDS = [path.suffix[1:] for path in RECIPES]


def copied(recipe: Path) -> list[tuple[str, str]]:
    """(source, destination) of what comes from the repository."""
    found = []
    for line in recipe.read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            *sources, destination = line.split()[1:]
            found += [(source, destination) for source in sources]
    return found


def test_there_is_one_for_each_device() -> None:
    assert IDS == ["cpu", "cuda"]


def test_what_is_copied_is_enough_to_install_and_run(tmp_path: Path) -> None:
    in_both = set.intersection(*(set(copied(recipe)) for recipe in RECIPES))
    for source, destination in in_both:
        target = tmp_path / destination.lstrip("/")
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target)
        else:
            target = target / Path(source).name if destination.endswith("/") else target
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, target)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    site = tmp_path / "site"
    subprocess.run([*install, "--target", site, tmp_path / "src"], check=True, timeout=120)
    program = "import router.live, tknp.cli; router.live.live_page(); tknp.cli.main()"
    # -P: not from the folder of the checkout, and not from an editable install of it.
    ended = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {program}", "router", "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=120,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "--drain-seconds" in ended.stdout
    assert (site / "router" / "live.html").is_file()


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_the_build_sees_only_what_is_copied(recipe: Path) -> None:
    lines = recipe.with_name(f"{recipe.name}.dockerignore").read_text().splitlines()
    shown = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    assert shown == {source.split("/")[0] for source, _ in copied(recipe)}


def test_vllm_is_the_version_that_the_project_is_built_on() -> None:
    assert f"ARG VLLM_VERSION={VLLM_VERSION}\n" in RECIPES[1].read_text()
    assert f"\nvllm=={VLLM_VERSION}\n" in (ROOT / "requirements" / "cuda.txt").read_text()


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_the_build_checks_vllm_s_version(recipe: Path) -> None:
    (check,) = re.findall(r"^RUN python3 -c '(.+?)'", recipe.read_text(), re.MULTILINE)
    exec(check, {})  # passes here, where the right version is installed


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_user_and_folders_are_the_chart_s(recipe: Path) -> None:
    text = recipe.read_text()
    spec = pod_spec(find(objects_of("minimal"), "Deployment", "llm-tknp-prefill"))
    user, group = (spec["securityContext"][name] for name in ("runAsUser", "runAsGroup"))
    assert f"\nUSER {user}:{group}\n" in text
    (home,) = re.findall(r"HOME=(\S+)", text)
    container = spec["containers"][0]
    assert home in [mount["mountPath"] for mount in container["volumeMounts"]]
    assert {"name": "HOME", "value": home} in container["env"]
    assert text.rstrip().endswith('ENTRYPOINT ["tknp"]')
    assert container["command"] == ["tknp"]
