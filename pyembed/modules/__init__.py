"""The modules that replace PyTorch's own.

front_end.py    EmbeddingQKV: embeddings, norm and QKV projection
embedding.py    Embedding and TokenPositionEmbedding
parts.py        what a front end reads from the modules that it holds, as a Call
keeps_table.py  a front end's table for inference: when it is made, kept and thrown away
"""
