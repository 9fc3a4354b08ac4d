#!/usr/bin/env bash
# The Linux capabilities that root has here, or lacks (in a sandbox, say), comma-separated:
#
#   containers/capabilities.sh held|lost
#
# As root, Apptainer asks for every capability, and ends where the kernel refuses one. Others lack none that it asks for.
set -euo pipefail
names=(chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap linux_immutable net_bind_service
    net_broadcast net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio sys_chroot sys_ptrace sys_pacct sys_admin
    sys_boot sys_nice sys_resource sys_time sys_tty_config mknod lease audit_write audit_control setfcap mac_override
    mac_admin syslog wake_alarm block_suspend audit_read perfmon bpf checkpoint_restore)  # by their numbers
permitted=$((16#$(sed -n 's/^CapPrm:[[:space:]]*//p' /proc/self/status)))
[ "$(id -u)" = 0 ] || permitted=$((-1))
held=() lost=()
for number in $(seq 0 "$(cat /proc/sys/kernel/cap_last_cap)"); do
    name=${names[number]:-}
    [ -n "$name" ] || continue
    if ((permitted >> number & 1)); then held+=("CAP_${name^^}"); else lost+=("CAP_${name^^}"); fi
done
IFS=,
case ${1:-} in
    held) echo "${held[*]-}" ;;
    lost) echo "${lost[*]-}" ;;
    *) echo "containers/capabilities.sh: say held or lost" >&2; exit 2 ;;
esac
