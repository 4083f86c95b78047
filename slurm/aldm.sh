#!/usr/bin/env bash
# ALDM on SLURM: prepare -> vqgan -> encode -> msspade -> ldm -> samples of the three stages -> evaluate -> report, each job
# waiting for the success of those before it; a failing stage cancels the rest.
#   RAW=/data/BraTS2021 ROOT=/data/brats RUNS=/runs/aldm GPU=a6000 slurm/aldm.sh [key=value ...]
#   RAW     the dataset as published          ROOT  the prepared dataset (made)     RUNS  trainings, samples, evaluation
#   GPU     rtx3090 (24 GB, default), a6000 (48 GB) or cpu: sbatch options and batches
#   DATA    brats (default) or ixi            PRESET  r1 or r3: the releases as published, from images (no encode stage);
#                                                     nothing: the repaired default
#   STAGES  the stages to submit, e.g. "ldm sample evaluate report"; those left out count as done
#   SBATCH_OPTIONS  added to every sbatch, e.g. --partition=gpu
#   NODES GPUS  of a training (default 1 1)    SHARDS  of encode, sample and evaluate (default 1): see below
#   GRES    default gpu:1                         DRY_RUN=1       prints the sbatch lines and submits nothing

# shellcheck source-path=SCRIPTDIR disable=SC2034,SC2154
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
stages=(prepare vqgan encode msspade ldm reconstruction spade sample evaluate report)
train_stages=(vqgan msspade ldm)
data_stages=(prepare vqgan encode msspade ldm reconstruction spade sample)
debug_stages=(vqgan msspade ldm)

read_arguments "$@"
choose_preset
find_python
RAW=$(absolute "${RAW:?set RAW to the folder of the dataset as published}")
ROOT=$(absolute "${ROOT:?set ROOT to the folder of the prepared dataset}")
RUNS=$(absolute "${RUNS:-runs/aldm-slurm}")
DATA=${DATA:-brats}
case $DATA in brats | ixi) ;; *) fail "DATA=$DATA: choose brats or ixi" ;; esac
case ${PRESET:-} in
  '') suffix='' ;;
  r1 | r3) [ "$DATA" = brats ] || fail "PRESET=$PRESET: the releases are presets of brats"; suffix=_$PRESET ;;
  *) fail "PRESET=$PRESET: choose r1 or r3, or leave it out" ;;
esac
[ "${DRY_RUN:-0}" != 0 ] || [ -d "$RAW" ] || [[ " ${STAGES:-prepare} " != *" prepare "* ]] || fail "RAW=$RAW: no such folder"

case $GPU in  # volumes an update: vqgan 2, msspade 4, ldm 8
  rtx3090) batch=(data.batch_size=1 trainer.accumulate_grad_batches=2) ;;
  a6000) batch=() ;;
  cpu) batch=(data.batch_size=1) ;;
esac
[[ " $* " != *debug=* ]] || batch=()  # a debug run has its own, tiny ones
loading=(data.num_workers="$workers")
dataset=(data="$DATA$suffix" data.root="$(quoted "$ROOT")")
checkpoint() { quoted "$RUNS/$1/checkpoints/best.ckpt"; }
cached=(data.latents=auto "data.flip_axes=[]")
after_vqgan=encode
# r1's translator trains the autoencoder too, on images; r3's stages mirror theirs: neither reads cached latents
[ -z "${PRESET:-}" ] || { cached=() after_vqgan=vqgan; }

submit prepare cpu "" prepare "${dataset[@]}" data.raw="$(quoted "$RAW")"
submit vqgan train "prepare" train experiment="aldm/${DATA}_vqgan$suffix" resume=auto \
  run_dir="$(quoted "$RUNS/vqgan")" "${dataset[@]}" ${batch[@]+"${batch[@]}"} "${loading[@]}"
[ -n "${PRESET:-}" ] || submit encode gpu "vqgan" encode checkpoint="$(checkpoint vqgan)" "${dataset[@]}"
submit msspade train "$after_vqgan" train experiment="aldm/${DATA}_msspade$suffix" resume=auto \
  run_dir="$(quoted "$RUNS/msspade")" "${dataset[@]}" ${cached[@]+"${cached[@]}"} \
  model.first_stage.checkpoint="$(checkpoint vqgan)" "${loading[@]}"
submit ldm train "msspade" train experiment="aldm/${DATA}_ldm$suffix" resume=auto \
  run_dir="$(quoted "$RUNS/ldm")" "${dataset[@]}" ${cached[@]+"${cached[@]}"} \
  model.first_stage.checkpoint="$(checkpoint msspade)" "${loading[@]}"
for kind in reconstruction:autoencoder spade:spade; do
  submit "${kind%:*}" gpu "msspade" sample checkpoint="$(checkpoint msspade)" "${dataset[@]}" split=test \
    stage="${kind#*:}" output="$(quoted "$RUNS/${kind%:*}")"
done
submit sample gpu "ldm" sample checkpoint="$(checkpoint ldm)" "${dataset[@]}" split=test output="$(quoted "$RUNS/samples")"
submit evaluate gpu "reconstruction spade sample" evaluate metrics=translation generated="$(quoted "$RUNS/samples")" \
  reference="$(quoted "$ROOT")" reconstruction="$(quoted "$RUNS/reconstruction")" spade="$(quoted "$RUNS/spade")" \
  output="$(quoted "$RUNS/evaluation")"
submit report cpu "evaluate" report run="[$(quoted "$RUNS/vqgan"),$(quoted "$RUNS/msspade"),$(quoted "$RUNS/ldm")]" \
  evaluation="$(quoted "$RUNS/evaluation")"

show_jobs
cat <<TEXT

prepared data    $ROOT
trainings        $RUNS/vqgan  $RUNS/msspade  $RUNS/ldm
images           $RUNS/samples  $RUNS/spade  $RUNS/reconstruction
numbers          $RUNS/evaluation/metrics.json
watch            squeue --me; tail -f $RUNS/slurm/*.out
TEXT
