# shellcheck shell=bash disable=SC2034,SC2154
# What the chains in slurm/ share; sourced by them. A chain sets `stages`, `train_stages`, `data_stages`, `debug_stages`,
# calls `read_arguments "$@"` and `choose_preset`, then `submit` once for each stage, then `show_jobs`, which also warns
# where a training does not fit the card. PLAN=no leaves that out.
#
# NODES=2 GPUS=4 trains in 8 processes, 4 a node; batches are those of one process, so that an update sees 8 times as many
# images: the training prints how many, and scale_lr=linear (or sqrt) scales the learning rate. SHARDS=8 divides encode,
# sample and evaluate over the 8 elements of a job array. GRES is what a training takes of a node, e.g. gpu:a100:4.
#
# Overrides after the script's name, in the order of the command line, after the chain's own and so winning over them:
#   STAGE:key=value   that stage alone               vqvae:trainer.max_steps=10   sample:sampler.num_steps=20
#   data.key=value    every stage that has data      data.image_size=128   data.split also the evaluation (train_split)
#   debug=tiny        every stage that knows debug
#   key=value         both trainings                 trainer.precision=bf16-mixed   seed=1

set -euo pipefail
slurm_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
chain=$(basename "$0" .sh)
overrides=() table=() trainings=()
declare -A job_ids=()

fail() { echo "$chain: $*" >&2; exit 2; }

usage() { sed -n '2,/^$/{/^#/!q;s/^# \{0,1\}//;p}' "$0"; echo; sed -n '/^# Overrides/,/^$/{s/^# \{0,1\}//p}' "$slurm_dir/common.sh"; }

is_in() {  # is_in WORD WORDS...
  local word=$1 other
  shift
  for other in "$@"; do [ "$word" != "$other" ] || return 0; done
  return 1
}

absolute() { realpath -m -- "$1"; }

quoted() {  # a path as a value in Hydra's grammar, where spaces, commas and brackets mean something
  local value=${1//\'/\\\'}
  value=${value//'${'/'\${'}  # else an interpolation
  if [[ $1 =~ ^[A-Za-z0-9_./-]+$ ]]; then printf %s "$1"; else printf "'%s'" "$value"; fi
}

read_arguments() {
  local argument
  for argument in "$@"; do
    case $argument in
      -h | --help) usage; exit 0 ;;
    esac
    [[ $argument == *=* || ${argument#*:} == '~'* ]] || fail "'$argument' is no override: write key=value (--help tells more)"
    if [[ $argument =~ ^([A-Za-z0-9_]+): ]]; then
      is_in "${BASH_REMATCH[1]}" "${stages[@]}" || fail "'$argument': no stage '${BASH_REMATCH[1]}'; choose from ${stages[*]}"
    fi
    case $argument in
      data=*) fail "'$argument': set DATA=... before the script's name" ;;
      data.raw=*) fail "'$argument': set RAW=... before the script's name" ;;
      data.root=*) fail "'$argument': set ROOT=... before the script's name; the evaluation reads it too" ;;
      run_dir=*) fail "'$argument': set RUNS=... before the script's name; each stage has its folder there" ;;
    esac
    overrides+=("$argument")
  done
}

overrides_of() {  # overrides_of STAGE: fills `own` with the user's overrides of that stage
  local stage=$1 argument
  own=()
  for argument in ${overrides[@]+"${overrides[@]}"}; do
    if [[ $argument =~ ^([A-Za-z0-9_]+):(.*)$ ]]; then
      [ "${BASH_REMATCH[1]}" != "$stage" ] || own+=("${BASH_REMATCH[2]}")
      continue
    fi
    case $argument in
      data.split=* | ++data.split=*)  # evaluation has no data: its training subjects are of the same split
        [ "$stage" != evaluate ] || own+=("train_split=${argument#*=}")
        is_in "$stage" "${data_stages[@]}" || continue ;;
      data.* | +data.* | ++data.*) is_in "$stage" "${data_stages[@]}" || continue ;;
      debug=*) is_in "$stage" "${debug_stages[@]}" || continue ;;
      *) is_in "$stage" "${train_stages[@]}" || continue ;;
    esac
    own+=("$argument")
  done
}

choose_preset() {  # GPU=rtx3090|a6000|cpu: sbatch options per kind of stage; the chain reads $GPU for its batch sizes
  GPU=${GPU:-rtx3090}
  NODES=${NODES:-1} GPUS=${GPUS:-1} SHARDS=${SHARDS:-1}
  local name cpus gib gres=()
  for name in NODES GPUS SHARDS; do [[ ${!name} =~ ^[1-9][0-9]{0,3}$ ]] || fail "$name=${!name}: give a number from 1"; done
  case $GPU in
    rtx3090) workers=8 cpus=10 gib=48 ;;
    a6000) workers=12 cpus=14 gib=96 ;;
    cpu) workers=0 cpus=2 gib=8 ;;
    *) fail "GPU=$GPU: choose from rtx3090, a6000, cpu" ;;
  esac
  [ "$GPU" = cpu ] || gres=(--gres="${GRES:-gpu:$GPUS}")
  train_options=(${gres[@]+"${gres[@]}"} --cpus-per-task="$cpus" --mem="$((gib * GPUS))G"
    --time=24:00:00)  # what is not finished by then is saved and queued again
  processes=()  # of a training: SLURM starts them, and Lightning finds the others by SLURM's variables
  if [ $((NODES * GPUS)) -gt 1 ]; then
    train_options+=(--nodes="$NODES" --ntasks-per-node="$GPUS")
    processes=(trainer.num_nodes="$NODES" trainer.devices="$GPUS")
    [ "$GPU" != cpu ] || processes+=(trainer.accelerator=cpu)
    local default=${GRES:-gpu:1}
    [ "$GPU" = cpu ] || gres=(--gres="${default%:*}:1")
  fi
  gpu_options=(${gres[@]+"${gres[@]}"} --cpus-per-task="$cpus" --mem="${gib}G" --time=08:00:00)
  cpu_options=(--cpus-per-task=8 --mem=32G --time=08:00:00)
  [ "$GPU" != cpu ] || cpu_options=("${gpu_options[@]}")
}

