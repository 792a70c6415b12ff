"""Whose row is it: how the rows that a layer is given come from the sequences of the batch.

    inputs of the model --owners of each element--> input of a layer --fit--> Layout --> the slot of each row

Nothing is concluded from sizes that happen to fit. `Watch` follows an eager run, `tracing` follows the graph that
Dynamo captures, both by the same rules for each op of ATen; a layer whose rows they cannot tell is an error.
"""
