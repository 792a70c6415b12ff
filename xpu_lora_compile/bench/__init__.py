"""`xpu-lora bench`: our kernels against their peers and a floor, in one run, after their numbers were checked."""
