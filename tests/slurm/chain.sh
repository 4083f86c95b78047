#!/usr/bin/env bash
# The cardiac chain with debug=tiny on the phantom, on a running SLURM (SLURM_CONF), with the real commands and the python
# given as $1: all stages, those that divide as arrays of two elements; a stage that fails; a training in two processes that
# is requeued and goes on.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/checks.sh"
slurm=$here/../../slurm
export MEDLDM_PYTHON=${1:-$here/../../.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1

medldm() { "$MEDLDM_PYTHON" -m "medldm.commands.$1" "${@:2}"; }
chain() { GPU=cpu RAW=$work/raw ROOT=$work/prepared RUNS=$work/$1 "$slurm/cardiac2d.sh" debug=tiny "${@:2}" | tee "$work/$1.txt"; }
show_logs() { tail -n 15 "$1"/slurm/*.out; }

check "a phantom in the layout of M&Ms-2" medldm phantom dataset=mnms2 root="$work/raw" num_subjects=8 image_size=64 || { finish; exit 1; }

SHARDS=2 SBATCH_OPTIONS=--cpus-per-task=1 chain runs data.image_size=64
check "the chain ends" wait_until 900 queue_empty
states=$(job_states "$work/runs.txt")
echo "        $states"
check "every job is COMPLETED" test "${states//:COMPLETED/}" = "prepare vqvae encode ldm reconstruction sample evaluate report " ||
  show_logs "$work/runs"
for file in runs/vqvae/checkpoints/best.ckpt runs/ldm/checkpoints/best.ckpt runs/samples/provenance.json \
  runs/reconstruction/provenance.json runs/evaluation/metrics.json; do
  check "$file" test -s "$work/$file"
done
check "samples of both elements, and no locks left" test "$(cd "$work/runs/samples" && ls -A | tr '\n' ' ')" = \
  "$(cd "$work/runs/samples" && ls | tr '\n' ' ')"
check "a report" test -n "$(find "$work/runs" -name '*.html')"

STAGES="ldm sample evaluate report" chain broken ldm:model.first_stage.checkpoint=/nowhere.ckpt
check "a chain with a failing stage ends" wait_until 300 queue_empty
check "the stages after it are cancelled" test "$(job_states "$work/broken.txt")" = \
  "ldm:FAILED sample:CANCELLED evaluate:CANCELLED report:CANCELLED "
check "its log names the file" grep -h "medldm train: .*/nowhere.ckpt" "$work"/broken/slurm/*ldm*.out

# 64 pixels: seconds on a busy machine too. The signal comes once an update is saved; what was trained before the requeue is not trained again.
run=$work/requeued num_steps=${NUM_STEPS:-20}
is_saved() { [ -s "$run/checkpoints/last.ckpt" ]; }
last_step() {
  "$MEDLDM_PYTHON" - "$run/checkpoints/last.ckpt" <<<'import sys, torch; print(torch.load(sys.argv[1], weights_only=True)["global_step"])'
}
logged_steps() { tail -n +2 "$run/metrics.csv" | awk -F, -v n="$num_steps" '$1 < n && !seen[$1]++ {count++} END {print count + 0}'; }
job=$(sbatch --parsable --output="$work/requeued.out" --time=20 --ntasks-per-node=2 --cpus-per-task=1 \
  "$slurm/job.sbatch" train experiment=cardiac2d/vqvae trainer.accelerator=cpu trainer.devices=2 data.batch_size=2 \
  debug=tiny data.root="$work/prepared" run_dir="$run" resume=auto trainer.max_steps="$num_steps" \
  callbacks.checkpoints.every_n_steps=5 trainer.check_val_every_n_epoch=100)
wait_until 300 eval 'is_saved || has_ended "$job"'
check "the training saves" is_saved
scancel --signal=USR1 --batch "$job"
wait_until 900 has_ended "$job"
check "two processes train together" grep "batch: 2 a process x 2 processes on 1 nodes" "$work/requeued.out"
check "USR1: it is requeued, goes on and completes" has_state "$job" COMPLETED || cat "$work/requeued.out"
check "it started twice" grep "start 2 on" "$work/requeued.out"
check "it went on from its checkpoint" grep -E "resuming .* at step [1-9]" "$work/requeued.out"
check "it ends with the right number of steps" test "$(last_step)" = "$num_steps"
check "every step is logged once" test "$(logged_steps)" = "$num_steps"
finish
