#!/usr/bin/env bash
# The cardiac 2D system on SLURM: prepare -> vqvae -> encode -> ldm -> sample -> evaluate -> report, each job waiting for
# the success of those before it; a failing stage cancels the rest.
#   RAW=/data/MnM2 ROOT=/data/mnms2 RUNS=/runs/cardiac2d GPU=rtx3090 slurm/cardiac2d.sh [key=value ...]
#   RAW     the dataset as published          ROOT  the prepared dataset (made)     RUNS  trainings, samples, evaluation
#   GPU     rtx3090 (24 GB, default), a6000 (48 GB) or cpu: sbatch options, and batches that make 36 an update
#   STAGES  the stages to submit, e.g. "ldm sample evaluate report"; those left out count as done
#   DATA    dataset, e.g. folder (default mnms2)  SBATCH_OPTIONS  added to every sbatch, e.g. --partition=gpu
#   NODES GPUS  of a training (default 1 1)    SHARDS  of encode, sample and evaluate (default 1): see below
#   GRES    default gpu:1                         DRY_RUN=1       prints the sbatch lines and submits nothing

# shellcheck source-path=SCRIPTDIR disable=SC2034,SC2154
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
stages=(prepare vqvae encode ldm reconstruction sample evaluate report)
train_stages=(vqvae ldm)
data_stages=(prepare vqvae encode ldm reconstruction sample)
debug_stages=(vqvae ldm)

read_arguments "$@"
choose_preset
find_python
RAW=$(absolute "${RAW:?set RAW to the folder of the dataset as published}")
ROOT=$(absolute "${ROOT:?set ROOT to the folder of the prepared dataset}")
RUNS=$(absolute "${RUNS:-runs/cardiac2d-slurm}")
[ "${DRY_RUN:-0}" != 0 ] || [ -d "$RAW" ] || [[ " ${STAGES:-prepare} " != *" prepare "* ]] || fail "RAW=$RAW: no such folder"

case $GPU in  # 36 images an update everywhere
  rtx3090) vqvae_batch=(data.batch_size=12 trainer.accumulate_grad_batches=3) ldm_batch=(data.batch_size=36) ;;
  a6000) vqvae_batch=(data.batch_size=36) ldm_batch=(data.batch_size=36) ;;
  cpu) vqvae_batch=(data.batch_size=4 trainer.accumulate_grad_batches=9) ldm_batch=(data.batch_size=36) ;;
esac
[[ " $* " != *debug=* ]] || vqvae_batch=() ldm_batch=()  # a debug run has its own, tiny ones
loading=(data.num_workers="$workers")
dataset=(data="${DATA:-mnms2}" data.root="$(quoted "$ROOT")")
first_stage=$(quoted "$RUNS/vqvae/checkpoints/best.ckpt")
denoiser=$(quoted "$RUNS/ldm/checkpoints/best.ckpt")

submit prepare cpu "" prepare "${dataset[@]}" data.raw="$(quoted "$RAW")"
submit vqvae train "prepare" train experiment=cardiac2d/vqvae "${dataset[@]}" run_dir="$(quoted "$RUNS/vqvae")" resume=auto \
  ${vqvae_batch[@]+"${vqvae_batch[@]}"} "${loading[@]}"
submit encode gpu "vqvae" encode checkpoint="$first_stage" "${dataset[@]}"
submit ldm train "encode" train experiment=cardiac2d/ldm "${dataset[@]}" model.first_stage.checkpoint="$first_stage" \
  data.latents=auto run_dir="$(quoted "$RUNS/ldm")" resume=auto ${ldm_batch[@]+"${ldm_batch[@]}"} "${loading[@]}"
submit reconstruction gpu "vqvae" sample checkpoint="$first_stage" "${dataset[@]}" split=test \
  output="$(quoted "$RUNS/reconstruction")"
submit sample gpu "ldm" sample checkpoint="$denoiser" "${dataset[@]}" split=test output="$(quoted "$RUNS/samples")"
submit evaluate gpu "reconstruction sample" evaluate generated="$(quoted "$RUNS/samples")" \
  reference="$(quoted "$ROOT")" reconstruction="$(quoted "$RUNS/reconstruction")" train="$(quoted "$ROOT")" \
  output="$(quoted "$RUNS/evaluation")" metrics=synthesis
submit report cpu "evaluate" report run="[$(quoted "$RUNS/vqvae"),$(quoted "$RUNS/ldm")]" \
  evaluation="$(quoted "$RUNS/evaluation")"

show_jobs
cat <<TEXT

prepared data    $ROOT
trainings        $RUNS/vqvae  $RUNS/ldm
images           $RUNS/samples  $RUNS/reconstruction
numbers          $RUNS/evaluation/metrics.json
watch            squeue --me; tail -f $RUNS/slurm/*.out
TEXT
