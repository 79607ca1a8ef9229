#!/usr/bin/env bash
# A real SLURM cluster (munge + slurmctld + N slurmd) on ONE machine, for tests.
# No systemd, no cgroups, no database. Debian/Ubuntu, run as root.
#
#   devcluster.sh start            install what is missing, start, wait for idle nodes
#   devcluster.sh status           PIDs and sinfo; exit 0 only when every node answers
#   devcluster.sh stop             stop exactly the processes this script started
#   devcluster.sh env              print `export ...` lines:  eval "$(devcluster.sh env)"
#   devcluster.sh kill-node NAME   kill -9 slurmd and all that runs on that node = power loss
#   devcluster.sh fail-node NAME   the same, and tell slurmctld at once (kill-node: ~25 s)
#   devcluster.sh start-node NAME  bring that slurmd back
#   devcluster.sh logs             tail of every daemon log
#   devcluster.sh purge            stop, then delete the state folder
#
# Settings (environment):
#   SLURM_DEV_DIR    state folder                       /var/tmp/slurm-devcluster
#   SLURM_DEV_NODES  number of emulated nodes           2
#   SLURM_DEV_CPUS   CPUs claimed per node              8
#   SLURM_DEV_MEM    MB claimed per node                4096
#   SLURM_DEV_GPUS   pretend GPUs per node (0 = none)   8
#   SLURM_DEV_NET    lo | netns                         lo
#   SLURM_DEV_PORT   first TCP port                     17817
#   SLURM_DEV_JOB    number of the first job            1
#   SLURM_DEV_LINK   1: link /etc/slurm/slurm.conf      0
# Clusters with folders, ports and job numbers of their own may run side by side (lo only).
# lo:    nodes are 127.0.0.1, .2, ...  netns: each node has its own network namespace,
#        address and ports.  In both, each node has its own hostname, /dev/shm and
#        $SLURM_DEV_DIR/scratch (a "local disk").  Needs root with CAP_SYS_ADMIN.
set -euo pipefail

DIR=${SLURM_DEV_DIR:-/var/tmp/slurm-devcluster}
# what a running cluster was started with wins over today's environment
if [ -f "$DIR/run/settings" ]; then . "$DIR/run/settings"; fi
N=${RUN_NODES:-${SLURM_DEV_NODES:-2}}
CPUS=${RUN_CPUS:-${SLURM_DEV_CPUS:-8}}
MEM=${RUN_MEM:-${SLURM_DEV_MEM:-4096}}
GPUS=${RUN_GPUS:-${SLURM_DEV_GPUS:-8}}
NET=${RUN_NET:-${SLURM_DEV_NET:-lo}}
PORT=${RUN_PORT:-${SLURM_DEV_PORT:-17817}}
LINK=${RUN_LINK:-${SLURM_DEV_LINK:-0}}
JOB=${RUN_JOB:-${SLURM_DEV_JOB:-1}}
PREFIX=node
CONF=$DIR/etc/slurm.conf
HOST=$(hostname -s)
BR=sdbr0
SUB=10.213.77
TAG="# slurm-devcluster $DIR"
export PATH=$PATH:/usr/sbin:/sbin
export SLURM_CONF=$CONF

say() { printf '[devcluster] %s\n' "$*" >&2; }
die() { say "ERROR: $*"; exit 1; }
names() { local i; for ((i = 1; i <= N; i++)); do echo "$PREFIX$i"; done; }

