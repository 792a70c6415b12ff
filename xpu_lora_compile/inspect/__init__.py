"""What the compiler made of a model's LoRA, and whether it is right: `explain`, `verify`, `doctor`."""
