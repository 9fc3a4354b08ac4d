#!/usr/bin/env bash
# Installs Apptainer where it is not yet:
#
#   containers/install_apptainer.sh [PREFIX]
#
# Where the distribution has a package of it, that is installed, which needs root. Debian 12 has none: there Debian's newer
# package is unpacked below PREFIX (/opt/apptainer, or ~/.local/apptainer without root) together with the C library that
# it was built for. The system's libraries and apt's lists stay as they are, and nothing but PREFIX is written. Twice
# does no harm. APT_MIRROR=URL names another mirror of Debian than the one this machine's apt uses.
set -euo pipefail

fail() { printf 'containers/install_apptainer.sh: %s\n' "$1" >&2; exit "${2:-1}"; }

here=$(cd "$(dirname "$0")" && pwd)
root=$([ "$(id -u)" = 0 ] && echo yes || echo no)
if [ "$root" = yes ]; then prefix=/opt/apptainer; else prefix=$HOME/.local/apptainer; fi
prefix=$(realpath -m "${1:-$prefix}")

done_with() { echo "$("$1" --version): $1"; exit 0; }

if found=$(command -v apptainer) && "$found" --version > /dev/null 2>&1; then done_with "$found"; fi
if "$prefix/usr/bin/apptainer" --version > /dev/null 2>&1; then done_with "$prefix/usr/bin/apptainer"; fi

# The distribution's own package
for installer in apt-get dnf zypper; do
    case $installer in
        apt-get) apt-cache policy apptainer 2> /dev/null | grep -q 'Candidate: [0-9]' || continue ;;
        *) command -v $installer > /dev/null && $installer -q info apptainer > /dev/null 2>&1 || continue ;;
    esac
    [ "$root" = yes ] || fail "this distribution has Apptainer as a package. Ask who has root: $installer install apptainer"
    $installer install -y apptainer
    done_with "$(command -v apptainer)"
done

# Debian 12
# shellcheck disable=SC1091
system=$(. /etc/os-release && echo "${ID:-unknown} ${VERSION_ID:-}")
[ "$system" = "debian 12" ] && [ "$(dpkg --print-architecture)" = amd64 ] ||
    fail "no package of Apptainer is known for $system. Its own documentation says how to install it: https://apptainer.org/docs/admin"
if [ -e "$prefix" ] && [ ! -x "$prefix/usr/bin/apptainer" ] && [ -n "$(ls -A "$prefix")" ]; then
    fail "$prefix holds something else than Apptainer. Name another folder: containers/install_apptainer.sh PREFIX" 2
fi
mkdir -p "$(dirname "$prefix")" 2> /dev/null && [ -w "$(dirname "$prefix")" ] ||
    fail "$prefix can't be written. Name another folder: containers/install_apptainer.sh PREFIX" 2

missing=()
for package in patchelf squashfs-tools debootstrap squashfuse fuse-overlayfs fakeroot uidmap ca-certificates; do
    dpkg -s "$package" > /dev/null 2>&1 || missing+=("$package")
done
if [ ${#missing[@]} != 0 ]; then
    [ "$root" = yes ] || fail "Apptainer works with packages that are not here. Ask who has root: apt-get install ${missing[*]}"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends -o DPkg::Lock::Timeout=300 "${missing[@]}" ||
        fail "apt-get could not install ${missing[*]}. Are its lists there? apt-get update"
fi

mirror=${APT_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Codename: bookworm' | sed -n 1p)}
[ -n "$mirror" ] || fail "this machine's apt knows no mirror of Debian. Fetch its lists: apt-get update. Or name one: APT_MIRROR=URL"
work=$(mktemp -d)
partial=$prefix.partial.$$
trap 'rm -rf "$work" "$partial"' EXIT
mkdir -p "$work"/{lists/partial,cache/archives/partial,packages,libraries}
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror sid main" > "$work/sources.list"
apt=(apt-get -q -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null -o Dir::State::Lists="$work/lists"
    -o Dir::State::status=/dev/null -o Dir::Cache="$work/cache" -o Acquire::Languages=none)
[ "$root" = no ] || apt+=(-o APT::Sandbox::User=root)
"${apt[@]}" update
(cd "$work/packages" && "${apt[@]}" download apptainer libc6 libseccomp2 libsqlite3-0)

mkdir -p "$partial/glibc"
dpkg -x "$work"/packages/apptainer_*.deb "$partial"
for library in libc6 libseccomp2 libsqlite3-0; do
    dpkg -x "$work/packages/${library}"_*.deb "$work/libraries"
done
# Copied from outside their folder: with an LD_LIBRARY_PATH that has an empty part, cp would load the C library beside it.
for library in ld-linux-x86-64.so.2 lib{c,m}.so.6 libdl.so.2 libpthread.so.0 libresolv.so.2 lib{rt,util}.so.1 libnss_*.so.2 \
    libseccomp.so.2* libsqlite3.so.0*; do
    # shellcheck disable=SC2086
    cp -a "$work/libraries/usr/lib/x86_64-linux-gnu"/$library "$partial/glibc/"
done
# Not a RUNPATH, which loses against the LD_LIBRARY_PATH that Apptainer sets for its own helpers.
for program in "$partial/usr/bin/apptainer" "$partial/usr/lib/x86_64-linux-gnu/apptainer/bin/starter"; do
    patchelf --set-interpreter "$prefix/glibc/ld-linux-x86-64.so.2" --force-rpath --set-rpath "$prefix/glibc" "$program"
done
# Apptainer looks for its folders from where it lies: the launcher below PREFIX/usr, the starter below PREFIX/usr/lib.
mv "$partial/etc" "$partial/usr/etc"
mkdir -p "$partial/usr/var/lib/apptainer/mnt/session"
ln -s ../etc "$partial/usr/lib/etc"
ln -s ../var "$partial/usr/lib/var"
rm -rf "$prefix"
mv "$partial" "$prefix"

# Root without all capabilities: Apptainer is told to ask for those that there are.
if [ "$root" = yes ] && [ -n "$("$here/capabilities.sh" lost)" ]; then
    sed -i 's/^root default capabilities = .*/root default capabilities = file/' "$prefix/usr/etc/apptainer/apptainer.conf"
    "$prefix/usr/bin/apptainer" capability add --user root "$("$here/capabilities.sh" held)" > /dev/null 2>&1
fi
echo "Put it on the path: export PATH=$prefix/usr/bin:\$PATH"
done_with "$prefix/usr/bin/apptainer"
