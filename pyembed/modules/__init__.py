"""The modules that replace PyTorch's own.

front_end.py    EmbeddingQKV: embeddings, norm and QKV projection
embedding.py    Embedding and TokenPositionEmbedding
parts.py        a front end's modules as a Call
known.py        modules whose forward is known, and what it computes from which weights
trials.py       what a module of another class computes: its forward at random parameters, against formulas
proofs.py       findings, and whether they still hold
keeps_table.py  a front end's table for inference: when it is made, kept and thrown away
"""
