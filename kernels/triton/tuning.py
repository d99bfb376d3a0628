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
    products: int = 1024  # of 16 bits, summed in fp32, that a multiprocessor multiplies and adds a cycle
    lanes: int = 32  # threads of a warp
    registers: int = 65_536  # of 32 bits, that the threads of a program share

    @property
    def rdna(self):
        """Whether it is one of AMD's with warps of 32, whose threads have 256 registers, half of what the others have."""
        return self.lanes == 32 and not isinstance(self.arch, int)

    @property
    def tma(self):
        """Whether tensor descriptors are read by hardware, and not by pointers with strides known at run time alone."""
        return isinstance(self.arch, int) and self.arch >= 90


# NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (maximum shared memory per thread block,
# 32-bit registers per thread block), multiprocessors of the data sheets. AMD: ROCm, "GPU specifications" (LDS, compute units,
# vector register file); of gfx1100 HIP counts pairs of compute units, which share them (github.com/ROCm/hip/issues/3198).
# products: FLOPs of the data sheets (dense, of 16 bits, summed in fp32) over twice their clocks and multiprocessors.
H100 = Device(90, 132, 232_448, 2048)
DEVICES = {
    80: Device(80, 108, 166_912, 1024),  # A100
    86: Device(86, 82, 101_376, 256),  # RTX 3090
    89: Device(89, 128, 101_376, 256),  # RTX 4090
    90: H100,
    100: Device(100, 148, 232_448, 4096),  # B200
    120: Device(120, 170, 101_376, 256),  # RTX 5090
    "gfx942": Device("gfx942", 304, 65_536, 1024, 64, 131_072),  # MI300X
    "gfx950": Device("gfx950", 256, 163_840, 2048, 64, 131_072),  # MI355X
    "gfx1100": Device("gfx1100", 48, 65_536, 512, 32, 196_608),  # RX 7900 XTX
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
    return described(torch.cuda.get_device_properties(index))


def described(properties):
    """The Device of torch.cuda.get_device_properties(…), whichever it is."""
    arch = properties.gcnArchName.split(":")[0] if torch.version.hip else properties.major * 10 + properties.minor
    # "optin" is what a program may ask for beyond CUDA's 48 KB; HIP has no such thing.
    shared = max(getattr(properties, f"shared_memory_per_block{name}", 0) for name in ("", "_optin")) or 65_536
    lanes, registers = (getattr(properties, name, 0) for name in ("warp_size", "regs_per_multiprocessor"))
    products = DEVICES[arch].products if arch in DEVICES else 1024
    return Device(arch, properties.multi_processor_count, shared, products, lanes or 32, registers or 65_536)


def cdiv(a, b):
    """The quotient rounded up. triton.cdiv does the same, but takes 5 µs."""
    return -(-a // b)


def device_of(tensor):
    """The device to tune for. The interpreter gets the tiles of an H100 with one multiprocessor."""
    return _device(tensor.device.index) if tensor.is_cuda else H100._replace(multiprocessors=1)


def dense(*tensors):
    """The tensors, contiguous; None stays None."""
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]


def precision(dtype, device):
    """input_precision of tl.dot: as torch.backends.cuda.matmul says for fp32; other dtypes have no choice."""
    has_tf32 = isinstance(device.arch, int) or device.arch == "gfx942"  # Triton refuses to compile it for others
    wanted = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if wanted and has_tf32 else "ieee"


def operand(matrix, block, device):
    """A matrix for tiles.load_tile, its rows of unit stride: a descriptor of tiles (rows, columns), which wants rows at
    multiples of 16 bytes, or without TMA, or with block None, the pointer, rows, columns and row stride."""
    rows, columns = matrix.shape
    if device.tma and block is not None:
        return TensorDescriptor(matrix, [rows, columns], [matrix.stride(0), 1], [*block])
    return matrix, rows, columns, matrix.stride(0)


def weight_operand(weight, tiles, device, by_pointers=False):
    """operand() of a projection's weight (N, D), and whether it is weightᵀ, as for the view of a Conv1D's weight.

    A weight that operand() cannot describe is copied. by_pointers: also where there is TMA, for tiles.load_at.
    """
    unit = 16 // weight.element_size()
    transposed = weight.stride(1) != 1 and weight.stride(0) == 1
    matrix = weight.t() if transposed else weight
    if matrix.stride(1) != 1 or device.tma and (matrix.stride(0) % unit or matrix.data_ptr() % 16):
        matrix = padded(matrix, *matrix.shape).copy_(matrix)
    block = (tiles.BLOCK_K, tiles.BLOCK_N) if transposed else (tiles.BLOCK_N, tiles.BLOCK_K)
    return operand(matrix, None if by_pointers else block, device), transposed


INVARIANT = 64  # batch_invariant: tiles for this number of tokens serve any number, so that every sum has one order


def way(M, N, D, dtype, device, kept=False, head=0):
    """Which kernels run for M tokens: "few", one launch; "rows", hidden and its norm, then the product; "folded", the norm
    folded into the weight, then one launch. kept: it was folded before. head: as of embed_qkv_folded.

    "rows" writes M·D elements more, "folded" reads the weight twice and writes it once, 3·N·D, or nothing where it was kept. It
    is for bf16 only: in fp32, rows with a mean far larger than their deviation would lose digits that eager keeps; in fp16,
    the folded weight would underflow where the norm's weight is small.
    """
    most = 32  # AMD would load the norm's weight in pieces of 2 bytes, or spill
    if not isinstance(device.arch, int):
        most = 16 if device.lanes == 64 and dtype.itemsize == 2 and head <= 32 else 0
    many = 1024 if kept else max(1024, 3 * N)
    if dtype == torch.bfloat16 and many < M:
        return "folded"
    return "rows" if most < M or not aligned(dtype, D, N) else "few"


def aligned(dtype, *sizes):
    """Whether rows of these sizes start at multiples of 16 bytes, which wide loads and stores need."""
    return all(size * dtype.itemsize % 16 == 0 for size in sizes)


@functools.lru_cache(256)
def few(M, N, D, dtype, device, crowded=False, head=0, table=None, once=False):
    """Tiles of the kernel that normalises while it loads, for few tokens. crowded, head: as of embed_qkv_folded.

    table: dtype of the tables, which under autocast is not the weight's. once: rows are read once, as in embed_qkv.py.
    """
    deep = 64 if dtype.itemsize == 2 else 16
    stages = 2 if device.shared_memory < 100_000 else 3
    if not aligned(dtype, D, N):
        tiles = Tiles(32, 32, 32 if dtype.itemsize == 2 else 16, 4, 2)
    elif M <= 16 and dtype.itemsize == 2:  # decode: narrow tiles, so that every multiprocessor reads a part of the weight
        warps = 128 // device.lanes // (2 if once and device.lanes == 32 else 1)  # once: squares take registers too
        tiles = Tiles(16, 32, 2 * device.lanes * warps, warps, stages)  # two of the norm's weights a thread, 4 bytes to copy
    else:
        tiles = Tiles(32, 32, deep, 4, stages)
    return fitted(_with_heads(tiles, head, dtype, device), dtype, device, table or dtype)


def _with_heads(tiles, head, dtype, device):
    """Tiles as wide as a head, with fewer rows and a smaller BLOCK_K, so that they fit registers and shared memory."""
    if head <= tiles.BLOCK_N:
        return tiles
    rows, deep = 64 if dtype.itemsize == 2 else 4096 // head, 16384 // (head * dtype.itemsize)
    rows = max(16, rows // 2) if device.rdna else rows
    return Tiles(min(tiles.BLOCK_M, rows), head, min(tiles.BLOCK_K, deep), 8, tiles.num_stages)


@functools.lru_cache(256)
def product(M, N, D, dtype, device, crowded=False, head=0, precision="ieee"):
    """Tiles of a plain product (M, D)·(D, N). crowded, head: as of embed_qkv_folded. precision: of tl.dot.

    Of those that ship, the ones that end first by a model: each wave of programs takes the time of a tile's products (half as
    many a cycle in tf32), or of reading its operands from L2, 32 bytes a cycle, and that of its stores.
    """
    stages = 2 if device.shared_memory < 100_000 else 3
    if not aligned(dtype, N):
        tiles = Tiles(64, 32, 64 // dtype.itemsize, 4, 2)
    elif dtype.itemsize > 2 and precision == "ieee":
        tiles = Tiles(64, 64, 16, 8, stages)
    else:
        if dtype.itemsize > 2:
            choices = [Tiles(128, columns, 32, 8, stages) for columns in (64, 128)[: 1 if crowded else 2]]
        else:
            crowded |= device.arch == 100  # 256 columns of turned heads spill there
            choices = [Tiles(64, 64, 64, 4, stages), Tiles(64, 128, 64, 8, stages), _many(N, D, dtype, device, crowded)]
            if choices[-1].BLOCK_N > 128:
                choices.append(choices[-1]._replace(BLOCK_N=128))

        def time(tiles):
            rows, columns = tiles[:2]
            waves = cdiv(cdiv(M, rows) * cdiv(N, columns), device.multiprocessors)
            step = max(rows * columns / device.products / 2, (rows + columns) / 32) * dtype.itemsize
            return waves * (step * D + rows * columns / 32)

        tiles = min(reversed(choices), key=time)
    return fitted(_with_heads(tiles, head, dtype, device), dtype, device)


def registers(device):
    """Options against spills: by default ptxas spills a few registers to fit one more program on a multiprocessor."""
    return {"maxnreg": 255} if isinstance(device.arch, int) else {}


@functools.lru_cache(256)
def embed_qkv_folded(M, N, D, dtype, device, crowded=False, head=0):
    """Tiles of the kernel that multiplies by the folded weight: many tokens, limited by the tensor cores.

    crowded: the epilogue needs more registers than a bias does. head: width of heads that are normalised, which a tile must
    hold whole; 0: none are.
    """
    tiles = _many(N, D, dtype, device, crowded)
    if head == 128 and isinstance(device.arch, int) and 100 <= device.arch < 120:
        tiles = tiles._replace(BLOCK_K=32)  # 64 spill
    elif 0 < head <= 16 and device.arch == 120:
        tiles = tiles._replace(BLOCK_N=64)  # 128 spill
    return fitted(_with_heads(tiles, head, dtype, device), dtype, device)


def _many(N, D, dtype, device, crowded):
    """The largest tiles of a product that ship."""
    if not aligned(dtype, D, N):
        return Tiles(64, 32, 32, 4, 2)
    if device.arch in (90, 100):
        return Tiles(128, 128 if crowded else 256, 64, 8, 4)
    if device.arch == 80:
        return Tiles(128, 128, 32, 8, 4)
    if device.rdna:
        return Tiles(128, 64, 32, 8, 2)
    return Tiles(128, 128, 64, 8, 2 if device.shared_memory < 100_000 else 3)


@functools.lru_cache(256)
def project(N, K, dtype, device):
    """Tiles of the persistent product over distinct rows; both operands have descriptors."""
    if dtype.itemsize > 2:
        return product(1024, N, K, dtype, device, precision=precision(dtype, device))
    return embed_qkv_folded(1024, N, K, dtype, device, crowded=device.arch == 100)  # 256 columns spill there under Triton 3.8


@functools.lru_cache(256)
def expand(D, N, dtype):
    """BLOCK_M (tokens), BLOCK_N (projected columns) and BLOCK_K (table columns) of expand_kernel: 8 KB in flight."""
    columns = min(1 << max(N - 1, 15).bit_length(), 512)
    return max(1, 8192 // (columns * dtype.itemsize)), columns, min(1 << max(D - 1, 15).bit_length(), 512)


@functools.lru_cache(256)
def weight_grad(N, D, dtype, device):
    """Tiles of the product over distinct rows for the gradient (N, D) of the weight."""
    if dtype.itemsize > 2:
        return fitted(product(1024, D, N, dtype, device, precision=precision(dtype, device)), dtype, device, spare=1)
    tiles = embed_qkv_folded(1024, D, N, dtype, device)
    tiles = tiles._replace(BLOCK_N=min(tiles.BLOCK_N, 128))  # more programs, to fill the device
    return fitted(tiles, dtype, device, spare=1)  # the last, masked rows


@functools.lru_cache(256)
def stream(N, dtype):
    """BLOCK_M (tokens) and BLOCK_N (columns, as many as a warp loads at a time) of distinct_grad.qkv_kernel."""
    return 8, min(1 << max(N - 1, 15).bit_length(), 512 // dtype.itemsize)


def padded(like, rows, columns, dtype=None):
    """An empty matrix (rows, columns), of dtype or like's, whose rows start at multiples of 16 bytes, as descriptors need."""
    dtype = dtype or like.dtype
    unit = 16 // dtype.itemsize
    return like.new_empty(rows, cdiv(columns, unit) * unit, dtype=dtype)[:, :columns]


def fold(weight):
    """Options of the kernels that sum over the columns of a weight (N, D): tiles along the axis of unit stride."""
    rows, columns = (4, 512) if weight.stride(1) == 1 else (16, 256)
    return {"BLOCK_N": rows, "BLOCK_K": columns, "num_warps": 4}


def runs(M, count, tiles, device, resident=1):
    """How many programs share the `count` column tiles of a block of rows, so that the last program ends as early as possible.
    resident: programs that a multiprocessor holds at once.

    Time is counted in column tiles; reading the rows for their statistics costs about half a tile.
    """
    blocks = cdiv(M, tiles.BLOCK_M)

    def makespan(share):
        return cdiv(blocks * share, resident * device.multiprocessors) * (0.5 + cdiv(count, share))

    return min(range(1, count + 1), key=makespan)


def shared_memory(tiles, dtype, device, table=None, spare=0):
    """Bytes of shared memory that a program with these tiles takes at most; tests compare it with the compiled kernels.

    dtype: of the operands. table: of the tables, where the kernel adds and normalises their rows on the way into the product.
    spare: steps whose operands are there besides those of the loop.
    """
    M, N, K, _, stages = tiles
    rows, columns = M * K * dtype.itemsize, N * K * dtype.itemsize
    # Hopper's and Blackwell's matrix units read shared memory while they multiply, and so hold the tiles of one more step; fp32
    # may be rearranged, which takes those of another.
    reads_shared = isinstance(device.arch, int) and 90 <= device.arch < 120
    copies = device.arch == "gfx950"  # into shared memory, padded by up to 4 %, by Triton 3.8: a step more is there
    held = max(stages - 1, 1) + (reads_shared or copies) + (dtype.itemsize > 2)
    if table is None:
        loop = (held + spare) * (rows + columns)
    else:  # the weight's columns; token rows, position rows and the norm's weight and bias; then the normalised rows
        loop = held * columns + (stages - 1) * 2 * (M + 1) * K * table.itemsize + rows
        loop = max(loop, 4 * max(8192, M * K * table.itemsize))  # two steps of token and position rows for their statistics
    loop += loop // 24 * copies
    epilogue = M * N * 4  # the products in fp32, on their way from the matrix units' layout to that of the stores
    return max(loop, epilogue) + 128 * device.tma  # barriers that count what TMA has copied


def is_valid(tiles, dtype, device, table=None, spare=0):
    """Whether tile sizes are powers of two from 16 on, as tl.dot needs, and what shared_memory says is there."""
    sized = all(size & (size - 1) == 0 and size >= 16 for size in tiles[:3])
    return sized and shared_memory(tiles, dtype, device, table, spare) <= device.shared_memory


def fitted(tiles, dtype, device, table=None, spare=0):
    """The tiles; where the device lacks the shared memory for them, with fewer stages, smaller blocks of K, then of rows."""
    while not is_valid(tiles, dtype, device, table, spare):
        M, _, K, _, stages = tiles
        if stages > 3 or stages == 3 and K * dtype.itemsize <= 64:
            tiles = tiles._replace(num_stages=stages - 1)
        elif K > 16:
            tiles = tiles._replace(BLOCK_K=K // 2)
        elif M > 16:
            tiles = tiles._replace(BLOCK_M=M // 2)
        else:
            break
    if device.lanes == 64:  # so that each thread has 16 bytes of an operand to read, if it can be
        operand = min(tiles.BLOCK_M, tiles.BLOCK_N) * tiles.BLOCK_K * dtype.itemsize
        tiles = tiles._replace(num_warps=max(min(4, tiles.num_warps), min(tiles.num_warps, operand // (16 * device.lanes))))
    return tiles


@functools.lru_cache(256)
def streaming(D, dtype):
    """Rows and columns of a tile of a kernel that only streams: 16 KB per program, and up to 1,024 columns."""
    columns = min(1 << max(D - 1, 15).bit_length(), 1024)
    return max(1, 16_384 // (columns * dtype.itemsize)), columns


@functools.lru_cache(256)
def embed_norm(D, dtype):
    """Rows and columns of a tile of embed_norm_kernel: 8 KB, of which it has four at once."""
    rows, columns = streaming(D, dtype)
    return max(1, rows // 2), columns if rows > 1 else columns // 2


@functools.lru_cache(256)
def rows(D, dtype):
    """Rows per step, columns and warps of a kernel that holds whole rows in registers, or parts of rows that are too wide."""
    if D > 4096:
        return max(1, 4 // dtype.itemsize), 1024, 4
    columns = 1 << max(D - 1, 15).bit_length()
    return max(1, 2048 // columns), columns, 4 if columns <= 2048 else 8


@functools.lru_cache(256)
def segment(D):
    """Rows per step and columns of table_grad.segment_kernel and join_kernel."""
    columns = min(1 << max(D - 1, 15).bit_length(), 1024)
    return min(4096 // columns, 8), columns
