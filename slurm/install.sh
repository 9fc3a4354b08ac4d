#!/bin/bash
# Install what slurm/cluster.py needs: Slurm, munge and small tools, from Debian's own packages. Run it as root, as often
# as you like. With --accounting also slurmdbd and MariaDB. No service of the system is started by it.
set -euo pipefail

packages=(slurm-wlm slurm-wlm-basic-plugins munge iproute2 util-linux hostname)
case "$*" in
    "") ;;
    --accounting) packages+=(slurmdbd slurm-wlm-mysql-plugin mariadb-server) ;;
    *) echo "slurm/install.sh: $* is not known. Usage: slurm/install.sh [--accounting]" >&2; exit 2 ;;
esac

missing=()
for package in "${packages[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} = 0 ]; then
    echo "all there: ${packages[*]}"
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "slurm/install.sh: there is no apt-get: it installs on Debian only. Elsewhere install Slurm 22.05 or newer," \
        "munge and iproute2 by your own means." >&2
    exit 1
fi
if [ "$(id -u)" != 0 ]; then
    echo "slurm/install.sh: missing are ${missing[*]}; only root can install them. Type: sudo slurm/install.sh $*" >&2
    exit 1
fi

# Debian's packages start their services unless this file forbids it; a local cluster brings its own daemons.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -q || echo "slurm/install.sh: the package lists could not be refreshed; trying those that are here" >&2
apt-get install -y -q --no-install-recommends -o DPkg::Lock::Timeout=300 "${missing[@]}"
echo "installed: ${missing[*]}"
