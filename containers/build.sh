#!/usr/bin/env bash
# Builds the Apptainer image of this checkout:
#
#   containers/build.sh [cpu|gpu] [OUT.sif]
#
# Apptainer comes from containers/install_apptainer.sh or the distribution. The environment may say:
#   BASE=docker://debian:12   begin from this image of Debian 12 instead of debootstrap, which wants root or --fakeroot
#   DEBIAN_MIRROR=URL         Debian's mirror; else the one that this machine's own apt uses
#   UV_*INDEX*, UV_HTTP_TIMEOUT, SSL_CERT_FILE, *_proxy ...   reach the build, and do not stay in the image
#   APPTAINER_TMPDIR=FOLDER   with room for the build (8 GB; gpu 20 GB); else TMPDIR, else /tmp
set -euo pipefail
umask 022  # whoever uses the image must be able to read it

fail() { printf 'containers/build.sh: %s\n' "$1" >&2; exit "${2:-1}"; }

checkout=$(cd "$(dirname "$0")/.." && pwd)
variant=${1:-cpu}
case $variant in
    cpu) needed_gb=8 ;;
    gpu) needed_gb=20 ;;
    *) fail "there is no image '$variant'. Allowed: cpu, gpu. Example: containers/build.sh cpu cellhpc-cpu.sif" 2 ;;
esac
out=$(realpath -m "${2:-$checkout/containers/cellhpc-$variant.sif}")
[ -d "$(dirname "$out")" ] || fail "the folder $(dirname "$out") does not exist. Make it, or name another OUT.sif." 2
[ ! -d "$out" ] || fail "$out is a folder. Name a file: containers/build.sh $variant $out/cellhpc-$variant.sif" 2
base=${BASE:-debootstrap}
case $base in
    debootstrap | *:?*) ;;
    *) fail "BASE=$base names no source. Example: BASE=docker://debian:12 containers/build.sh $variant" 2 ;;
esac

# The tools
apptainer=$(PATH=$PATH:/opt/apptainer/usr/bin:$HOME/.local/apptainer/usr/bin command -v apptainer) ||
    fail "there is no apptainer. Install it: containers/install_apptainer.sh"
command -v mksquashfs > /dev/null || fail "there is no mksquashfs. On Debian: apt-get install squashfs-tools"
temporary=${APPTAINER_TMPDIR:-${TMPDIR:-/tmp}}
free_gb=$(($(df --output=avail -k "$temporary" | tail -n 1) / 1000000))
((free_gb >= needed_gb)) ||
    fail "$temporary has $free_gb GB free, and the build needs $needed_gb. Name another: APPTAINER_TMPDIR=FOLDER"
dropped=$("$checkout/containers/capabilities.sh" lost)
[ -z "$dropped" ] || export APPTAINER_DROP_CAPS=$dropped

# Where the base comes from
mirror='' security=''
if [ "$base" = debootstrap ]; then
    command -v debootstrap > /dev/null || [ -x /usr/sbin/debootstrap ] || fail "there is no debootstrap. On Debian: \
apt-get install debootstrap. Or begin from an image: BASE=docker://debian:12 containers/build.sh $variant"
    archive() { # the first address that apt has for this part of Debian
        apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' "Label: $1" 2> /dev/null |
            sed -n 1p || true
    }
    mirror=${DEBIAN_MIRROR:-$(archive Debian)}
    [ -n "$mirror" ] || fail "this machine's apt knows no mirror of Debian. Name one: DEBIAN_MIRROR=URL containers/build.sh \
$variant. On a Debian machine whose lists are empty: apt-get update"
    [ -n "${DEBIAN_MIRROR:-}" ] || security=$(archive Debian-Security)
    bootstrap=debootstrap from=none
else
    bootstrap=${base%%:*} from=${base#*:}
    from=${from#//}
fi

# What goes into the build: sources, uv, and how to reach the registries from here. Only the owner can read it.
build=$(mktemp -d "$temporary/cellhpc-build.XXXXXX")
partial=$out.partial.$$
trap 'rm -rf "$build" "$partial"' EXIT
make --no-print-directory -C "$checkout" .uv/bin/uv > /dev/null || fail "uv could not be had by: make .uv/bin/uv"
cp "$checkout/.uv/bin/uv" "$build/uv"
mkdir "$build/checkout"
sources=(pyproject.toml uv.lock README.md LICENSE cellhpc)
tar -C "$checkout" -c --exclude=__pycache__ "${sources[@]}" | tar -C "$build/checkout" -x
: > "$build/sources.list"
[ -z "$mirror" ] || echo "deb $mirror bookworm main" >> "$build/sources.list"
[ -z "$security" ] || echo "deb $security bookworm-security main" >> "$build/sources.list"
for name in $(compgen -e | grep -E '^UV_(.*INDEX.*|KEYRING.*|SYSTEM_CERTS|INSECURE_HOST|HTTP.*)$|^(https?|all|no)_proxy$|^(HTTPS?|ALL|NO)_PROXY$'); do
    printf 'export %s=%q\n' "$name" "${!name}"
done > "$build/environment"
certificates=${SSL_CERT_FILE:-${PIP_CERT:-}}
if [ -n "$certificates" ]; then
    cp "$certificates" "$build/certificates"
    echo 'export SSL_CERT_FILE=/build/certificates' >> "$build/environment"
fi
version=$(sed -n '/^version = /{s/.*"\(.*\)"/\1/p;q}' "$checkout/pyproject.toml")
commit=$(git -C "$checkout" rev-parse HEAD 2> /dev/null || echo unknown)
[ "$commit" = unknown ] || [ -z "$(git -C "$checkout" status --porcelain -- "${sources[@]}")" ] || commit+=-dirty

# Horovod is compiled in the image, once for each lock file, way of building it, and base: kept here, 20 MB.
recipe() { cat pyproject.toml uv.lock && sed -n '/^%post/,/^%environment/p' "containers/$variant.def" && echo "$base"; }
ingredients=$(cd "$checkout" && recipe | sha256sum | cut -c 1-12)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/cellhpc/image-$variant-$ingredients
mkdir -p "$cache"

echo "cellhpc $version ($commit) for $variant, begun from $base; compiling Horovod takes most of the time"
started=$SECONDS
"$apptainer" build --force --bind "$cache:/mnt" --mksquashfs-args "-comp zstd -Xcompression-level 3" \
    --build-arg BOOTSTRAP="$bootstrap" --build-arg FROM="$from" --build-arg MIRROR="${mirror:-none}" \
    --build-arg BUILD="$build" --build-arg VERSION="$version" --build-arg COMMIT="$commit" \
    "$partial" "$checkout/containers/$variant.def"
mv "$partial" "$out"
cat << END

$out
  built in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s, $(($(stat -c %s "$out") / 1000000)) MB
  sha256 $(sha256sum "$out" | cut -d ' ' -f 1)
Try it:            $apptainer run $out --help
In a site file:    [container]
                   image = "$out"
END
