"""The modules that replace PyTorch's own.

front_end.py    EmbeddingQKV: embeddings, norm and QKV projection
embedding.py    Embedding and TokenPositionEmbedding
parts.py        a front end's modules as a Call
known.py        modules whose forward is known, and what it computes from which weights
proofs.py       how a module of another class comes to be known: its forward at random parameters, against formulas
keeps_table.py  a front end's table for inference: when it is made, kept and thrown away
"""