# ---------------------------------------------------------------- processes
# A PID file counts only if the process has the same start time as when the
# file was written: a recycled PID is never signalled.
starttime() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }
record() { local t; t=$(starttime "$2") || true; [ -n "$t" ] && echo "$2 $t" > "$DIR/run/$1.mine"; }
mine() { # name -> prints the live pid, else fails
  local pid t
  [ -f "$DIR/run/$1.mine" ] || return 1
  read -r pid t < "$DIR/run/$1.mine" || return 1
  [ "$(starttime "$pid")" = "$t" ] && echo "$pid"
}
wait_pidfile() { # file seconds
  local i; for ((i = 0; i < $2 * 10; i++)); do [ -s "$1" ] && return 0; sleep 0.1; done; return 1
}
end() { # names: TERM to all of them, wait together, KILL what stays
  local n pid i left
  for n in "$@"; do if pid=$(mine "$n"); then kill -TERM "$pid" 2>/dev/null || true; fi; done
  for ((i = 0; i < 100; i++)); do
    left=; for n in "$@"; do if mine "$n" >/dev/null; then left=1; fi; done
    [ -n "$left" ] || break; sleep 0.1
  done
  for n in "$@"; do
    if pid=$(mine "$n"); then say "$n ignored TERM, KILL"; kill -KILL "$pid" 2>/dev/null || true; fi
    rm -f "$DIR/run/$n.mine"
  done
}
# Every node lives in a UTS namespace that this script made, so all that runs on
# the "node" (slurmd, slurmstepd, tasks, what they forked) is found by that id.
uts_of() { readlink "/proc/$1/ns/uts" 2>/dev/null; }
inhabitants() { # namespace id, as uts:[N] -> pids
  find /proc -maxdepth 3 -path '/proc/[0-9]*/ns/uts' -lname "uts:\\[${1//[!0-9]/}\\]" 2>/dev/null | cut -d/ -f3 || true
}
wipe_node() { # name: kill -9 all that runs on it
  local ns p k
  ns=$(cat "$DIR/run/$1.uts" 2>/dev/null) || return 0
  [ -n "$ns" ] && [ "$ns" != "$(uts_of 1)" ] && [ "$ns" != "$(uts_of $$)" ] || return 0
  for k in 1 2 3; do
    p=$(inhabitants "$ns"); [ -n "$p" ] || break
    kill -KILL $p 2>/dev/null || true; sleep 0.1
  done
  rm -f "$DIR/run/$1.uts"
}

# ---------------------------------------------------------------- install
need_install() {
  local b want="munged slurmctld slurmd sbatch srun"
  for b in $want; do command -v $b >/dev/null || return 0; done; return 1
}
install() {
  need_install || return 0
  [ "$(id -u)" = 0 ] || die "must be root to install"
  say "installing slurm and munge with apt"
  export DEBIAN_FRONTEND=noninteractive
  # keep the packages from starting their own daemons, whatever the init system
  local rc=/usr/sbin/policy-rc.d made=
  if [ ! -e $rc ]; then printf '#!/bin/sh\nexit 101\n' > $rc; chmod 755 $rc; made=1; fi
  local pk="slurmctld slurmd slurm-client munge"
  apt-get install -y -q --no-install-recommends $pk > "$DIR/log/apt.log" 2>&1 \
    || { apt-get update -q >> "$DIR/log/apt.log" 2>&1
         apt-get install -y -q --no-install-recommends $pk >> "$DIR/log/apt.log" 2>&1; } \
    || { [ -z "$made" ] || rm -f $rc; tail -5 "$DIR/log/apt.log" >&2; die "apt failed, see $DIR/log/apt.log"; }
  [ -z "$made" ] || rm -f $rc
}

# ---------------------------------------------------------------- network
addr() { # node index -> address
  if [ "$NET" = netns ]; then echo "$SUB.$((10 + $1))"; else echo "127.0.0.$1"; fi
}
net_up() {
  [ "$NET" = netns ] || return 0
  local i ns
  ip link show $BR >/dev/null 2>&1 || ip link add $BR type bridge
  ip addr show $BR | grep -q "$SUB.1/" || ip addr add $SUB.1/24 dev $BR
  ip link set $BR up
  for ((i = 1; i <= N; i++)); do
    ns=sd-$PREFIX$i
    ip netns list | grep -qw "$ns" && continue
    ip netns add "$ns"
    ip link add "sdv$i" type veth peer name eth0 netns "$ns"
    ip link set "sdv$i" master $BR up
    ip -n "$ns" addr add "$(addr "$i")/24" dev eth0
    ip -n "$ns" link set lo up
    ip -n "$ns" link set eth0 up
    ip -n "$ns" route add default via $SUB.1 2>/dev/null || true
  done
}
net_down() {
  [ "$NET" = netns ] || return 0
  local ns
  command -v ip >/dev/null || return 0
  for ns in $(ip netns list 2>/dev/null | awk '{print $1}' | grep "^sd-$PREFIX" || true); do ip netns del "$ns"; done
  ip link del $BR 2>/dev/null || true
}
hosts_set() { # lines: this cluster's, in place of those that it had
  # /etc/hosts may be a bind mount: it is rewritten in place, by one cluster at a time
  local keep
  exec 8< /etc/hosts; flock 8
  keep=$(awk -v tag="$TAG" 'substr($0, length($0) - length(tag) + 1) != tag' /etc/hosts)
  printf '%s\n' "$keep" "$@" > /etc/hosts
  exec 8<&-
}
hosts_add() {
  local i lines=()
  for ((i = 1; i <= N; i++)); do lines+=("$(addr "$i") $PREFIX$i $TAG"); done
  if [ "$NET" = netns ]; then lines+=("$SUB.1 slurm-dev-ctl $TAG"); fi
  hosts_set "${lines[@]}"
}

