"""The plans, ways to compute a call that agree to rounding, and the choice between them.

one_pass.py      every token is projected: one fused kernel
distinct.py      each distinct token and position is projected once, then gathered; distinct_cpu.py: by PyTorch's operators
table.py         every row of the vocabulary was projected before: gathers alone, for inference
choice.py        which plan runs a call, by a cost model over the device's measured rates (rates.py)
gathered.py      rows of two tables by one kernel, over which the others go
operators.py     a Call as a PyTorch operator, with its gradients
"""
