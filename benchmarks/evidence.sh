#!/bin/sh
# What the model card tells, measured again with the experts that ship: make evidence DATA=DIR.
#
#     benchmarks/evidence.sh DATA OUT [NPROCS]
#
# DATA holds train/, external_test/, clinical/ and templateflow/. Everything goes to OUT, nothing
# into the repository; what an earlier run has finished is not measured again. It takes hours.
set -eu
data=$1 out=$2 nprocs=${3:-2}
here=$(dirname "$0")
lin=$data/templateflow/tpl-MNI152Lin/tpl-MNI152Lin_res-01
mkdir -p "$out"

# What an earlier run has left there counts for the same experts and protocol only.
package=$here/../remix_bids/data
made_with=$(cat "$package/experts/experts.toml" "$package/protocol.toml" | sha256sum)
if [ "$(cat "$out/made_with" 2>/dev/null || echo "$made_with")" != "$made_with" ]; then
    echo "$out holds results of other experts or of another protocol: name another folder" >&2
    exit 2
fi
echo "$made_with" >"$out/made_with"

# Runs a step unless its output is there; the output appears when the step has succeeded.
once() {
    result=$out/$1
    shift
    if [ ! -e "$result" ]; then
        "$@" >"$result.part"
        mv "$result.part" "$result"
    fi
}

prepare() {
    set -- "$@" --template "${lin}_T1w.nii.gz" --template-mask "${lin}_desc-brain_mask.nii.gz"
    remix-experts prepare "$@" --nprocs "$nprocs"
}

prepare "$data/external_test" "$out/test" --test
prepare "$data/train" "$out/prepared"

manual=$data/external_test/derivatives/manual
remix-experts evaluate "$out/test" "$out/clean.tsv" --noise 0 --classes 1 2 3 4 5 6 --dice \
    --labels "$manual" --nprocs "$nprocs"
remix-experts evaluate "$out/test" "$out/clean7.tsv" --noise 0 --classes 7 --dice --dice-scans 6 \
    --labels "$manual" --nprocs "$nprocs"
remix-experts evaluate "$out/test" "$out/noisy.tsv" --noise 0.02 --nprocs "$nprocs"
remix-experts table "$out/table1" "$out/clean.tsv" "$out/noisy.tsv" "$out/clean7.tsv"
remix-experts evaluate "$out/prepared" "$out/heads.tsv" --split held_out --classes 3 4 5 6 7 \
    --geometries 1 --every-expert --nprocs "$nprocs"
once lesions.log remix-experts lesions "$out/test" "$out/lesions.tsv" --persons 2
once gates.log remix-experts gates "$out/test" "$out/gates.tsv" --geometries 24

once steps.md python "$here/steps.py" "$out/prepared" --persons 2 --draws 1 --seed 9 \
    --noise 0 0.005 0.01
once outside.md python "$here/outside.py" "$out/prepared" --persons 2
once network.log python "$here/network.py" --out "$out/network.md"

TEMPLATEFLOW_HOME=$data/templateflow remix-bids "$data/clinical" "$out/clinical" participant \
    --offline --leave-slices-out -w "$out/work"
once left_out.md python "$here/left_out.py" "$out/clinical"
once pictures.log python "$here/pictures.py" "$data/clinical" "$out/clinical" "$out/pictures"
