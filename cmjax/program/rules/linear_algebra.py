"""Factorizations, solvers and Fourier transforms, by the FLOP counts of the textbooks.

Golub and Van Loan, "Matrix Computations", 4th edition (G&VL): a factorization of a batch of m x n
matrices costs a polynomial of m and n, the leading terms of which are taken. Blocked algorithms
spend nearly all of it in matrix products, on the cube cores; those that reduce a matrix column by
column (eigenvalues, singular values) half in products of a matrix and a vector, which are taken to
run on the vector cores whole.
"""

from cmjax.program.rules.registry import cost_rule
from cmjax.program.size import Size, log2, maximum, minimum, product
from cmjax.program.work import Operand, Work, matmul_flops


@cost_rule("cholesky")
def _cholesky(x: Operand, **_) -> Work:
    """n^3 / 3 (G&VL 4.2)."""
    n = x.shape[-1]
    return _blocked(x, _cube(n) / 3.0)


@cost_rule("cholesky_update")
def _cholesky_update(x: Operand, *_, **__) -> Work:
    """2 n^2: one rotation per column (G&VL 6.5.4)."""
    return _unblocked(x, x.shape[-1] * x.shape[-1] * 2.0)


@cost_rule("lu")
def _lu(x: Operand, **_) -> Work:
    """k^2 (max - k / 3) with k = min(m, n): 2 n^3 / 3 if square (G&VL 3.4)."""
    least, most = _extent(x)
    return _blocked(x, least * least * (most - least / 3.0))


@cost_rule("lu_pivots_to_permutation")
def _lu_pivots(pivots: Operand, *, out, **_) -> Work:
    """Swaps of integers."""
    return Work(vector_bytes=pivots.nbytes + out[0].nbytes)


@cost_rule("geqrf", "geqp3")
def _householder_qr(x: Operand, *_, **__) -> Work:
    """R and the reflectors: 2 k^2 (max - k / 3) with k = min(m, n) (G&VL 5.2)."""
    least, most = _extent(x)
    return _blocked(x, least * least * (most - least / 3.0) * 2.0)


@cost_rule("householder_product")
def _householder_product(x: Operand, *_, **__) -> Work:
    """The first columns of Q from its reflectors: as many FLOP again (G&VL 5.1.6)."""
    least, most = _extent(x)
    return _blocked(x, least * least * (most - least / 3.0) * 2.0)


@cost_rule("qr")
def _qr(x: Operand, *, full_matrices: bool, **_) -> Work:
    """R, and Q from its reflectors: 4 k^2 (max - k / 3); a square Q of tall matrices
    4 (m^2 n - m n^2 + n^3 / 3) + 2 n^2 (m - n / 3) (G&VL 5.2)."""
    m, n = x.shape[-2:]
    least, most = _extent(x)
    r = least * least * (most - least / 3.0) * 2.0
    if full_matrices and m != n:
        return _blocked(x, r + (m * m * least - m * least * least + _cube(least) / 3.0) * 4.0)
    return _blocked(x, r * 2.0)


@cost_rule("svd")
def _svd(x: Operand, *, compute_uv: bool, full_matrices: bool, **_) -> Work:
    """With m >= n: values 4 m n^2 - 4 n^3 / 3; vectors 14 m n^2 + 8 n^3, and with all of U
    4 m^2 n + 8 m n^2 + 9 n^3 (G&VL 8.6.3, Golub-Reinsch)."""
    n, m = _extent(x)
    if not compute_uv:
        return _unblocked(x, m * n * n * 4.0 - _cube(n) * (4.0 / 3.0))
    if full_matrices:
        return _unblocked(x, m * m * n * 4.0 + m * n * n * 8.0 + _cube(n) * 9.0)
    return _unblocked(x, m * n * n * 14.0 + _cube(n) * 8.0)


