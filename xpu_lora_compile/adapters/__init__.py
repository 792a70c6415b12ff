"""From a PEFT folder to a slot of a bank: config, checkpoint, bank."""
