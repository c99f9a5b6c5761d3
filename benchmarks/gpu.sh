#!/bin/sh
# What needs an NVIDIA GPU: gpu.sh test PYTHON runs the marked tests, gpu.sh bench PYTHON the benchmarks, each in under
# 9 minutes. The Python given needs torch, triton, transformers, rich, pytest and pytest-xdist. Installs nothing.
set -u
what=$1
python=$2
unset TRITON_INTERPRET BERT_FUSED_DISABLE
export PYTHONUNBUFFERED=1
if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then
    echo "gpu.sh: $python sees no NVIDIA GPU" >&2
    exit 2
fi
case $what in
test)
    # At SIGINT, unlike SIGTERM, pytest still prints what failed.
    BERT_FUSED_TEST_GPU=1 exec timeout -s INT -k 10 520 "$python" -m pytest tests/test_gpu*.py -n 4 \
        -q -p no:cacheprovider -W default -o faulthandler_timeout=150
    ;;
bench)
    # Results are written case by case, so that nothing is lost if the last one has to be cut off.
    exec timeout -k 10 530 "$python" -m benchmarks run --device cuda --budget 480
    ;;
esac