# ---------------------------------------------------------------- config
write_conf() {
  local i ctl=127.0.0.1 gres="" grestypes=""
  if [ "$NET" = netns ]; then ctl=$SUB.1; fi
  if [ "$GPUS" -gt 0 ]; then gres="Gres=gpu:$GPUS"; grestypes="GresTypes=gpu"; fi
  {
    cat <<C
ClusterName=devcluster
SlurmctldHost=$HOST($ctl)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start again (default 120 s)
AuthInfo=socket=$DIR/run/munge.sock,cred_expire=5
CredType=cred/munge
SlurmctldPort=$PORT
SlurmdPort=$((PORT + 1))
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd.%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldDebug=verbose
SlurmdDebug=verbose
# no kernel features needed
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.txt
MpiDefault=none
# nodes may claim more CPUs and memory than the host has
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
$grestypes
# come back by itself after a restart, notice a dead node fast
ReturnToService=2
SlurmdTimeout=8
SlurmctldTimeout=10
MessageTimeout=10
InactiveLimit=0
EnforcePartLimits=ALL
KillWait=5
UnkillableStepTimeout=30
WaitTime=0
JobRequeue=1
MinJobAge=300
FirstJobId=$JOB
# short scheduling delays
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0,requeue_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PriorityType=priority/basic
C
    for ((i = 1; i <= N; i++)); do
      echo "NodeName=$PREFIX$i NodeHostname=$HOST NodeAddr=$(addr "$i") Port=$((PORT + 1 + i)) CPUs=$CPUS RealMemory=$MEM $gres State=UNKNOWN"
    done
    echo "PartitionName=main Nodes=$PREFIX[1-$N] Default=YES MaxTime=INFINITE DefaultTime=30 State=UP OverSubscribe=NO PriorityTier=1"
    echo "PartitionName=high Nodes=$PREFIX[1-$N] MaxTime=INFINITE DefaultTime=30 State=UP OverSubscribe=NO PriorityTier=10"
  } > "$CONF"
  : > "$DIR/etc/gres.conf"
  if [ "$GPUS" -gt 0 ]; then
    # slurmd 22.05 drops a gpu GRES without File=, and wants device nodes there:
    # make copies of /dev/null (char 1:3)
    mkdir -p "$DIR/dev"
    for ((i = 0; i < GPUS; i++)); do [ -c "$DIR/dev/gpu$i" ] || mknod "$DIR/dev/gpu$i" c 1 3; done
    echo "NodeName=$PREFIX[1-$N] Name=gpu File=$DIR/dev/gpu[0-$((GPUS - 1))] Flags=nvidia_gpu_env" > "$DIR/etc/gres.conf"
  fi
  # slurmd 22.05 loads a cgroup plugin even when nothing uses it, and its autodetection
  # fails on hosts without a cgroup mount. Named plugin = no detection.
  printf 'CgroupAutomount=no\nCgroupPlugin=cgroup/v1\n' > "$DIR/etc/cgroup.conf"
}

