"""Triton kernels and their launchers: tensors in, tensors out, no nn.Module. Installed as pyembed.kernels.

embed.py        gather + position → hidden
embed_qkv.py    the one-pass kernel: gather, position, norm, QKV projection
embed_grad.py   gradients of both
tiles.py        jitted pieces that they share
tuning.py       tile configurations
interpreter.py  the same kernels on CPU tensors
"""
