#!/usr/bin/env bash
# Med-LSDM on SLURM: prepare -> vqgan -> encode -> ldm -> sample -> evaluate -> report, each job waiting for the success of
# those before it; a failing stage cancels the rest.
#   RAW=/data/autopet ROOT=/data/autopet256 RUNS=/runs/autopet DATA=autopet GPU=rtx3090 slurm/medlsdm.sh [key=value ...]
#   RAW      the dataset as published          ROOT  the prepared dataset (made)     RUNS  trainings, samples, evaluation
#   DATA     autopet, synthrad, duke, totalsegmentator_mri or folder (your own volumes; default)
#   DECODER  plain (default) or spade: a first stage whose decoder sees the map (not totalsegmentator_mri)
#   SEGMENTER  yes: also a segmenter of the real volumes, and its Dice on the samples (stages segmenter, dice)
#   GPU      rtx3090 (24 GB, default), a6000 (48 GB) or cpu: sbatch options
#   STAGES   the stages to submit, e.g. "ldm sample evaluate report"; those left out count as done
#   NODES GPUS  of a training (default 1 1)    SHARDS  of encode, sample and evaluate (default 1): see below
#   GRES     default gpu:$GPUS                 SBATCH_OPTIONS  added to every sbatch      DRY_RUN=1  prints and submits nothing
# Other runs of the paper: ldm:model.conditioner.spade_out_channels=37 (or 128) on AutoPET; pre-training on TotalSegmentator
# MRI, then vqgan:init_from=CKPT ldm:init_from=CKPT on SynthRAD.

# shellcheck source-path=SCRIPTDIR disable=SC2034,SC2154
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
stages=(prepare vqgan encode ldm reconstruction sample evaluate report)
case ${SEGMENTER:-no} in
  yes) stages+=(segmenter dice) ;;
  no) ;;
  *) fail "SEGMENTER=$SEGMENTER: choose from yes, no" ;;
esac
train_stages=(vqgan ldm)
data_stages=(prepare vqgan encode ldm reconstruction sample segmenter)
debug_stages=(vqgan ldm segmenter)

read_arguments "$@"
choose_preset
find_python
RAW=$(absolute "${RAW:?set RAW to the folder of the dataset as published}")
ROOT=$(absolute "${ROOT:?set ROOT to the folder of the prepared dataset}")
RUNS=$(absolute "${RUNS:-runs/medlsdm-slurm}")
[ "${DRY_RUN:-0}" != 0 ] || [ -d "$RAW" ] || [[ " ${STAGES:-prepare} " != *" prepare "* ]] || fail "RAW=$RAW: no such folder"

DATA=${DATA:-folder}
case $DATA in
  autopet | synthrad | duke | folder) prefix=$DATA ;;
  totalsegmentator_mri) prefix=totalseg ;;
  *) fail "DATA=$DATA: choose from autopet, synthrad, duke, totalsegmentator_mri, folder" ;;
esac
case ${DECODER:-plain} in
  plain) vqgan=${prefix}_vqgan ;;
  spade) vqgan=${prefix}_vqgan_spade; [ "$prefix" != totalseg ] || fail "DECODER=spade: not with DATA=$DATA" ;;
  *) fail "DECODER=$DECODER: choose from plain, spade" ;;
esac
loading=(data.num_workers="$workers")
dataset=(data="$DATA" data.spatial_dims=3 data.root="$(quoted "$ROOT")")
windows=(windows.size="[32,null,null]" tile=128)  # volumes are deeper than the training windows
[[ " $* " != *debug=* ]] || windows=()
first_stage=$(quoted "$RUNS/vqgan/checkpoints/best.ckpt")
denoiser=$(quoted "$RUNS/ldm/checkpoints/best.ckpt")

submit prepare cpu "" prepare "${dataset[@]}" data.raw="$(quoted "$RAW")" data.preprocess.divisible_by=32
submit vqgan train "prepare" train experiment=medlsdm/"$vqgan" "${dataset[@]}" run_dir="$(quoted "$RUNS/vqgan")" resume=auto \
  "${loading[@]}"
submit encode gpu "vqgan" encode checkpoint="$first_stage" "${dataset[@]}" data.batch_size=1 tile=128
submit ldm train "encode" train experiment=medlsdm/"${prefix}_ldm" "${dataset[@]}" data.latents=auto \
  model.first_stage.checkpoint="$first_stage" run_dir="$(quoted "$RUNS/ldm")" resume=auto "${loading[@]}"
submit reconstruction gpu "vqgan" sample checkpoint="$first_stage" "${dataset[@]}" split=test tile=128 data.batch_size=1 \
  output="$(quoted "$RUNS/reconstruction")"
submit sample gpu "ldm" sample checkpoint="$denoiser" "${dataset[@]}" split=test data.batch_size=1 \
  ${windows[@]+"${windows[@]}"} output="$(quoted "$RUNS/samples")"
submit evaluate gpu "reconstruction sample" evaluate generated="$(quoted "$RUNS/samples")" \
  reference="$(quoted "$ROOT")" reconstruction="$(quoted "$RUNS/reconstruction")" train="$(quoted "$ROOT")" \
  output="$(quoted "$RUNS/evaluation")" metrics=synthesis_3d
segmentation=folder_segmentation
[ "$prefix" != duke ] || segmentation=duke_segmentation
submit segmenter train "prepare" train experiment=medlsdm/"$segmentation" "${dataset[@]}" \
  run_dir="$(quoted "$RUNS/segmenter")" resume=auto "${loading[@]}"
submit dice gpu "segmenter sample" evaluate metrics=segmentation generated="$(quoted "$RUNS/samples")" \
  reference="$(quoted "$ROOT")" segmenter="$(quoted "$RUNS/segmenter/checkpoints/best.ckpt")" \
  output="$(quoted "$RUNS/dice")"
submit report cpu "evaluate" report run="[$(quoted "$RUNS/vqgan"),$(quoted "$RUNS/ldm")]" \
  evaluation="$(quoted "$RUNS/evaluation")"

show_jobs
cat <<TEXT

prepared data    $ROOT
trainings        $RUNS/vqgan  $RUNS/ldm
volumes          $RUNS/samples  $RUNS/reconstruction
numbers          $RUNS/evaluation/metrics.json
watch            squeue --me; tail -f $RUNS/slurm/*.out
TEXT
