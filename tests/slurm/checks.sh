# shellcheck shell=bash
# What the shell checks share: a line per check, counted, and waiting for jobs with a bound.
num_passed=0 num_failed=0

check() {  # check NAME COMMAND...: one line, counted; the checks go on after a failure
  local name=$1
  shift
  if "$@"; then
    num_passed=$((num_passed + 1))
    echo "ok      $name"
  else
    num_failed=$((num_failed + 1))
    echo "FAILED  $name"
    return 1
  fi
}

finish() {  # the closing line, and the exit status
  echo "$num_passed passed, $num_failed failed"
  [ $num_failed = 0 ] && [ $num_passed -gt 0 ]
}

wait_until() {  # wait_until SECONDS COMMAND...: until the command succeeds
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || { echo "not within its time: $*" >&2; return 1; }
    sleep 0.3
  done
}

job_field() { scontrol --oneliner show job "$1" | tr ' ' '\n' | sed -n "s/^$2=//p" | head -1; }
has_state() { [ "$(job_field "$1" JobState)" = "$2" ]; }
has_ended() { [[ ! $(job_field "$1" JobState) =~ ^(PENDING|RUNNING|COMPLETING|REQUEUED)$ ]]; }
queue_empty() { [ -z "$(squeue --noheader)" ]; }
job_of() { awk -v stage="$1" '$1 == stage {print $2}' "$2"; }  # the id in a chain's printed table

job_states() {  # the states of a chain's jobs, from its printed table, in one line
  local stage
  for stage in $(sed -n '/^stage  /,/^$/p' "$1" | awk 'NR > 1 && NF {print $1}'); do
    printf '%s:%s ' "$stage" "$(job_field "$(job_of "$stage" "$1")" JobState)"
  done
}
