"""Triton kernels and their launchers: tensors in, tensors out, no nn.Module. Installed as pyembed.kernels.

embed.py          gather + position → hidden
arguments.py      what launchers take, and how kernels take it
embed_qkv.py      the one-pass kernel: gather, position, norm, QKV projection
embed_grad.py     gradients of both
distinct.py       each distinct token projected once: find, prepare, project, expand; and a call by a table
distinct_grad.py  its gradients
tiles.py          jitted pieces that they share
tuning.py         tile configurations
interpreter.py    the same kernels on CPU tensors
"""
