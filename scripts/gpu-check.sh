#!/usr/bin/env bash
# `npm run gpu:check`: whether the device cuda is right on this machine's GPU, and how fast it is.
#
#   scripts/gpu-check.sh [--call right|speed] [--seconds N] [--kit FOLDER] [--out FOLDER] [--work FOLDER] [--rehearse]
#     --call right   right or wrong, planned for 200 seconds: every test case of the conformance suite in a process of
#                    its own, with cuBLASLt and without; a training run of 20 steps through Node; compute-sanitizer on
#                    every kernel with tiny shapes and on the test cases that failed
#     --call speed   how fast, planned for 420 seconds: operators beside PyTorch, whole GRPO steps, what ncu says of the
#                    main kernels and of a decode step, a training run through Node
#                    (without --call: both, one after the other)
#     --seconds N    ends by itself within N seconds; what would not fit is left out, and said so
#     --kit FOLDER   what `npm run gpu:kit` made, build/gpu-kit by default. With it this machine needs neither compiler
#                    nor Node nor network; without it the programs are built here
#     --out FOLDER   where results go, build/gpu-check/results by default: for each call <card>-<call>.md with the
#                    tables, .json with all that was measured, -logs.tgz, and -failures.txt or -kernels.csv; never more
#                    than 8 files for both calls, each below 16 MiB
#     --work FOLDER  for what is made on the way, build/gpu-check by default
#     --rehearse     the same on the device cuda-emulated with tiny shapes, for machines without a GPU: checks this
#                    script, the kit and the benchmark programs
#
# A machine with a GPU that is lent for a quarter of an hour is used best by two calls, and a look at what the first says
# in between:
#   bash scripts/gpu-check.sh --call right --seconds 200 --out FOLDER
#   bash scripts/gpu-check.sh --call speed --seconds 420 --out FOLDER
#
# Exit code 0: everything that ran passed, and the whole suite ran; 1: something failed; 2: something that it cannot do
# without is missing.
#
# Without a kit it needs bash, a C++ compiler, CMake, ninja, CUDA's compiler (12.4 or later) and the header
# doctest/doctest.h; MERF_DOCTEST_INCLUDE names the folder that holds doctest/, CUDACXX the compiler. MERF_PYTHON is a
# Python with PyTorch (python3 by default), which also writes the tables.
set -u
export LC_ALL=C
SECONDS=0

stop() { printf '%s\n' "$*" >&2; exit 2; }
script=${BASH_SOURCE[0]}
root=$(cd "$(dirname "$script")/.." && pwd) || exit 2

calls=(right speed)
seconds=
kit=$root/build/gpu-kit
out=
work=
rehearse=
while [ $# -gt 0 ]; do
  case $1 in
    --call | --seconds | --kit | --out | --work) [ $# -gt 1 ] || stop "Expected a value after $1" ;;
  esac
  case $1 in
    --call)
      case $2 in
        right | speed) calls=("$2") ;;
        *) stop "Expected right or speed for --call but received $2" ;;
      esac
      shift
      ;;
    --seconds)
      [[ $2 =~ ^[1-9][0-9]*$ ]] || stop "Expected a positive integer for --seconds but received $2"
      seconds=$2
      shift
      ;;
    --kit) kit=$(realpath -m "$2"); shift ;;
    --out) out=$(realpath -m "$2"); shift ;;
    --work) work=$(realpath -m "$2"); shift ;;
    --rehearse) rehearse=1 ;;
    --help | -h)
      sed -n '2,/^set -u/{/^#/s/^# \{0,1\}//p}' "$script"
      exit 0
      ;;
    *) stop "Expected --call, --seconds, --kit, --out, --work or --rehearse but received $1; --help says more" ;;
  esac
  shift
done
cd "$root" || exit 2

device=cuda
tiny=()
if [ -n "$rehearse" ]; then
  device=cuda-emulated
  tiny=(--tiny)
fi
work=${work:-$root/build/gpu-check${rehearse:+-rehearsal}}
out=${out:-$work/results}
declare -A planned=([right]=200 [speed]=420)
# Two busy cores take their time for what a GPU does at once.
[ -n "$rehearse" ] && planned=([right]=400 [speed]=450)
if [ -z "$seconds" ]; then
  seconds=0
  for call in "${calls[@]}"; do seconds=$((seconds + planned[$call])); done
