"""`far_rows.py FOLDER DTYPE IDS_DTYPE`, for test_sizes.py: tables of more elements than int32 counts, without their memory.

They are files with holes, of which only the rows that are written take room. An offset that overflows ends the process, which
may hold neither a copy of such a table nor a dense gradient.
"""

import itertools
import resource
import sys

import torch

import pyembed
from pyembed import functional as F
from pyembed import reference
from pyembed.plans import operators

D = 64
V = 2**31 // D + 100
ROWS = torch.tensor([[V - 1, 3, V // 2], [V - 1, V - 99, V // 2 - 1]])
USED, NEAR = ROWS.unique(return_inverse=True)  # the same rows, and ids, of tables that hold no others


def far_table(path, dtype, rows):
    table = torch.from_file(str(path), shared=True, size=V * D, dtype=dtype).view(V, D)
    table[USED] = rows
    return table


def results(ids, token, weight, position=None, position_ids=None, segment=None, plan="one_pass"):
    """Whatever the functions return, and the gradients of tables that have few rows, by name."""
    named = {"token": token, "weight": weight, "position": position}
    leaves = {k: t.detach().requires_grad_() for k, t in named.items() if t is not None and len(t) < V}
    token, weight, position = (leaves.get(k, t) for k, t in named.items())
    terms = {"position": position, "position_ids": position_ids}
    terms |= {} if segment is None else {"segment": segment, "segment_ids": ids}
    found = {"embedding": F.embedding(ids, token), "embed": F.embed(ids, token, **terms)}
    assert torch.equal(found["embed"], reference.embed(ids, token, **terms))
    distinct = pyembed.DistinctIds(*ids.unique(return_inverse=True))
    with pyembed.plan(plan):
        found |= F.embed_qkv(ids, token, weight, num_heads=2, norm="layer", distinct=distinct, **terms)._asdict()
    reached = [x for x in found.values() if x.requires_grad]
    incoming = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in reached]
    grads = torch.autograd.grad(reached, list(leaves.values()), incoming)
    return found | {f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def main(folder, dtype, ids_dtype):
    resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))  # of a process's own memory: a shared file is none of it
    g = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, D, generator=g).to(dtype) for n in (len(USED), 12))
    few = torch.randn(len(USED), D, generator=g).to(dtype)
    far, places = far_table(f"{folder}/token", dtype, rows), far_table(f"{folder}/position", dtype, few)
    for backend, plan in itertools.product(("torch", "triton"), ("one_pass", "distinct")):
        ids, near = ROWS.to(ids_dtype), NEAR.to(ids_dtype)
        pairs = [
            ((ids, far, weight, few), (near, rows, weight, few)),
            ((near, rows, weight, places, ids), (near, rows, weight, few, near)),
        ]
        if plan == "one_pass":
            pairs.append(((ids, far, weight, None, None, places), (near, rows, weight, None, None, few)))
        with pyembed.backend(backend):
            for beyond, within in pairs:
                ours, theirs = results(*beyond, plan=plan), results(*within, plan=plan)
                assert len(ours) >= 7
                for name, tensor in ours.items():
                    torch.testing.assert_close(tensor, theirs[name], msg=f"{name} by {backend}, {plan}, of {ids_dtype}")
    sums = torch.zeros(len(USED), D, dtype=dtype).index_add_(0, NEAR.reshape(-1), torch.ones(6, D, dtype=dtype))
    module, running = operators.launcher("embed_grad", far)
    grad = far_table(f"{folder}/grad", dtype, torch.zeros_like(rows))
    with running:
        module.table_grad(torch.ones(6, D, dtype=dtype), ROWS.reshape(-1).int(), V, out=grad)
    assert torch.equal(grad[USED], sums)


if __name__ == "__main__":
    main(sys.argv[1], *(getattr(torch, name) for name in sys.argv[2:]))
