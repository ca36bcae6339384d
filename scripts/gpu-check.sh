#!/usr/bin/env bash
# `npm run gpu:check`: whether the device cuda is right on this machine's GPU, and how fast it is.
#
#   scripts/gpu-check.sh [--rehearse]
#     --rehearse  the same on the device cuda-emulated with tiny shapes, for machines without a GPU: checks this
#                 script and the benchmark programs, and writes nothing to benchmarks/results
#
# Builds, runs the conformance suite on cuda, runs the kernels under compute-sanitizer where that is installed,
# measures them beside PyTorch where python3 has it, and measures whole GRPO steps. The tables are printed and written
# to benchmarks/results/<card>.{md,json}. Exit code 0: everything that ran passed, and the suite ran.
#
# Needs bash, a C++ compiler, CMake, ninja, CUDA's compiler (12.4 or later) and the header doctest/doctest.h, and
# neither Node nor a network. MERF_DOCTEST_INCLUDE names the folder that holds doctest/, CUDACXX the compiler,
# MERF_PYTHON a Python with PyTorch. Takes less than MERF_GPU_CHECK_SECONDS (480): what would not fit is left out, and
# said so.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
SECONDS=0
budget=${MERF_GPU_CHECK_SECONDS:-480}
rehearse=
case "${1:-}" in
  '') ;;
  --rehearse) rehearse=1 ;;
  *) echo "Expected nothing or --rehearse but received $1" >&2; exit 2 ;;
esac

work=build/gpu-check
device=cuda
tiny=()
if [ -n "$rehearse" ]; then
  work=build/gpu-check-rehearsal
  device=cuda-emulated
  tiny=(--tiny)
fi
mkdir -p "$work"
rm -rf "$work"/*.log "$work"/*.jsonl "$work"/sanitizer
failed=0

say() { printf '[%3d s] %s\n' "$SECONDS" "$*"; }
stop() { printf '%s\n' "$*" >&2; exit 2; }
# Seconds left for a part that may take $1 when $2 have to be kept for those after it.
left() {
  local seconds=$((budget - SECONDS - $2))
  [ "$seconds" -gt "$1" ] && seconds=$1
  [ "$seconds" -lt 1 ] && seconds=1
  echo "$seconds"
}
# A line for the report: part, status (passed, failed or left out), seconds, what happened.
part() {
  printf '{"part": "%s", "status": "%s", "seconds": %d, "detail": "%s"}\n' "$1" "$2" "$3" \
    "$(printf '%s' "$4" | tr -d '\\\n' | tr '"' "'")" >>"$work/parts.jsonl"
  say "$1: $2, $4"
  [ "$2" = failed ] && failed=1
  return 0
}

# ---- what is here

find_doctest() {
  local folder
  for folder in "${MERF_DOCTEST_INCLUDE:-}" build/include /usr/include /usr/local/include; do
    if [ -n "$folder" ] && [ -f "$folder/doctest/doctest.h" ]; then
      (cd "$folder" && pwd)
      return 0
    fi
  done
  return 1
}

doctest=$(find_doctest) || {
  # A Debian machine with a network brings it.
  if command -v node >/dev/null && command -v apt-get >/dev/null; then
    node scripts/bootstrap.mjs --gpu
    doctest=$(find_doctest)
  fi
}
[ -n "$doctest" ] || stop "The header doctest/doctest.h was not found: install it (Debian: doctest-dev), copy it to \
build/include/doctest/, or name the folder that holds doctest/ with MERF_DOCTEST_INCLUDE"

card='emulated GPU'
architecture=90a-real
if [ -z "$rehearse" ]; then
  if ! card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1) || [ -z "$card" ]; then
    stop "No NVIDIA GPU was found (nvidia-smi names none): gpu:check needs one. Without one, the device \
cuda-emulated runs the same kernels in npm test, and --rehearse tries this script."
  fi
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d ' .')
  [ -n "$capability" ] && [ "$capability" != 90 ] && architecture=$capability-real
fi

for tool in cmake ninja g++; do
  command -v "$tool" >/dev/null || stop "$tool was not found: the build needs it"
done

nvcc=
for candidate in "${CUDACXX:-}" "$(command -v nvcc)" /usr/local/cuda/bin/nvcc; do
  if [ -n "$candidate" ] && [ -x "$candidate" ]; then nvcc=$candidate; break; fi
done
[ -n "$nvcc" ] || [ -n "$rehearse" ] || stop "CUDA's compiler nvcc was not found: name it with CUDACXX"
toolkit=
if [ -n "$nvcc" ]; then
  toolkit=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
  # A toolkit of Python packages keeps its libraries where nvcc does not look.
  if [ ! -d "$toolkit/lib64" ] && [ -f "$toolkit/lib/libcudart_static.a" ]; then
    export CUDAFLAGS="${CUDAFLAGS:-} -L$toolkit/lib"
  fi
fi

python=${MERF_PYTHON:-python3}
command -v "$python" >/dev/null || python=

if [ -z "$rehearse" ]; then
  # Where cuBLASLt lies: with the toolkit, or among PyTorch's packages.
  folders=("$toolkit/lib64" "$toolkit/lib" "$toolkit/targets/x86_64-linux/lib")
  if [ -n "$python" ]; then
    while IFS= read -r folder; do folders+=("$folder"); done < <("$python" -c '
import glob, sysconfig
for file in glob.glob(sysconfig.get_path("purelib") + "/nvidia/*/lib/libcublasLt.so.1*"): print(file.rsplit("/", 1)[0])
' 2>/dev/null)
  fi
  for folder in "${folders[@]}"; do
    if compgen -G "$folder/libcublasLt.so.1*" >/dev/null; then
      export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder"
      break
    fi
  done
