#!/usr/bin/env bash
# The suites that run on an accelerator, on a machine that has one: bash tests/run_on_gpu.sh [cuda|xpu] [pytest's arguments]
# It installs nothing: the package itself, pytest, expecttest, hypothesis, and for the bank peft and transformers must be there.
set -euo pipefail
cd "$(dirname "$0")/.."
export XPU_LORA_TEST_DEVICE="${1:-cuda}" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
shift || true
python3 -c "
import torch
name = getattr(torch, '$XPU_LORA_TEST_DEVICE').get_device_name()
print('torch', torch.__version__, 'on', name)
"
# The examples and the real model need a package of weights that such a machine may not have.
python3 -m pytest --ignore=tests/test_examples.py --ignore=tests/test_smollm2.py "$@"
