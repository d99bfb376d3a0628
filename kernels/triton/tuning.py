"""Tile configurations: pure functions of shape, dtype and device. Tests compile every one of them ahead of time.

Nothing is searched or measured at run time. is_valid states what a configuration may be.
"""

import functools
from typing import NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor


class Device(NamedTuple):
    """What a configuration depends on. arch: compute capability times ten on CUDA, "gfx942" and the like on HIP."""

    arch: int | str
    multiprocessors: int
    shared_memory: int  # bytes a program may use


H100 = Device(90, 132, 232_448)
DEVICES = {
    80: Device(80, 108, 166_912),
    90: H100,
    100: Device(100, 148, 232_448),
    "gfx942": Device("gfx942", 304, 65_536),
}


class Tiles(NamedTuple):
    """One configuration of a matrix kernel, as Triton's launch takes it."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


@functools.cache
def _device(index):
    properties = torch.cuda.get_device_properties(index)
    arch = properties.gcnArchName.split(":")[0] if torch.version.hip else properties.major * 10 + properties.minor
    return Device(arch, properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 65_536))


def cdiv(a, b):
    """The quotient rounded up. triton.cdiv does the same, but takes 5 µs."""
    return -(-a // b)


def device_of(tensor):
    """The device to tune for. The interpreter gets the tiles of an H100 with one multiprocessor."""
    return _device(tensor.device.index) if tensor.is_cuda else H100._replace(multiprocessors=1)


def dense(*tensors):
    """The tensors, contiguous; None stays None."""
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]


def precision(dtype):
    """input_precision of tl.dot: as torch.backends.cuda.matmul says for fp32; other dtypes have no choice."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def weight_descriptor(weight, tiles):
    """A TMA descriptor of a projection's weight (N, D), and whether it describes weightᵀ, as for the view of a Conv1D's weight.

    A weight whose rows a descriptor cannot describe is copied.
    """
    unit = 16 // weight.element_size()  # rows of a descriptor start at multiples of 16 bytes
    transposed = weight.stride(1) != 1 and weight.stride(0) == 1
    matrix = weight.t() if transposed else weight
    if matrix.stride(1) != 1 or matrix.stride(0) % unit or matrix.data_ptr() % 16:
        matrix = padded(matrix, *matrix.shape).copy_(matrix)
    block = [tiles.BLOCK_K, tiles.BLOCK_N] if transposed else [tiles.BLOCK_N, tiles.BLOCK_K]
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block), transposed


INVARIANT = 64  # batch_invariant: tiles for this number of tokens serve any number, so that every sum has one order


def folds(M, dtype):
    """Whether to fold the norm into the weight, which is faster from about 1,024 tokens on.

    In bf16 only: in fp32, rows with a mean far larger than their deviation would lose digits that eager keeps; in fp16, the
    folded weight would underflow where the norm's weight is small.
    """
    return M >= 1024 and dtype == torch.bfloat16


def _aligned(dtype, *sizes):
    """Whether rows of these sizes start at multiples of 16 bytes, which wide loads and stores need."""
    return all(size * dtype.itemsize % 16 == 0 for size in sizes)


@functools.lru_cache(256)
def embed_qkv(M, N, D, dtype, device, crowded=False, head=0):
    """Tiles of the kernel that normalises while it loads: few tokens, or no norm. crowded, head: as of embed_qkv_folded."""
    return _with_heads(_embed_qkv(M, N, D, dtype, device), head, dtype)


def _with_heads(tiles, head, dtype):
    """Tiles as wide as a head, with fewer rows and a smaller BLOCK_K, so that they fit registers and shared memory."""
    if head <= tiles.BLOCK_N:
        return tiles
    rows, deep = 64 if dtype.itemsize == 2 else 4096 // head, 16384 // (head * dtype.itemsize)
    return Tiles(min(tiles.BLOCK_M, rows), head, min(tiles.BLOCK_K, deep), 8, tiles.num_stages)


def _embed_qkv(M, N, D, dtype, device):
    deep = 64 if dtype.itemsize == 2 else 16
    stages = 2 if device.shared_memory < 100_000 else 3
    if not _aligned(dtype, D, N):
        return Tiles(32, 32, 32 if dtype.itemsize == 2 else 16, 4, 2)
    if M <= 32:  # decode: narrow tiles, so that every multiprocessor reads a part of the weight
        return Tiles(16, 32, 2 * deep, 4, stages) if M <= 16 and dtype.itemsize == 2 else Tiles(32, 32, deep, 4, stages)
    if M <= 256 or dtype.itemsize > 2:
        return Tiles(64, 64, deep, 8, stages)
    return Tiles(64, 128, deep, 8, stages)


