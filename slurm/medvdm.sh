#!/usr/bin/env bash
# Medical VDM on SLURM: prepare -> vdm -> sample -> evaluate -> report, each job waiting for the success of those before it;
# a failing stage cancels the rest.
#   RAW=/data/chest_xray ROOT=/data/chestxray RUNS=/runs/medvdm GPU=rtx3090 slurm/medvdm.sh [key=value ...]
#   RAW         the dataset as published          ROOT  the prepared dataset (made)     RUNS  training, samples, evaluation
#   EXPERIMENT  chestxray_conv (default), chestxray (as published), chestxray_pixel or colab
#   DATA        chestxray (default), kermany_normal, nih_cxr14, class_folders or folder
#   GPU         rtx3090 (24 GB, default), a6000 (48 GB) or cpu: sbatch options
#   STAGES      the stages to submit, e.g. "vdm sample"; those left out count as done
#   NODES GPUS  of a training (default 1 1)    SHARDS  of encode, sample and evaluate (default 1): see below
#   GRES        default gpu:$GPUS                 SBATCH_OPTIONS  added to every sbatch      DRY_RUN=1  prints and submits nothing

# shellcheck source-path=SCRIPTDIR disable=SC2034,SC2154
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
stages=(prepare vdm sample evaluate report)
train_stages=(vdm)
data_stages=(prepare vdm sample)
debug_stages=(vdm)

read_arguments "$@"
choose_preset
find_python
RAW=$(absolute "${RAW:?set RAW to the folder of the dataset as published}")
ROOT=$(absolute "${ROOT:?set ROOT to the folder of the prepared dataset}")
RUNS=$(absolute "${RUNS:-runs/medvdm-slurm}")
[ "${DRY_RUN:-0}" != 0 ] || [ -d "$RAW" ] || [[ " ${STAGES:-prepare} " != *" prepare "* ]] || fail "RAW=$RAW: no such folder"

experiment=${EXPERIMENT:-chestxray_conv}
dataset=(data="${DATA:-chestxray}" data.root="$(quoted "$ROOT")")
model=$(quoted "$RUNS/vdm/checkpoints/best.ckpt")

submit prepare cpu "" prepare "${dataset[@]}" data.raw="$(quoted "$RAW")"
submit vdm train "prepare" train experiment=medvdm/"$experiment" "${dataset[@]}" run_dir="$(quoted "$RUNS/vdm")" resume=auto \
  data.num_workers="$workers"
submit sample gpu "vdm" sample checkpoint="$model" "${dataset[@]}" split=test output="$(quoted "$RUNS/samples")"
submit evaluate gpu "sample" evaluate generated="$(quoted "$RUNS/samples")" reference="$(quoted "$ROOT")" \
  train="$(quoted "$ROOT")" output="$(quoted "$RUNS/evaluation")" metrics=synthesis
submit report cpu "evaluate" report run="$(quoted "$RUNS/vdm")" evaluation="$(quoted "$RUNS/evaluation")"

show_jobs
cat <<TEXT

prepared data    $ROOT
training         $RUNS/vdm
images           $RUNS/samples
numbers          $RUNS/evaluation/metrics.json
watch            squeue --me; tail -f $RUNS/slurm/*.out
TEXT
