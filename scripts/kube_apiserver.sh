#!/usr/bin/env bash
# Puts a real kube-apiserver and etcd into .kubernetes/bin, for `make test-kubernetes`. Nobody ships the API server as a
# package, so it is built from Debian's source of Kubernetes 1.20, which holds everything that it needs: 6 minutes on
# two idle cores, once. Needs Debian 12, make, gcc and dpkg-dev, but no root: packages are unpacked, not installed.
set -euo pipefail
cd "$(dirname "$0")/.."

source_version=1.20.5+really1.20.2-1.1+deb12u1 version=v1.20.2 # the release that the source says it is
cache=$PWD/.kubernetes
[ -x "$cache/bin/$version/kube-apiserver" ] && [ -x "$cache/bin/$version/etcd" ] && exit

known=$(apt-get indextargets --format '$(REPO_URI)' 'Codename: bookworm' 'Component: main' | sort -u | head -n 1)
mirror=${DEBIAN_MIRROR:-$known}
if [ -z "$mirror" ] || [ "$(dpkg --print-architecture)" != amd64 ]; then
    echo "No mirror of Debian 12 for amd64 is known here: run apt-get update, or set DEBIAN_MIRROR" >&2
    exit 1
fi
work=$cache/build
mkdir -p "$work"/{lists,archives,debs,tools} "$cache/bin"

# An apt of its own: the machine's may have no sources listed, and belongs to root.
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
for kind in deb deb-src; do echo "$kind [signed-by=$keyring] $mirror bookworm main"; done >"$work/sources.list"
options=(-qq -o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=- -o "Dir::State::Lists=$work/lists"
    -o "Dir::Cache=$work" -o "APT::Sandbox::User=$(id -un)")
echo "1/3 Fetching Debian's source of Kubernetes, Go 1.19 and etcd"
apt-get "${options[@]}" update
(cd "$work/debs" && apt-get "${options[@]}" download \
    golang-1.19-go golang-1.19-src etcd-server rsync libpopt0 libxxhash0)
(cd "$work" && apt-get "${options[@]}" source --download-only "kubernetes=$source_version")

echo "2/3 Unpacking"
for package in "$work"/debs/*.deb; do dpkg -x "$package" "$work/tools"; done
rm -rf "$work/source"
dpkg-source --no-check -x "$work"/kubernetes_*.dsc "$work/source"

echo "3/3 Building kube-apiserver: 6 minutes on two idle cores, half an hour on busy ones"
cd "$work/source"
mkdir -p .go/src/k8s.io
ln -sfn ../../.. .go/src/k8s.io/kubernetes
export GOROOT=$work/tools/usr/lib/go-1.19 CGO_ENABLED=0 GOFLAGS=-mod=vendor GOCACHE=$work/go-cache
export PATH=$GOROOT/bin:$work/tools/usr/bin:$PATH LD_LIBRARY_PATH=$work/tools/usr/lib/x86_64-linux-gnu
make WHAT=cmd/kube-apiserver KUBE_GIT_VERSION=$version
cd - >/dev/null
mkdir -p "$cache/bin/$version"
cp "$work/tools/usr/bin/etcd" "$cache/bin/$version/"
cp "$(find "$work/source/_output" -name kube-apiserver -type f -perm -u+x | head -n 1)" "$cache/bin/$version/"
rm -rf "$work"
echo "Done: $cache/bin/$version"