def registers(device):
    """Options against spills: by default ptxas spills a few registers to fit one more program on a multiprocessor."""
    return {"maxnreg": 255} if isinstance(device.arch, int) else {}


@functools.lru_cache(256)
def embed_qkv_folded(M, N, D, dtype, device, crowded=False, head=0):
    """Tiles of the kernel that multiplies by the folded weight: many tokens, limited by the tensor cores.

    crowded: the epilogue needs more registers than a bias does. head: width of heads that are normalised, which a tile must
    hold whole; 0: none are.
    """
    tiles = _embed_qkv_folded(N, D, dtype, device, crowded)
    if head == 128 and device.arch == 100:
        tiles = tiles._replace(BLOCK_K=32)  # 64 spill
    return _with_heads(tiles, head, dtype)


def _embed_qkv_folded(N, D, dtype, device, crowded):
    if not _aligned(dtype, D, N):
        return Tiles(64, 32, 32, 4, 2)
    if device.arch == 90:
        return Tiles(128, 128 if crowded else 256, 64, 8, 4)
    if device.arch == 80:
        return Tiles(128, 128, 32, 8, 4)
    return Tiles(128, 128, 64, 8, 2 if device.shared_memory < 100_000 else 3)


@functools.lru_cache(256)
def project(N, K, dtype, device):
    """Tiles of the persistent product over distinct rows; both operands have descriptors."""
    if dtype.itemsize > 2:
        return embed_qkv(1024, N, K, dtype, device)
    return embed_qkv_folded(1024, N, K, dtype, device)


@functools.lru_cache(256)
def expand(D, N, dtype):
    """BLOCK_M (tokens), BLOCK_N (projected columns) and BLOCK_K (table columns) of expand_kernel: 8 KB in flight."""
    columns = min(1 << max(N - 1, 15).bit_length(), 512)
    return max(1, 8192 // (columns * dtype.itemsize)), columns, min(1 << max(D - 1, 15).bit_length(), 512)


@functools.lru_cache(256)
def weight_grad(N, D, dtype, device):
    """Tiles of the product over distinct rows for the gradient (N, D) of the weight."""
    if dtype.itemsize > 2:
        return embed_qkv(1024, D, N, dtype, device)
    tiles = embed_qkv_folded(1024, D, N, dtype, device)
    return tiles._replace(BLOCK_N=min(tiles.BLOCK_N, 128))  # more programs, to fill the device


@functools.lru_cache(256)
def stream(N):
    """BLOCK_M (tokens) and BLOCK_N (columns) of distinct_grad.qkv_kernel."""
    return 4, min(1 << max(N - 1, 15).bit_length(), 512)


def padded(like, rows, columns):
    """An empty matrix (rows, columns) whose rows start at multiples of 16 bytes, as descriptors need."""
    unit = 16 // like.element_size()
    return like.new_empty(rows, cdiv(columns, unit) * unit)[:, :columns]


FOLD = {"BLOCK_N": 16, "BLOCK_K": 128, "num_warps": 4}


def runs(M, count, tiles, device):
    """How many programs share the `count` column tiles of a block of rows, so that the last program ends as early as possible.

    Time is counted in column tiles; reading the rows for their statistics costs about half a tile.
    """
    blocks = cdiv(M, tiles.BLOCK_M)

    def makespan(share):
        return cdiv(blocks * share, device.multiprocessors) * (0.5 + cdiv(count, share))

    return min(range(1, count + 1), key=makespan)


def is_valid(tiles, dtype, device):
    """Whether tile sizes are powers of two from 16 on, as tl.dot needs, and the tiles of all stages fit shared memory."""
    stage = (tiles.BLOCK_M + tiles.BLOCK_N) * tiles.BLOCK_K * dtype.itemsize
    return all(size & (size - 1) == 0 and size >= 16 for size in tiles[:3]) and tiles.num_stages * stage <= device.shared_memory


@functools.lru_cache(256)
def streaming(D, dtype):
    """Rows and columns of a tile of a kernel that only streams: 16 KB per program, and up to 1,024 columns."""
    columns = min(1 << max(D - 1, 15).bit_length(), 1024)
    return max(1, 16_384 // (columns * dtype.itemsize)), columns


@functools.lru_cache(256)
def rows(D):
    """Rows per step, columns and warps of a kernel that holds whole rows in registers."""
    columns = 1 << max(D - 1, 15).bit_length()
    return max(1, 2048 // columns), columns, 4 if columns <= 2048 else 8 if columns <= 4096 else 16


@functools.lru_cache(256)
def segment(D):
    """Rows per step and columns of embed_grad.segment_kernel and join_kernel."""
    return 8, min(1 << max(D - 1, 15).bit_length(), 512)