# commands find the cluster even without SLURM_CONF, unless the host has its own
link_conf() {
  [ "$LINK" = 1 ] || return 0
  mkdir -p /etc/slurm
  if [ ! -e /etc/slurm/slurm.conf ] || [ -L /etc/slurm/slurm.conf ]; then ln -sfn "$CONF" /etc/slurm/slurm.conf; fi
}
unlink_conf() { [ "$(readlink /etc/slurm/slurm.conf 2>/dev/null)" = "$CONF" ] && rm -f /etc/slurm/slurm.conf; return 0; }

# ---------------------------------------------------------------- daemons
start_munge() {
  mine munged >/dev/null && return 0
  if [ ! -s "$DIR/etc/munge.key" ]; then
    (umask 077; head -c 1024 /dev/urandom > "$DIR/etc/munge.key")
  fi
  rm -f "$DIR/run/munge.sock" "$DIR/run/munged.pid"
  munged --force --key-file="$DIR/etc/munge.key" --socket="$DIR/run/munge.sock" \
    --pid-file="$DIR/run/munged.pid" --log-file="$DIR/log/munged.log" --seed-file="$DIR/etc/munge.seed" \
    --num-threads=2 > "$DIR/log/munged.out" 2>&1 || { cat "$DIR/log/munged.out" >&2; die "munged did not start"; }
  wait_pidfile "$DIR/run/munged.pid" 10 || die "munged wrote no pid file"
  record munged "$(cat "$DIR/run/munged.pid")"
}
start_ctld() {
  mine slurmctld >/dev/null && return 0
  rm -f "$DIR/run/slurmctld.pid"
  slurmctld -f "$CONF" > "$DIR/log/slurmctld.out" 2>&1 || { cat "$DIR/log/slurmctld.out" >&2; die "slurmctld did not start"; }
  wait_pidfile "$DIR/run/slurmctld.pid" 15 || { tail -5 "$DIR/log/slurmctld.log" >&2; die "slurmctld wrote no pid file"; }
  record slurmctld "$(cat "$DIR/run/slurmctld.pid")"
}
start_node() { # name
  local n=$1 pre=()
  mine "slurmd.$n" >/dev/null && return 0
  rm -f "$DIR/run/slurmd.$n.pid"
  if [ "$NET" = netns ]; then pre=(nsenter "--net=/run/netns/sd-$n"); fi
  # Own UTS namespace: `hostname` differs per node, as on a real cluster.
  # Own mount namespace: $DIR/scratch is a different folder on each node (like a
  # local NVMe), /dev/shm is private, names resolve from /etc/hosts only.
  mkdir -p "$DIR/scratch" "$DIR/local/$n"
  sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf > "$DIR/etc/nsswitch.conf"
  "${pre[@]}" unshare --uts --mount sh -ec '
    n=$1 d=$2; shift 2
    hostname "$n"
    mount --bind "$d/local/$n" "$d/scratch"
    mount -t tmpfs -o size=50% tmpfs /dev/shm
    if [ "$1" = netns ]; then
      mount --bind "$d/etc/nsswitch.conf" /etc/nsswitch.conf
      mount -t sysfs sysfs /sys
    fi
    shift; exec "$@"' sh "$n" "$DIR" "$NET" \
    slurmd -N "$n" -f "$CONF" > "$DIR/log/slurmd.$n.out" 2>&1 \
    || { cat "$DIR/log/slurmd.$n.out" >&2; die "slurmd $n did not start"; }
  wait_pidfile "$DIR/run/slurmd.$n.pid" 15 || { tail -5 "$DIR/log/slurmd.$n.log" >&2; die "slurmd $n wrote no pid file"; }
  record "slurmd.$n" "$(cat "$DIR/run/slurmd.$n.pid")"
  uts_of "$(cat "$DIR/run/slurmd.$n.pid")" > "$DIR/run/$n.uts"
}
idle_count() { sinfo -h -p main -N -o '%T' 2>/dev/null | grep -cE '^(idle|mixed|allocated|completing)$' || true; }