fi
say "$card; $([ -n "$nvcc" ] && "$nvcc" --version | grep release | sed 's/.*release/nvcc/'); doctest in $doctest"

# ---- build

began=$SECONDS
build=$work/build
options=(-DMERF_CPU=OFF -DMERF_BUILD_TESTS=ON -DMERF_BUILD_GPU_BENCHMARKS=ON "-DMERF_DOCTEST=$doctest")
if [ -n "$rehearse" ]; then
  options+=(-DCMAKE_CUDA_COMPILER= -DMERF_CUDA_EMULATION=ON)
else
  options+=(-DMERF_CUDA_EMULATION=OFF "-DCMAKE_CUDA_COMPILER=$nvcc" "-DCMAKE_CUDA_ARCHITECTURES=$architecture")
fi
if cmake -S . -B "$build" -G Ninja "${options[@]}" >"$work/build.log" 2>&1 &&
  timeout -k 5 "$(left 300 60)" cmake --build "$build" >>"$work/build.log" 2>&1; then
  part build passed $((SECONDS - began)) "in $((SECONDS - began)) s"
else
  tail -n 40 "$work/build.log"
  part build failed $((SECONDS - began)) "see $work/build.log"
  exit 1
fi
programs=$build/Release

# ---- the conformance suite

# What is about the emulation alone is left to npm test.
filter=('-tce=orders:*,the emulated GPU*')
began=$SECONDS
MERF_TEST_DEVICES=$device timeout -k 5 "$(left 200 60)" "$programs/merf_native_tests" --no-colors -d "${filter[@]}" \
  >"$work/suite.log" 2>&1
code=$?
summary=$(grep -o 'test cases:.*' "$work/suite.log" | tr -s ' ' | tail -n 1)
if [ "$code" -eq 0 ] && [ -n "$summary" ]; then
  part "conformance suite on $device" passed $((SECONDS - began)) "$summary"
else
  grep -A 12 -E 'ERROR|FATAL' "$work/suite.log" | head -n 80
  [ "$code" -eq 124 ] && summary="stopped by its time limit"
  part "conformance suite on $device" failed $((SECONDS - began)) "${summary:-ended with $code}; see $work/suite.log"
fi

# ---- compute-sanitizer

sanitizer=
for candidate in "$(command -v compute-sanitizer)" "$toolkit/bin/compute-sanitizer" \
  "$toolkit/compute-sanitizer/compute-sanitizer"; do
  if [ -n "$candidate" ] && [ -x "$candidate" ]; then sanitizer=$candidate; break; fi
done

# tool, name, command...: its log and exit code go to $work/sanitizer.
sanitize() {
  local tool=$1 log=$work/sanitizer/$1-$2.log
  shift 2
  # What the library of matrix products does inside is not ours to check, nor are errors that are asked for and caught.
  OMP_NUM_THREADS=2 MERF_TEST_DEVICES=$device timeout -k 5 "$(left 120 190)" "$sanitizer" --tool "$tool" \
    --error-exitcode 86 --report-api-errors no --kernel-regex kns=merf "$@" >"$log" 2>&1
  echo $? >"$log.code"
}

if [ -n "$rehearse" ]; then
  part compute-sanitizer 'left out' 0 'it needs a GPU'
elif [ -z "$sanitizer" ]; then
  part compute-sanitizer 'left out' 0 'it is not installed'