fi
mkdir -p "$work" "$out" || exit 2
rm -rf "${work:?}"/{right,speed,bin,runtime}
failed=0
cores=$(nproc)
began_call=0
deadline=$seconds # of the call in hand

say() { printf '[%3d s] %s\n' "$SECONDS" "$*"; }
# Seconds left for a part that may take $1 when $2 have to be kept for those after it; 0 where none are.
left() {
  local remaining=$((deadline - SECONDS - $2))
  [ "$remaining" -gt "$1" ] && remaining=$1
  [ "$remaining" -lt 0 ] && remaining=0
  echo "$remaining"
}
# Seconds that are that many percent of the call in hand.
percent() { echo $(((deadline - began_call) * $1 / 100)); }
# As JSON has text.
quoted() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  printf '"%s"' "${text//[[:cntrl:]]/ }"
}
# A line for the report: part, status (passed, failed or left out), seconds, what happened.
part() {
  printf '{"part": %s, "status": "%s", "seconds": %d, "detail": %s}\n' "$(quoted "$1")" "$2" "$3" \
    "$(quoted "$4")" >>"$results/parts.jsonl"
  say "$1: $2, $4"
  [ "$2" = failed ] && failed=1
  return 0
}
# Runs a command for at most $1 seconds.
limited() {
  local limit=$1
  shift
  [ "$limit" -gt 0 ] || return 124
  timeout -k 3 "$limit" "$@"
}
# Waits until fewer than $1 jobs run.
room() { while [ "$(jobs -rp | wc -l)" -ge "$1" ]; do wait -n; done; }
field() { sed -n "s/.*\"$1\": *\"\([^\"]*\)\".*/\1/p" "$kit/kit.json" 2>/dev/null | head -n 1; }

# ---- what is here

card='emulated GPU'
capability=90
if [ -z "$rehearse" ]; then
  if ! card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1) || [ -z "$card" ]; then
    stop "No NVIDIA GPU was found (nvidia-smi names none): gpu:check needs one. Without one, the device \
cuda-emulated runs the same kernels in npm test, and --rehearse tries this script."
  fi
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d ' .')
  [[ $capability =~ ^[0-9]+$ ]] || capability=90
fi

# Whether code for one of these architectures runs on the card.
runs_here() {
  local each number
  for each in ${1//;/ }; do
    number=${each%%[!0-9]*}
    case $each in
      *a-real | *a-virtual) [ "$number" -eq "$capability" ] && return 0 ;;
      *-virtual) [ "$number" -le "$capability" ] && return 0 ;;
      *) [ $((number / 10)) -eq $((capability / 10)) ] && [ "$number" -le "$capability" ] && return 0 ;;
    esac
  done
  return 1
}

programs=
if [ ! -x "$kit/bin/merf_native_tests" ]; then
  say "there is no kit in $kit: the programs are built here"
elif [ -z "$rehearse" ] && ! runs_here "$(field architectures)"; then
  say "the kit's code is for $(field architectures), and this card is of $capability: the programs are built here"
else
  programs=kit
fi

nvcc=
for candidate in "${CUDACXX:-}" "$(command -v nvcc)" /usr/local/cuda/bin/nvcc; do
  if [ -n "$candidate" ] && [ -x "$candidate" ]; then nvcc=$candidate; break; fi
done
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

# A tool of CUDA's: on PATH or with the toolkit.
find_tool() {
  local candidate
  for candidate in "$(command -v "$1")" "$toolkit/bin/$1" "$toolkit/$1/$1" /usr/local/cuda/bin/"$1"; do
    if [ -n "$candidate" ] && [ -x "$candidate" ]; then
      echo "$candidate"
      return 0
    fi
  done
  return 1
}

# ---- programs: those of the kit, or built here

find_doctest() {
  local folder
  for folder in "${MERF_DOCTEST_INCLUDE:-}" "$kit/include" build/include /usr/include /usr/local/include; do
    if [ -n "$folder" ] && [ -f "$folder/doctest/doctest.h" ]; then
      (cd "$folder" && pwd)
      return 0
    fi
  done
  return 1
}

