#!/usr/bin/env bash
# slurm/*.sh and job.sbatch on a running SLURM (SLURM_CONF), with a stand-in for the python: overrides, quoting, presets,
# dependencies, requeues. About 40 s, next to no CPU.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/checks.sh"
slurm=$here/../../slurm
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1
export MEDLDM_PYTHON=$here/fake_python FAKE_DIR=$work

line_of() { grep -F -- "--job-name=cardiac2d-$1 " "$work/dry"; }
dry() { DRY_RUN=1 RAW="$work/my raw" ROOT=$work/root RUNS=$work/runs "$slurm/cardiac2d.sh" "$@" >"$work/dry" 2>"$work/err"; }
reaches() {  # reaches WORD STAGES...: these stages' lines have the word and no other
  local word=$1 stage
  shift
  for stage in prepare vqvae encode ldm reconstruction sample evaluate report; do
    if [[ " $* " == *" $stage "* ]]; then
      line_of "$stage" | grep -qF -- "$word" || return 1
    else
      ! line_of "$stage" | grep -qF -- "$word" || return 1
    fi
  done
}
is_refused() { local text=$1; shift; ! dry "$@" && [ "$(wc -l <"$work/err")" = 1 ] && grep -qF -- "$text" "$work/err"; }

dry seed=7 vqvae:trainer.max_steps=10 sample:sampler.num_steps=20 data.cache=ram debug=tiny
check "a plain override reaches both trainings" reaches " seed=7 " vqvae ldm
check "STAGE: reaches one training" reaches " trainer.max_steps=10 " vqvae
check "STAGE: reaches sample" reaches " sampler.num_steps=20 " sample
check "data.* reaches every stage with data" reaches " data.cache=ram " prepare vqvae encode ldm reconstruction sample
dry data.split=official_160_40_160
check "data.split reaches every stage with data" reaches " data.split=official_160_40_160 " prepare vqvae encode ldm reconstruction sample
check "and the evaluation as train_split" reaches " train_split=official_160_40_160 " evaluate
dry seed=7 data.cache=ram debug=tiny
check "debug reaches the stages that know it" reaches " debug=tiny " vqvae ldm
check "a path with a space is quoted for Hydra" reaches "data.raw=\\'$work/my\\ raw\\'" prepare
check "a misspelt stage is refused in one line" is_refused "no stage 'vqva'" vqva:seed=1
check "a word without = is refused" is_refused "is no override" fast
check "data.root as an override is refused" is_refused "set ROOT=" data.root=/x
GPU=a6000 dry
check "a6000 trains the first stage on 36 at once" eval 'line_of vqvae | grep -q "data.batch_size=36 " && ! line_of vqvae | grep -q accumulate'
GPU=rtx3090 dry
check "rtx3090 accumulates 3 x 12" eval 'line_of vqvae | grep -q "data.batch_size=12 .*=3 "'
check "rtx3090 asks for a GPU for the trainings" reaches " --gres=gpu:1 " vqvae encode ldm reconstruction sample evaluate
GPU=cpu dry
check "cpu asks for no GPU" reaches " --gres" ""
GPU=v100 check "an unknown GPU is refused" is_refused "GPU=v100"

NODES=2 GPUS=4 GPU=a6000 PLAN=no dry
check "NODES and GPUS: tasks and cards of the trainings" reaches " --gres=gpu:4 --cpus-per-task=14 --mem=384G --time=24:00:00 --nodes=2 --ntasks-per-node=4 " vqvae ldm
check "and their processes" reaches " trainer.num_nodes=2 trainer.devices=4 " vqvae ldm
check "the other stages take one card" reaches " --gres=gpu:1 " encode reconstruction sample evaluate
GPUS=2 GRES=gpu:a100:2 PLAN=no dry
check "a kind of card is kept" eval 'line_of ldm | grep -q -- "--gres=gpu:a100:2 " && line_of encode | grep -q -- "--gres=gpu:a100:1 "'
NODES=two check "a number of nodes that is none is refused" is_refused "NODES=two: give a number"
SHARDS=3 PLAN=no dry
check "SHARDS: arrays of the stages that divide" reaches " --array=1-3 " encode reconstruction sample evaluate
check "which take their share" reaches " shard=array " encode reconstruction sample evaluate
PLAN=no dry
check "one process asks for neither" eval '! grep -qE -- "--array|--ntasks|shard=|trainer.devices" "$work/dry"'

