#!/usr/bin/env bash
# A one-node SLURM on the loopback interface, so that the scripts in slurm/ run for real on a laptop or in CI.
#   scripts/local_slurm.sh start    # prints `export SLURM_CONF=...`; use it as: eval "$(scripts/local_slurm.sh start)"
#   scripts/local_slurm.sh status   # sinfo and squeue
#   scripts/local_slurm.sh stop     # cancels the jobs and ends the three daemons
# State, keys and logs lie in $MEDLDM_SLURM_DIR (default /tmp/medldm-slurm). Needs root and Debian's slurm-wlm and munge,
# which `start` installs where they are missing. There is no accounting and no GPU: submit with GPU=cpu.
set -euo pipefail

dir=${MEDLDM_SLURM_DIR:-/tmp/medldm-slurm}
mkdir -p "$dir" && dir=$(cd "$dir" && pwd -P)
export SLURM_CONF=$dir/slurm.conf
export PATH=$PATH:/usr/sbin:/sbin

fail() { echo "local_slurm: $*" >&2; exit 1; }

install_packages() {
  local name missing=()
  for name in munged slurmctld slurmd sbatch; do command -v "$name" >/dev/null || missing+=("$name"); done
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || fail "no ${missing[*]} here and no apt-get: install SLURM and munge"
  local log=$dir/apt.log
  echo "local_slurm: installing slurm-wlm and munge (log: $log)" >&2
  # Debian would start the daemons with settings of its own: policy-rc.d says no while we install.
  local policy=/usr/sbin/policy-rc.d made_policy=no
  if [ ! -e $policy ]; then printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy && made_policy=yes; fi
  local rc=0
  { timeout 300 apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 600 apt-get install -y -qq \
    --no-install-recommends slurm-wlm munge; } >"$log" 2>&1 </dev/null || rc=$?
  [ $made_policy = no ] || rm -f $policy
  [ $rc = 0 ] || fail "apt-get could not install slurm-wlm and munge, see $log: $(tail -1 "$log")"
}

pid_of() {  # the live process behind a pid file, else nothing
  local pid
  pid=$(cat "$dir/$1.pid" 2>/dev/null) || return 0
  if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ]; then echo "$pid"; fi
}

wait_for() {  # wait_for SECONDS COMMAND...: until the command succeeds
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.2
  done
}

free_ports() {  # two neighbouring ports on which nobody listens
  local port
  for port in $(seq 6817 2 6917); do
    if ! (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null && ! (: <"/dev/tcp/127.0.0.1/$((port + 1))") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
  fail "no free port between 6817 and 6918"
}

write_config() {
  local host port cpus memory
  host=$(hostname -s) port=$(free_ports) cpus=$(nproc)
  [ "$cpus" -ge 2 ] || cpus=2
  memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
  # cred_expire is also how long a requeued job must wait before it starts again (120 s unless told).
  cat >"$SLURM_CONF" <<CONF
ClusterName=medldm
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=5
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
MinJobAge=7200
KillWait=5
OverTimeLimit=0
ReturnToService=2
NodeName=medldm NodeHostname=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$memory State=UNKNOWN
PartitionName=local Nodes=medldm Default=YES MaxTime=INFINITE State=UP
CONF
}

is_idle() { sinfo --noheader --format=%t | grep -qE '^(idle|alloc|mix)$'; }

start() {
  [ "$(id -u)" = 0 ] || fail "must run as root: munged, slurmctld and slurmd share one machine's accounts"
  if [ -n "$(pid_of munged)" ] && [ -n "$(pid_of slurmctld)" ] && [ -n "$(pid_of slurmd)" ] && is_idle; then
    echo "export SLURM_CONF=$SLURM_CONF"
    return
  fi
  install_packages
  stop
  mkdir -p "$dir/state" "$dir/spool"
  write_config
  [ -s "$dir/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
  munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
    --seed-file="$dir/munge.seed" --log-file="$dir/munged.log" >"$dir/munged.out" 2>&1 </dev/null ||
    fail "munged did not start: $(tail -1 "$dir/munged.out")"
  slurmctld -c >"$dir/slurmctld.out" 2>&1 </dev/null || fail "slurmctld did not start, see $dir/slurmctld.log"
  wait_for 30 scontrol ping || fail "slurmctld does not answer, see $dir/slurmctld.log"
  slurmd -N medldm >"$dir/slurmd.out" 2>&1 </dev/null || fail "slurmd did not start, see $dir/slurmd.log"
  wait_for 60 is_idle || fail "the node did not become idle ($(sinfo --noheader --format='%t %E')), see $dir/slurmd.log"
  echo "export SLURM_CONF=$SLURM_CONF"
}

jobs_gone() { [ -z "$(squeue --noheader)" ]; }

stop() {
  local name pid
  if [ -n "$(pid_of slurmctld)" ] && [ -n "$(pid_of slurmd)" ] && ! jobs_gone; then
    timeout 10 scancel --user=root || true
    wait_for 15 jobs_gone || true
  fi
  for name in slurmd slurmctld munged; do
    pid=$(pid_of $name)
    [ -z "$pid" ] || { kill "$pid" && wait_for 10 test ! -e "/proc/$pid"; } || kill -9 "$pid" 2>/dev/null || true
  done
  for pid in $(pgrep slurmstepd || true); do  # steps that outlived their slurmd; another cluster's are left alone
    if { tr '\0' '\n' <"/proc/$pid/environ"; } 2>/dev/null | grep -qx "SLURM_CONF=$SLURM_CONF"; then kill -9 "$pid" || true; fi
  done
}

case ${1:-} in
  start) start ;;
  stop) stop ;;
  status) [ -n "$(pid_of slurmctld)" ] || fail "not running in $dir"; sinfo; squeue ;;
  *) fail "usage: scripts/local_slurm.sh start|stop|status" ;;
esac
