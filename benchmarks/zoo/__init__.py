"""Many families of models, tiny and with random weights, each compared with PEFT: `python -m benchmarks.zoo --help`."""
