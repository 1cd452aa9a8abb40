#!/bin/bash
# Check a container image as it will be used: make container-test
#
#   ENGINE     podman or docker (default: the first that is installed)
#   IMAGE      check this image; without it one is built
#   BUILD      more arguments for the build, such as --build-context templates=DIR
#   DATA       a BIDS dataset to run it on; without it a simulated brain, which needs no template
#   LIMIT_MB   how large the image may be (default 3000; an image with CUDA is larger)
set -euo pipefail
cd "$(dirname "$0")/.."
say() { echo "container-test: $*"; }
fail() { say "FAILED: $*" >&2; exit 1; }

engine=${ENGINE:-$(command -v podman || command -v docker || true)}
[ -n "$engine" ] || fail "neither podman nor docker is installed here, so that there is nothing to check with"
image=${IMAGE:-}
if [ -z "$image" ]; then
    image=remix-bids:container-test
    # shellcheck disable=SC2086 # several arguments
    "$engine" build ${BUILD:-} --build-arg REVISION="$(git rev-parse --short HEAD)" -t "$image" .
fi

scratch=$(mktemp -d)
cleanup() { # with the engine, because some of it belongs to other users
    "$engine" run --rm -v "$scratch:/scratch" --user 0 --entrypoint sh "$image" -c 'rm -rf /scratch/*'
    rm -rf "$scratch"
}
trap cleanup EXIT

size=$(($("$engine" image inspect --format '{{.Size}}' "$image") / 1000000))
[ "$size" -lt "${LIMIT_MB:-3000}" ] || fail "the image has $size MB"
say "size $size MB; the ten largest parts (MB):"
inside() { "$engine" run --rm --network=none --read-only --tmpfs /tmp --entrypoint sh "$image" -c "$1"; }
inside 'du -xsm /usr /app/venv/bin /app/templateflow /app/venv/lib/python3*/site-packages/* | sort -rn | head -n 10'
left=$(inside 'for tool in cc gcc g++ make ld pytest mypy ruff; do command -v $tool; done
    find / -xdev -path /proc -prune -o \( -path "*/.cache/*" -o -path "/var/lib/apt/lists/*" \) -type f -size +0 -print' || true)
[ -z "$left" ] || fail "compilers, test tools or caches are left in the image: $left"

# Anybody, without a network, with nothing but the output folder and /tmp to write to.
user=4321:4321
mkdir "$scratch/out" && chmod 777 "$scratch" "$scratch/out"
run() {
    "$engine" run --rm --network=none --read-only --tmpfs /tmp --user "$user" \
        -v "$data:/data:ro" -v "$scratch/out:/out" "$image" /data /out participant "$@"
}
options=()
if [ -n "${DATA:-}" ]; then
    data=$(realpath "$DATA")
else
    "$engine" run --rm --network=none --user "$user" -v "$scratch:/scratch" --entrypoint remix-experts \
        "$image" simulate /scratch/demo
    data=$scratch/demo/bids options=(--output-spaces MNI152NLin2009aSym)
fi
checksums() { (cd "$data" && find . -type f -size +0 -print0 | sort -z | xargs -0 sha256sum); }
before=$(checksums)
run --dry-run "${options[@]}" > "$scratch/dry.txt" || { cat "$scratch/dry.txt"; fail "the dry run"; }
run "${options[@]}" | tee "$scratch/run.txt" || fail "the run"
n=$(grep -c ' -> ' "$scratch/dry.txt")
tail -n 1 "$scratch/run.txt" | grep -qx "$n done, 0 failed" || fail "not all of $n scans are done"
[ "$(checksums)" = "$before" ] || fail "the input has changed"
found=$(find "$scratch/out" -name '*_desc-remix_T1w.nii.gz' | wc -l)
[ "$found" -ge "$n" ] || fail "$found images of $n scans"
if [ "$(id -u)" = 0 ]; then # without root the engine maps users to others
    others=$(find "$scratch/out" -mindepth 1 ! -uid "${user%:*}")
    [ -z "$others" ] || fail "not owned by $user: $others"
fi
grep -q '"Container"' "$scratch/out/dataset_description.json" || fail "the results do not name the container"
"$engine" run --rm --network=none --read-only --tmpfs /tmp -v "$scratch/out:/out:ro" \
    --entrypoint bids-validator-deno "$image" --ignoreWarnings /out || fail "the results are not valid BIDS"
say "all is well: $n scan(s), image $image ($size MB, templates: $(
    "$engine" image inspect --format '{{index .Config.Labels "templates"}}' "$image"))"
