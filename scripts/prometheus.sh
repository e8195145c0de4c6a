#!/usr/bin/env bash
# Puts Prometheus and promtool into .prometheus/: Debian's package, unpacked and not installed, which needs no root.
# Does nothing where apt is missing: the tests then look for both on the machine.
set -euo pipefail
cd "$(dirname "$0")/.."

[ -x .prometheus/usr/bin/prometheus ] && exit
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    echo "No apt here: rules and dashboards are tested with a Prometheus of this machine, if it has one" >&2
    exit
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work" # apt gives its rights up while it downloads, if it has any

fetch() { (cd "$work" && apt-get -qq "$@" download prometheus); }
if ! fetch 2>/dev/null; then # a machine whose lists of packages are empty or old: read them into a folder of our own
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
    own=(-o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache" -o Debug::NoLocking=true)
    apt-get -qq "${own[@]}" update
    fetch "${own[@]}"
fi
rm -rf .prometheus
dpkg-deb --extract "$work"/prometheus_*.deb "$work/unpacked"
mkdir -p .prometheus/usr
mv "$work/unpacked/usr/bin" .prometheus/usr/