@cost_rule("eigh")
def _eigh(x: Operand, **_) -> Work:
    """Symmetric QR with vectors: 9 n^3 (G&VL 8.3)."""
    return _unblocked(x, _cube(x.shape[-1]) * 9.0)


@cost_rule("eig")
def _eig(x: Operand, *, compute_left_eigenvectors, compute_right_eigenvectors, **_) -> Work:
    """QR algorithm: 10 n^3 for values, 25 n^3 with vectors (G&VL 7.5)."""
    vectors = compute_left_eigenvectors or compute_right_eigenvectors
    return _unblocked(x, _cube(x.shape[-1]) * (25.0 if vectors else 10.0))


@cost_rule("schur")
def _schur(x: Operand, *, compute_schur_vectors: bool, **_) -> Work:
    """As the eigenvalues: 25 n^3 with vectors, else 10 n^3 (G&VL 7.5)."""
    return _unblocked(x, _cube(x.shape[-1]) * (25.0 if compute_schur_vectors else 10.0))


@cost_rule("hessenberg")
def _hessenberg(x: Operand, **_) -> Work:
    """10 n^3 / 3 (G&VL 7.4)."""
    return _unblocked(x, _cube(x.shape[-1]) * (10.0 / 3.0))


@cost_rule("tridiagonal")
def _tridiagonal(x: Operand, **_) -> Work:
    """4 n^3 / 3 (G&VL 8.3)."""
    return _unblocked(x, _cube(x.shape[-1]) * (4.0 / 3.0))


@cost_rule("tridiagonal_solve")
def _tridiagonal_solve(lower: Operand, *operands: Operand, **_) -> Work:
    """8 FLOP per unknown: elimination of one diagonal, and back (G&VL 4.3)."""
    return _on_vector_cores(operands[-1], operands[-1].size * 8.0)


@cost_rule("triangular_solve")
def _triangular_solve(a: Operand, b: Operand, **_) -> Work:
    """n^2 per right-hand side (G&VL 3.1)."""
    return _on_cube_cores(b, b.size * a.shape[-1])


@cost_rule("fft")
def _fft(x: Operand, *, out, fft_lengths, **_) -> Work:
    """5 N log2 N per complex transform of N = product of lengths, half of it if one side is real.

    (Cooley and Tukey 1965; the count by which FFTW and the HPC challenge report speeds.) Vector
    cores do it; every axis is a pass over HBM.
    """
    is_real = not (x.is_complex and out[0].is_complex)
    time = out[0] if x.is_complex else x  # the side with all N points
    flops = time.size * log2(product(fft_lengths)) * (2.5 if is_real else 5.0)
    again = float(len(fft_lengths) - 1)
    return Work(
        vector_bytes=flops * (time.itemsize / (1.0 if is_real else 2.0)),
        flops=flops,
        read_bytes=x.nbytes + out[0].nbytes * again,
        write_bytes=out[0].nbytes * (again + 1.0),
    )


def _extent(x: Operand) -> tuple[Size, Size]:
    """The shorter and the longer side of the matrices."""
    m, n = x.shape[-2:]
    return minimum(m, n), maximum(m, n)


def _cube(n: Size) -> Size:
    return n * n * n


def _blocked(x: Operand, flops_each: Size) -> Work:
    return _on_cube_cores(x, product(x.shape[:-2]) * flops_each)


def _unblocked(x: Operand, flops_each: Size) -> Work:
    return _on_vector_cores(x, product(x.shape[:-2]) * flops_each)


def _on_cube_cores(x: Operand, flops: Size) -> Work:
    flops = flops * (4.0 if x.is_complex else 1.0)
    return Work(flops=flops, **matmul_flops(x.dtype, flops))


def _on_vector_cores(x: Operand, flops: Size) -> Work:
    """A vector instruction multiplies and adds: two FLOP per number."""
    flops = flops * (4.0 if x.is_complex else 1.0)
    width = x.itemsize / (2.0 if x.is_complex else 1.0)
    return Work(flops=flops, vector_bytes=flops * (width / 2.0))