FAKE_FAIL=plan FAKE_LINE="30.0 GiB of 23.6: DOES NOT FIT" dry vqvae:data.batch_size=99
check "a training that does not fit its card is warned of" eval '[ "$(grep -c "warning: stage .* does not fit rtx3090" "$work/err")" = 2 ] && grep -q "^  30.0 GiB .*DOES NOT FIT" "$work/err"'
check "and is submitted nevertheless" eval 'line_of vqvae | grep -q "data.batch_size=99 " && line_of report >/dev/null'
check "the plan is asked with the training's own settings, its run folder left out" \
  eval 'grep -P "^plan\t" "$work/calls" | grep "batch_size=99" | grep "gpu=rtx3090" | grep "experiment=cardiac2d/vqvae" | grep -qv "run_dir=\|data.root="'
calls=$(grep -cP "^plan\t" "$work/calls")
PLAN=no dry && GPU=cpu dry && dry debug=tiny
check "PLAN=no, a CPU and a debug run ask for no plan" test "$(grep -cP "^plan\t" "$work/calls")" = "$calls"
: >"$work/calls"

lsdm() { DRY_RUN=1 RAW="$work/my raw" ROOT=$work/root RUNS=$work/runs "$slurm/medlsdm.sh" "$@" >"$work/dry" 2>"$work/err"; }
lsdm_line() { grep -F -- "--job-name=medlsdm-$1 " "$work/dry"; }
lsdm_refuses() { local text=$1; shift; ! lsdm "$@" && [ "$(wc -l <"$work/err")" = 1 ] && grep -qF -- "$text" "$work/err"; }
DATA=totalsegmentator_mri lsdm vqgan:trainer.max_steps=10
check "medlsdm: each dataset has its experiments" eval 'lsdm_line vqgan | grep -qF "experiment=medlsdm/totalseg_vqgan " && lsdm_line ldm | grep -qF "experiment=medlsdm/totalseg_ldm "'
check "medlsdm: an override reaches its stage alone" eval 'lsdm_line vqgan | grep -q max_steps=10 && ! lsdm_line ldm | grep -q max_steps'
check "medlsdm: samples wait for the diffusion alone" eval 'lsdm_line sample | grep -qF "afterok:ID_ldm "'
DATA=duke DECODER=spade lsdm
check "medlsdm: the SPADE decoder" eval 'lsdm_line vqgan | grep -qF "experiment=medlsdm/duke_vqgan_spade "'
DATA=duke lsdm
check "medlsdm: no segmenter unless asked for" eval '! grep -qE -- "--job-name=medlsdm-(segmenter|dice) " "$work/dry"'
DATA=duke SEGMENTER=yes lsdm segmenter:trainer.max_epochs=3 data.cache=ram seed=7
check "medlsdm: the segmenter trains on real volumes" eval 'lsdm_line segmenter | grep -qF "experiment=medlsdm/duke_segmentation " && lsdm_line segmenter | grep -qF "afterok:ID_prepare "'
check "medlsdm: its own overrides and those of the data reach it, those of both trainings do not" eval 'lsdm_line segmenter | grep -qF "max_epochs=3 " && lsdm_line segmenter | grep -qF "data.cache=ram " && ! lsdm_line segmenter | grep -qF "seed=7 "'
check "medlsdm: its Dice waits for it and the samples" eval 'lsdm_line dice | grep -qE "afterok:ID_(segmenter:ID_sample|sample:ID_segmenter) " && lsdm_line dice | grep -qF "metrics=segmentation " && lsdm_line dice | grep -qF "segmenter=$work/runs/segmenter/checkpoints/best.ckpt "'
DATA=autopet SEGMENTER=yes STAGES="segmenter dice" lsdm
check "medlsdm: other data take the experiment of folders, alone" eval 'lsdm_line segmenter | grep -qF "experiment=medlsdm/folder_segmentation data=autopet " && [ "$(grep -c -- --job-name= "$work/dry")" = 2 ] && ! lsdm_line dice | grep -qF sample,'
SEGMENTER=maybe check "medlsdm: another word for the segmenter is refused" lsdm_refuses "SEGMENTER=maybe: choose from"
DATA=mnms2 check "medlsdm: another dataset is refused" lsdm_refuses "DATA=mnms2: choose from"
DECODER=odd check "medlsdm: another decoder is refused" lsdm_refuses "DECODER=odd: choose from"

odd="$work/50% \${HOME} it's"
DRY_RUN=1 RAW="$odd" ROOT=$odd RUNS=$odd "$slurm/cardiac2d.sh" >"$work/dry"
check "a path with %, \${...} and a quote arrives as written" eval 'line_of prepare | grep -qF "$(printf %q "data.raw='"'"'$work/50% \\\${HOME} it\\'"'"'s'"'"'")"'
check "and a % in the name of the log is doubled" eval 'line_of prepare | grep -qF "50%%"'

