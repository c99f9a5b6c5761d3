#!/bin/sh
# What needs an NVIDIA GPU. gpu.sh WHAT PYTHON [ARGUMENTS], each in under 10 minutes, where WHAT is
#   day       what to run first: exact integers per shipped configuration, tune, the tests; results go to $OUT
#   test      the marked tests, without compute-sanitizer's
#   sanitize  compute-sanitizer's tests
#   bench     the benchmarks
# The Python given needs torch, triton, transformers, rich, pytest and pytest-xdist. Installs nothing.
set -u
what=$1
python=$2
shift 2
cd "$(dirname "$0")/.." || exit 2
unset TRITON_INTERPRET BERT_FUSED_DISABLE
export PYTHONUNBUFFERED=1
if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then
    echo "gpu.sh: $python sees no NVIDIA GPU" >&2
    exit 2
fi

# At SIGINT, unlike SIGTERM, pytest still prints what failed, and tune writes what it has measured.
limited() {
    seconds=$1
    shift
    timeout -s INT -k 5 "$seconds" "$@"
}

# Of what ships, not of what tune found here, and always in workers: tests/support/watchdog.py ends them, pytest-xdist
# starts new ones. -v, so that what was tested is known even if the end is cut off.
tests() {
    seconds=$1
    shift
    limited "$seconds" env BERT_FUSED_TEST_GPU=1 BERT_FUSED_TABLES=off "$python" -m pytest "$@" \
        -v -p no:cacheprovider -W default --max-worker-restart=50
}

# What times things has the GPU to itself.
all_but_the_sanitizers() {
    together=$1
    alone=$2
    shift 2
    status=0
    tests "$together" tests/gpu --deselect tests/gpu/test_gpu_sanitizer.py -n 4 -m "not alone" "$@" || status=$?
    tests "$alone" tests/gpu --deselect tests/gpu/test_gpu_sanitizer.py -n 1 -m alone "$@" || status=$?
    return $status
}

# One step of the day: its output goes to a file as it comes, and how it ended to another.
step() {
    name=$1
    shift
    begun=$(date +%s)
    "$@" >"$OUT/$name.log" 2>&1
    status=$?
    tail -n 30 "$OUT/$name.log"
    echo "$name: exit status $status after $(($(date +%s) - begun)) s" | tee -a "$OUT/day.txt"
    [ $status -eq 0 ] || failed=1
}

day() {
    if [ -z "${COMMIT:-}" ] && ! git rev-parse --git-dir >/dev/null 2>&1; then
        echo "gpu.sh: there is no git here: set COMMIT to what is measured" >&2
        exit 2
    fi
    : "${OUT:=build/day}"
    mkdir -p "$OUT" || exit 2
    failed=0
    echo "commit ${COMMIT:-$(git describe --always --dirty)}" | tee "$OUT/day.txt"
    # With 5 s each to end in, 550 s.
    step integers tests 80 tests/gpu/test_gpu.py -n 4 -k "this_machine or exact_on_integers"
    step tune limited 175 "$python" -m bert_fused tune --shapes BERT-base,MiniLM --dtypes bfloat16 --budget 150 \
        --export "$OUT/tuned.json"
    step tests all_but_the_sanitizers 245 30
    exit $failed
}

case $what in
day)
    day
    ;;
test)
    all_but_the_sanitizers 480 60 "$@"
    ;;
sanitize)
    tests 560 tests/gpu/test_gpu_sanitizer.py -n 2 "$@"
    ;;
bench)
    # Results are written case by case, so that nothing is lost if the last one has to be cut off.
    timeout -k 10 530 "$python" -m benchmarks run --device cuda --budget 480 "$@"
    ;;
*)
    echo "gpu.sh: $what is none of day, test, sanitize and bench" >&2
    exit 2
    ;;
esac