else
  # Many at once, since each spends most of its time on one core: the benchmark programs with tiny shapes, which run
  # every kernel, then the suite in slices.
  began=$SECONDS
  mkdir -p "$work/sanitizer"
  workers=$(nproc)
  [ "$workers" -gt 12 ] && workers=12
  # That test takes all the memory there is.
  quiet=('-tce=orders:*,the emulated GPU*,memory that is not there*')
  cases=$("$programs/merf_native_tests" --count --no-colors "${quiet[@]}" | grep -o '[0-9]*$' | tail -n 1)
  slice=$(((cases + 9) / 10))
  start() {
    while [ "$(jobs -rp | wc -l)" -ge "$workers" ]; do wait -n; done
    sanitize "$@" &
  }
  for tool in memcheck racecheck; do
    for program in operators gpu_step; do
      start "$tool" "$program" "$programs/$program" --device "$device" --tiny
    done
  done
  for tool in memcheck racecheck; do
    for ((first = 1; first <= cases; first += slice)); do
      start "$tool" "suite-$first" "$programs/merf_native_tests" --no-colors -d "${quiet[@]}" "--first=$first" \
        "--last=$((first + slice - 1))"
    done
  done
  wait
  for tool in memcheck racecheck; do
    status=passed
    detail=
    for log in "$work/sanitizer/$tool"-*.log; do
      code=$(cat "$log.code")
      name=$(basename "$log" .log)
      if grep -q 'Device not supported' "$log"; then
        status='left out'
        detail='it does not support this device'
        break
      elif [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
        # The programs have to come to their end; the suite goes as far as time allows.
        case $name in *-suite-*) ;; *) status=failed; detail+="$name did not come to its end; " ;; esac
      elif [ "$code" -eq 1 ] && [[ $name == *-suite-* ]]; then
        : # a test failed, as the suite itself has said
      elif [ "$code" -ne 0 ]; then
        status=failed
        detail+="$name: $(grep -E 'SUMMARY' "$log" | tail -n 1 | sed 's/^=* *//') (exit code $code); "
        grep '^========= ' "$log" | grep -v COMPUTE-SANITIZER | head -n 25
      fi
    done
    if [ "$status" != 'left out' ]; then
      finished=$(cat "$work/sanitizer/$tool"-suite-*.log | grep -cE '^[0-9.]+ s: ')
      detail+="operators, steps and $finished of $cases test cases"
    fi
    part "$tool" "$status" $((SECONDS - began)) "$detail"
  done
fi

# ---- benchmarks

peers=
if [ -n "$python" ]; then
  peer_device=cuda
  backends=flash,cudnn,efficient
  if [ -n "$rehearse" ]; then
    peer_device=cpu
    backends=math
  fi
  if ! peers=$("$python" benchmarks/operators/peers.py --device "$peer_device" --probe 2>&1); then
    say "no PyTorch to measure beside merf: $(printf '%s' "$peers" | tail -n 1)"
    peers=
  fi
else
  say 'no PyTorch to measure beside merf: there is no python3'
fi

operators=("$programs/operators" --device "$device" "${tiny[@]}")
began=$SECONDS
limit=$(left 170 100)
if [ -n "$peers" ]; then
  timeout -k 5 "$limit" "$python" benchmarks/operators/peers.py --device "$peer_device" --backends "$backends" \
    --seconds $((limit - 15)) -- "${operators[@]}" >"$work/operators.jsonl" 2>"$work/operators.log"
else
  timeout -k 5 "$limit" "${operators[@]}" >"$work/operators.jsonl" 2>"$work/operators.log"
fi
code=$?
detail="beside ${peers:-nothing}"
if [ "$code" -eq 0 ]; then
  part 'benchmark of operators' passed $((SECONDS - began)) "$detail"
else
  tail -n 5 "$work/operators.log"
  part 'benchmark of operators' failed $((SECONDS - began)) "$detail; ended with $code; see $work/operators.log"
fi

began=$SECONDS
timeout -k 5 "$(left 150 5)" "$programs/gpu_step" --device "$device" "${tiny[@]}" >"$work/step.jsonl" \
  2>"$work/step.log"
code=$?
if [ "$code" -eq 0 ]; then
  part 'benchmark of GRPO steps' passed $((SECONDS - began)) "$(grep -c '"metrics"' "$work/step.jsonl") models"
else
  tail -n 5 "$work/step.log"
  part 'benchmark of GRPO steps' failed $((SECONDS - began)) "ended with $code; see $work/step.jsonl, $work/step.log"
fi

# ---- the report

out=benchmarks/results
[ -n "$rehearse" ] && out=$work
if [ -n "$python" ]; then
  "$python" benchmarks/gpu/report.py --card "$card" --out "$out" "$work" || failed=1
else
  # Without Python there is no table, but the measurements are kept.
  name=$(printf '%s' "$card" | tr -cs 'A-Za-z0-9' '-' | tr 'A-Z' 'a-z' | sed 's/^-//; s/-$//')
  cat "$work"/*.jsonl | sed '1s/^/[/; $!s/$/,/; $s/$/]/' >"$out/$name.json"
  cat "$work"/*.jsonl
  say "the table needs python3; the lines above are in $out/$name.json"
fi
if [ "$failed" -eq 0 ]; then say 'passed'; else say 'FAILED'; fi
exit "$failed"
