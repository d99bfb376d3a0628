"""Triton kernels and their launchers: a Call (pyembed/call.py) in, tensors out, no nn.Module. Installed as pyembed.kernels.

embed.py          hidden: gather and add
embed_qkv.py      the one-pass kernel: gather, add, norm, QKV projection, epilogue
embed_grad.py     gradients of both
distinct.py       each distinct token projected once: find, prepare, project, expand
distinct_grad.py  its gradients
expand.py         gather projected rows: the last step of distinct, and the whole of a call by a table
rotary.py         gradients of rotary turns
arguments.py      a Call's parts as the kernels' arguments
tiles.py          jitted functions that kernels share
tuning.py         tile configurations
launch.py         launches with little host time
interpreter.py    the same kernels on CPU tensors
"""
