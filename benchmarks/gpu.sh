#!/bin/sh
# Everything that needs an NVIDIA GPU, in under 9 minutes: the marked tests, then the headline timings.
# The Python given needs torch, triton, transformers, pytest and pytest-xdist. Installs nothing, needs no network.
set -u
python=${1:-python3}
unset TRITON_INTERPRET BERT_FUSED_DISABLE
export PYTHONUNBUFFERED=1
if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "make gpu: $python sees no NVIDIA GPU" >&2
    exit 2
fi
status=0
# At SIGINT, unlike SIGTERM, pytest still prints what failed.
BERT_FUSED_TEST_GPU=1 timeout -s INT -k 10 220 "$python" -m pytest tests/test_gpu.py tests/test_gpu_runtime.py \
    -n 4 -q -p no:cacheprovider -W default -o faulthandler_timeout=150 || status=1
# Failed tests do not stop the timings: each implementation is checked again before it gets a figure.
timeout -k 10 290 "$python" -m benchmarks headline --device cuda --budget 270 || status=1
exit $status
