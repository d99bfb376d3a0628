"""Triton kernels and their launchers: a Call (pyembed/call.py) in, tensors out, no nn.Module. Installed as pyembed.kernels.

embed.py             hidden: gather and add
embed_qkv.py         gather, add, norm, QKV projection and epilogue: few tokens in one launch, and the choice for more
embed_qkv_rows.py    the same for more tokens: hidden and its norm, then a plain product
embed_qkv_folded.py  the same for many: the norm folded into the weight
epilogue.py          jitted functions of the projection's columns: norms of heads, turns, stores
embed_grad.py        gradients of both
table_grad.py        the gradient of a table: sums over tokens in a fixed order
distinct.py          each distinct token projected once: find, prepare, project, expand
distinct_grad.py     its gradients
weight_grad.py       that of its weight
expand.py            gather projected rows: the last step of distinct, and the whole of a call by a table
rotary.py            gradients of rotary turns
arguments.py         a Call's parts as the kernels' arguments
tiles.py             jitted functions that kernels share
tuning.py            tile configurations
launch.py            launches with little host time
interpreter.py       the same kernels on CPU tensors
"""
