#!/usr/bin/env bash
# Starts and stops a real SLURM on this one machine, for the tests: munged, slurmctld and several
# slurmd, each a node of its own name and port. Everything it writes lies in one folder.
#
#     slurm.sh start DIR [NODES]     needs root, and the packages slurm-wlm and munge
#     slurm.sh stop DIR
#
# Commands find it by SLURM_CONF=DIR/slurm.conf. Nothing of a SLURM that is installed is touched.
set -euo pipefail

start() {
    local dir=$1 nodes=${2:-2}
    mkdir -p "$dir"/{state,spool,log,munge}
    chmod 755 "$dir" "$dir"/munge
    # munged refuses folders that others may write; its own must be its user's.
    dd if=/dev/urandom of="$dir/munge/key" bs=1024 count=1 status=none
    chmod 600 "$dir/munge/key"
    munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" \
        --pid-file="$dir/munge/pid" --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
    write_conf "$dir" "$nodes"
    export SLURM_CONF=$dir/slurm.conf
    slurmctld -c -f "$SLURM_CONF" -L "$dir/log/slurmctld.log"
    for ((node = 0; node < nodes; node++)); do
        slurmd -c -f "$SLURM_CONF" -N "node$node" -L "$dir/log/node$node.log"
    done
    for _ in {1..60}; do
        [[ $(sinfo --noheader --format=%T 2>>"$dir/log/sinfo.log" | sort -u) == idle ]] && return 0
        sleep 0.5
    done
    echo "SLURM's nodes did not come up; see $dir/log" >&2
    sinfo >&2 || true
    return 1
}

# The first of 16 ports in a row that nobody listens on: another run of the tests may be under way.
free_ports() {
    local first port taken
    for first in $(seq 26816 16 29000 | shuf); do
        taken=0
        for ((port = first; port < first + 16; port++)); do
            if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then taken=1; fi
        done
        ((taken)) || { echo "$first" && return 0; }
    done
    return 1
}

write_conf() {
    local dir=$1 nodes=$2 host memory ports
    ports=$(free_ports)
    host=$(hostname -s)
    memory=$(awk '/MemTotal/{print int($2/1024/'"$nodes"'*0.9)}' /proc/meminfo)
    cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$ports
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/jobcomp.txt
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=5
OverTimeLimit=0
MinJobAge=600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldTimeout=30
SlurmdTimeout=30
SlurmdParameters=config_overrides
CONF
    for ((node = 0; node < nodes; node++)); do
        echo "NodeName=node$node NodeAddr=127.0.0.1 NodeHostname=$host Port=$((ports + 1 + node))" \
            "CPUs=2 RealMemory=$memory State=UNKNOWN" >>"$dir/slurm.conf"
    done
    cat >>"$dir/slurm.conf" <<CONF
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
CONF
}

stop() {
    local dir=$1 file pid
    for file in "$dir"/slurmd-*.pid "$dir"/slurmctld.pid "$dir"/munge/pid; do
        [[ -s $file ]] || continue
        pid=$(<"$file")
        kill "$pid" 2>>"$dir/log/stop.log" || continue
        for _ in {1..50}; do
            kill -0 "$pid" 2>>"$dir/log/stop.log" || break
            sleep 0.2
        done
    done
}

case ${1:-} in
start) start "$2" "${3:-2}" ;;
stop) stop "$2" ;;
*)
    sed -n '2,9p' "$0" >&2
    exit 2
    ;;
esac
