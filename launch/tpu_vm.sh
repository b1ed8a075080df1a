#!/usr/bin/env bash
# A run on all hosts of a TPU slice, which is asked for as a queued resource if there is none of this name.
#
#   NAME=sae ZONE=us-west4-a TYPE=v5litepod-64 RUNTIME=v2-alpha-tpuv5-lite \
#       bash launch/tpu_vm.sh --workdir=/mnt/SHARED/run --flagfile=configs/qwen3-4b-math.flags
#   bash launch/tpu_vm.sh --dry-run --workdir=...      prints what would run
#
# The workdir is on a file system that all hosts have mounted, such as a bucket by gcsfuse. STAGE names the program (default
# pipeline), PYTHON the hosts' Python, 3.11 or newer (default python3), MORE further options of the request, such as
# --spot. The same command with --take_over goes on where an earlier one was stopped: a slice that was preempted has to be
# deleted first (gcloud compute tpus queued-resources delete NAME --force).
set -eu
name=${NAME:-saejax} zone=${ZONE:-us-west4-a} type=${TYPE:-v5litepod-64} runtime=${RUNTIME:-v2-alpha-tpuv5-lite}
tpus=(gcloud compute tpus)
run() { "$@"; }
state() { "${tpus[@]}" queued-resources describe "$name" --zone="$zone" --format='value(state.state)' 2>/dev/null || true; }
if [ "${1:-}" = --dry-run ]; then
  shift
  run() { printf '%q ' "$@"; echo; }
  state() { [ "${requested:-}" ] && echo ACTIVE || true; }
fi
each_host=("${tpus[@]}" tpu-vm ssh "$name" --zone="$zone" --worker=all --command)

if [ -z "$(state)" ]; then
  # shellcheck disable=SC2086
  run "${tpus[@]}" queued-resources create "$name" --node-id="$name" --zone="$zone" --accelerator-type="$type" \
    --runtime-version="$runtime" ${MORE:-}
fi
requested=yes
until [ "$(state)" = ACTIVE ]; do
  case "$(state)" in FAILED | SUSPENDED) echo "the slice $name is $(state): delete it, then run this again" >&2; exit 1 ;; esac
  sleep 30
done
run "${each_host[@]}" "mkdir -p saejax"
run "${tpus[@]}" tpu-vm scp --recurse --worker=all --zone="$zone" pyproject.toml constraints.txt README.md LICENSE saejax configs \
  "$name":saejax/
run "${each_host[@]}" "cd saejax && ${PYTHON:-python3} -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[tpu]'"
printf -v command '%q ' .venv/bin/saejax "${STAGE:-pipeline}" --mesh.distributed=auto "$@"
run "${each_host[@]}" "cd saejax && $command"
