#!/usr/bin/env bash
# Installs SLURM and munge for `make test-slurm`, where that is possible; says so where it is not.
set -uo pipefail
if command -v slurmctld slurmd munged sbatch >/dev/null; then
    exit 0
fi
if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "SLURM is not installed: that needs root and apt-get; the SLURM tests will be skipped"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
# Another apt at work holds a lock for a while: waited for, not a reason to skip.
wait=(-o DPkg::Lock::Timeout=240 -o Acquire::Retries=3)
log=$(mktemp)
for _ in 1 2 3; do
    if { apt-get "${wait[@]}" update -qq &&
        timeout 300 apt-get "${wait[@]}" install -qq -y --no-install-recommends slurm-wlm munge; } \
        >"$log" 2>&1; then
        rm -f "$log"
        exit 0
    fi
    sleep 5 # the lists' own lock has no time-out
done
echo "SLURM could not be installed ($(tail -n 1 "$log")); the SLURM tests will be skipped"
rm -f "$log"