# The programs with the plugin of this run's device, into $work/build/Release.
build_programs() {
  local doctest tool architecture=90a-real began=$SECONDS options=() most=300
  doctest=$(find_doctest) || {
    # A Debian machine with a network brings it.
    if command -v node >/dev/null && command -v apt-get >/dev/null; then
      node scripts/bootstrap.mjs --gpu
      doctest=$(find_doctest)
    fi
  }
  [ -n "$doctest" ] || stop "The header doctest/doctest.h was not found: install it (Debian: doctest-dev), copy it to \
build/include/doctest/, or name the folder that holds doctest/ with MERF_DOCTEST_INCLUDE"
  for tool in cmake ninja g++; do
    command -v "$tool" >/dev/null || stop "$tool was not found: the build needs it, or a kit (npm run gpu:kit)"
  done
  [ "$capability" != 90 ] && architecture=$capability-real
  options=(-DMERF_CPU=OFF -DMERF_BUILD_TESTS=ON -DMERF_BUILD_GPU_BENCHMARKS=ON "-DMERF_DOCTEST=$doctest")
  if [ -n "$rehearse" ]; then
    options+=(-DCMAKE_CUDA_COMPILER= -DMERF_CUDA_EMULATION=ON)
    most=600
  else
    [ -n "$nvcc" ] || stop "CUDA's compiler nvcc was not found: name it with CUDACXX, or bring a kit (npm run gpu:kit)"
    options+=(-DMERF_CUDA_EMULATION=OFF "-DCMAKE_CUDA_COMPILER=$nvcc" "-DCMAKE_CUDA_ARCHITECTURES=$architecture")
  fi
  if cmake -S . -B "$work/build" -G Ninja "${options[@]}" >"$work/build.log" 2>&1 &&
    timeout -k 5 "$(left "$most" 60)" cmake --build "$work/build" "$@" >>"$work/build.log" 2>&1; then
    say "built in $((SECONDS - began)) s"
  else
    tail -n 40 "$work/build.log"
    say "the build failed: $work/build.log"
    exit 1
  fi
}

