#!/usr/bin/env bash
# Builds the wheel, installs it in a virtualenv of its own and works there from another folder, where no checkout helps:
# help, phantom, prepare and a tiny training. Its dependencies come from the environment of the python given as $1, as a
# .pth file, under which that environment's own editable medldm is not seen.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${1:-$root/.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset VIRTUAL_ENV PYTHONPATH PYTHONHOME

"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/dist" "$root"
"$python" -m venv --without-pip "$work/venv"
site='import sysconfig; print(sysconfig.get_path("purelib"))'
"$python" -c "$site" >"$("$work/venv/bin/python" -c "$site")/dependencies.pth"
"$python" -m pip --python "$work/venv/bin/python" install --quiet --no-deps --force-reinstall "$work"/dist/medldm-*.whl

mkdir "$work/elsewhere"
cd "$work/elsewhere"
export PATH=$work/venv/bin:$PATH
case $(python -c 'import medldm; print(medldm.__file__)') in
  "$work"/venv/*) echo "ok      medldm is the wheel's" ;;
  *) echo "FAILED  medldm comes from $(python -c 'import medldm; print(medldm.__file__)')"; exit 1 ;;
esac
medldm --help >help.txt && grep -q train help.txt
echo "ok      medldm --help"
commands=$(python -c 'from medldm.cli import COMMANDS; print(*COMMANDS)')
for command in $commands; do
  medldm "$command" --help >help.txt && medldm "$command" --cfg job >config.txt
  [ -s help.txt ] && [ -s config.txt ] || { echo "FAILED  medldm $command --help"; exit 1; }
done
echo "ok      every command explains itself and finds its config"
medldm phantom dataset=mnms2 root=raw num_subjects=6
medldm prepare data=mnms2 data.raw=raw data.root=prepared
medldm train experiment=cardiac2d/vqvae debug=tiny data.root=prepared run_dir=run
[ -s run/checkpoints/last.ckpt ] || { echo "FAILED  no run/checkpoints/last.ckpt"; exit 1; }
echo "ok      a tiny training from the wheel"