find_python() {  # the interpreter that the jobs use, checked before anything is queued
  local candidate
  if [ -z "${MEDLDM_PYTHON:-}" ]; then
    for candidate in "$slurm_dir/../.venv/bin/python" python python3; do
      if command -v "$candidate" >/dev/null; then MEDLDM_PYTHON=$(command -v "$candidate"); break; fi
    done
  fi
  command -v "${MEDLDM_PYTHON:-}" >/dev/null || fail "no python '${MEDLDM_PYTHON:-}': set MEDLDM_PYTHON to the one that has medldm"
  export MEDLDM_PYTHON
}

# submit STAGE KIND AFTER COMMAND [key=value ...]: KIND is train, gpu or cpu; AFTER names the stages, separated by spaces,
# that must have succeeded. A stage left out by STAGES="..." is taken as done. SBATCH_OPTIONS="--partition=..." is added.
submit() {
  local stage=$1 kind=$2 after=$3 command=$4 dependency='' before id log=%x-%j divided=() array=()
  shift 4
  is_in "$stage" "${stages[@]}" && is_in "$stage" ${STAGES:-${stages[*]}} || return 0
  for before in $after; do dependency+=${job_ids[$before]:+:${job_ids[$before]}}; done
  local -n options=${kind}_options
  overrides_of "$stage"
  [ "$kind" != train ] || divided=(${processes[@]+"${processes[@]}"})
  case $command in
    encode | sample | evaluate)  # cases are independent: each element of an array takes its share
      [ "$SHARDS" = 1 ] || { array=(--array="1-$SHARDS") divided=(shard=array) log=%x-%A_%a; } ;;
  esac
  local line=(sbatch --parsable --job-name="$chain-$stage" --output="${RUNS//%/%%}/slurm/$log.out" "${options[@]}"
    ${array[@]+"${array[@]}"} ${dependency:+"--dependency=afterok$dependency" --kill-on-invalid-dep=yes} ${SBATCH_OPTIONS:-}
    "$slurm_dir/job.sbatch" "$command" "$@" ${divided[@]+"${divided[@]}"} ${own[@]+"${own[@]}"})
  if [ "${DRY_RUN:-0}" != 0 ]; then
    id=ID_$stage
    printf '%q ' "${line[@]}" && echo
  else
    mkdir -p "$RUNS/slurm"
    id=$("${line[@]}") || fail "sbatch refused stage $stage; queued so far, for scancel: ${job_ids[*]:-none}"
    id=${id%%;*}
  fi
  job_ids[$stage]=$id
  [ "$kind" != train ] || trainings+=("$(printf '%q ' "$stage" "$@" ${own[@]+"${own[@]}"})")
  [ ${#array[@]} = 0 ] || log=${id}_\*
  table+=("$(printf '%-16s %-18s %-24s %s' "$stage" "$id" "${after:--}" "$RUNS/slurm/$chain-$stage-${log/#%x-%j/$id}.out")")
}

show_jobs() {
  printf '\n%-16s %-18s %-24s %s\n' stage job after log
  printf '%s\n' "${table[@]}"
  check_card
}

# Asks `medldm plan` whether each training fits the chosen card; some seconds each, after everything is queued. It only
# warns: the numbers of a plan are estimates. A debug run is tiny, and a CPU has no memory of its own.
check_card() {
  local training words
  [ "$GPU" != cpu ] && [ "${PLAN:-yes}" != no ] || return 0
  for training in ${trainings[@]+"${trainings[@]}"}; do
    eval "words=($training)"  # quoted by printf %q
    [[ " ${words[*]} " != *" debug="* ]] || continue
    plan_training "${words[@]}"
  done
}

plan_training() {  # plan_training STAGE [key=value ...]
  local stage=$1 argument status=0 told asked=()
  shift
  for argument in "$@"; do
    case $argument in
      run_dir=* | resume=*) ;;  # of this run, not of the step
      trainer.devices=* | trainer.num_nodes=*) ;;  # each process holds what one would
      data.root=*) [ ! -e "$ROOT/index.json" ] || asked+=("$argument") ;;  # else it is not prepared yet
      *) asked+=("$argument") ;;
    esac
  done
  told=$("$MEDLDM_PYTHON" -m medldm.commands.plan "${asked[@]}" gpu="$GPU" 2>&1) || status=$?
  case $status in
    0) ;;
    3) echo "$chain: warning: stage $stage does not fit $GPU:" >&2
      printf '%s\n' "$told" | grep -E 'DOES NOT FIT|data\.batch_size=|use_checkpoint|data\.crop_size' | sed 's/^/  /' >&2 || true ;;
    *) echo "$chain: note: whether stage $stage fits $GPU is not known: $(printf '%s\n' "$told" | tail -n 1)" >&2 ;;
  esac
}
