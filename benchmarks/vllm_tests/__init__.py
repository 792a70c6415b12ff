"""vLLM's own LoRA tests, run on the plugin's wrapper: `python -m benchmarks.vllm_tests FOLDER 0.32.0 0.33.0`.

The tests are taken from the source distributions of vLLM into the folder; nothing of them is in this repository. They
run in an environment that has vLLM for a CPU and pytest, on the Python files of their own release: `release.py` says
what stands in for the compiled part of a release that is not installed. What is adapted:

- the plugin is registered before the first test, as vLLM itself does it in a server;
- the sweep of punica ops calls Triton kernels: here it calls the wrapper's `add_shrink` and `add_expand`;
- the question whether a layer has vLLM's wrapper is whether it has ours;
- the configuration of the dummy models, a mock in which every field is true, is not that of an encoder-decoder;
- where layers have not prepared their weights for vLLM's product on a CPU, it is torch's;
- adapters of the hub are a local one that has the rank, alpha and modules that the tests expect; the worker is a CPU's,
  and a model of the hub a small random Qwen3. What needs another file of the hub is skipped;
- a package that the tests import, but do not use here, is an empty module where it is missing.

There are 4200 cases of the sweep; `--every 16` runs each sixteenth case of it and of the layers. A test that fails
is run again with vLLM's own wrapper: what fails there, too, is no failure of the plugin.
"""
