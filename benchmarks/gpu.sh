#!/usr/bin/env bash
# Everything that the open issues want measured on a machine with a GPU, in one call of at most ten minutes.
#
#   benchmarks/gpu.sh [tests] [train_step] [encoders] [methods] [codes] [profile] [photographs]
#                                                       default: tests train_step encoders
#
# Each step has its own time limit, and goes on without those that failed; logs, tables and profiles are in $OUT (default
# gpu-results). The status is 0 when every step passed. Variables:
#   OUT      where results are written
#   PYTHON   the interpreter with a torch that sees the GPU (default python3)
#   PUBLIC   a clone of REPA's repository, for the public step's rows; needs accelerate and torchvision
#   MINUTES  limit of train_step, methods and photographs (default 5); with 5, not every model is begun: call `MINUTES=9 benchmarks/gpu.sh train_step`
#   ARGS     more options of benchmarks.train_step (`--vae`, `--encoder dinov2-vitg14`, `--dtype int8`, …)
#   PHOTOS, HELDOUT, VIT, [SECOND]
#            for photographs: images to train on, images to measure on, the weights of a DINOv2 ViT-S/14 and, for a second
#            Fréchet distance, of EfficientNet-Lite0
#   WHEELS   a folder of wheels to install first, into a folder of their own
#
# Packages: those of pyproject.toml but Ray; diffusers for `encoders`, `photographs` and `--vae`, timm for all but tests. Where the
# machine has no network, bring what it lacks (compare `pip list` there) as wheels, made on one that has:
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 \
#     -c constraints.txt -d WHEELS crc32c zarr donfig numcodecs google-crc32c diffusers importlib-metadata
# with the GPU machine's Python in --python-version, and a line of `pip show` there for each package's own needs.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu-results}
MINUTES=${MINUTES:-5}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
if [ -n "${WHEELS:-}" ]; then
  SITE=$(mktemp -d)
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl || exit 2
  export PYTHONPATH=$PYTHONPATH:$SITE
fi

case " ${*:-} " in
  *photographs*)
    if [ -z "${PHOTOS:-}" ] || [ -z "${HELDOUT:-}" ] || [ -z "${VIT:-}" ]; then
      echo "benchmarks/gpu.sh: photographs needs PHOTOS, HELDOUT and VIT; name the three files" >&2
      exit 2
    fi ;;
esac

FAILED=()
step() {  # NAME SECONDS COMMAND…
  local name=$1 limit=$2
  shift 2
  echo "== $name: $*"
  timeout -k 10 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
  local status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || FAILED+=("$name ($status)")
}

PUBLIC_OPTION=()
[ -z "${PUBLIC:-}" ] || PUBLIC_OPTION=(--public "$(cd "$PUBLIC" && pwd)")
COMMON=(--device cuda --directory "${TMPDIR:-/tmp}" --out "$OUT" "${PUBLIC_OPTION[@]}")

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "benchmarks/gpu.sh: torch sees no GPU" >&2; exit 2; }
{ nvidia-smi || true; "$PYTHON" -m pip list 2>/dev/null; } >"$OUT/machine.log"
for name in "${@:-tests train_step encoders}"; do
  for each in $name; do
    case $each in
      tests)
        step tests 150 "$PYTHON" -m pytest -k "cuda or gpu or two_threads" --durations=5 tests/trainer/test_cuda.py \
          tests/trainer/test_dequantise.py tests/trainer/test_random_keys.py tests/trainer/test_codes.py tests/pipeline/test_quantise.py \
          tests/pipeline/test_encode.py tests/pipeline/test_precision.py ;;
      train_step)
        step train_step $((MINUTES * 60)) "$PYTHON" -m benchmarks.train_step --presets sit-xl-2,sit-b-2,sit-l-2 \
          --seconds 1.5 --minutes $((MINUTES - 1)) "${COMMON[@]}" ${ARGS:-} ;;
      methods)  # images a second of each, in one table beside REPA's
        step methods $((MINUTES * 60)) "$PYTHON" -m benchmarks.train_step --batches 32 --compile yes --seconds 1.5 \
          --presets "sit-xl-2,sit-xl-2:irepa,sit-xl-2-reg,sit-xl-2:stopped,sit-xl-2-vanilla,sit-xl-1,lightningdit-xl-1,rit-xl-1,ditdh-xl-1" \
          --minutes $((MINUTES - 1)) "${COMMON[@]}" --out "$OUT/methods" ${ARGS:-} ;;
      codes)  # a step of SiT-B/2 from codes beside one from float16: decoding may take 2 % of it
        for dtype in float16 rotated1 rotated2 rotated4; do
          step "codes-$dtype" $((MINUTES * 15)) "$PYTHON" -m benchmarks.train_step --presets sit-b-2 --batches 256 \
            --compile yes --seconds 1.5 --dtype "$dtype" "${COMMON[@]}" --out "$OUT/codes-$dtype" ${ARGS:-}
        done ;;
      encoders)
        step encoders 110 "$PYTHON" -m benchmarks.encoders --device cuda --seconds 1 --out "$OUT" ;;
      profile)
        step profile 150 "$PYTHON" -m benchmarks.train_step --presets sit-b-2,sit-xl-2 --batches 32 --compile yes \
          --profile store "${COMMON[@]}" ${ARGS:-} ;;
      photographs)  # SiT-B/2 at 256 px, vanilla and REPA, as far as MINUTES go; the same call on a warm machine goes on
        STUDY=${TMPDIR:-/tmp}/photographs
        step photographs $((MINUTES * 60)) "$PYTHON" -m benchmarks.repa_effect --scale base --without-ray --resolution 256 \
          --data "$PHOTOS" --heldout "$HELDOUT" --vae benchmarks/results/photo_vae --encoder-weights "$VIT" \
          --arms vanilla repa --seeds 1 --milestones 1000 2000 4000 8000 --jobs 1 --threads 8 --minutes $((MINUTES - 1)) \
          --out "$STUDY" --results "$OUT/photographs" ${SECOND:+--second-weights "$SECOND"}
        [ ! -d "$STUDY/measures" ] || tar czf "$OUT/photographs.tgz" -C "$STUDY" measures ;;
      *) echo "benchmarks/gpu.sh: no step $each; there are tests, train_step, encoders, methods, codes, profile, photographs" >&2; exit 2 ;;
    esac
  done
done
if [ ${#FAILED[@]} -gt 0 ]; then
  echo "failed: ${FAILED[*]}"
  exit 1
fi