plugin=merf_${device//-/_}.so
mkdir -p "$work/bin"
if [ "$programs" = kit ]; then
  cp "$kit"/bin/* "$work/bin/"
  if [ -n "$rehearse" ]; then
    rm -f "$work/bin/merf_cuda.so"
    emulated=build/Release/$plugin
    if [ ! -f "$emulated" ]; then
      build_programs --target merf_cuda_emulated
      emulated=$work/build/Release/$plugin
    fi
    cp "$emulated" "$work/bin/"
  fi
else
  build_programs
  cp "$work/build/Release"/{merf_native_tests,operators,gpu_step,"$plugin"} "$work/bin/" || exit 1
fi
programs=$work/bin
chmod +x "$programs"/*
[ -d "$kit/golden" ] && export MERF_TEST_GOLDEN=$kit/golden
[ -d tests/native/golden ] && export MERF_TEST_GOLDEN=$root/tests/native/golden
if ldd "$programs/operators" 2>/dev/null | grep -q 'not found' && [ -d "$kit/lib" ]; then
  export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$kit/lib"
fi

# merf itself, as a user has it: of the kit, or of this checkout where it is built.
node=
runtime=$work/runtime
unpack_runtime() {
  mkdir -p "$runtime"
  if command -v xz >/dev/null; then
    tar -C "$runtime" -I 'xz -T0' -xf "$kit/runtime.tar.xz" || return 1
  elif [ -n "$python" ]; then
    "$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])' "$kit/runtime.tar.xz" \
      "$runtime" || return 1
  else
    return 1
  fi
  cp "$programs/$plugin" "$runtime/build/Release/"
}
no_node='there is no kit with Node in it, nor a built checkout with a Node to run it'
if [ -f "$kit/runtime.tar.xz" ]; then
  if unpack_runtime >"$work/unpack.log" 2>&1; then
    node=$runtime/node
  else
    no_node="the kit's Node could not be unpacked: $(tail -n 1 "$work/unpack.log")"
    failed=1
  fi
elif command -v node >/dev/null && [ -f dist/cli/index.js ] && [ -f "build/Release/$plugin" ]; then
  node=$(command -v node)
  runtime=$root
fi

say "$card; $cores cores; $(if [ -f "$kit/kit.json" ]; then echo "kit of $(field commit), nvcc $(field nvcc), \
Node $(field node)"; else echo 'no kit'; fi); results go to $out"
if [ -z "$rehearse" ]; then
  nvidia-smi --query-gpu=driver_version,memory.total,clocks.sm,clocks.max.sm,temperature.gpu,power.draw,ecc.mode.current \
    --format=csv >"$work/card.csv" 2>&1
fi

# ---- the conformance suite, a process for each test case

# What is about the emulation alone is left to npm test.
filter=('-tce=orders:*,the emulated GPU*')
# That test takes all the memory there is, so nothing runs beside it.
alone='memory that is not there'
case_seconds=100
workers=8
[ "$cores" -lt "$workers" ] && workers=$cores
threads=$((cores / workers))

# doctest's pattern for exactly this name.
pattern_of() {
  local name=${1//\\/\\\\}
  printf '%s' "${name//,/\\,}"
}

# mode (default, or none for MERF_CUBLASLT=none), number, name: a line in cases.jsonl.
test_case() {
  local mode=$1 number=$2 name=$3 log=$results/logs/case-$1-$2.log limit began=${EPOCHREALTIME/./} code status=passed
  limit=$(left "$case_seconds" "$kept")
  if [ "$limit" -eq 0 ]; then
    status='left out'
    code=0
  else
    [ "$mode" = none ] && export MERF_CUBLASLT=none
    OMP_NUM_THREADS=$threads MERF_TEST_DEVICES=$device limited "$limit" "$programs/merf_native_tests" --no-colors -d \
      "-tc=$(pattern_of "$name")" >"$log" 2>&1
    code=$?
    # A pattern that names no case would pass.
    if [ "$code" -ne 0 ] || ! grep -qE 'test cases: +[1-9][0-9]* \|' "$log"; then status=failed; fi
  fi
  printf '{"case": %s, "mode": "%s", "number": %d, "status": "%s", "code": %d, "seconds": %d.%02d}\n' \
    "$(quoted "$name")" "$mode" "$number" "$status" "$code" $(((${EPOCHREALTIME/./} - began) / 1000000)) \
    $(((${EPOCHREALTIME/./} - began) / 10000 % 100)) >>"$results/cases.jsonl"
}

# A rehearsal under emulation takes those of a second or so, some of every kind.
rehearsal=('*advantages*' 'add and cast*' 'attention survives*' "a token's attention*" 'cached tokens*' 'entropy and*'
  'every device draws the golden*' 'greedy*' 'linear_backward_weight*' 'memory is counted*' 'rms_norm takes*' 'rope *' 'rows in no run*' 'seed, key*'
  'sum_of_squares*' 'swiglu*' 'what decoding repeats*')
rehearsed() {
  local pattern
  for pattern in "${rehearsal[@]}"; do
    # shellcheck disable=SC2053
    [[ $1 == $pattern ]] && return 0
  done
  return 1
}

# The lines of a log that say what went wrong.
excerpt() {
  local first
  first=$(grep -n -m 1 -E 'ERROR|FATAL|terminate called|========= [A-Z][a-z]' "$1" | cut -d: -f1)
  if [ -n "$first" ]; then sed -n "$first,$((first + 30))p" "$1"; fi
  tail -n 5 "$1"
}

count() { grep -c "$1" "$results/cases.jsonl"; }

conformance() {
  local began=$SECONDS number name mode names=() modes_of_all=(default none) status=passed detail
  kept=$1
  : >"$results/cases.jsonl"
  mapfile -t names < <(MERF_TEST_DEVICES=$device "$programs/merf_native_tests" --list-test-cases --no-colors \
    "${filter[@]}" 2>"$results/logs/list.log" | grep -vE '^(\[doctest\]|=====)')
  for mode in "${modes_of_all[@]}"; do
    for number in "${!names[@]}"; do
      name=${names[number]}
      [[ $name == *"$alone"* ]] && continue
      if [ -n "$rehearse" ] && ! rehearsed "$name"; then continue; fi
      room "$workers"
      test_case "$mode" "$number" "$name" &
    done
  done
  wait
  for number in "${!names[@]}"; do
    [[ ${names[number]} == *"$alone"* ]] || continue
    for mode in "${modes_of_all[@]}"; do test_case "$mode" "$number" "${names[number]}"; done
  done
  detail="$(count '"status": "passed"') passed, $(count '"status": "failed"') failed, \
$(count '"status": "left out"') left out for want of time, $(count '"mode": "none"') of them without cuBLASLt"
  [ -n "$rehearse" ] && detail+="; a rehearsal takes part of ${#names[@]} test cases, npm test all"
  if [ "${#names[@]}" -eq 0 ]; then detail="the program lists no test cases: $(tail -n 1 "$results/logs/list.log")"; fi
  # What was left out is not known to be right.
  [ "${#names[@]}" -gt 0 ] && [ "$(grep -vc '"status": "passed"' "$results/cases.jsonl")" -eq 0 ] || status=failed
  part "conformance suite on $device" "$status" $((SECONDS - began)) "$detail"
}

# Mode, number and name of failed cases, a line each, those with cuBLASLt first.
failed_cases() {
  sed -n 's/^{"case": "\(.*\)", "mode": "\([a-z]*\)", "number": \([0-9]*\), "status": "failed".*/\2\t\3\t\1/p' \
    "$results/cases.jsonl" | sed 's/\\\(["\\]\)/\1/g' | sort -s -k1,1
}

write_failures() {
  local mode number name
  failed_cases | while IFS=$'\t' read -r mode number name; do
    printf '== %s: %s\n' "$mode" "$name"
    excerpt "$results/logs/case-$mode-$number.log"
    echo
  done
}

# ---- merf train, through Node

# What the addon needs of libraries lies in the kit.
with_libraries() { LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$runtime/lib" "$@"; }

# device, steps, arguments...
train() {
  local name=$1 steps=$2 folder=$results/train-$1 code
  shift 2
  rm -rf "$folder"
  with_libraries limited "$(left "$train_seconds" "$kept")" "$node" "$runtime/bin/merf.js" train --task knights-and-knaves \
    --people 2 --steps "$steps" --device "$name" --save-every 0 --out "$folder" "$@" \
    >"$results/logs/train-$name.log" 2>&1
  code=$?
  cp "$folder/metrics.jsonl" "$results/train-$name.jsonl" 2>/dev/null
  echo "$code" >"$results/train-$name.code"
}

# What came of it: device, steps, seconds.
trained() {
  local code rows
  code=$(cat "$results/train-$1.code")
  rows=$(cat "$results/train-$1.jsonl" 2>/dev/null | wc -l)
  if [ "$code" -eq 0 ] && [ "$rows" -eq "$2" ]; then
    part "merf train on $1" passed "$3" "$rows steps through Node"
  elif [ "$code" -eq 124 ] && [ "$rows" -gt 0 ]; then
    part "merf train on $1" failed "$3" "stopped by the time limit after $rows of $2 steps"
  else
    part "merf train on $1" failed "$3" "ended with $code after $rows of $2 steps: \
$(tail -n 1 "$results/logs/train-$1.log")"
  fi
}

# ---- compute-sanitizer

sanitizer=$(find_tool compute-sanitizer) || sanitizer=

# tool, name, command...: its log and exit code.
sanitize() {
  local tool=$1 log=$results/logs/$1-$2.log
  shift 2
  # What the library of matrix products does inside is not ours to check, nor are errors that are asked for and caught.
  OMP_NUM_THREADS=2 MERF_TEST_DEVICES=$device limited "$(left 120 "$kept")" "$sanitizer" --tool "$tool" \
    --error-exitcode 86 --report-api-errors no --kernel-regex kns=merf "$@" >"$log" 2>&1
  echo $? >"$log.code"
}

# Whether all that racecheck reports are bulk copies into the rings of attention's Hopper kernels: their readers are waited
# for at barriers in shared memory (mbarrier), which racecheck does not follow.
only_bulk_copies() {
  ! grep -qE 'Internal|Error: Potential|Invalid' "$1" && grep -q 'Race reported' "$1" &&
    ! grep 'Race reported between Write' "$1" | grep -qv '_hopper_kernel' &&
    ! grep 'Race reported' "$1" | grep -qv 'between Write'
}
summary_of() { { grep SUMMARY "$1" || cat "$1"; } | tail -n 1 | sed 's/^=* *//'; }

sanitize_all() {
  local began=$SECONDS tool program mode number name log code status detail checked
  kept=$1
  if [ -z "$sanitizer" ]; then
    [ -z "$rehearse" ] && part compute-sanitizer 'left out' 0 'it is not installed'
    [ -n "$rehearse" ] && part compute-sanitizer 'left out' 0 'it needs a GPU'
    wait
    return
  fi
  # Many at once, since each spends most of its time on one core: the benchmark programs with tiny shapes, which run
  # every kernel, then what failed.
  for tool in memcheck racecheck; do
    for program in operators gpu_step; do
      room 12
      sanitize "$tool" "$program" "$programs/$program" --device "$device" --tiny &
    done
  done
  while IFS=$'\t' read -r mode number name; do
    room 12
    (
      [ "$mode" = none ] && export MERF_CUBLASLT=none
      sanitize memcheck "case-$mode-$number" "$programs/merf_native_tests" --no-colors -d "-tc=$(pattern_of "$name")"
    ) &
  done < <(failed_cases | head -n 12)
  wait
  for tool in memcheck racecheck; do
    status=passed
    detail=
    checked=0
    for log in "$results/logs/$tool"-*.log; do
      code=$(cat "$log.code")
      name=$(basename "$log" .log)
      checked=$((checked + 1))
      if grep -q 'Device not supported' "$log"; then
        status='left out'
        detail='it does not support this device; '
        break
      elif [[ $name == *-case-* ]]; then
        # That the case fails has been said; the sanitizer may say why.
        [ "$code" -eq 86 ] && detail+="$name: $(summary_of "$log"); "
      elif [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
        status=failed
        detail+="$name did not come to its end; "
      elif [ "$code" -eq 86 ] && [ "$tool" = racecheck ] && only_bulk_copies "$log"; then
        detail+="$name: bulk copies alone, whose barriers it does not follow; "
        code=0
      elif [ "$code" -ne 0 ]; then
        status=failed
        detail+="$name: $(summary_of "$log") (exit code $code); "
      fi
      if [ "$code" -ne 0 ]; then
        printf '== %s\n' "$name" >>"$results/failures.txt"
        excerpt "$log" >>"$results/failures.txt"
      fi
    done
    part "$tool" "$status" $((SECONDS - began)) "$detail$checked programs and test cases"
  done
}

# ---- benchmarks

probe_peers() {
  peers=
  peer_device=cuda
  backends=flash,cudnn,efficient
  if [ -n "$rehearse" ]; then
    peer_device=cpu
    backends=math
  fi
  if [ -z "$python" ]; then
    say 'no PyTorch to measure beside merf: there is no python3'
  elif ! peers=$("$python" benchmarks/operators/peers.py --device "$peer_device" --probe 2>&1); then
    say "no PyTorch to measure beside merf: $(printf '%s' "$peers" | tail -n 1)"
    peers=
  fi
}

measure_operators() {
  local began=$SECONDS limit code detail command=("$programs/operators" --device "$device" "${tiny[@]}")
  probe_peers
  detail="beside ${peers:-nothing}"
  limit=$(left 170 "$1")
  if [ -n "$peers" ] && [ "$limit" -gt 20 ]; then
    limited "$limit" "$python" benchmarks/operators/peers.py --device "$peer_device" --backends "$backends" \
      --seconds $((limit - 15)) -- "${command[@]}" >"$results/operators.jsonl" 2>"$results/logs/operators.log"
  else
    limited "$limit" "${command[@]}" >"$results/operators.jsonl" 2>"$results/logs/operators.log"
  fi
  code=$?
  if [ "$code" -eq 0 ]; then
    part 'benchmark of operators' passed $((SECONDS - began)) "$detail"
  else
    part 'benchmark of operators' failed $((SECONDS - began)) "$detail; ended with $code: \
$(tail -n 1 "$results/logs/operators.log")"
  fi
}

measure_steps() {
  local began=$SECONDS code
  limited "$(left 150 "$1")" "$programs/gpu_step" --device "$device" "${tiny[@]}" >"$results/step.jsonl" \
    2>"$results/logs/step.log"
  code=$?
  if [ "$code" -eq 0 ]; then
    part 'benchmark of GRPO steps' passed $((SECONDS - began)) "$(grep -c '"metrics"' "$results/step.jsonl") models"
  else
    part 'benchmark of GRPO steps' failed $((SECONDS - began)) "ended with $code after \
$(grep -c '"metrics"' "$results/step.jsonl") models: $(tail -n 1 "$results/logs/step.log")"
  fi
}

# ---- ncu: what holds each kernel back. It replays kernels, so these times are read beside each other alone.

ncu=$(find_tool ncu) || ncu=

# group, most launches, most seconds, options of ncu... -- command...: a file of comma-separated values.
collect() {
  local group=$1 launches=$2 limit=$3 began=$SECONDS options=() code
  shift 3
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  limit=$(left "$limit" "$kept")
  # Clocks stay as they are. It writes at its end, so it ends where it has what it is here for.
  limited "$limit" "$ncu" --clock-control none --launch-count "$launches" --kill yes --csv --page details \
    --log-file "$results/kernels-$group.csv" "${options[@]}" "$@" >"$results/logs/ncu-$group.log" 2>&1
  code=$?
  if grep -q '"Metric Value"' "$results/kernels-$group.csv" 2>/dev/null; then
    say "ncu: $group in $((SECONDS - began)) s"
    collected+=("$group")
  else
    uncollected+="$group ended with $code: $(cat "$results/kernels-$group.csv" "$results/logs/ncu-$group.log" \
      2>/dev/null | grep -E '==(ERROR|WARNING)==' | head -n 1); "
  fi
}

collect_kernels() {
  local began=$SECONDS sections=() metrics
  kept=$1
  collected=()
  uncollected=
  if [ -z "$ncu" ]; then
    [ -z "$rehearse" ] && part ncu 'left out' 0 'it is not installed'
    [ -n "$rehearse" ] && part ncu 'left out' 0 'it needs a GPU'
    return
  fi
  sections=(--section SpeedOfLight --section LaunchStats --section Occupancy --section MemoryWorkloadAnalysis
    --section WarpStateStats --print-details all)
  # One pass over each launch of a rollout's decode steps.
  metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
  local once=("$programs/operators" --device "$device" --once)
  collect attention-28x128-causal 6 20 "${sections[@]}" -k regex:attention -- "${once[@]}" \
    attention/28q-4kv-128/causal-2048
  collect attention-9x64-forest 6 20 "${sections[@]}" -k regex:attention -- "${once[@]}" attention/9q-3kv-64/forest
  collect attention-28x128-forest 6 20 "${sections[@]}" -k regex:attention -- "${once[@]}" \
    attention/28q-4kv-128/forest
  collect decoding-28x128 4 15 "${sections[@]}" -k 'regex:decode|merge' -- "${once[@]}" decode/28q-4kv-128/shared
  collect decode-step 1600 45 --metrics "$metrics" -- "$programs/gpu_step" --device "$device" --once step/qwen2.5-0.5b
  collect sampling-64x152064 9 15 "${sections[@]}" -- "${once[@]}" sampling/64x152064
  collect loss 14 25 "${sections[@]}" -- "${once[@]}" loss/2048x576x49152
  collect adamw 4 25 "${sections[@]}" -k 'regex:adamw|squares' -- "$programs/gpu_step" --device "$device" --once step/smollm2-135m
  collect decoding-9x64 4 15 "${sections[@]}" -k 'regex:decode|merge' -- "${once[@]}" decode/9q-3kv-64/shared
  collect products 4 15 "${sections[@]}" -- "${once[@]}" matrix/
  if [ "${#collected[@]}" -gt 0 ]; then
    part ncu passed $((SECONDS - began)) "${collected[*]}${uncollected:+; not: $uncollected}"
  else
    part ncu 'left out' $((SECONDS - began)) "nothing was collected: $uncollected"
  fi
}

# ---- results

# At most four files of one call. A log is cut where it is long, and the archive where it is large.
pack() {
  local name=$1 log archive
  archive=$out/$name-logs.tgz
  find "$results/logs" -type f -size +512k | while IFS= read -r log; do
    { head -c 200000 "$log"; printf '\n[...]\n'; tail -c 200000 "$log"; } >"$log.cut" && mv "$log.cut" "$log"
  done
  cp "$work"/{build.log,card.csv} "$results/logs/" 2>/dev/null
  (cd "$results" && tar --exclude='*.code' --exclude='train-*/*' -czf "$archive" -- *)
  if [ "$(stat -c %s "$archive")" -gt 15000000 ]; then
    (cd "$results" && tar -czf "$archive" -- *.jsonl)
    say 'the logs were too large to keep'
  fi
}

report() {
  local call=$1 name
  name=$(printf '%s' "$card" | tr -cs 'A-Za-z0-9' '-' | tr 'A-Z' 'a-z' | sed 's/^-//; s/-$//')-$call
  rm -f "$out/$name".{md,json} "$out/$name"-{failures.txt,kernels.csv,logs.tgz}
  if [ -n "$python" ]; then
    "$python" benchmarks/gpu/report.py --card "$card" --name "$name" --out "$out" "$results" || failed=1
  else
    # Without Python there is no table, but the measurements are kept.
    cat "$results"/*.jsonl | sed '1s/^/[/; $!s/$/,/; $s/$/]/' >"$out/$name.json"
    cat "$results/parts.jsonl"
    say "the tables need python3; what they are made of is in $out/$name.json"
  fi
  if [ -s "$results/failures.txt" ]; then
    head -c 4000000 "$results/failures.txt" >"$out/$name-failures.txt"
    head -n 100 "$results/failures.txt"
  fi
  pack "$name"
}

# ---- the two calls, the most telling first

# What a rehearsal's training takes, on two cores under emulation.
small=()
steps=20
train_seconds=120
if [ -n "$rehearse" ]; then
  small=(--prompts-per-step 2 --group-size 2 --max-tokens 8)
  steps=1
  train_seconds=300
fi

right() {
  conformance "$(percent 30)"
  write_failures >"$results/failures.txt"
  kept=$(percent 5)
  local began=$SECONDS
  if [ -n "$node" ]; then
    # Beside the sanitizer, since neither is timed.
    with_libraries limited "$(left 30 "$kept")" "$node" "$runtime/bin/merf.js" doctor >"$results/logs/doctor.log" 2>&1 &
    train "$device" "$steps" "${small[@]}" &
    train cpu "$steps" "${small[@]}" &
  fi
  sanitize_all "$(percent 5)"
  if [ -n "$node" ]; then
    trained "$device" "$steps" $((SECONDS - began))
    trained cpu "$steps" $((SECONDS - began))
  else
    part "merf train on $device" 'left out' 0 "$no_node"
  fi
}

speed() {
  measure_operators "$(percent 52)"
  measure_steps "$(percent 30)"
  collect_kernels "$(percent 8)"
  kept=$(percent 2)
  local began=$SECONDS
  if [ -n "$node" ]; then
    train "$device" "$steps" "${small[@]}"
    trained "$device" "$steps" $((SECONDS - began))
  else
    part "merf train on $device" 'left out' 0 "$no_node"
  fi
}

for call in "${calls[@]}"; do
  results=$work/$call
  mkdir -p "$results/logs"
  began_call=$SECONDS
  deadline=$seconds
  # Right or wrong gets its planned share of both.
  if [ "$call" = right ] && [ "${#calls[@]}" -gt 1 ]; then
    deadline=$((seconds * planned[right] / (planned[right] + planned[speed])))
  fi
  "$call"
  report "$call"
done
if [ "$failed" -eq 0 ]; then say 'passed'; else say 'FAILED'; fi
exit "$failed"