mkdir -p "$work/my raw"
chain() { GPU=cpu RAW="$work/my raw" ROOT=$work/root RUNS="$work/$1" "$slurm/cardiac2d.sh" "${@:2}" >"$work/$1.txt"; }
chain 'all runs' 'vqvae:+model.note=[1, "a b", {x: $HOME}]'
check "the chain ends" wait_until 60 queue_empty
states=$(job_states "$work/all runs.txt")
check "every job of the chain is COMPLETED" test "${states//:COMPLETED/}" = "prepare vqvae encode ldm reconstruction sample evaluate report "
check "an override with spaces, brackets and quotes arrives whole" \
  grep -qF $'\t+model.note=[1, "a b", {x: $HOME}]' "$work/calls"
check "evaluate runs after both samples" test "$(cut -f1 "$work/calls" | tail -2 | tr '\n' ' ')" = "evaluate report "

FAKE_FAIL=encode chain broken
check "a failing stage ends the chain" wait_until 60 queue_empty
echo "        $(job_states "$work/broken.txt")"
check "its dependents are cancelled" test "$(job_states "$work/broken.txt")" = "prepare:COMPLETED vqvae:COMPLETED \
encode:FAILED ldm:CANCELLED reconstruction:COMPLETED sample:CANCELLED evaluate:CANCELLED report:CANCELLED "

SBATCH_OPTIONS=--cpus-per-task=1 SHARDS=2 FAKE_FAIL=sample STAGES="encode sample evaluate report" chain arrays
check "a chain of arrays ends" wait_until 60 queue_empty
check "each element ran, and of the failing stage the other one" test "$(sort "$work/elements" | grep -E "^(encode|sample) ." | tr '\n' ' ')" = "encode 1 encode 2 sample 1 "
check "a failing element cancels what waits for its array" eval 'for stage in evaluate report; do has_state "$(job_of $stage "$work/arrays.txt")" CANCELLED || exit 1; done'

submit() { sbatch --parsable --output="$work/%j.out" "$@"; }
reached() { [ "$(cat "$1/now" 2>/dev/null || echo 0)" -ge "$2" ]; }
touch stubborn
job=$(FAKE_STEPS=40 submit --time=10 "$slurm/job.sbatch" train run_dir="$work/run")
wait_until 20 test ! -e stubborn
sleep 1
scancel --signal=USR1 --batch "$job"
check "USR1 before the training listens queues it again" wait_until 40 reached "$work/run" 5
scancel --signal=USR1 --batch "$job"
check "USR1 during the training: requeued, and COMPLETED" wait_until 60 has_state "$job" COMPLETED
sed 's/^/        /' "$work/run/starts"
check "it goes on from its checkpoint" test "$(grep -c 'from step [1-9]' "$work/run/starts")" = 1
check "and does all of its steps once" test "$(cat "$work/run/last")" = 40
check "its log keeps the earlier starts" test "$(grep -c 'start [123] on' "$work/$job.out")" = 3
job=$(FAKE_FAIL=train submit "$slurm/job.sbatch" train run_dir="$work/other")
check "another exit status is passed on" wait_until 30 has_state "$job" FAILED
check "with its number" test "$(job_field "$job" ExitCode)" = 3:0
job=$(MEDLDM_MAX_REQUEUES=0 FAKE_STEPS=600 submit "$slurm/job.sbatch" train run_dir="$work/bounded")
wait_until 20 reached "$work/bounded" 3
scancel --signal=USR1 --batch "$job"
check "requeues are bounded" wait_until 30 has_state "$job" FAILED
two_tasks() { submit --ntasks-per-node=2 --cpus-per-task=1 "$slurm/job.sbatch" train run_dir="$1"; }
starts() { [ "$(grep -c "^task 1 of 2 at 127.0.0.1" "$work/tasks")" = "$1" ]; }
touch stubborn
job=$(FAKE_STEPS=60 two_tasks "$work/pair")
wait_until 20 eval '[ ! -e stubborn ] && reached "$work/pair" 3'
scancel --signal=USR1 --batch "$job"
check "USR1 that ends the second of two tasks, which does not listen yet, queues both again" wait_until 40 starts 2
sleep 1
scancel --signal=USR1 --batch "$job"
check "two tasks on a node are told to stop, requeued, and COMPLETED" wait_until 60 has_state "$job" COMPLETED
check "the second task started with the first each time" starts 3
check "and they do all steps once" eval '[ "$(cat "$work/pair/last")" = 60 ] && [ "$(grep -c "from step [1-9]" "$work/pair/starts")" = 2 ]'
finish