cmd_start() {
  [ "$(id -u)" = 0 ] || die "must be root"
  local t0=$SECONDS n i
  umask 022
  mkdir -p "$DIR"/{etc,log,run,spool,state}
  chmod 755 "$DIR" "$DIR/run" "$DIR/etc"
  install
  local up=1
  if [ -n "${RUN_NODES:-}" ] && [ "${SLURM_DEV_NODES:-$N}/${SLURM_DEV_NET:-$NET}" != "$N/$NET" ]; then
    say "WARNING: already started with nodes=$N net=$NET; use restart to change"
  fi
  for n in munged slurmctld $(names | sed 's/^/slurmd./'); do mine "$n" >/dev/null || up=; done
  if [ -z "$up" ]; then
    cat > "$DIR/run/settings" <<C
RUN_NODES=$N RUN_CPUS=$CPUS RUN_MEM=$MEM RUN_GPUS=$GPUS
RUN_NET=$NET RUN_PORT=$PORT RUN_LINK=$LINK RUN_JOB=$JOB
C
    net_up; hosts_add; write_conf; link_conf
    for n in $(names); do mkdir -p "$DIR/spool/$n"; done
    start_munge; start_ctld
    for n in $(names); do start_node "$n"; done
  fi
  for ((i = 0; i < 300; i++)); do
    [ "$(idle_count)" = "$N" ] && break
    if ((i % 50 == 49)); then
      scontrol update NodeName="$PREFIX[1-$N]" State=RESUME >/dev/null 2>&1 || true
    fi
    sleep 0.2
  done
  [ "$(idle_count)" = "$N" ] || { sinfo -N -l >&2 || true; die "nodes did not become idle, see $DIR/log"; }
  say "up: $N nodes, net=$NET, $((SECONDS - t0)) s.  eval \"\$($0 env)\""
}
cmd_stop() {
  local n
  if mine slurmctld >/dev/null; then scancel --full -u root >/dev/null 2>&1 || true; sleep 0.3; fi
  end $(ls "$DIR/run" 2>/dev/null | sed -nE 's/^(slurmd\..*|slurmctld)\.mine$/\1/p')
  for n in $(ls "$DIR/run" 2>/dev/null | sed -n 's/^\(.*\)\.uts$/\1/p'); do wipe_node "$n"; done
  end munged
  net_down; hosts_set; unlink_conf; rm -f "$DIR/run/settings"
  say "stopped"
}
cmd_status() {
  local n p rc=0
  for n in munged slurmctld $(names | sed 's/^/slurmd./'); do
    if p=$(mine "$n"); then echo "$n pid $p"; else echo "$n DOWN"; rc=1; fi
  done
  sinfo -N -o '%N %T %c %m %G %E' 2>/dev/null || rc=1
  [ "$(idle_count)" = "$N" ] || rc=1
  return $rc
}
cmd_kill_node() {
  mine "slurmd.$1" >/dev/null || die "$1 is not running"
  wipe_node "$1"
  rm -f "$DIR/run/slurmd.$1.mine"
}

# one start/stop at a time; -o: the daemons must not inherit the lock
case ${1:-} in
  start|stop|restart|purge)
    if [ -z "${SLURM_DEV_LOCKED:-}" ]; then
      mkdir -p "$(dirname "$DIR")"
      SLURM_DEV_LOCKED=1 exec flock -o -w 180 "$DIR.lock" "$0" "$@"
    fi
    unset SLURM_DEV_LOCKED ;;
esac
case ${1:-} in
  start) cmd_start ;;
  stop) cmd_stop ;;
  restart) cmd_stop; SLURM_DEV_LOCKED=1 exec "$0" start ;;
  status) cmd_status ;;
  env) echo "export SLURM_CONF=$CONF"; echo 'export PATH=$PATH:/usr/sbin' ;;
  kill-node) cmd_kill_node "${2:?node name}" ;;
  fail-node) cmd_kill_node "${2:?node name}"; scontrol update NodeName="$2" State=DOWN Reason="slurm-devcluster fail-node" ;;
  start-node) start_node "${2:?node name}" ;;
  logs) tail -n 20 "$DIR"/log/*.log ;;
  purge) cmd_stop; rm -rf "$DIR" ;;
  install) mkdir -p "$DIR/log"; install ;;
  *) sed -n '2,31p' "$0"; exit 2 ;;
esac
